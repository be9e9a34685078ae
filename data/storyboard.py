"""Pictures of a sampled story: the storyboard (a contact sheet) and the routing map."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

FRAMES_A_ROW = 5


def pick_frames(num_frames: int, count: int = FRAMES_A_ROW) -> list[int]:
    """Indices of `count` frames spread over a shot, first and last among them."""
    return np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int).tolist()


def draw_storyboard(path: Path, title: str, captions: Sequence[str], rows: Sequence[np.ndarray]) -> None:
    """A row for each shot: its caption, then its frames, uint8 [n, H, W, 3]."""
    height, width = rows[0].shape[1:3]
    cell = 2.2
    figure, axes = plt.subplots(
        len(rows),
        FRAMES_A_ROW + 1,
        figsize=(cell * (FRAMES_A_ROW + 1), cell * height / width * len(rows) + 0.5),
        gridspec_kw={"wspace": 0.03, "hspace": 0.06, "left": 0.01, "right": 0.99, "bottom": 0.01, "top": 0.93},
        squeeze=False,
    )
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
    for index, (axis_row, caption, frames) in enumerate(zip(axes, captions, rows, strict=True)):
        text = "\n".join(textwrap.wrap(f"{index + 1}. {caption}", width=34)[:7])
        axis_row[0].text(0.02, 0.5, text, va="center", size=7.5, wrap=False)
        for axis in axis_row:
            axis.axis("off")
        for axis, frame in zip(axis_row[1:], frames, strict=False):
            axis.imshow(frame, interpolation="lanczos")
    _save(figure, path)


def draw_routing_map(path: Path, shares: Tensor) -> None:
    """Shots by shots, the share of each shot's routes that goes to each: float [S, S]. The diagonal is set apart: a
    query's own shot is no route but a mandatory link (paper, figure 2)."""
    table = np.ma.masked_array(shares.numpy(), mask=np.eye(len(shares), dtype=bool))
    size = max(3.2, 0.55 * len(shares) + 1.6)
    figure, axis = plt.subplots(figsize=(size + 0.9, size))
    colours = plt.get_cmap("Oranges").with_extremes(bad="#b8c4d6")
    image = axis.imshow(table, cmap=colours, vmin=0, vmax=1)
    for row, column in np.ndindex(*table.shape):
        share = table[row, column]
        if share is not np.ma.masked and share > 0:
            axis.text(column, row, f"{share:.2f}", ha="center", va="center", size=7, color="w" if share > 0.6 else "k")
    ticks = range(len(shares))
    axis.set_xticks(ticks, [str(i + 1) for i in ticks])
    axis.set_yticks(ticks, [str(i + 1) for i in ticks])
    axis.set_xlabel("to shot (blue: the own shot, always attended)", size=8)
    axis.set_ylabel("from the queries of shot", size=8)
    axis.set_title("where routes go", size=10)
    figure.colorbar(image, fraction=0.046, pad=0.04, label="share of the routes")
    figure.tight_layout()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
