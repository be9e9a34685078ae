"""This module makes tables and plots from the rows of `scripts/benchmark_recall.py`."""

import math
from pathlib import Path

import numpy as np

from evaluation.benchmarks.measurements import markdown_table, measured_on
from evaluation.benchmarks.recall_plots import draw, draw_compared, draw_routing
from evaluation.benchmarks.recall_rows import (
    TITLES,
    attention_flops,
    by_seeds,
    difference_to,
    learning_rate,
    loss_to_dense,
    start_of,
    title,
)
from moc.files import write_whole

SIGMAS = ("0.8", "0.95")
COMPARED = 6  # kinds of rows with the same start and number of steps; as many or more get a plot of their own

RETRIEVAL = (
    "A cell has a number for each head of a layer. `routes` are those of which the mass is told: a row's own or, where "
    "its attention is dense or chooses no route by score, those that untrained MoC would choose.\n\n"
)


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
    compared = _compared(rows)
    # Rows that stand side by side are short and have a plot of their own.
    draw([row for row in rows if row not in compared] or rows, output.with_suffix(".png"))
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
        f"{reader:.3f} at least. Intervals hold 95 %, over scenes; those of swapped attention and of rows whose single "
        "readings were lost take the two looks of a scene for independent, and may be a fifth too narrow. Where no "
        "learning rate stands, it is that of experiment=recall. Differences to dense, and to MoC, are to the row of "
        "the same seed that began with the same weights: that of as many steps or, where there is none, of the most.",
        "## Seeds together: mean, least and greatest\n\n" + _over_seeds(rows),
        "## Recall, and loss of the last shot\n\n" + _main(rows),
        "## Recall by distance in shots\n\n" + _by_distance(rows),
        "## Beside look-alikes\n\n" + _look_alikes(rows),
        *(["## With other numbers of shots than in training\n\n" + _other_shots(rows)]
          if any("shots" in row for row in rows) else []),
        "## Retrieval: where the returning character routes to\n\n" + _retrieval(rows),
        *(f"## {title(row)}, with its attention swapped\n\n" + _swapped(row)
          for row in rows if "swapped" in row),
        "## Commands\n\n" + "\n".join(f"- {title(row)}: `{row['command']}`" for row in rows),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _over_seeds(rows: list[dict]) -> str:
    """Returns a table of the mean over seeds, with the least and the greatest."""
    head = ["attention", "steps", "learning rate", "seeds", "recall", "minus dense", "GFLOPs of attention, of a scene",
            *(f"loss, sigma {s}" for s in SIGMAS),
            *(f"{what} to dense's, sigma {s}" for what in ("loss", "of the character") for s in SIGMAS)]  # fmt: skip
    lines = []
    for members in by_seeds(rows):
        recalls = [row["all"]["recall"] for row in members]
        differences = [found[0] for row in members if (found := difference_to(row, rows, "dense"))]
        losses = [np.mean([row["all"]["loss"][s][0] for row in members]) for s in SIGMAS]
        ratios = [
            [excess for row in members if (excess := loss_to_dense(row, rows, name, s))]
            for name in ("loss", "region_loss") for s in SIGMAS
        ]  # fmt: skip
        lines.append([
            f"{TITLES[members[0]['row']]}{start_of(members[0])}", f"{members[0]['steps']:,}",
            learning_rate(members[0]), ", ".join(str(row["seed"]) for row in members), _spread(recalls, ".3f"),
            _spread(differences, "+.3f"), f"{attention_flops(members[0]) / 1e9:.2f}",
            *(f"{loss:.5f}" for loss in losses),
            *(_with_half(*of[0], "+.1%") if len(of) == 1 else _spread([excess for excess, _ in of], "+.1%")
              for of in ratios),
        ])  # fmt: skip
    return markdown_table(head, lines)


def _spread(values: list[float], form: str) -> str:
    if len(values) < 2:
        return "".join(f"{value:{form}}" for value in values)
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _with_half(mean: float, half: float, form: str) -> str:
    """Returns a mean with half of its interval, where it has one."""
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" ± {half:{form.lstrip('+')}}")


