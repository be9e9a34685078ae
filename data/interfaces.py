"""What data asks of the codec and the text encoder it is handed; it never imports models."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Video to latents: float [3, F, H, W] in [-1, 1] to [C, T, H', W'], F = temporal_factor * n + 1."""

    latent_channels: int
    temporal_factor: int
    spatial_factor: int
    fingerprint: str

    def encode(self, video: Tensor) -> Tensor: ...


class TextEncoder(Protocol):
    """Captions to features: 1 + S tensors [T_i, text_dim]."""

    fingerprint: str

    def encode(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]: ...
