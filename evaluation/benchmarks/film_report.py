"""This module makes tables and a plot from the rows of `scripts/benchmark_film.py`."""

from collections.abc import Callable
from pathlib import Path
from textwrap import fill

import torch
from matplotlib.figure import Figure  # not pyplot, which may ask for a display
from torch import Tensor

from evaluation.benchmarks.measurements import markdown_table, measured_on, write_figure
from evaluation.estimates import Estimate, estimate
from moc.files import write_whole

TITLES = {
    "dense": "dense",
    "moc": "MoC from scratch",
    "own_shot": "own shot only",
}
HISTORY = 7  # the number of shots before the target
AGES: dict[str, Callable[[int | None], bool]] = {
    "1 shot ago": lambda age: age == 1,
    "2 shots ago": lambda age: age == 2,
    f"3 to {HISTORY} shots ago": lambda age: age is not None and 3 <= age <= HISTORY,
    "before its history, or never": lambda age: age is not None and (age > HISTORY or age < 0),
    "it shows nobody": lambda age: age is None,
}


def write_report(rows: list[dict], output: Path) -> None:
    """Writes `output` with .md and .png in the place of .json."""
    rows = [row for row in rows if "losses" in row]
    if rows:
        write_whole(output.with_suffix(".md"), tables(rows).encode())
        draw(_cases(rows), output.with_suffix(".png"))


def tables(rows: list[dict]) -> str:
    """Returns the report of rows, the folds of one kind of attention, seed and number of steps taken together."""
    cases = _cases(rows)
    return "\n\n".join([
        "# Big Buck Bunny: what a shot's history is worth\n\n"
        f"{measured_on(row['machine'] for row in rows)} Made by scripts/benchmark_film.py. "
        "The target is a held-out shot at fixed noise; up to seven shots before it are "
        "given true and clean. Intervals hold 95 % and are taken over shots, as if these were independent, which "
        "neighbours in a film are not.",
        "## Loss of the held-out shots\n\n" + _losses(cases),
        *(f"## What the history is worth, sigma {sigma:g}\n\nThe share by which it lowers the loss of the shot alone, "
          "by when the character of the shot that was unseen for longest was last seen; beside it by how much more "
          "than the history of a shot elsewhere.\n\n" + _worth(cases, sigma) for sigma in rows[0]["sigmas"]),
        "## Held-out loss during training\n\nWith sigma 0.8 on all shots of 24 scenes.\n\n" + _course(cases),
        "## Commands\n\n" + "\n".join(f"- {_title(row)}, fold {row['fold']}: `{row['command']}`" for row in rows),
    ]) + "\n"  # fmt: skip


def _cases(rows: list[dict]) -> list[list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (list(TITLES).index(row["row"]), row["seed"], row["steps"], row["fold"])):
        found.setdefault((row["row"], row["seed"], row["steps"]), []).append(row)
    return list(found.values())


def _title(row: dict) -> str:
    done = "" if row["steps_done"] == row["steps"] else f", stopped at step {row['steps_done']}"
    return f"{TITLES[row['row']]}, seed {row['seed']}, {row['steps']} steps{done}"


def _of(case: list[dict], kind: str, sigma: float) -> Tensor:
    """Returns losses of all folds' targets, float [targets, draws]."""
    at = case[0]["sigmas"].index(sigma)
    return torch.cat([torch.tensor(row["losses"][kind])[:, :, at] for row in case])


def _losses(cases: list[list[dict]]) -> str:
    sigmas = cases[0][0]["sigmas"]
    names = {"alone": "alone", "history": "after its history", "other": "after another's"}
    losses = [f"{names[kind]}, sigma {sigma:g}" for sigma in sigmas for kind in names]
    compared = ("alone", "history")
    minus = [f"{names[kind]}, minus dense, sigma {sigma:g}" for sigma in sigmas for kind in compared]
    head = ["row", "sparsity of all pairs", "shots", *losses, *minus, "minutes"]
    lines = []
    for case in cases:
        cells = [estimate(_of(case, kind, sigma)) for sigma in sigmas for kind in names]
        minutes = sum(row["train_minutes"] for row in case)
        sparsity = sum(row["sparsity"] for row in case) / len(case)
        differences = [_minus_dense(case, cases, kind, sigma) for sigma in sigmas for kind in compared]
        lines.append([_title(case[0]), f"{sparsity:.0%}", cells[0].count, *cells, *differences, f"{minutes:.1f}"])
    return markdown_table(head, lines)


