"""This module draws the rows of a recall record."""

from pathlib import Path

import numpy as np

from evaluation.benchmarks.measurements import write_figure
from evaluation.benchmarks.recall_rows import TITLES, attention_flops, by_seeds, loss_to_dense, start_of, title

MAIN = ("dense", "moc", "moc_progressive", "moc_dense_target", "first_frame", "random", "own_shot")


def draw(rows: list[dict], path: Path) -> None:
    """Draws recall against distance, and the character's loss against the FLOPs of attention.

    A kind of attention has one colour, and a line for each seed. Of each start, the rows of the most steps are drawn;
    what began with other weights than most is dashed, and its mark empty."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    whole = [row for row in rows if "by_distance" in row["all"]]
    drawn = _longest([row for row in whole if row["row"] in MAIN] or whole)
    kinds = list(dict.fromkeys(row["row"] for row in drawn))
    starts = [row.get("start") for row in drawn]
    usual = max(starts, key=starts.count)
    for label, members in by_seeds(drawn).items():
        as_most = members[0].get("start") == usual
        color, style = f"C{kinds.index(members[0]['row'])}", "-" if as_most else "--"
        for number, row in enumerate(members):
            found = row["all"]
            distances = [int(d) for d in found["by_distance"]]
            shares, lows, highs, _ = np.array(list(found["by_distance"].values())).T
            left.plot(distances, shares, style, marker="o", markersize=3, color=color,
                      label=None if number else label)  # fmt: skip
            left.fill_between(distances, lows, highs, color=color, alpha=0.1)
            loss, half = found["region_loss"]["0.95"]
            face = color if as_most else "none"
            right.errorbar(attention_flops(row) / 1e9, loss, half, marker="o", color=color, markerfacecolor=face)
    left.axhline(1 / 6, color="grey", linestyle=":", linewidth=1)
    left.set(xlabel="shots since the name was shown", ylabel="looks recalled", ylim=(0, 1.02))
    right.set(xlabel="FLOPs of attention with routing, of a scene, 1e9", ylabel="loss of the character, sigma 0.95")
    right.set_xlim(left=0)
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    write_figure(figure, path)
    plt.close(figure)


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
            right.errorbar(100 * excess[0], y, xerr=100 * (excess[1] or 0), marker="o", markersize=4, color=color)
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
    mass on other shots its routes keep. A course has points of its own; else a row has its last step."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}  # so that no legend hides a mark
    whole = [row for row in rows if "mass" in row]
    starts = list(dict.fromkeys(row.get("start") for row in whole if row["row"] == "moc"))
    for row in (row for row in whole if row["row"] == "moc"):
        points = remembering(row)
        told = {
            "its routes that lead to the shot which shows the name": [point[1] for point in points],
            "its mass on other shots, were it dense": [point[2] for point in points],
            "the share of that on its routes": [point[3] for point in points],
        }
        marker = "os^D"[starts.index(row.get("start")) % 4]
        for number, (name, values) in enumerate(told.items()):
            left.plot([point[0] for point in points], values, marker, linestyle="-", markersize=5,
                      color=f"C{number}", label=name)  # fmt: skip
    if starts:
        handles = dict(zip(*left.get_legend_handles_labels()[::-1], strict=True))
        left.legend(handles.values(), handles.keys(), fontsize=8, **below)
    left.set(
        xlabel="steps of MoC; joined marks are one run",
        xlim=(0, None),
        ylim=(0, 1.02),
        title="the head with the most mass on other shots at the end",
    )
    alike = [row for row in whole if row["row"] in ("moc", "dense") and row.get("start") in starts]
    for number, row in enumerate(_longest(alike)):
        mass = row["mass"]
        right.scatter(np.ravel(mass["elsewhere"]), np.ravel(mass["kept"]), s=14, color=f"C{number}", label=title(row))
    right.set(xlabel="dense attention's mass on other shots", ylabel="the share of it on the routes", ylim=(0, 1.02),
              xscale="log", title="every head")  # fmt: skip
    if alike:
        right.legend(fontsize=7, **below)
    write_figure(figure, path)
    plt.close(figure)


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
