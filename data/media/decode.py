"""`open_video` opens a video with a decoder by its name; tests hold all decoders to the same exact frames.

PyAV scans every file (frame count and times); the others only read frames. It reads by seeking one second early and
decoding forward, comparing every frame's timestamp with the scan: a bare seek is wrong on open GOP, HEVC and variable
frame rate. decord bundles an FFmpeg of 2021 and is silently wrong on some files; those are refused, and the error
names the cause.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from data.errors import FETCH_AGAIN, DataError
from data.media.index import IndexedReader, VideoIndex, index_video, opened, to_rgb

DECODERS = ("pyav", "decord", "torchcodec")
_INSTALL = {
    "decord": "pip install decord (Linux on x86-64)",
    "torchcodec": "pip install 'torchcodec==0.13.*' with torch 2.11 or later, and FFmpeg 4 to 8 (apt install ffmpeg); "
    "newer torchcodec from PyPI needs a CUDA 13 build of torch",
}
_SEEK_EARLY_SECONDS = 1.0


def open_video(path: str | Path, decoder: str = "pyav", index: VideoIndex | None = None) -> IndexedReader:
    """Returns a frame-exact reader. index: a scan made before, so that the file is not decoded again to count frames.

    Raises DataError for files that cannot be read, and for a decoder that is unknown, not installed or known to read
    this file wrong.
    """
    path = Path(path)
    if decoder == "pyav":
        return PyAVReader(path, index)
    if decoder == "decord":
        return DecordReader(path, index)
    if decoder == "torchcodec":
        return TorchCodecReader(path, index)
    raise DataError("unknown-decoder", decoder, f"decoders are {', '.join(DECODERS)}")


def check_decoder(decoder: str) -> None:
    """Raises DataError (decoder-missing) where the decoder's package is not installed."""
    if decoder in _INSTALL:
        _load(decoder)


class PyAVReader(IndexedReader):
    """This reader seeks one second early, decodes forward, and names every frame by its timestamp in the scan; a read
    just ahead of the last one goes on decoding."""

    def __init__(self, path: Path, index: VideoIndex | None = None) -> None:
        super().__init__(path, index or index_video(path))
        self._file: opened | None = None
        self._reformatter = VideoReformatter()
        self._decoded: Iterator[av.VideoFrame] = iter(())
        self._num_decoded = 0
        self._next = -1  # index of the frame that is decoded next; -1 where nothing is open

    def read(self, start: int, end: int) -> Tensor:
        self._check_span(start, end)
        return self.pick(range(start, end))

    def pick(self, indices: Sequence[int]) -> Tensor:
        start, end = indices[0], indices[-1] + 1
        self._check_span(start, end)
        out = torch.empty(len(indices), self.height, self.width, 3, dtype=torch.uint8)
        early = self.index.times[start] - _SEEK_EARLY_SECONDS
        try:
            if 0 <= self._next <= start and self._near(start) and self._fill(out, indices):
                return out
            if self.index.pts is not None and early > 0:
                self._open(seek_seconds=early)
                if self._fill(out, indices):
                    return out
            self._open(seek_seconds=None)
            if self._fill(out, indices):
                return out
        except av.error.FFmpegError as error:
            self.close()
            raise DataError(
                "broken", self.path, f"decoding fails in [{start}, {end}) ({error.strerror}); {FETCH_AGAIN}"
            ) from error
        raise DataError(
            "broken", self.path, f"frames [{start}, {end}) do not decode as they did in the scan; prepare it again"
        )

    def close(self) -> None:
        if self._file:
            self._file.__exit__()
        self._file, self._decoded, self._next = None, iter(()), -1

    def _open(self, seek_seconds: float | None) -> None:
        self.close()
        file = opened(self.path)
        container, stream = file.__enter__()
        self._file = file
        if seek_seconds is not None and self.index.pts is not None:
            target = self.index.pts[0] + int(seek_seconds / stream.time_base)
            container.seek(target, stream=stream, backward=True)
        self._decoded, self._num_decoded = container.decode(stream), 0

    def _near(self, start: int) -> bool:
        """Returns whether decoding on to `start` is no longer than seeking to it, or than starting over without
        stamps."""
        times = self.index.times
        return self.index.pts is None or times[start] - times[min(self._next, len(times) - 1)] <= _SEEK_EARLY_SECONDS

    def _fill(self, out: Tensor, indices: Sequence[int]) -> bool:
        """Decodes forward into `out`; returns False where the stream departs from the scan."""
        for i, frame_index in enumerate(indices):
            if i and frame_index == indices[i - 1]:
                out[i] = out[i - 1]
                continue
            frame = self._advance(frame_index)
            if frame is None:
                self._next = -1
                return False
            out[i] = torch.from_numpy(to_rgb(frame, self._reformatter))
            self._next = frame_index + 1
        return True

    def _advance(self, i: int) -> av.VideoFrame | None:
        pts = self.index.pts
        for frame in self._decoded:
            self._num_decoded += 1
            if pts is None:
                ahead = self._num_decoded - 1 - i
            elif frame.pts is None:
                return None
            else:
                ahead = frame.pts - pts[i]
            if ahead == 0:
                return frame
            if ahead > 0:
                return None
        return None


