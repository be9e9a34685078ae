"""Pictures of a sampled story: the storyboard (a contact sheet) and the routing map.

Text is drawn by Pillow as it stands: "$" is no formula, and a character that the font lacks is an empty box.
"""

import textwrap
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # not pyplot, which may ask for a display
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.cache.writer import write_whole

FRAMES_A_ROW = 5
_CELL, _GAP, _HEAD = 330, 8, 48  # pixels: width of a frame or caption, space between them, height of the title


def pick_frames(num_frames: int, count: int = FRAMES_A_ROW) -> list[int]:
    """Indices of `count` frames spread over a shot, first and last among them."""
    return np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int).tolist()


def draw_storyboard(path: Path, title: str, captions: Sequence[str], rows: Sequence[np.ndarray]) -> None:
    """A row for each shot: its caption, then its frames, uint8 [n, H, W, 3]."""
    height, width = rows[0].shape[1:3]
    cell = (_CELL, max(1, round(_CELL * height / width)))
    across, down = cell[0] + _GAP, cell[1] + _GAP
    sheet = Image.new("RGB", (_GAP + across * (FRAMES_A_ROW + 1), _HEAD + down * len(rows)), "white")
    sheet.paste(_text(title, (sheet.width - 2 * _GAP, _HEAD), size=23, bold=True), (_GAP, 0))
    for index, (caption, frames) in enumerate(zip(captions, rows, strict=True)):
        top = _HEAD + down * index
        sheet.paste(_text(f"{index + 1}. {caption}", cell, size=16), (_GAP, top))
        for column, frame in enumerate(frames, start=1):
            picture = Image.fromarray(frame).resize(cell, Image.Resampling.LANCZOS)
            sheet.paste(picture, (_GAP + across * column, top))
    _save(sheet, path)


def _text(text: str, cell: tuple[int, int], size: int, bold: bool = False) -> Image.Image:
    """A white picture of `cell` pixels (W, H) with as much of the text as fits, in the middle of its height."""
    font, line_height = _font(size, bold), round(1.25 * size)
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    num_characters = int(0.95 * cell[0] * len(text) / max(1.0, font.getlength(text)))
    lines = textwrap.wrap(text, max(1, num_characters), max_lines=max(1, cell[1] // line_height), placeholder="…")
    picture = Image.new("RGB", cell, "white")
    top = (cell[1] - line_height * len(lines)) // 2
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, top + number * line_height), line, "black", font)
    return picture


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf", name), size)


def draw_routing_map(path: Path, shares: Tensor) -> None:
    """Shots by shots, the share of each shot's routes that goes to each: float [S, S]. The diagonal is set apart: a
    query's own shot is no route but a mandatory link (paper, figure 2)."""
    table = np.ma.masked_array(shares.numpy(), mask=np.eye(len(shares), dtype=bool))
    size = max(3.2, 0.55 * len(shares) + 1.6)
    figure = Figure(figsize=(size + 0.9, size), dpi=150)
    axis = figure.subplots()
    colours = matplotlib.colormaps["Oranges"].with_extremes(bad="#b8c4d6")
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


def _save(picture: Image.Image | Figure, path: Path) -> None:
    """Writes a PNG, which appears when it is whole."""
    png = BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(png, format="png")
    else:
        picture.save(png, format="png")
    write_whole(path, png.getvalue())
