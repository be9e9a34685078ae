"""This module counts and times the frames of a video file exactly.

Counts and times come from decoding the whole stream once (`index_video`), never from headers. Frames are read by index
through `data.media.decode.open_video`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorTrc, VideoReformatter
from torch import Tensor

from data.errors import FETCH_AGAIN, DataError

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".ts", ".mpg", ".mpeg"})
MAX_SIDE = 16384
_SQUARE = 0.01  # pixels whose sides differ less are called square
_HDR_TRANSFERS = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}


@dataclass(frozen=True)
class VideoIndex:
    """An index is what one full decode of a video found. pts: timestamp of each frame in stream units; None where the
    file has no usable ones (then frames are reached by decoding from the start). times: seconds, from 0. stamp_fault:
    how the file's time stamps were mended, or "". hdr: "PQ" or "HLG" where its brightness is coded for HDR, or "".
    pixel_aspect: width to height of a pixel as it is stored, such as "64:45", or "" for square ones. interlaced:
    whether most frames are two fields of other times."""

    height: int
    width: int
    fps: float
    times: tuple[float, ...]
    pts: tuple[int, ...] | None
    stamp_fault: str = ""
    hdr: str = ""
    pixel_aspect: str = ""
    interlaced: bool = False

    @property
    def num_frames(self) -> int:
        return len(self.times)


class IndexedReader:
    """A reader reads frames of one video by decoded index; the decoders derive from this class."""

    def __init__(self, path: Path, index: VideoIndex) -> None:
        self.path, self.index = path, index

    @property
    def num_frames(self) -> int:
        return self.index.num_frames

    @property
    def fps(self) -> float:
        return self.index.fps

    @property
    def height(self) -> int:
        return self.index.height

    @property
    def width(self) -> int:
        return self.index.width

    def read(self, start: int, end: int) -> Tensor:
        """Returns uint8 [end - start, H, W, 3] RGB, upright. Raises DataError (out-of-range, broken)."""
        raise NotImplementedError

    def pick(self, indices: Sequence[int]) -> Tensor:
        """Returns uint8 [n, H, W, 3] of ascending indices, which may repeat."""
        first = indices[0]
        return self.read(first, indices[-1] + 1)[torch.tensor(indices) - first]

    def close(self) -> None:
        """Closes the file; a later read opens it again."""

    def _check_span(self, start: int, end: int) -> None:
        if not 0 <= start < end <= self.num_frames:
            raise DataError(
                "out-of-range", self.path, f"frames [{start}, {end}) of a video of {self.num_frames} frames"
            )


def index_video(path: str | Path, on_frame: Callable[[av.VideoFrame], None] | None = None) -> VideoIndex:
    """Decodes the whole video once; `on_frame(frame)` sees every frame (shot detection rides along).

    Raises DataError: zero-byte, not-a-video, audio-only, no-frames, broken, size-change, too-large.
    """
    path = Path(path)
    stamps: list[int | None] = []
    height = width = num_interlaced = 0
    hdr = ""
    with opened(path) as (container, stream):
        fps, time_base = float(stream.average_rate or stream.guessed_rate or 0), stream.time_base
        pixel_aspect = _pixel_aspect(stream.sample_aspect_ratio)
        try:
            for i, frame in enumerate(container.decode(stream)):
                if i == 0:
                    height, width = _upright_size(frame)
                    hdr = _HDR_TRANSFERS.get(frame.color_trc, "")
                    if max(height, width) > MAX_SIDE:
                        raise DataError(
                            "too-large",
                            path,
                            f"{height}x{width} is over {MAX_SIDE} a side; scale it down, or leave it out",
                        )
                elif _upright_size(frame) != (height, width):
                    raise DataError(
                        "size-change", path, f"frame {i} is not {height}x{width} as frame 0; split the file there"
                    )
                stamps.append(frame.pts)
                num_interlaced += frame.interlaced_frame
                if on_frame:
                    on_frame(frame)
        except av.error.FFmpegError as error:
            raise DataError(
                "broken", path, f"decoding fails after {len(stamps)} frames ({error.strerror}); {FETCH_AGAIN}"
            ) from error
    if not stamps:
        raise DataError("no-frames", path, f"no frame decodes; {FETCH_AGAIN}")
    found = _index(stamps, height, width, fps, time_base)
    return replace(found, hdr=hdr, pixel_aspect=pixel_aspect, interlaced=num_interlaced > len(stamps) / 2)


def _pixel_aspect(ratio: Fraction | None) -> str:
    if not ratio or abs(ratio - 1) < _SQUARE:
        return ""
    return f"{ratio.numerator}:{ratio.denominator}"


def estimated_frames(path: Path, fps: float | None = None) -> int | None:
    """Returns the number of frames that the header claims; None where it claims none. fps: the measured rate, for a
    header that says a duration alone: its own rate is off where the rate varies."""
    try:
        with opened(path) as (container, stream):
            end, start = container.duration or 0, container.start_time or 0
            seconds = max(0, end - start) / av.time_base  # Matroska's duration counts from 0, wherever the film starts
            return stream.frames or round(seconds * (fps or float(stream.average_rate or 0))) or None
    except DataError:
        return None


def _index(stamps: list[int | None], height: int, width: int, fps: float, time_base: Fraction | None) -> VideoIndex:
    """Times the frames by their stamps. A frame that has none, or repeats the last one, is put evenly between the
    stamps around it; where stamps go back, or too few are there, the header's rate is assumed."""
    count = len(stamps)
    if count == 1:
        return VideoIndex(height, width, fps or 1.0, (0.0,), None)
    known = [(i, stamp) for i, stamp in enumerate(stamps) if stamp is not None]
    own = known[:1] + [pair for last, pair in pairwise(known) if pair[1] != last[1]]
    frames, ticks = [i for i, _ in own], [stamp for _, stamp in own]
    if time_base is None or len(own) < 2 or frames[0] or any(a > b for a, b in pairwise(ticks)):
        fps = fps or 25.0
        fault = f"time stamps are missing or go back; {fps:g} fps is assumed"
        return VideoIndex(height, width, fps, tuple(i / fps for i in range(count)), None, fault)
    seconds = [float((tick - ticks[0]) * time_base) for tick in ticks]
    end = seconds[-1] / frames[-1] * count
    times = tuple(np.interp(range(count), [*frames, count], [*seconds, end]).tolist())
    fps = round((count - 1) / times[-1], 6)  # the measured mean: headers are off on variable rates and cut files
    if len(own) == count:
        return VideoIndex(height, width, fps, times, tuple(ticks))
    fault = (
        f"{count - len(own)} of {count} time stamps are missing or repeat the last; those frames are put evenly "
        f"between the others, which makes {times[-1]:.2f} s at {fps:g} fps"
    )
    return VideoIndex(height, width, fps, times, None, fault)


