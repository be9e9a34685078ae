"""Pictures of a sampled story: the storyboard (contact sheets of ten shots each) and the routing map.

Text is drawn by Pillow as it stands: "$" is no formula. Where the usual font lacks characters, one of the system that
has them is taken; where none has, they are empty boxes, which is told.
"""

import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure  # not pyplot, which may ask for a display
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.cache.writer import write_whole

FRAMES_A_ROW, ROWS_A_PAGE = 5, 10
MOST_NUMBERS = 12  # shots of a routing map that has room for its numbers
_CELL, _GAP, _HEAD = 330, 8, 48  # pixels: width of a frame or caption, space between them, height of the title
logger = logging.getLogger(__name__)


def pick_frames(num_frames: int, count: int = FRAMES_A_ROW) -> list[int]:
    """Indices of `count` frames spread over a shot, first and last among them."""
    return np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int).tolist()


@dataclass(frozen=True)
class Panel:
    """A shot on the storyboard. number: from 1. cut: whether a cut begins it. frames: uint8 [n, H, W, 3]."""

    number: int
    caption: str
    seconds: float
    cut: bool
    frames: np.ndarray

    @property
    def head(self) -> str:
        return f"{self.number} · {self.seconds:.1f} s · {'cut' if self.cut else f'goes on from {self.number - 1}'}"


def page_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that frames have on a storyboard."""
    return max(1, round(_CELL * height / width)), _CELL


def draw_storyboard(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """One page: a row for each shot, with its number, length, cut and caption, then its frames."""
    height, width = panels[0].frames.shape[1:3]
    cell = page_size(height, width)[::-1]
    across, down = cell[0] + _GAP, cell[1] + _GAP
    sheet = Image.new("RGB", (_GAP + across * (FRAMES_A_ROW + 1), _HEAD + down * len(panels)), "white")
    sheet.paste(_text(title, (sheet.width - 2 * _GAP, _HEAD), size=23, bold=True), (_GAP, 0))
    for row, panel in enumerate(panels):
        top, head = _HEAD + down * row, min(22, cell[1] // 3)
        sheet.paste(_text(panel.head, (cell[0], head), size=13, bold=True), (_GAP, top))
        sheet.paste(_text(panel.caption, (cell[0], cell[1] - head), size=16), (_GAP, top + head))
        for column, frame in enumerate(panel.frames, start=1):
            picture = Image.fromarray(frame)
            if picture.size != cell:
                picture = picture.resize(cell, Image.Resampling.LANCZOS)
            sheet.paste(picture, (_GAP + across * column, top))
    _save(sheet, path)


def _text(text: str, cell: tuple[int, int], size: int, bold: bool = False) -> Image.Image:
    """A white picture of `cell` pixels (W, H) with as much of the text as fits, in the middle of its height."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    font, line_height = _font(_font_file("".join(sorted(set(text))), bold), size), round(1.25 * size)
    num_characters = int(0.95 * cell[0] * len(text) / max(1.0, font.getlength(text)))
    lines = textwrap.wrap(text, max(1, num_characters), max_lines=max(1, cell[1] // line_height), placeholder="…")
    picture = Image.new("RGB", cell, "white")
    top = (cell[1] - line_height * len(lines)) // 2
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, top + number * line_height), line, "black", font)
    return picture


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@cache
def _font_file(characters: str, bold: bool) -> str:
    """DejaVu Sans, which matplotlib brings along, or the system's font that lacks the fewest characters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    usual = str(Path(matplotlib.get_data_path(), "fonts/ttf", name))
    codes = {ord(character) for character in characters if character.isprintable()}
    if codes <= _codes(usual):
        return usual
    best = min([usual, *_system_fonts()], key=lambda file: len(codes - _codes(file)))
    if not codes <= _codes(best):
        _tell_missing()
    return best


@cache
def _tell_missing() -> None:
    logger.warning("characters that no font here has are boxes on the storyboard; install one such as fonts-noto-cjk")


@cache
def _system_fonts() -> list[str]:
    return sorted(font_manager.findSystemFonts())


@cache
def _codes(file: str) -> frozenset[int]:
    """The characters that a font has; none where it cannot be read, or Pillow could not draw with it."""
    try:
        ImageFont.truetype(file, 16)
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def draw_routing_map(path: Path, shares: Tensor) -> None:
    """Shots by shots, the share of each shot's routes that goes to each: float [S, S]. The diagonal is set apart: a
    query's own shot is no route but a mandatory link (paper, figure 2)."""
    table = np.ma.masked_array(shares.numpy(), mask=np.eye(len(shares), dtype=bool))
    size = min(8.2, max(3.2, 0.55 * len(shares) + 1.6))
    figure = Figure(figsize=(size + 0.9, size), dpi=150)
    axis = figure.subplots()
    colours = matplotlib.colormaps["Oranges"].with_extremes(bad="#b8c4d6")
    has_numbers = len(shares) <= MOST_NUMBERS
    # Among many shots each share is small: the square root of colours makes them visible.
    norm = Normalize(0, 1) if has_numbers else PowerNorm(0.5, 0, max(float(table.max()), 1e-6))
    image = axis.imshow(table, cmap=colours, norm=norm)
    for row, column in np.ndindex(*table.shape) if has_numbers else ():
        share = table[row, column]
        if share is not np.ma.masked and share > 0:
            axis.text(column, row, f"{share:.2f}", ha="center", va="center", size=7, color="w" if share > 0.6 else "k")
    ticks = range(0, len(shares), 1 if has_numbers else 5)
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
