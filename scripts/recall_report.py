"""Makes tables and plots from the rows of `benchmark_recall.py`."""

from collections import Counter
from pathlib import Path

import numpy as np

from moc.files import write_whole
from scripts.measuring import markdown_table
from scripts.rows import measured_on, write_figure

TITLES = {
    "dense": "dense",
    "dense_causal": "all earlier shots, by routing",
    "moc_progressive": "MoC, progressive",
    "moc": "MoC",
    "moc_no_drops": "MoC, no drops",
    "moc_all_text": "MoC, all text anchored",
    "moc_no_own_shot": "MoC, own shot not anchored",
    "moc_no_text": "MoC, no text anchored",
    "moc_not_causal": "MoC, not causal",
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
SIGMAS = ("0.8", "0.95")
STYLES = ("-", "--", ":", "-.")


def write_report(rows: list[dict], output: Path) -> None:
    """Writes `output` with .md and .png in the place of .json."""
    import matplotlib

    matplotlib.use("Agg")
    rows = sorted((row for row in rows if "all" in row), key=lambda row: (list(TITLES).index(row["row"]), row["seed"]))
    if rows:
        write_whole(output.with_suffix(".md"), tables(rows).encode())
        draw(rows, output.with_suffix(".png"))


def tables(rows: list[dict]) -> str:
    reader = rows[0]["reader"]
    sections = [
        "# Recall, row beside row\n\n"
        f"{measured_on(row['machine'] for row in rows)} Made by scripts/benchmark_recall.py. "
        "Recall is the share of looks (fur and outfit, six colours each: chance 0.167) "
        "that reappear right in a last shot sampled after a true history; the reader tells true shots to "
        f"{min(reader['fur'], reader['outfit']):.3f} at least. Intervals hold 95 %.",
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
    done = "" if row["steps_done"] == row["steps"] else f" (stopped at step {row['steps_done']})"
    return f"{TITLES[row['row']]}, seed {row['seed']}{_start(row)}{done}"


def _start(row: dict) -> str:
    return f", from {row['start']}" if row.get("start") else ""


def _main(rows: list[dict]) -> str:
    head = ["row", "recall", "minus dense", "sparsity of video pairs", "fur", "outfit", "wrong, but of the scene",
            *(f"loss, sigma {s}" for s in SIGMAS), *(f"of the character, sigma {s}" for s in SIGMAS),
            "scenes seen", "minutes"]  # fmt: skip
    lines = []
    for row in rows:
        found = row["all"]
        low, high = found["interval"]
        difference = _minus_dense(row, rows)
        losses = [
            f"{found[name][s][0]:.4f} ± {found[name][s][1]:.4f}" for name in ("loss", "region_loss") for s in SIGMAS
        ]
        lines.append([
            _title(row), f"{found['recall']:.3f} ({low:.3f} to {high:.3f})",
            "{:+.3f} ± {:.3f}".format(*difference) if difference else "",
            f"{found['sparsity']:.1%}", *(f"{found['by_attribute'][name]:.3f}" for name in ("fur", "outfit")),
            f"{found['copied']:.3f}", *losses, row["scenes_seen"], f"{row['train_minutes']:.1f}",
        ])  # fmt: skip
    return markdown_table(head, lines)


def _seeds(rows: list[dict]) -> dict[str, list[dict]]:
    """Returns the rows that differ by their seed alone, or by where time ended them, under one name."""
    together: dict[str, list[dict]] = {}
    for row in rows:
        together.setdefault(f"{TITLES[row['row']]}{_start(row)}", []).append(row)
    return {f"{name}, {len(members)} seeds" if len(members) > 1 else name: members
            for name, members in together.items()}  # fmt: skip


def _over_seeds(rows: list[dict]) -> str:
    """Returns a table of the mean over seeds, with the least and the greatest."""
    head = ["attention", "seeds", "recall", "minus dense", *(f"loss, sigma {s}" for s in SIGMAS)]
    lines = []
    for members in _seeds(rows).values():
        recalls = [row["all"]["recall"] for row in members]
        differences = [found[0] for row in members if (found := _minus_dense(row, rows))]
        losses = [np.mean([row["all"]["loss"][s][0] for row in members]) for s in SIGMAS]
        lines.append([
            f"{TITLES[members[0]['row']]}{_start(members[0])}", ", ".join(str(row["seed"]) for row in members),
            _spread(recalls, ".3f"), _spread(differences, "+.3f"), *(f"{loss:.5f}" for loss in losses),
        ])  # fmt: skip
    return markdown_table(head, lines)


def _spread(values: list[float], form: str) -> str:
    if len(values) < 2:
        return "".join(f"{value:{form}}" for value in values)
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _minus_dense(row: dict, rows: list[dict]) -> tuple[float, float] | None:
    """Returns the difference over the same scenes to dense attention of the same seed that began with the same
    weights, and half of its 95 % interval; None where there is no such row."""
    alike = [r for r in rows if all(r.get(name) == row.get(name) for name in ("seed", "start"))]
    rivals = [r for r in alike if r["row"] == "dense" and r is not row]
    if not rivals or len(rivals[0]["all"]["right"]) != len(row["all"]["right"]):
        return None
    difference = (_right(row) - _right(rivals[0])).mean(1)
    half = 1.96 * difference.std() / len(difference) ** 0.5
    return difference.mean(), half


def _right(row: dict) -> np.ndarray:
    """Returns whether each look of each scene is right, float [B, 2]."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["all"]["right"]), np.uint8))
    return bits[: row["all"]["readings"]].reshape(-1, 2).astype(float)


def _by_distance(rows: list[dict]) -> str:
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
    for row in rows:
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
    parts = swap.get("descriptor_parts", 1)
    return f"{swap['top_k']} of {swap['chunk_tokens']} tokens" + (f", scored by {parts} means" if parts > 1 else "")


def _recall_and_loss(found: dict) -> list[str]:
    low, high = found["interval"]
    loss, half = found["region_loss"]["0.95"]
    return [f"{found['recall']:.3f} ({low:.3f} to {high:.3f})", f"{loss:.4f} ± {half:.4f}"]


def draw(rows: list[dict], path: Path) -> None:
    """Draws recall against distance, and the character's loss against the pairs attended to.

    A kind of attention has one colour, and a line for each seed. Where a row began tells the style of its line: where
    most did it is solid, and its mark is full."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    kinds = list(dict.fromkeys(row["row"] for row in rows))
    starts = [start for start, _ in Counter(row.get("start") for row in rows).most_common()]
    for label, members in _seeds(rows).items():
        start = starts.index(members[0].get("start"))
        color, style = f"C{kinds.index(members[0]['row'])}", STYLES[start % len(STYLES)]
        for number, row in enumerate(members):
            found = row["all"]
            distances = [int(d) for d in found["by_distance"]]
            shares, lows, highs, _ = np.array(list(found["by_distance"].values())).T
            left.plot(distances, shares, style, marker="o", markersize=3, color=color,
                      label=None if number else label)  # fmt: skip
            left.fill_between(distances, lows, highs, color=color, alpha=0.1)
            loss, half = found["region_loss"]["0.95"]
            face = "none" if start else color
            right.errorbar(100 * (1 - found["sparsity"]), loss, half, marker="o", color=color, markerfacecolor=face)
    left.axhline(1 / 6, color="grey", linestyle=":", linewidth=1)
    left.set(xlabel="shots since the name was shown", ylabel="looks recalled", ylim=(0, 1.02))
    right.set(xlabel="pairs of video tokens attended to, % of dense", ylabel="loss of the character, sigma 0.95")
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    write_figure(figure, path)
    plt.close(figure)