def _minus_dense(case: list[dict], cases: list[list[dict]], kind: str, sigma: float) -> str:
    """Returns how much higher a kind of loss is than dense attention's on the same shots."""
    same = [{key: row[key] for key in ("fold", "seed", "steps")} for row in case]
    for other in cases:
        matches = [{key: row[key] for key in ("fold", "seed", "steps")} for row in other] == same
        if other[0]["row"] == "dense" and other is not case and matches:
            dense = _of(other, kind, sigma)
            found = estimate(100 * (_of(case, kind, sigma) - dense) / dense.mean())
            return f"{found.shown(2, '+')} %"
    return ""


def _worth(cases: list[list[dict]], sigma: float) -> str:
    head = ["row", "all", "all, another's history", "more than another's"]
    head += [age for name in AGES for age in (name, "more than another's")]
    lines = []
    for case in cases:
        alone, history, other = (_of(case, kind, sigma) for kind in ("alone", "history", "other"))
        ages = [target["farthest"] for row in case for target in row["targets"]]
        cells: list[object] = [
            _share(alone, history, alone),
            _share(alone, other, alone),
            _share(other, history, alone),
        ]
        for is_of_it in AGES.values():
            of = torch.tensor([is_of_it(age) for age in ages])
            cells += [_share(seen[of], history[of], alone[of]) for seen in (alone, other)]
        lines.append([_title(case[0]), *cells])
    return markdown_table(head, lines)


def _share(before: Tensor, after: Tensor, alone: Tensor) -> str:
    found = _lowered(before, after, alone)
    return f"{found.shown(1, '+')} % ({found.count})" if found else ""


def _lowered(before: Tensor, after: Tensor, alone: Tensor) -> Estimate | None:
    """Says how far one loss lies under another, in percent of the loss alone, with its error; None without a shot."""
    return estimate(100 * (before - after) / alone.mean()) if len(alone) else None


def _course(cases: list[list[dict]]) -> str:
    """Returns the loss of validation, averaged over folds, by step."""
    courses = []
    for case in cases:
        by_step: dict[int, list[float]] = {}
        for row in case:
            for step, loss in row["validation"]:
                by_step.setdefault(step, []).append(loss)
        courses.append(
            {step: sum(losses) / len(losses) for step, losses in by_step.items() if len(losses) == len(case)}
        )
    steps = sorted(set().union(*courses))
    lines: list[list[object]] = [
        [_title(case[0]), *(f"{course[step]:.4f}" if step in course else "" for step in steps)]
        for case, course in zip(cases, courses, strict=True)
    ]
    return markdown_table(["row", *(f"step {step}" for step in steps)], lines)


def draw(cases: list[list[dict]], path: Path) -> None:
    """Draws how much more a shot's history is worth than that of a shot elsewhere, by when the characters were last
    seen, at each noise level."""
    sigmas = cases[0][0]["sigmas"]
    figure = Figure(figsize=(4.6 * len(sigmas), 4.2), layout="constrained")
    axes = figure.subplots(1, len(sigmas), squeeze=False)[0]
    for axis, sigma in zip(axes, sigmas, strict=True):
        for number, case in enumerate(cases):
            ages = [target["farthest"] for row in case for target in row["targets"]]
            alone, history, other = (_of(case, kind, sigma) for kind in ("alone", "history", "other"))
            points = []
            for column, is_of_it in enumerate(AGES.values()):
                of = torch.tensor([is_of_it(age) for age in ages])
                found = _lowered(other[of], history[of], alone[of])
                aside = 0.6 * ((number + 0.5) / len(cases) - 0.5)  # so that no interval hides another
                points += [(column + aside, found.mean, found.scenes)] if found else []
            axis.errorbar(*zip(*points, strict=True), marker="o", markersize=4, linestyle="", label=_title(case[0]))
        axis.axhline(0, color="grey", linewidth=1)
        axis.set_xticks(range(len(AGES)), [fill(name, 12) for name in AGES], fontsize=7)
        axis.set(title=f"sigma {sigma:g}", ylabel="worth more than another's history, %")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=len(cases), loc="outside lower center")
    write_figure(figure, path)
