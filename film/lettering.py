"""This module draws texts by Pillow as they are written: "$" begins no formula.

Characters that the usual font lacks are drawn in whichever font of the system has them: emoji and Chinese may share a
line. Those that no font has are drawn as empty boxes, and a warning says so.
"""

import logging
import textwrap
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from threading import Lock

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

_BITMAP_SIZE = 109  # the one size that fonts of coloured pictures, such as Noto Color Emoji, have
_choosing = Lock()  # threads draw pages, and only one of them reads the system's fonts
_JOINED = ("Mn", "Me", "Cf")  # categories of characters that change the one before them


def draw_text(text: str, cell: tuple[int, int], size: int, bold: bool = False, from_top: bool = False) -> Image.Image:
    """Returns a white picture of `cell` pixels (W, H) with as much of the text as fits, in the middle of its height, or
    from its top."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    with _choosing:
        fonts = _fonts("".join(sorted(set(text))), bold)
    line_height = round(1.25 * size)
    length = sum(_length(run, file, size) for run, file in _runs(text, fonts))
    num_characters = int(0.95 * cell[0] * len(text) / max(1.0, length))
    lines = textwrap.wrap(text, max(1, num_characters), max_lines=max(1, cell[1] // line_height), placeholder="…")
    picture = Image.new("RGB", cell, "white")
    top = 0 if from_top else (cell[1] - line_height * len(lines)) // 2
    for number, line in enumerate(lines):
        left = 0.0
        for run, file in _runs(line, fonts):
            _draw_run(picture, (left, top + number * line_height + size), run, file, size)
            left += _length(run, file, size)
    return picture


def _draw_run(picture: Image.Image, point: tuple[float, float], run: str, file: str, size: int) -> None:
    """Draws what one font has of a line. point: the left end of the line that it stands on."""
    font = _font(file, size)
    if font.size == size:
        ImageDraw.Draw(picture).text(point, run, "black", font, anchor="ls")
        return
    scale, base = size / font.size, round(font.size)
    glyphs = Image.new("RGBA", (max(1, round(font.getlength(run))), round(1.25 * font.size)))
    ImageDraw.Draw(glyphs).text((0, base), run, "black", font, anchor="ls", embedded_color=True)
    glyphs = glyphs.resize((max(1, round(glyphs.width * scale)), max(1, round(glyphs.height * scale))))
    picture.paste(glyphs, (round(point[0]), round(point[1] - base * scale)), glyphs)


def _length(run: str, file: str, size: int) -> float:
    font = _font(file, size)
    return font.getlength(run) * size / font.size


def _runs(text: str, fonts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yields the text in pieces, each with the first of the fonts that has its characters."""
    run, of = "", fonts[0]
    for character in text:
        joined = run and unicodedata.category(character) in _JOINED
        file = of if joined else next((file for file in fonts if ord(character) in _codes(file)), fonts[0])
        if run and file != of:
            yield run, of
            run = ""
        run, of = run + character, file
    if run:
        yield run, of


@cache
def _fonts(characters: str, bold: bool) -> tuple[str, ...]:
    """Returns DejaVu Sans, which matplotlib brings along, and fonts of the system that have what it lacks; those that
    have most of it come first, and of these the ones named as of this weight."""
    name, weight = ("DejaVuSans-Bold.ttf", "Bold") if bold else ("DejaVuSans.ttf", "Regular")

    def worth(file: str) -> tuple[int, bool]:
        return len(missing & _codes(file)), weight in Path(file).stem

    chosen = [str(Path(matplotlib.get_data_path(), "fonts/ttf", name))]
    missing = {ord(one) for one in characters if one.isprintable() and unicodedata.category(one) not in _JOINED}
    missing -= _codes(chosen[0])
    while missing:
        best = max(_system_fonts(), key=worth, default=chosen[0])
        if not missing & _codes(best):
            _tell_missing()
            break
        chosen.append(best)
        missing -= _codes(best)
    return tuple(chosen)


@cache
def _tell_missing() -> None:
    logger.warning(
        "characters that no font here has are boxes on the storyboard; install one such as fonts-noto-cjk or "
        "fonts-noto-color-emoji"
    )


@cache
def _system_fonts() -> list[str]:
    return sorted(font_manager.findSystemFonts())


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns the font in this size, or in the only one it has."""
    try:
        return ImageFont.truetype(file, size)
    except OSError:
        return ImageFont.truetype(file, _BITMAP_SIZE)


@cache
def _codes(file: str) -> frozenset[int]:
    """Returns the characters that a font has; none where it cannot be read, or Pillow could not draw with it."""
    try:
        _font(file, 16)
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