def _main(rows: list[dict]) -> str:
    head = ["row", "learning rate", "recall", "minus dense", "minus MoC", "sparsity of video pairs", "fur", "outfit",
            "wrong, but of the scene", *(f"loss, sigma {s}" for s in SIGMAS),
            *(f"of the character, sigma {s}" for s in SIGMAS), "scenes seen", "minutes"]  # fmt: skip
    lines = []
    for row in rows:
        found = row["all"]
        low, high = found["interval"]
        differences = [difference_to(row, rows, kind) for kind in ("dense", "moc")]
        losses = [
            f"{found[name][s][0]:.4f} ± {found[name][s][1]:.4f}" for name in ("loss", "region_loss") for s in SIGMAS
        ]
        lines.append([
            title(row), learning_rate(row), f"{found['recall']:.3f} ({low:.3f} to {high:.3f})",
            *(_with_half(*difference, "+.3f") if difference else "" for difference in differences),
            f"{found['sparsity']:.1%}", *_wrong(found), *losses, row["scenes_seen"], f"{row['train_minutes']:.1f}",
        ])  # fmt: skip
    return markdown_table(head, lines)


def _wrong(found: dict) -> list[str]:
    """Returns how often fur and outfit are right, and how often an answer is another character's; nothing of a row
    whose record was lost but for what was printed."""
    if "by_attribute" not in found:
        return [""] * 3
    return [f"{share:.3f}" for share in (*(found["by_attribute"][look] for look in ("fur", "outfit")), found["copied"])]


def _by_distance(rows: list[dict]) -> str:
    rows = [row for row in rows if "by_distance" in row["all"]]
    distances = list(rows[0]["all"]["by_distance"])
    lines = []
    for row in rows:
        cells = [row["all"]["by_distance"][d] for d in distances]
        lines.append([title(row), *(f"{share:.3f} ({low:.3f} to {high:.3f})" for share, low, high, _ in cells)])
    return markdown_table(["row", *distances], lines)


def _look_alikes(rows: list[dict]) -> str:
    lines = []
    for row in (row for row in rows if "look_alikes" in row):
        found = row["look_alikes"]
        low, high = found["interval"]
        lines.append([title(row), f"{found['recall']:.3f} ({low:.3f} to {high:.3f})", f"{found['copied']:.3f}"])
    return markdown_table(["row", "recall", "wrong, but of the scene"], lines)


def _other_shots(rows: list[dict]) -> str:
    tested = [(row, shots, found) for row in rows for shots, found in row.get("shots", {}).items()]
    lines = [[title(row), shots, f"{found['sparsity']:.1%}", *_recall_and_loss(found)] for row, shots, found in tested]
    return markdown_table(["row", "shots", "sparsity of video pairs", "recall", "character's loss, 0.95"], lines)


def _retrieval(rows: list[dict]) -> str:
    head = ["row", "layer", "heads: routes that lead to the shot which shows it", "tokens with such a route",
            "dense mass on other shots", "routes", "of that mass on these", "on the best as many"]  # fmt: skip
    lines = []
    for row in (row for row in rows if "mass" in row):
        precision, reached, mass = row["all"].get("precision"), row["all"].get("reached"), row["mass"]
        for layer in range(len(mass["kept"])):
            tables = precision, reached, mass["elsewhere"], mass["kept"], mass["best"]
            cells = [" ".join(f"{x:.2f}" for x in table[layer]) if table else "" for table in tables]
            lines.append([title(row), layer + 1, *cells[:3], row["mass_routes"], *cells[3:]])
    return RETRIEVAL + markdown_table(head, lines)


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


def _compared(rows: list[dict]) -> list[dict]:
    """Returns the rows of the start and number of steps that most kinds share; none where they are few."""
    sets: dict[tuple, list[dict]] = {}
    for row in rows:
        sets.setdefault((row.get("start"), row["steps"]), []).append(row)
    most = max(sets.values(), key=lambda members: len({row["row"] for row in members}))
    return most if len({row["row"] for row in most}) >= COMPARED else []
