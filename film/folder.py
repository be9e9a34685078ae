"""The folder of one film: what sampling writes there, each file whole or not at all.

latents/01.safetensors, shots/01.mp4, ...    as soon as a shot is known
video.mp4                                    the shots one after another
metadata.json                                everything to repeat the film
storyboard.png, routing.png                  pictures of it, which it is whole without
"""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from data.cache.writer import write_whole
from data.errors import DataError
from data.media.write import write_video

FILES = ("latents/*.safetensors", "shots/*.mp4", "video.mp4", "metadata.json", "storyboard.png", "routing.png")
logger = logging.getLogger(__name__)


class FilmFolder:
    """A folder for one film, made when it is first written to. Raises DataError (film-exists, not-a-folder) where it
    cannot be one: a shorter film would leave the last shots of a longer one standing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise DataError("not-a-folder", self.path, "is a file; name a folder for the film")
        there = next((file for pattern in FILES for file in sorted(self.path.glob(pattern))), None)
        if there is not None:
            raise DataError(
                "film-exists", self.path, f"already holds {there.relative_to(self.path)} of a film; name another folder"
            )

    def write_latent(self, number: int, latent: Tensor) -> None:
        """The latent [C, T, H, W] of a shot, counted from 1."""
        write_whole(self.path / f"latents/{number:02d}.safetensors", save({"latent": latent.contiguous()}))

    def write_shot(self, number: int, frames: np.ndarray, fps: float) -> None:
        """The frames of a shot, uint8 [F, H, W, 3]."""
        write_video(self.path / f"shots/{number:02d}.mp4", frames, fps)

    def write_video(self, frames: Iterable[np.ndarray], fps: float) -> int:
        """All frames of the film, uint8 [H, W, 3] each; returns how many."""
        return write_video(self.path / "video.mp4", frames, fps)

    def write_metadata(self, record: dict[str, Any]) -> None:
        """What makes the film repeatable, as JSON; what JSON does not know is written as text."""
        text = json.dumps(record, indent=2, default=str) + "\n"
        write_whole(self.path / "metadata.json", text.encode())

    def draw(self, name: str, draw: Callable[..., None], *what: Any) -> None:
        """Has `draw(path, *what)` make a picture of the film. One that fails costs no more than itself: a warning."""
        path = self.path / name
        try:
            draw(path, *what)
        except Exception as error:
            logger.warning("%s is left out, the film is whole (%s: %s)", path, type(error).__name__, error)

    def files(self) -> list[Path]:
        """What there is to look at."""
        return [path for name in FILES[2:] if name != "metadata.json" and (path := self.path / name).exists()]
