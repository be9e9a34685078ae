"""This module draws pictures of a sampled story: the storyboard (contact sheets of ten shots each) and the routing
map."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure  # not pyplot, which may ask for a display
from PIL import Image, ImageOps
from torch import Tensor

from data.records import write_whole
from film.lettering import draw_text

FRAMES_A_ROW, ROWS_A_PAGE = 5, 10
MOST_NUMBERS = 12  # a routing map of more shots has no room for its numbers
_CELL, _GAP, _HEAD = 330, 8, 48  # pixels: width of a frame or caption, space between them, height of the title


def pick_frames(num_frames: int, count: int = FRAMES_A_ROW) -> list[int]:
    """Returns indices of `count` frames spread over a shot, first and last among them."""
    return np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int).tolist()


@dataclass(frozen=True)
class Panel:
    """A panel shows a shot on the storyboard. number: from 1. beginning: how it begins, in a word or two. frames: uint8
    [n, H, W, 3]."""

    number: int
    caption: str
    seconds: float
    beginning: str
    frames: np.ndarray

    @property
    def head(self) -> str:
        return f"{self.number} · {self.seconds:.1f} s · {self.beginning}"


def page_size(height: int, width: int) -> tuple[int, int]:
    """Returns the height and width that frames have on a storyboard."""
    return max(1, round(_CELL * height / width)), _CELL


def draw_storyboard(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draws one page: a row for each shot, with its number, length, cut and caption, then its frames."""
    height, width = panels[0].frames.shape[1:3]
    cell = page_size(height, width)[::-1]
    across, down = cell[0] + _GAP, cell[1] + _GAP
    sheet = Image.new("RGB", (_GAP + across * (FRAMES_A_ROW + 1), _HEAD + down * len(panels)), "white")
    sheet.paste(draw_text(title, (sheet.width - 2 * _GAP, _HEAD), size=23, bold=True), (_GAP, 0))
    for row, panel in enumerate(panels):
        top, head = _HEAD + down * row, min(22, cell[1] // 3)
        sheet.paste(draw_text(panel.head, (cell[0], head), size=13, bold=True), (_GAP, top))
        caption = draw_text(panel.caption, (cell[0], cell[1] - head), size=16, from_top=True)
        sheet.paste(caption, (_GAP, top + head))
        for column, frame in enumerate(panel.frames, start=1):
            picture = Image.fromarray(frame)
            if picture.size != cell:
                picture = picture.resize(cell, Image.Resampling.LANCZOS)
            sheet.paste(picture, (_GAP + across * column, top))
    _save(sheet, path)


def draw_routing_map(path: Path, shares: Tensor, thumbnails: Sequence[np.ndarray] = ()) -> None:
    """Draws the share of each shot's routes that goes to each shot, float [S, S]. The diagonal is set apart: a
    query's own shot is no route but a mandatory link (paper, figure 2). thumbnails: of each shot, uint8 [H, W, 3], to
    stand along both axes."""
    table = np.ma.masked_array(shares.numpy(), mask=np.eye(len(shares), dtype=bool))
    size = min(8.2, max(3.8, 0.62 * len(shares) + 1.6))
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
    axis.tick_params(length=0 if len(thumbnails) else 3.5)
    axis.set_xlabel("to shot (blue: the own shot, always attended)", size=8)
    axis.set_ylabel("from the queries of shot", size=8)
    axis.set_title("where routes go", size=10)
    figure.colorbar(image, fraction=0.046, pad=0.04, label="share of the routes")
    figure.tight_layout()
    if len(thumbnails):
        _line_axes(figure, axis, thumbnails)
        figure.tight_layout()
    _save(figure, path)


def _line_axes(figure: Figure, axis: Axes, thumbnails: Sequence[np.ndarray]) -> None:
    """Puts a thumbnail of each shot between the axes of a map and their labels."""
    count = len(thumbnails)
    depth = min(0.2, max(1 / count, 0.05))  # a share of the map's side
    down = [_middle(picture, round(1000 * depth), 1000 // count) for picture in thumbnails]
    along = [_middle(picture, 1000 // count, round(1000 * depth)) for picture in thumbnails]
    left = axis.inset_axes((-depth - 0.01, 0, depth, 1))
    left.imshow(np.concatenate(down, axis=0), aspect="auto")
    below = axis.inset_axes((0, -depth - 0.01, 1, depth))
    below.imshow(np.concatenate(along, axis=1), aspect="auto")
    for strip in (left, below):
        strip.set_axis_off()
    points = (depth + 0.02) * axis.get_window_extent().width * 72 / figure.dpi
    axis.tick_params(pad=points)


def _middle(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns the middle of a picture, filling `width` x `height` pixels."""
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (max(1, width), max(1, height))))


def _save(picture: Image.Image | Figure, path: Path) -> None:
    """Writes a PNG, which appears when it is whole."""
    png = BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(png, format="png")
    else:
        picture.save(png, format="png")
    write_whole(path, png.getvalue())
