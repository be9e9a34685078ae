"""This module defines what data asks of the codec and the text encoder that it is given; data never imports models."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """A codec encodes video, float [3, F, H, W] in [-1, 1], to latents [C, T, H', W'].

    It says how many frames make whole latent frames; it may depend on `shot`, a shot's index in its sample.
    """

    latent_channels: int
    spatial_factor: int
    fingerprint: str

    def encode(self, video: Tensor) -> Tensor:
        """Returns the latent of a still, or of a sample's only shot."""

    def shot_encoder(self) -> Callable[[Iterable[Tensor]], Tensor]:
        """Returns a function for one sample: it takes the pieces of each shot in order, and gives its latent."""

    def shot_decoder(self) -> Callable[[Tensor], Iterable[Tensor]]:
        """Returns a function for one sample: it takes the latent of each shot in order, and gives its pieces."""

    def begins_video(self, shot: int) -> bool:
        """Returns whether the shot starts afresh, not where the one before ended."""

    def latent_frames(self, frames: int, shot: int = 0) -> int:
        """Returns how many latent frames a shot of `frames` has, which must make whole ones."""

    def whole_frames(self, frames: int, shot: int = 0) -> int:
        """Returns the longest run within `frames` that is whole latent frames; 0 where there is none."""

    def enclosing_frames(self, frames: int, shot: int = 0) -> int:
        """Returns the shortest length of whole latent frames that is at least `frames`."""

    def nearest_frames(self, frames: float, shot: int = 0) -> int:
        """Returns the length of whole latent frames, one at least, nearest to `frames`."""


class TextEncoder(Protocol):
    """A text encoder turns captions into features: 1 + S tensors [T_i, text_dim]."""

    fingerprint: str

    def encode(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]: ...

    def encode_each(self, captions: Sequence[str]) -> list[Tensor]:
        """Returns features of captions that stand alone, one each."""
