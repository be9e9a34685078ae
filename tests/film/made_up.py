"""This module has films made up for tests: scripts, codecs whose latents one can read, sampling that is told what to
make."""

import torch

from film.script import Script, ScriptShot
from moc.diffusion import Progress
from models.encoders.codec import Codec


class MeanCodec(Codec):
    """Latents are block means; time is taken every fourth frame."""

    latent_channels, spatial_factor = 3, 8

    def __init__(self, continuous=False):
        super().__init__()
        self.continuous = continuous

    def encode_piece(self, frames, memory, first):
        assert -1 <= frames.min() <= frames.max() <= 1
        return torch.nn.functional.avg_pool3d(frames, (1, 8, 8))[:, ::4]


class FlatCodec(MeanCodec):
    """This codec decodes a latent to frames of one colour, its mean."""

    def decode_piece(self, latent, memory, first):
        return latent.mean().expand(3, 4 * latent.shape[1] - 3 * first, 32, 48)

    latents_at_once = 1000


def echo(global_caption, shot_captions):
    """Returns features that are the captions."""
    return [global_caption, *shot_captions]


def script(*shots: ScriptShot, size=(64, 96), fps=12.0) -> Script:
    return Script("t", "whole story", size, fps, "ugly", shots)


def latent(value: float = 0.5) -> torch.Tensor:
    return torch.full((3, 2, 2, 2), value)


def plays(*latents: torch.Tensor):
    """Yields sampling that finishes a shot at each step."""

    def sampling(on_step, start):
        done = start.step if start else 0
        for index, made in enumerate(latents[done:], start=done):
            yield index, made
            on_step(Progress(index + 1, len(latents), dict(enumerate(latents[: index + 1]))))

    return sampling
