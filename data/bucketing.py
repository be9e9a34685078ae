"""Frames to the model's sizes: which frames at the wanted rate, which frame size, resize and crop."""

import bisect
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.video import IndexedReader

_READ_PIXELS = 64 << 20  # held at full size while reading


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (H, W) of `buckets` whose aspect ratio is nearest; the first of equals."""
    aspect = math.log(height / width)
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


def whole_latents(num_frames: int, temporal_factor: int) -> int:
    """The longest temporal_factor * n + 1 within num_frames: what a causal codec encodes without padding."""
    return max(0, (num_frames - 1) // temporal_factor * temporal_factor + 1)


def resample(times: Sequence[float], start: int, end: int, fps: float) -> list[int]:
    """Frame indices that show [start, end) at `fps`: at each tick the frame then on screen.

    times: seconds of every frame of the video, so that variable frame rate keeps its speed. fps 0: every frame.
    """
    if fps <= 0:
        return list(range(start, end))
    step = (times[end - 1] - times[start]) / max(1, end - 1 - start)
    duration = times[end] - times[start] if end < len(times) else times[end - 1] - times[start] + step
    ticks = max(1, math.floor(duration * fps + 1e-6))
    slack = 1e-3 / fps
    return [
        min(end - 1, max(start, bisect.bisect_right(times, times[start] + i / fps + slack) - 1)) for i in range(ticks)
    ]


def fit(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [F, H, W, 3] to float [3, F, h, w] in [-1, 1]: resized keeping aspect to cover `size`, centre-cropped."""
    height, width = size
    scale = max(height / frames.shape[1], width / frames.shape[2])
    covering = [max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale))]
    pixels = frames.permute(0, 3, 1, 2)  # stays uint8: resizing is several times faster, and rounds as PIL does
    if covering != [frames.shape[1], frames.shape[2]]:
        pixels = F.interpolate(pixels, covering, mode="bilinear", antialias=True, align_corners=False)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width]
    return (pixels.transpose(0, 1).float() / 127.5 - 1).contiguous()


def read_fitted(reader: IndexedReader, indices: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Frames `indices` (ascending, may repeat) of the video, as `fit` gives them; few are held at full size."""
    span = max(1, _READ_PIXELS // (reader.height * reader.width))
    pieces, at = [], 0
    while at < len(indices):
        end = bisect.bisect_left(indices, indices[at] + span)
        pieces.append(fit(reader.pick(indices[at:end]), size))
        at = end
    return torch.cat(pieces, dim=1)
