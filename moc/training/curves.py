"""This module draws a run's curves, for those who have no tracker."""

import logging
from io import BytesIO
from pathlib import Path
from typing import Any

from moc.files import write_whole

# The title of each panel maps to what the names of its curves begin with.
PANELS = {
    "loss": ("loss", "grad_norm"),
    "held-out loss": ("validation/",),
    "loss by noise level": ("loss/noise_",),
    "loss by shot": ("loss/shot_", "loss/source_"),
    "share of dense attention's pairs; MFU": ("density", "mfu"),
    "routes, by shots back": ("routes/",),
}
_LOGARITHMIC = ("loss", "held-out loss", "loss by noise level", "loss by shot")

logger = logging.getLogger(__name__)


def draw_curves(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Draws rows of `metrics.jsonl` into curves.png, where matplotlib is installed. A picture that fails costs no more
    than itself: a warning."""
    try:
        from matplotlib.figure import Figure  # pyplot may ask for a display
    except ImportError:
        return
    figure = Figure(figsize=(15, 8))
    figure.subplots_adjust(0.04, 0.06, 0.99, 0.95, wspace=0.15, hspace=0.25)
    for axis, (title, beginnings) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for name, (steps, values) in _curves(rows, beginnings).items():
            axis.plot(steps, values, ".-" if len(steps) < 50 else "-", linewidth=1, markersize=3, label=name)
        axis.set_title(title, size=10)
        axis.set_xlabel("step", size=8)
        axis.tick_params(labelsize=8)
        if title in _LOGARITHMIC:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        if axis.lines:
            axis.legend(fontsize=6)
    png = BytesIO()
    try:
        figure.savefig(png, format="png", dpi=90)
        write_whole(folder / "curves.png", png.getvalue())
    except (OSError, ValueError) as error:
        logger.warning("%s is left out (%s)", folder / "curves.png", error)


def _curves(rows: list[dict[str, Any]], beginnings: tuple[str, ...]) -> dict[str, tuple[list[int], list[float]]]:
    """Returns steps and values of each curve whose name begins so; a beginning that ends a word is a whole name."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if any(name == start or (name.startswith(start) and start[-1] in "/_") for start in beginnings):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves
