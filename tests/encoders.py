"""This module has stand-ins for codec and text encoder: exact, instant, and countable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.encoders.codec import Codec
from tests.films import read_numbers


class PoolCodec(Codec):
    """This codec keeps every fourth frame, averaged over 8 x 8 pixels: the numbers of numbered films stay readable."""

    latent_channels, spatial_factor, fingerprint = 3, 8, "pool"
    latents_at_once = 1000

    def __init__(self, continuous: bool = False) -> None:
        super().__init__()
        self.continuous = continuous
        self.encoded: list[int] = []  # the number in the first frame of each shot
        self.fail_at: int | None = None
        self.error: BaseException | None = None
        self.nan_at: int | None = None

    def encode_piece(self, frames: Tensor, memory: dict, first: bool) -> Tensor:
        assert frames.shape[1] % 4 == first
        latent = F.avg_pool3d(frames, (1, 8, 8))[:, ::4]
        first = numbers_in(latent)[0]
        if self.error and first == self.fail_at:
            raise self.error
        self.encoded.append(first)
        return torch.full_like(latent, torch.nan) if first == self.nan_at else latent


def numbers_in(latent: Tensor) -> list[int]:
    """Returns the numbers that the latent frames [3, T, H, W] of a numbered film carry."""
    frames = ((latent.float() + 1) * 127.5).permute(1, 2, 3, 0)
    return read_numbers(frames.repeat_interleave(8, 1).repeat_interleave(8, 2))


class WordText:
    """This encoder gives a row for each word, and one for the end."""

    fingerprint = "words"

    def encode(self, global_caption: str, shot_captions: list[str]) -> list[Tensor]:
        return [self._rows(caption) for caption in (global_caption, *shot_captions)]

    @staticmethod
    def _rows(caption: str) -> Tensor:
        words = [float(len(word)) for word in caption.split()] + [0.0]
        return torch.tensor(words)[:, None].expand(-1, 4).contiguous()
