"""The decoders behind `open_video`, by name. One interface; the tests hold all of them to the same exact frames.

PyAV scans every file (frame count and times); the others only read frames. decord bundles an FFmpeg of 2021 and is
silently wrong on some files, so those are refused by name of the cause, never read.
"""

from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.video import IndexedReader, PyAVReader, VideoIndex, scan

DECODERS = ("pyav", "decord", "torchcodec")


def build_reader(path: Path, decoder: str, index: VideoIndex | None) -> IndexedReader:
    """Raises DataError: unknown-decoder, decoder-missing, decoder-unsafe, and what `scan` raises."""
    if decoder == "pyav":
        return PyAVReader(path, index)
    if decoder == "decord":
        return DecordReader(path, index)
    if decoder == "torchcodec":
        return TorchCodecReader(path, index)
    raise DataError("unknown-decoder", decoder, f"decoders are {', '.join(DECODERS)}")


class DecordReader(IndexedReader):
    """decord, for files it reads right."""

    def __init__(self, path: Path, index: VideoIndex | None) -> None:
        super().__init__(path, index or scan(path))
        decord = _import("decord")
        fault = decord_fault(path)
        if fault:
            raise DataError("decoder-unsafe", path, f"decord reads {fault} wrong; use decoder=pyav")
        try:
            self._reader = decord.VideoReader(str(path), num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise DataError("not-a-video", path, f"decord cannot open it ({error})") from error
        if len(self._reader) != self.num_frames:
            raise DataError(
                "decoder-unsafe",
                path,
                f"decord counts {len(self._reader)} frames, a full decode {self.num_frames}; use decoder=pyav",
            )

    def read(self, start: int, end: int) -> Tensor:
        self._check_span(start, end)
        return torch.from_numpy(self._reader.get_batch(list(range(start, end))).asnumpy())


def decord_fault(path: Path) -> str:
    """What in the file decord is known to read wrong, or "" if nothing.

    Open groups of pictures show as packets that come after a keyframe and are shown before it.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        if context.name == "libdav1d" or context.codec.canonical_name == "av1":
            return "AV1"
        if context.pix_fmt not in ("yuv420p", "yuvj420p"):
            return f"pixel format {context.pix_fmt}"
        keyframe = first = None
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            if packet.is_keyframe:
                keyframe = packet.pts
            elif keyframe is not None and packet.pts < keyframe:
                return "an open group of pictures"
            first = packet.pts if first is None else min(first, packet.pts)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    if frame.pts != first:
        return "an edit list"
    return "a display rotation" if frame.rotation else ""


class TorchCodecReader(IndexedReader):
    """torchcodec in its exact mode."""

    def __init__(self, path: Path, index: VideoIndex | None) -> None:
        super().__init__(path, index or scan(path))
        decoders = _import("torchcodec.decoders")
        self._decoder = decoders.VideoDecoder(str(path), seek_mode="exact", dimension_order="NHWC")
        if len(self._decoder) != self.num_frames:
            raise DataError(
                "decoder-unsafe",
                path,
                f"torchcodec counts {len(self._decoder)} frames, a full decode {self.num_frames}; use decoder=pyav",
            )

    def read(self, start: int, end: int) -> Tensor:
        self._check_span(start, end)
        frames = self._decoder.get_frames_in_range(start, end).data
        return torch.from_numpy(np.ascontiguousarray(frames.numpy()))


def _import(module: str) -> Any:
    """Raises DataError (decoder-missing). An installed torchcodec that finds no FFmpeg raises RuntimeError."""
    from importlib import import_module

    try:
        return import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError("decoder-missing", module, f"is not usable here ({reason}); use decoder=pyav") from error
