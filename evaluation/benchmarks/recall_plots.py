"""This module draws the rows of a recall record."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from evaluation.benchmarks.measurements import write_figure
from evaluation.benchmarks.recall_rows import TITLES, attention_flops, loss_to_dense, start_of

MAIN = (
    "dense", "moc", "moc_lse", "moc_lse_not_causal_of_four", "moc_progressive", "moc_dense_target", "first_frame",
    "random", "own_shot",
)  # fmt: skip
NEAR = 0.94  # the least recall that the close-up shows
STYLES, MARKERS = ("-", "--", ":", "-."), "os^D"  # by what a row began with
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}  # where a legend hides no mark


def draw(rows: list[dict], path: Path) -> None:
    """Draws recall against distance, whole and close up, and the character's loss against the FLOPs of attention.

    A kind of attention has one colour. Its line is the mean over seeds, each of which has marks of its own. Of each
    start, the rows of the most steps are drawn; what began with other weights than most is dashed, and its marks are
    empty."""
    import matplotlib.pyplot as plt

    figure, (whole, near, right) = plt.subplots(1, 3, figsize=(14, 5), layout="constrained")
    told = [row for row in rows if "by_distance" in row["all"]]
    drawn = _longest([row for row in told if row["row"] in MAIN] or told)
    kinds, starts = list(dict.fromkeys(row["row"] for row in drawn)), _starts(drawn)
    for kind, start in dict.fromkeys((row["row"], row.get("start")) for row in drawn):
        members = [row for row in drawn if (row["row"], row.get("start")) == (kind, start)]
        color = f"C{kinds.index(kind)}"
        look = {"color": color, "markerfacecolor": color if start == starts[0] else "white"}
        seeds = f", {len(members)} seeds" if len(members) > 1 else ""
        style = STYLES[starts.index(start) % len(STYLES)]
        _by_distance(whole, members, style, look, label=f"{_label(members[0])}{seeds}")
        _by_distance(near, members, style, look, bars=True, shift=0.07 * kinds.index(kind))
        for row in members:
            loss, half = row["all"]["region_loss"]["0.95"]
            right.errorbar(attention_flops(row) / 1e9, loss, half, marker="o", **look)
    whole.axhline(1 / 6, color="grey", linestyle=":", linewidth=1)
    whole.annotate("chance", (1, 1 / 6 + 0.015), fontsize=8, color="grey")
    whole.set(xlabel="shots since the name was shown", ylabel="looks recalled", ylim=(0, 1.02))
    near.set(xlabel="shots since the name was shown", ylim=(NEAR, 1), title="close up, with intervals of each seed")
    right.set(xlabel="GFLOPs of attention and its routing, of a scene", ylabel="loss of the character, sigma 0.95")
    right.set_xlim(left=0)
    figure.legend(*whole.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    write_figure(figure, path)
    plt.close(figure)


def _by_distance(
    axes: Axes, members: list[dict], style: str, look: dict, label: str = "", bars: bool = False, shift: float = 0.0
) -> None:
    """Draws the recall of rows that differ by their seed: a line through their mean, and a mark for each, with bars for
    its interval where asked. shift: moves all to the right, so that bars of several kinds are seen apart."""
    distances = np.array([int(distance) for distance in members[0]["all"]["by_distance"]])
    found = np.array([list(row["all"]["by_distance"].values()) for row in members])  # [seeds, distances, 4]
    shares, lows, highs = found[..., 0], found[..., 1], found[..., 2]
    axes.plot(distances + shift, shares.mean(0), style, label=label, color=look["color"])
    for share, low, high in zip(shares, lows, highs, strict=True):
        if bars:
            axes.vlines(distances + shift, low, high, color=look["color"], alpha=0.25)
        axes.plot(distances + shift, share, "o", markersize=4, **look)


def _label(row: dict) -> str:
    """Returns the attention of a row, and what it began with."""
    return f"{TITLES[row['row']]}{start_of(row) or ' from scratch'}"


def _starts(rows: list[dict]) -> list[str | None]:
    """Returns what rows began with, that of most rows first."""
    starts = [row.get("start") for row in rows]
    return sorted(dict.fromkeys(starts), key=starts.count, reverse=True)


def _longest(rows: list[dict]) -> list[dict]:
    """Returns the row of the most steps of each kind, start and seed."""
    best: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        best[row["row"], row.get("start"), row["seed"]] = row
    return [row for row in rows if any(row is kept for kept in best.values())]


def draw_compared(rows: list[dict], path: Path) -> None:
    """Draws the recall of rows that began alike and took as many steps, and their loss to dense's; a mark a seed."""
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["row"] for row in rows))[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.3 * len(kinds)), sharey=True, layout="constrained")
    for row in rows:
        y, color = kinds.index(row["row"]) + 0.15 * row["seed"], f"C{row['seed']}"
        recall, (low, high) = row["all"]["recall"], row["all"]["interval"]
        left.errorbar(recall, y, xerr=[[recall - low], [high - recall]], marker="o", markersize=4, color=color)
        excess = loss_to_dense(row, rows, "loss", "0.8")
        if excess:
            right.errorbar(100 * excess[0], y, xerr=100 * excess[1], marker="o", markersize=4, color=color)
    left.set_yticks(range(len(kinds)), [TITLES[kind] for kind in kinds], fontsize=8)
    left.set(xlabel=f"looks recalled, after {rows[0]['steps']:,} steps{start_of(rows[0])}")
    right.axvline(0, color="grey", linewidth=1)
    right.axvline(0.5, color="grey", linestyle=":", linewidth=1)
    right.set(xlabel="loss of the last shot above dense's, %, sigma 0.8", xscale="symlog", xlim=(-1, 150))
    right.set_xticks([-0.5, 0, 0.5, 1, 2, 5, 10, 50, 100], ["-0.5", "0", "0.5", "1", "2", "5", "10", "50", "100"])
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
    write_figure(figure, path)
    plt.close(figure)


