"""This module makes tables and plots from the rows of `scripts/benchmark_recall.py`."""

import json
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import torch

import moc
from evaluation.benchmarks.measurements import markdown_table, measured_on, write_figure
from moc import MoCConfig
from moc.config import DropKey
from moc.cost import attention_cost
from moc.files import write_whole

TITLES = {
    "dense": "dense",
    "dense_causal": "all earlier shots, by routing",
    "moc_progressive": "MoC, progressive",
    "moc": "MoC",
    "moc_no_drops": "MoC, no drops",
    "moc_no_drops_all_text": "MoC, no drops, all text anchored",
    "moc_all_text": "MoC, all text anchored",
    "moc_no_own_shot": "MoC, own shot not anchored",
    "moc_no_text": "MoC, no text anchored",
    "moc_not_causal": "MoC, not causal",
    "moc_not_causal_of_four": "MoC, not causal, four routes",
    "moc_dense_target": "MoC, dense velocity as half of the target",
    "moc_pre_rope": "MoC, routed before RoPE",
    "moc_lse": "MoC, log-sum-exp of three means a chunk",
    "moc_lse_of_frames": "MoC, chunks of a frame, log-sum-exp of four means",
    "moc_of_half_frames": "MoC, chunks of half a frame",
    "moc_of_frames": "MoC, chunks of a frame",
    "first_frame": "first frame of every shot",
    "random": "random routes",
    "own_shot": "own shot only",
}
MAIN = ("dense", "moc", "moc_progressive", "moc_dense_target", "first_frame", "random", "own_shot")
SIGMAS = ("0.8", "0.95")
COMPARED = 6  # kinds of rows with the same start and number of steps; as many or more get a plot of their own
# What attention sees of a scene of experiment=recall, whose captions all have as many tokens.
SHOTS, GLOBAL_TEXT = [moc.Shot(text_tokens=15, grid=(2, 4, 6))] * 8, 35
LAYERS, HEADS, HEAD_DIM = 6, 6, 32


def write_report(rows: list[dict], output: Path) -> None:
    """Writes `output` with .md and .png in the place of .json, and plots of what else the rows tell beside it."""
    import matplotlib

    matplotlib.use("Agg")
    rows = sorted(
        (row for row in rows if "all" in row),
        key=lambda row: (list(TITLES).index(row["row"]), row["steps"], row["seed"]),
    )
    if not rows:
        return
    write_whole(output.with_suffix(".md"), tables(rows).encode())
    draw(rows, output.with_suffix(".png"))
    compared = _compared(rows)
    if compared:
        draw_compared(compared, output.with_name(f"{output.stem}_rows.png"))
    if any("mass" in row for row in rows):
        draw_routing(rows, output.with_name(f"{output.stem}_routing.png"))


