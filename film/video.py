"""This module writes a film's video and, if asked, what stands beside it: subtitles of its prompts, a small preview."""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.records import write_whole
from film.folder import FilmFolder
from film.plan import FilmPlan
from moc.errors import UserError

CODECS = ("libx264", "libx265")
_DECIDING = ("codec", "crf", "chapters")  # these settings decide the bytes of the videos
_PREVIEW_WIDTH, _PREVIEW_FPS, _PREVIEW_SECONDS = 320, 6, 12


@dataclass
class VideoConfig:
    """These settings say how films are written. codec: libx264 (H.264) or libx265 (HEVC). crf: its quality number; less
    is better and larger. chapters: whether each shot is a chapter of the video. subtitles: whether the prompts are
    written as video.srt and video.vtt. preview: whether preview.webp is written, small and moving, for a README."""

    codec: str = "libx264"
    crf: int = 16
    chapters: bool = False
    subtitles: bool = False
    preview: bool = False

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise UserError(
                f"video.codec={self.codec} must be one of {', '.join(CODECS)}, whose shots join frame by frame"
            )
        if not 0 <= self.crf <= 51:
            raise UserError(f"video.crf={self.crf} must be from 0, the best, to 51")

    def record(self) -> dict[str, Any]:
        """Returns those settings that decide the bytes of the videos, where they are not the usual ones."""
        usual = VideoConfig()
        chosen = {name: getattr(self, name) for name in _DECIDING}
        return chosen if any(value != getattr(usual, name) for name, value in chosen.items()) else {}


def write_subtitles(path: Path, plan: FilmPlan) -> None:
    """Writes the prompt of each shot while it is seen, as SubRip or, where the path ends in .vtt, as WebVTT."""
    is_vtt, start, blocks = path.suffix == ".vtt", 0, []
    for number, (shot, frames) in enumerate(zip(plan.script.shots, plan.num_frames, strict=True), start=1):
        times = [_clock(at / plan.script.fps, "." if is_vtt else ",") for at in (start, start + frames)]
        text = " ".join(shot.prompt.split())
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") if is_vtt else text
        blocks.append(f"{number}\n{times[0]} --> {times[1]}\n{text}\n")
        start += frames
    write_whole(path, (("WEBVTT\n\n" if is_vtt else "") + "\n".join(blocks)).encode())


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(1000 * seconds)
    hours, rest = divmod(milliseconds, 3_600_000)
    return f"{hours:02d}:{rest // 60_000:02d}:{rest // 1000 % 60:02d}{point}{rest % 1000:03d}"


def write_preview(path: Path, folder: FilmFolder, plan: FilmPlan) -> None:
    """Writes a moving WebP of the film's beginning and of each shot's: all shots have a share of its seconds."""
    each = max(2, round(_PREVIEW_FPS * _PREVIEW_SECONDS / len(plan.filmed)))

    def pick(num_frames: int) -> list[int]:
        step = max(1, round(plan.script.fps / _PREVIEW_FPS))
        return list(range(0, num_frames, step))[:each]

    frames: list[np.ndarray] = []
    for number in range(1, len(plan.filmed) + 1):
        frames.extend(folder.frames(number, pick, _preview_size))
    write_whole(path, moving(map(Image.fromarray, frames), _PREVIEW_FPS, quality=60))


def _preview_size(height: int, width: int) -> tuple[int, int]:
    return max(1, round(height * min(1, _PREVIEW_WIDTH / width))), min(width, _PREVIEW_WIDTH)


def moving(frames: Iterable[Image.Image], fps: float, quality: int) -> bytes:
    """Returns an endless WebP. quality: from 0 to 100."""
    first, *rest = frames
    file = BytesIO()
    first.save(file, format="WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0,
               quality=quality, method=4)  # fmt: skip
    return file.getvalue()