def draw_routing(rows: list[dict], path: Path) -> None:
    """Draws what the head that remembers does over the training of MoC, and of every head how much of dense attention's
    mass on other shots MoC's routes keep."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    whole = [row for row in rows if "mass" in row]
    moc_rows = [row for row in whole if row["row"] == "moc"]
    starts = _starts(moc_rows)
    _over_training(left, moc_rows, starts)
    routes = {row["mass_routes"] for row in moc_rows}
    alike = [row for row in whole if row["row"] in ("moc", "dense") and row["mass_routes"] in routes]
    _of_every_head(right, [row for row in _longest(alike) if row.get("start") in starts])
    write_figure(figure, path)
    plt.close(figure)


def _over_training(axes: Axes, rows: list[dict], starts: list[str | None]) -> None:
    """Draws the remembering head of MoC's rows by step. A course has points of its own; else a row has its last step.
    A start has a mark of its own."""
    names = (
        "its routes that lead to the shot which shows the name",
        "its mass on other shots, were it dense",
        "the share of that mass on its routes",
    )
    for row in rows:
        points = remembering(row)
        steps, *values = zip(*points, strict=True) if points else [()] * 4
        marker = MARKERS[starts.index(row.get("start")) % len(MARKERS)]
        for number, shares in enumerate(values):
            axes.plot(steps, shares, marker, linestyle="-", markersize=5, color=f"C{number}")
    handles = [Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(names)]
    for row in {row.get("start"): row for row in rows}.values():
        marker = MARKERS[starts.index(row.get("start")) % len(MARKERS)]
        handles.append(Line2D([], [], color="black", marker=marker, linestyle="", label=_label(row)))
    axes.legend(handles=handles, fontsize=8, **BELOW)
    axes.set(xlabel="steps of MoC; joined marks are one run", xlim=(0, None), ylim=(0, 1.02),
             title="the head with the most mass on other shots at the end")  # fmt: skip


def _of_every_head(axes: Axes, rows: list[dict]) -> None:
    """Draws the mass of every head of rows on other shots, and the share of it that routes keep."""
    kinds = list(dict.fromkeys((row["row"], row.get("start")) for row in rows))
    seen = set()
    for row in rows:
        kind, mass = (row["row"], row.get("start")), row["mass"]
        label = None if kind in seen else _label(row)
        seen.add(kind)
        axes.scatter(np.ravel(mass["elsewhere"]), np.ravel(mass["kept"]), s=16, alpha=0.7,
                     color=f"C{kinds.index(kind)}", label=label)  # fmt: skip
    axes.set(xlabel="dense attention's mass on other shots", ylim=(0, 1.02), xlim=(0, 1),
             ylabel=f"the share of it on {rows[0]['mass_routes'] if rows else 'the routes'}",
             title="every head, of every seed")  # fmt: skip
    if rows:
        axes.legend(fontsize=8, **BELOW)


def remembering(row: dict) -> list[tuple[int, float, float, float]]:
    """Returns (step, precision of its routes, mass on other shots, share of that on its routes) over a row's course, or
    at its end, of the head with the most mass on other shots at the end; without what has no routes."""
    points = row.get("course") or [{"step": row["steps_done"], "mass": row["mass"], **row["all"]}]
    head = np.argmax(row["mass"]["elsewhere"])
    return [
        (point["step"], *(float(np.ravel(table)[head]) for table in (
            point["precision"], point["mass"]["elsewhere"], point["mass"]["kept"])))
        for point in points if point.get("precision")
    ]  # fmt: skip
