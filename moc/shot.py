"""A `Shot` is what a stream's layout knows of a shot; its video is cut into chunks of whole latent frames or rows.

Source: arXiv 2508.21058, section 3 (content-aligned chunks).
"""

from dataclasses import dataclass
from numbers import Integral

Grid = tuple[int, int, int]


def is_whole(value: object, least: int) -> bool:
    """Returns whether a value is a whole number of at least `least`."""
    return isinstance(value, Integral) and int(value) >= least


@dataclass(frozen=True)
class Shot:
    """A shot of a stream has so many tokens of caption, and video tokens on a grid of (T, H, W).

    cut: whether a true cut begins it, or it continues the shot before. Raises ValueError for sizes that are not whole.
    """

    text_tokens: int
    grid: Grid
    cut: bool = True

    def __post_init__(self) -> None:
        if not is_whole(self.text_tokens, 0):
            raise ValueError(f"Shot.text_tokens={self.text_tokens!r} must be a whole number of at least 0")
        if len(self.grid) != 3 or not all(is_whole(size, 1) for size in self.grid):
            raise ValueError(f"Shot.grid={self.grid} must be three whole sizes (T, H, W) of at least 1")
        object.__setattr__(self, "grid", tuple(self.grid))


def even_runs(total: int, most: int) -> list[tuple[int, int]]:
    """Splits `total` into as few numbers of at most `most` as can be, which differ by at most one; returns (number, how
    often) for each, the larger first."""
    count = -(-total // most)
    small, num_large = divmod(total, count)
    runs = [(small + 1, num_large), (small, count - num_large)]
    return [run for run in runs if run[1]]


def chunk_runs(grid: Grid, chunk_tokens: int) -> tuple[int, list[tuple[int, int]]]:
    """Returns how a shot's video is cut: a pattern of (token length, how many chunks), and how often it is repeated.
    Chunks are whole latent frames, or rows of too large a frame."""
    frames, height, width = grid
    if height * width <= chunk_tokens:
        runs = even_runs(frames, chunk_tokens // (height * width))
        return 1, [(f * height * width, count) for f, count in runs]
    return frames, [(r * width, count) for r, count in even_runs(height, max(1, chunk_tokens // width))]


def chunk_lengths(grid: Grid, chunk_tokens: int) -> list[int]:
    """Returns token lengths of the chunks of a shot's video, in order."""
    repeats, runs = chunk_runs(grid, chunk_tokens)
    return [length for length, count in runs for _ in range(count)] * repeats
