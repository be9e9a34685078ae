"""This module reads what a script shows the model, at the film's size and frame rate: pictures, and shots of a
video."""

import bisect
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from data.errors import DataError
from data.media.decode import open_video
from data.media.images import read_image
from data.media.index import VideoIndex, index_video
from data.media.resize import fit, read_pieces, resample

logger = logging.getLogger(__name__)


def picture(file: Path, size: tuple[int, int]) -> Tensor:
    """Returns a picture as a video of one frame, float [3, 1, H, W] in [-1, 1]; says so where it is resized or
    cropped."""
    frame = read_image(file)
    _tell(file, (frame.shape[1], frame.shape[2]), size)
    return fit(frame, size)


def seconds_after(file: Path, start: float) -> float:
    """Returns how long a video goes on after `start` seconds; raises DataError (past-the-end) where it does not."""
    index = _indexed(file)
    seconds = index.num_frames / index.fps - start
    if seconds < 1 / index.fps:
        raise DataError(
            "past-the-end",
            file,
            f"lasts {index.num_frames / index.fps:.2f} s; start={start:g} is at its end or past it",
        )
    return seconds


class Footage:
    """This object reads a stretch of a video, in frames of the film. start, seconds: in the video's time."""

    def __init__(self, file: Path, start: float, seconds: float, fps: float) -> None:
        self.file, self.index = file, _indexed(file)
        times = self.index.times
        first = min(bisect.bisect_left(times, start - 1e-3 / self.index.fps), len(times) - 1)
        wanted = max(1, round(seconds * fps))
        self.frames = resample(times, first, len(times), fps)[:wanted]  # indices of the video's frames that are shown
        if wanted - len(self.frames) > 1:
            raise DataError(
                "past-the-end", file, f"has {len(self.frames) / fps:.2f} s after start={start:g}; {seconds:g} are asked"
            )

    def pieces(self, count: int, size: tuple[int, int], device: torch.device | str) -> Iterator[Tensor]:
        """Yields `count` frames in pieces float [3, f, H, W]; where there are too few, the last one is repeated."""
        _tell(self.file, (self.index.height, self.index.width), size)
        frames = (self.frames + [self.frames[-1]] * count)[:count]
        reader = open_video(self.file, "pyav", self.index)
        try:
            yield from (piece.to(device) for piece in read_pieces(reader, frames, size))
        finally:
            reader.close()


def _indexed(file: Path) -> VideoIndex:
    """Returns the index of a video, which takes a decoding of the whole; read once while the file stays as it is."""
    stat = file.stat()
    return _index_of(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(64)
def _index_of(file: Path, modified: int, size: int) -> VideoIndex:
    return index_video(file)


def _tell(file: Path, found: tuple[int, int], size: tuple[int, int]) -> None:
    if found != size:
        crops = found[0] * size[1] != found[1] * size[0]
        logger.warning(
            "%s is %dx%d; it is resized%s to %dx%d",
            file,
            *found,
            " and cropped about its middle" if crops else "",
            *size,
        )
