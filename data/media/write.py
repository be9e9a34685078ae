"""This module writes frames to a video file, which appears only when it is whole."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from torch import Tensor

from moc.errors import UserError

_OF_CODEC = {
    "libx264": {"x264-params": "mbtree=0"},  # x264's MB-tree may give other bytes each time (seen with core 165)
    "libx265": {"x265-params": "log-level=error"},  # x265 would print twenty lines for each shot
}


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray | Tensor],
    fps: float,
    codec: str = "libx264",
    crf: int = 16,
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    bt709: bool = False,
) -> int:
    """Encodes uint8 [H, W, 3] RGB frames and returns how many; the file appears under `path` only when whole.

    bt709: whether to convert colours by BT.709 and say so in the file, so that every player shows the same; else by
    FFmpeg's own default, which the file does not tell.
    One encoder thread, so that the same frames give the same bytes on any machine.
    Raises ValueError for no frames, sizes that differ, or odd sizes (4:2:0 video needs even ones).
    """
    path, count, reformatter = Path(path), 0, VideoReformatter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path) as container:
        stream = _encoder(container, codec, fps, {"crf": str(crf)} | (options or {}), bt709)
        for count, picture in enumerate(frames, start=1):
            array = np.ascontiguousarray(picture)
            if count == 1:
                _check_writable(path, array, codec)
                stream.height, stream.width, stream.pix_fmt = array.shape[0], array.shape[1], pixel_format
            elif array.shape[:2] != (stream.height, stream.width):
                raise ValueError(f"{path}: frame {count - 1} is {array.shape}, frame 0 {stream.height}x{stream.width}")
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if bt709:
                frame = reformatter.reformat(frame, format=pixel_format, dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(frame))
        if count == 0:
            raise ValueError(f"{path}: no frames to write")
        container.mux(stream.encode(None))
    return count


def join_videos(path: str | Path, videos: Sequence[str | Path], chapters: Sequence[str] | None = None) -> int:
    """Joins videos of one size, rate and codec, as `write_video` wrote them, without decoding them; returns how many
    frames they are. chapters: a title of each video, which becomes a chapter. The file appears under `path` only when
    whole."""
    stream, num_frames = None, 0
    with _opened(Path(path)) as joined:
        delay = max(_delay(video) for video in videos)
        if chapters is not None:
            joined.set_chapters(_chapters(videos, chapters))
        for video in videos:
            with av.open(str(video)) as source:
                stream = stream or _named(joined.add_stream_from_template(source.streams.video[0]))
                start = num_frames
                for packet in source.demux(video=0):
                    if packet.pts is None or packet.duration is None:  # an empty packet marks the end of the file
                        continue
                    packet.pts += start * packet.duration
                    packet.dts = num_frames * packet.duration - delay
                    packet.stream = stream
                    joined.mux(packet)
                    num_frames += 1
    return num_frames


@contextmanager
def _opened(path: Path) -> Iterator[av.container.OutputContainer]:
    """Opens a video that gets the name `path` when the block ends well. Its format is that of the name's ending, which
    `moc.files.beside` would not keep; what a killed process leaves is replaced by the next."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        with av.open(str(partial), "w") as container:
            yield container
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _encoder(
    container: av.container.OutputContainer, codec: str, fps: float, options: dict[str, str], bt709: bool
) -> av.VideoStream:
    """Adds a stream to encode to, repeatably: by one thread."""
    stream = _named(container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001)))
    assert isinstance(stream, av.VideoStream), codec
    context = stream.codec_context
    context.thread_count = 1
    if bt709:
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.options = _OF_CODEC.get(codec, {}) | options
    return stream


def _named(stream: Any) -> Any:
    """Returns a new stream under the name that Apple's players ask of HEVC."""
    if stream.codec_context.name == "libx265":
        stream.codec_context.codec_tag = "hvc1"
    return stream


def _chapters(videos: Sequence[str | Path], titles: Sequence[str]) -> list[Any]:
    """Returns each video as a chapter of milliseconds."""
    found: list[Any] = []
    end = Fraction(0)
    for number, (video, title) in enumerate(zip(videos, titles, strict=True), start=1):
        with av.open(str(video)) as source:
            stream = source.streams.video[0]
            start, end = end, end + stream.frames / Fraction(stream.average_rate or 1)
        times = {"start": round(1000 * start), "end": round(1000 * end), "time_base": Fraction(1, 1000)}
        found.append(times | {"id": number, "metadata": {"title": title}})
    return found


def _delay(path: str | Path) -> int:
    """Returns how long before it is shown a video's first frame is decoded, in units of its time stamps."""
    with av.open(str(path)) as source:
        return -(next(source.demux(video=0)).dts or 0)


def _check_writable(path: Path, array: np.ndarray, codec: str) -> None:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{path}: a frame is uint8 [H, W, 3], got {array.dtype} {array.shape}")
    if array.shape[0] % 2 or array.shape[1] % 2:
        raise UserError(f"{path}: height and width must be even for video, got {array.shape[0]}x{array.shape[1]}")
    # A picture smaller than x265's largest block would end the process.
    if codec == "libx265" and min(array.shape[:2]) < 64:
        raise UserError(f"{path}: libx265 needs pictures of at least 64x64, got {array.shape[0]}x{array.shape[1]}")
