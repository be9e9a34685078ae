"""This module writes small video files for tests: every frame carries its index in black and white blocks, so that a
wrong one shows."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

BITS = 10
HEIGHT, WIDTH = 64, 160
_BLOCK = WIDTH // BITS


def numbered_frame(i: int, height: int = HEIGHT, width: int = WIDTH, background: int = 128) -> np.ndarray:
    """Returns uint8 [H, W, 3]; block b of the middle band is white where bit b of i is set. A bar moves in the rest."""
    frame = np.full((height, width, 3), background, np.uint8)
    frame[: height // 4, (5 * i) % width : (5 * i) % width + 12] = (200, 60, 20)
    block = width // BITS
    for bit in range(BITS):
        frame[height // 4 :, bit * block : (bit + 1) * block] = 235 if i >> bit & 1 else 20
    return frame


def read_numbers(frames: Tensor) -> list[int]:
    """Returns the index that each of uint8 [F, H, W, 3] carries."""
    height, width = frames.shape[1:3]
    block = width // BITS
    band = frames[:, height // 2 :].float().mean(dim=(1, 3))
    blocks = band[:, : block * BITS].reshape(len(frames), BITS, block)
    set_bits = blocks[:, :, block // 4 : -block // 4].mean(dim=2) > 128
    return (set_bits.long() * 2 ** torch.arange(BITS)).sum(1).tolist()


def write_numbered(
    path: Path,
    num_frames: int,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    ticks: Sequence[int] | None = None,
    fps: int = 25,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    transfer: int | None = None,
    pixel_aspect: Fraction | None = None,
) -> Path:
    """Returns a numbered film. ticks: presentation time of each frame in 1/(4 fps) s, for variable frame rate.
    transfer: how its brightness is said to be coded (av's ColorTrc).
    pixel_aspect: width to height of a pixel."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = size[0], size[1], pixel_format
        stream.options = options or {}
        stream.codec_context.thread_count = 1
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if ticks is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 4 * fps)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(i, *size), format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[i], Fraction(1, 4 * fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_paired(path: Path) -> Path:
    """Returns a numbered mkv of 60 frames with two at each 100 ms: they differ by less than the millisecond that it
    stores."""
    return write_numbered(path, 60, fps=1000, ticks=[400 * (i // 2) + i % 2 for i in range(60)])


def rotate(path: Path) -> None:
    """Mark an mp4 as filmed by a camera turned by 90 degrees: players show it upright by its display matrix."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    matrix = at + (52 if data[at] == 1 else 40)
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, HEIGHT << 16, 0, 1 << 30)
    path.write_bytes(data)


def trim_by_edit_list(path: Path, frames: int, fps: int = 25) -> None:
    """Make the mp4's edit list skip its first frames."""
    data = bytearray(path.read_bytes())
    timescale = struct.unpack(">I", data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20])[0]
    entry = data.index(b"elst") + 4 + 8
    media_time = struct.unpack(">i", data[entry + 4 : entry + 8])[0]
    data[entry + 4 : entry + 8] = struct.pack(">i", media_time + frames * timescale // fps)
    path.write_bytes(data)