def tables(rows: list[dict]) -> str:
    """Returns the record as a Markdown page."""
    reader = min(row["reader"][look] for row in rows for look in ("fur", "outfit"))
    sections = [
        "# Recall, row beside row\n\n"
        f"{measured_on(row['machine'] for row in rows)} Made by scripts/benchmark_recall.py. "
        "Recall is the share of looks (fur and outfit, six colours each: chance 0.167) "
        "that reappear right in a last shot sampled after a true history; the reader tells true shots to "
        f"{reader:.3f} at least. Intervals hold 95 %. Differences to dense, and to MoC, are to the row of the same "
        "seed that began with the same weights: that of as many steps or, where there is none, of the most.",
        "## Seeds together: mean, least and greatest\n\n" + _over_seeds(rows),
        "## Recall, and loss of the last shot\n\n" + _main(rows),
        "## Recall by distance in shots\n\n" + _by_distance(rows),
        "## Beside look-alikes\n\n" + _look_alikes(rows),
        *(["## With other numbers of shots than in training\n\n" + _other_shots(rows)]
          if any("shots" in row for row in rows) else []),
        "## Retrieval: where the returning character routes to\n\n" + _retrieval(rows),
        *(f"## {_title(row)}, with its attention swapped\n\n" + _swapped(row)
          for row in rows if "swapped" in row),
        "## Commands\n\n" + "\n".join(f"- {_title(row)}: `{row['command']}`" for row in rows),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _title(row: dict) -> str:
    done = "" if row["steps_done"] == row["steps"] else f" (stopped at {row['steps_done']:,})"
    return f"{TITLES[row['row']]}, seed {row['seed']}{_start(row)}, {row['steps']:,} steps{done}"


def _start(row: dict) -> str:
    return f", from {row['start']}" if row.get("start") else ""


def _main(rows: list[dict]) -> str:
    head = ["row", "recall", "minus dense", "minus MoC", "sparsity of video pairs", "fur", "outfit",
            "wrong, but of the scene", *(f"loss, sigma {s}" for s in SIGMAS),
            *(f"of the character, sigma {s}" for s in SIGMAS), "scenes seen", "minutes"]  # fmt: skip
    lines = []
    for row in rows:
        found = row["all"]
        low, high = found["interval"]
        differences = [_minus(row, rows, kind) for kind in ("dense", "moc")]
        losses = [
            f"{found[name][s][0]:.4f} ± {found[name][s][1]:.4f}" for name in ("loss", "region_loss") for s in SIGMAS
        ]
        lines.append([
            _title(row), f"{found['recall']:.3f} ({low:.3f} to {high:.3f})",
            *("{:+.3f} ± {:.3f}".format(*difference) if difference else "" for difference in differences),
            f"{found['sparsity']:.1%}", *_wrong(found), *losses, row["scenes_seen"], f"{row['train_minutes']:.1f}",
        ])  # fmt: skip
    return markdown_table(head, lines)


def _wrong(found: dict) -> list[str]:
    """Returns how often fur and outfit are right, and how often an answer is another character's; nothing of a row
    whose record was lost but for what was printed."""
    if "by_attribute" not in found:
        return [""] * 3
    return [f"{share:.3f}" for share in (*(found["by_attribute"][look] for look in ("fur", "outfit")), found["copied"])]


def _seeds(rows: list[dict]) -> dict[str, list[dict]]:
    """Returns the rows that differ by their seed alone, or by where time ended them, under one name."""
    together: dict[str, list[dict]] = {}
    for row in rows:
        together.setdefault(f"{TITLES[row['row']]}{_start(row)}, {row['steps']:,} steps", []).append(row)
    return {f"{name}, {len(members)} seeds" if len(members) > 1 else name: members
            for name, members in together.items()}  # fmt: skip


def _over_seeds(rows: list[dict]) -> str:
    """Returns a table of the mean over seeds, with the least and the greatest."""
    head = ["attention", "steps", "seeds", "recall", "minus dense", "GFLOPs of attention, of a scene",
            *(f"loss, sigma {s}" for s in SIGMAS),
            *(f"{what} to dense's, sigma {s}" for what in ("loss", "of the character") for s in SIGMAS)]  # fmt: skip
    lines = []
    for members in _seeds(rows).values():
        recalls = [row["all"]["recall"] for row in members]
        differences = [found[0] for row in members if (found := _minus(row, rows, "dense"))]
        losses = [np.mean([row["all"]["loss"][s][0] for row in members]) for s in SIGMAS]
        ratios = [
            [excess for row in members if (excess := loss_to_dense(row, rows, name, s))]
            for name in ("loss", "region_loss") for s in SIGMAS
        ]  # fmt: skip
        lines.append([
            f"{TITLES[members[0]['row']]}{_start(members[0])}", f"{members[0]['steps']:,}",
            ", ".join(str(row["seed"]) for row in members), _spread(recalls, ".3f"), _spread(differences, "+.3f"),
            f"{attention_flops(members[0]) / 1e9:.2f}", *(f"{loss:.5f}" for loss in losses),
            *(f"{of[0][0]:+.1%} ± {of[0][1]:.1%}" if len(of) == 1 and of[0][1] else
              _spread([excess for excess, _ in of], "+.1%") for of in ratios),
        ])  # fmt: skip
    return markdown_table(head, lines)


def _spread(values: list[float], form: str) -> str:
    if len(values) < 2:
        return "".join(f"{value:{form}}" for value in values)
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def rival(row: dict, rows: list[dict], kind: str = "dense") -> dict | None:
    """Returns the dense row, or that of another kind, of the same seed that began with the same weights: that of as
    many steps or, where there is none, of the most."""
    alike = [r for r in rows if r["row"] == kind and all(r.get(name) == row.get(name) for name in ("seed", "start"))]
    alike.sort(key=lambda r: (r["steps"] == row["steps"], r["steps"]))
    return alike[-1] if alike and alike[-1] is not row else None


def _minus(row: dict, rows: list[dict], kind: str) -> tuple[float, float] | None:
    """Returns the difference over the same scenes to the rival of a kind, and half of its 95 % interval; None where
    there is no rival that was tested on them."""
    other = rival(row, rows, kind)
    if other is None or len(other["all"].get("right", "")) != len(row["all"].get("right", "")):
        return None
    difference = (_right(row) - _right(other)).mean(1)
    half = 1.96 * difference.std() / len(difference) ** 0.5
    return difference.mean(), half


def loss_to_dense(row: dict, rows: list[dict], name: str, sigma: str) -> tuple[float, float | None] | None:
    """Returns by what share a loss exceeds the dense rival's, and half of its 95 % interval over blocks of the same
    scenes with the same noise, which older rows do not tell; None where there is no rival."""
    dense = rival(row, rows)
    if dense is None:
        return None
    excess = row["all"][name][sigma][0] / dense["all"][name][sigma][0] - 1
    blocks = [np.array(r["all"].get(f"{name}_of_blocks", {}).get(sigma, [])) for r in (row, dense)]
    if not len(blocks[0]) or len(blocks[0]) != len(blocks[1]):
        return excess, None
    difference = blocks[0] - blocks[1]
    return excess, 1.96 * difference.std() / len(difference) ** 0.5 / blocks[1].mean()


def attention_flops(row: dict) -> float:
    """Returns the FLOPs of attention in a forward of one scene, with those of its routing."""
    known = {f.name for f in fields(MoCConfig)}  # older rows have further settings, which changed no result
    return _flops(json.dumps({name: value for name, value in row["moc"].items() if name in known}))


@cache
def _flops(settings: str) -> float:
    config = MoCConfig.from_dict(json.loads(settings))
    layout = moc.ShotLayout.build(shots=SHOTS, global_text_tokens=GLOBAL_TEXT, chunk_tokens=config.chunk_tokens)
    q, k = torch.randn(2, layout.num_tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    drops = None if config.top_k else DropKey(0, 0)  # with top_k=0 all routes are random, in tests too
    routes = None if config.dense else moc.route(q, k, layout, config, drops)
    return LAYERS * attention_cost(layout, config, routes, HEADS, HEAD_DIM).flops


def _compared(rows: list[dict]) -> list[dict]:
    """Returns the rows of the start and number of steps that most kinds share; none where they are few."""
    sets: dict[tuple, list[dict]] = {}
    for row in rows:
        sets.setdefault((row.get("start"), row["steps"]), []).append(row)
    most = max(sets.values(), key=lambda members: len({row["row"] for row in members}))
    return most if len({row["row"] for row in most}) >= COMPARED else []


def _right(row: dict) -> np.ndarray:
    """Returns whether each look of each scene is right, float [B, 2]."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["all"]["right"]), np.uint8))
    return bits[: row["all"]["readings"]].reshape(-1, 2).astype(float)


def _by_distance(rows: list[dict]) -> str:
    rows = [row for row in rows if "by_distance" in row["all"]]
    distances = list(rows[0]["all"]["by_distance"])
    lines = []
    for row in rows:
        cells = [row["all"]["by_distance"][d] for d in distances]
        lines.append([_title(row), *(f"{share:.3f} ({low:.3f} to {high:.3f})" for share, low, high, _ in cells)])
    return markdown_table(["row", *distances], lines)


def _look_alikes(rows: list[dict]) -> str:
    lines = []
    for row in (row for row in rows if "look_alikes" in row):
        found = row["look_alikes"]
        low, high = found["interval"]
        lines.append([_title(row), f"{found['recall']:.3f} ({low:.3f} to {high:.3f})", f"{found['copied']:.3f}"])
    return markdown_table(["row", "recall", "wrong, but of the scene"], lines)


def _other_shots(rows: list[dict]) -> str:
    tested = [(row, shots, found) for row in rows for shots, found in row.get("shots", {}).items()]
    lines = [[_title(row), shots, f"{found['sparsity']:.1%}", *_recall_and_loss(found)] for row, shots, found in tested]
    return markdown_table(["row", "shots", "sparsity of video pairs", "recall", "character's loss, 0.95"], lines)


def _retrieval(rows: list[dict]) -> str:
    head = ["row", "layer", "heads: routes that lead to the shot which shows it", "tokens with such a route",
            "dense mass on other shots", "of that on its routes", "on the best as many"]  # fmt: skip
    lines = []
    for row in (row for row in rows if "mass" in row):
        precision, reached, mass = row["all"].get("precision"), row["all"].get("reached"), row["mass"]
        for layer in range(len(mass["kept"])):
            cells = [table[layer] if table else [] for table in (precision, reached)]
            cells += [mass[name][layer] for name in ("elsewhere", "kept", "best")]
            lines.append([_title(row), layer + 1, *(" ".join(f"{x:.2f}" for x in cell) for cell in cells)])
    return markdown_table(head, lines)


def _swapped(row: dict) -> str:
    lines = [["dense", "0.0%", *_recall_and_loss(row["all"])]]
    lines += [[_chunks(found), f"{found['sparsity']:.1%}", *_recall_and_loss(found)] for found in row["swapped"]]
    return markdown_table(["routed chunks", "sparsity of video pairs", "recall", "character's loss, 0.95"], lines)


def _chunks(swap: dict) -> str:
    subchunks = swap.get("descriptor_subchunks", 1)
    by = f", scored by {subchunks} means" if subchunks > 1 else ""
    return f"{swap['top_k']} of {swap['chunk_tokens']} tokens{by}"


def _recall_and_loss(found: dict) -> list[str]:
    low, high = found["interval"]
    loss, half = found["region_loss"]["0.95"]
    return [f"{found['recall']:.3f} ({low:.3f} to {high:.3f})", f"{loss:.4f} ± {half:.4f}"]


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
    for label, members in _seeds(drawn).items():
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
    """Returns of each kind, start and seed the row of the most steps."""
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
    left.set(xlabel=f"looks recalled, after {rows[0]['steps']:,} steps{_start(rows[0])}")
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
        right.scatter(np.ravel(mass["elsewhere"]), np.ravel(mass["kept"]), s=14, color=f"C{number}", label=_title(row))
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