class DecordReader(IndexedReader):
    """This reader reads by decord, which takes only the files that decord reads right."""

    def __init__(self, path: Path, index: VideoIndex | None) -> None:
        super().__init__(path, index or index_video(path))
        decord = _load("decord")
        fault = decord_fault(path)
        if fault:
            raise DataError("decoder-unsafe", path, f"decord reads {fault} wrong; use decoder=pyav")
        with _faults("decord", path):
            self._reader = decord.VideoReader(str(path), num_threads=1)
        _check_count("decord", self, len(self._reader))

    def read(self, start: int, end: int) -> Tensor:
        self._check_span(start, end)
        with _faults("decord", self.path):
            return torch.from_numpy(self._reader.get_batch(list(range(start, end))).asnumpy())


def decord_fault(path: Path) -> str:
    """Returns what in the file decord is known to read wrong, or "" if nothing.

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
    """This reader reads by torchcodec in its exact mode."""

    def __init__(self, path: Path, index: VideoIndex | None) -> None:
        super().__init__(path, index or index_video(path))
        torchcodec = _load("torchcodec")
        with _faults("torchcodec", path):
            self._decoder = torchcodec.decoders.VideoDecoder(str(path), seek_mode="exact", dimension_order="NHWC")
        _check_count("torchcodec", self, len(self._decoder))

    def read(self, start: int, end: int) -> Tensor:
        self._check_span(start, end)
        with _faults("torchcodec", self.path):
            frames = self._decoder.get_frames_in_range(start, end).data
        return torch.from_numpy(np.ascontiguousarray(frames.numpy()))


def _check_count(decoder: str, reader: IndexedReader, count: int) -> None:
    if count != reader.num_frames:
        raise DataError(
            "decoder-unsafe",
            reader.path,
            f"{decoder} counts {count} frames, a full decode {reader.num_frames}; use decoder=pyav",
        )


@contextmanager
def _faults(decoder: str, path: Path) -> Iterator[None]:
    """Raises a decoder's errors as DataError (decoder-unsafe): the scan has read the file, so the fault is its own."""
    faults: tuple[type[Exception], ...] = (RuntimeError, IndexError, ValueError)
    if decoder == "decord":
        faults = (*faults, _load(decoder).DECORDError)
    try:
        yield
    except faults as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError("decoder-unsafe", path, f"{decoder} cannot read it ({reason}); use decoder=pyav") from error


def _load(decoder: str) -> Any:
    """Returns the package. Raises DataError (decoder-missing); an installed torchcodec may fail in loading its
    libraries."""
    try:
        if decoder == "torchcodec":
            import_module("torchcodec.decoders")
        return import_module(decoder)
    except (ImportError, OSError, RuntimeError) as error:
        causes = [line.removeprefix("OSError: ") for line in str(error).splitlines() if line.startswith("OSError: lib")]
        reason = causes[-1] if causes else str(error).splitlines()[0]
        raise DataError(
            "decoder-missing", f"decoder={decoder}", f"is not usable here ({reason}): {_INSTALL[decoder]}; or use pyav"
        ) from error
