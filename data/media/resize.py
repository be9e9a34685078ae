"""This module brings frames to the model's rate and sizes: chooses frames and a size, reads in pieces, resizes and
crops."""

import bisect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from data.media.decode import open_video
from data.media.images import read_image
from data.media.index import IndexedReader, VideoIndex

_READ_PIXELS = 16 << 20  # the most pixels that a piece has, before or after fitting


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the (H, W) of `sizes` whose aspect ratio is nearest; the first of equals."""
    aspect = math.log(height / width)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


def resample(times: Sequence[float], start: int, end: int, fps: float | None) -> list[int]:
    """Returns frame indices that show [start, end) at `fps`: at each tick the frame then on screen.

    times: seconds of every frame of the video, so that variable frame rate keeps its speed. fps None: every frame.
    """
    if fps is None:
        return list(range(start, end))
    step = (times[end - 1] - times[start]) / max(1, end - 1 - start)
    duration = times[end] - times[start] if end < len(times) else times[end - 1] - times[start] + step
    ticks = max(1, math.floor(duration * fps + 1e-6))
    slack = 1e-3 / fps
    return [
        min(end - 1, max(start, bisect.bisect_right(times, times[start] + i / fps + slack) - 1)) for i in range(ticks)
    ]


def fit(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Turns uint8 [F, H, W, 3] into float [3, F, h, w] in [-1, 1], resized to cover `size` and centre-cropped."""
    height, width = size
    scale = max(height / frames.shape[1], width / frames.shape[2])
    covering = [max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale))]
    pixels = frames.permute(0, 3, 1, 2)  # resizing uint8 is several times faster, and rounds as PIL does
    if covering != [frames.shape[1], frames.shape[2]]:
        pixels = F.interpolate(pixels, covering, mode="bilinear", antialias=True, align_corners=False)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width]
    return (pixels.transpose(0, 1).float() / 127.5 - 1).contiguous()


def read_pieces(reader: IndexedReader, indices: Sequence[int], size: tuple[int, int]) -> Iterator[Tensor]:
    """Yields frames `indices` (ascending, may repeat) of the video, as `fit` gives them, few at a time."""
    span = max(1, _READ_PIXELS // max(reader.height * reader.width, size[0] * size[1]))
    at = 0
    while at < len(indices):
        end = min(at + span, bisect.bisect_left(indices, indices[at] + span))
        yield fit(reader.pick(indices[at:end]), size)
        at = end


def read_shots(
    path: Path, decoder: str, index: VideoIndex | None, shots: Sequence[Sequence[int]], size: tuple[int, int]
) -> Iterator[Iterator[Tensor]]:
    """Yields the pieces of each shot of a sample, to be read in order; of an image, which has no index, its one frame.

    Raises DataError: missing-file, broken, not-an-image, ...
    """
    if index is None:
        yield iter([fit(read_image(path), size)])
        return
    reader = open_video(path, decoder, index)
    try:
        for indices in shots:
            yield read_pieces(reader, indices, size)
    finally:
        reader.close()