class opened:
    """This context opens a container and its first video stream, and closes them at its end; faults become
    DataErrors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tuple:
        path = self.path
        if not path.is_file():
            raise DataError("missing-file", path, "no such file")
        if path.stat().st_size == 0:
            raise DataError("zero-byte", path, f"the file is empty (0 bytes); {FETCH_AGAIN}")
        try:
            self.container = av.open(str(path))
        except (av.error.FFmpegError, OSError) as error:
            raise DataError(
                "not-a-video", path, f"cannot be opened as video ({error.strerror}); {FETCH_AGAIN}"
            ) from error
        streams = [s for s in self.container.streams.video if not _is_cover(s)]
        if not streams:
            has_audio = bool(self.container.streams.audio)
            self.container.close()
            if has_audio:
                raise DataError("audio-only", path, "has sound but no video stream; leave it out")
            raise DataError("no-frames", path, f"holds no video stream; {FETCH_AGAIN}")
        if streams[0].codec_context is None:
            self.container.close()
            raise DataError(
                "no-decoder",
                path,
                "this build of FFmpeg has no decoder for its video codec; convert it to H.264, or leave it out",
            )
        streams[0].thread_type = "AUTO"
        return self.container, streams[0]

    def __exit__(self, *_: object) -> None:
        self.container.close()


def _is_cover(stream: av.VideoStream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    turned = frame.rotation % 180 != 0
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter, size: tuple[int, int] | None = None) -> np.ndarray:
    """Returns uint8 [H, W, 3] of a frame of any pixel format and depth, upright as a player shows it, scaled to `size`.
    The array is contiguous, since networks look at it through views.

    reformatter: one for all frames of a film: a new one for each costs fifty times as much.
    """
    turns = round(frame.rotation / 90) % 4
    height, width = size or _upright_size(frame)
    if turns % 2:
        height, width = width, height
    picture = reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
    return np.ascontiguousarray(np.rot90(picture.to_ndarray(), k=turns))
