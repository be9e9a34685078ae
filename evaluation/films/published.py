"""This module sets the paper's numbers beside ours: the six of VBench, which VBench itself measures, in an environment
of its own.

Source: Mixture of Contexts for Long Video Generation, arXiv 2508.21058, its tables of multi-shot and single-shot video.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moc.errors import UserError

SIX = {
    "subject_consistency": "subject consistency",
    "background_consistency": "background consistency",
    "motion_smoothness": "motion smoothness",
    "dynamic_degree": "dynamic degree",
    "aesthetic_quality": "aesthetic quality",
    "imaging_quality": "imaging quality",
}
PAPER = {
    "paper: multi-shot LCT, dense": (0.9378, 0.9526, 0.9859, 0.4583, 0.5436, 0.5140),
    "paper: multi-shot MoC, 85 % sparse": (0.9421, 0.9535, 0.9920, 0.5625, 0.5454, 0.5003),
    "paper: single-shot base, dense": (0.9380, 0.9623, 0.9816, 0.6875, 0.5200, 0.6345),
    "paper: single-shot MoC, 83 % sparse": (0.9398, 0.9670, 0.9851, 0.7500, 0.5547, 0.6396),
}
NOT_COMPARABLE = (
    "The paper's rows are a model of 3 B parameters at 480p (single shots at 320x192) on prompts that are not public, "
    "measured by VBench for each shot. VBench's numbers of films of other prompts, sizes and lengths say how those "
    "films are, not whose model is better. Consistency rises when motion dies, so never read it without the dynamic "
    "degree. Colour histograms, optical flow and drift, as told here, are in no row of the paper."
)


def vbench_command(films: Sequence[Path]) -> str:
    """Returns the command that measures the six of the shots of films, for an environment with vbench and its weights;
    the results come to lie in each film's folder, as `vbench`."""
    folders = shlex.join(str(film) for film in films)
    return (
        f"for film in {folders}; do for dimension in {' '.join(SIX)}; do vbench evaluate --dimension $dimension "
        '--videos_path "$film/shots" --mode=custom_input --output_path "$film/vbench"; done; done'
    )


def read_vbench(path: str | Path) -> dict[str, float]:
    """Returns what VBench wrote in an *_eval_results.json, or in all under a folder: the mean of each of the six that
    is there.

    Raises UserError where there is no such file, or none of the six in it.
    """
    path = Path(path)
    files = sorted(path.rglob("*eval_results.json")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"vbench={path} is no result of VBench: name an *_eval_results.json, or the folder of some")
    found: dict[str, list[float]] = {}
    for file in files:
        try:
            record: Any = json.loads(file.read_text(encoding="utf-8"))
            for name in SIX.keys() & record.keys():
                value = record[name]
                found.setdefault(name, []).append(float(value[0] if isinstance(value, list) else value))
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{file} is not what VBench writes, {{dimension: [value, ...]}}: {error}") from None
    if not found:
        raise UserError(f"vbench={path} holds none of {', '.join(SIX)}")
    return {name: sum(values) / len(values) for name, values in found.items()}


def beside_the_paper(films: dict[str, dict[str, float]]) -> list[list[str]]:
    """Returns rows for a table: the paper's, then those of our films, with "not measured" where VBench was not run."""
    rows = [[name, *(f"{value:.4f}" for value in values)] for name, values in PAPER.items()]
    for name, values in films.items():
        rows.append([name, *(f"{values[key]:.4f}" if key in values else "not measured" for key in SIX)])
    return rows
