"""This module has a small MMDiT with random weights, samples and packs for it."""

import torch
from torch import Tensor

from moc import Batch, Execution, MoCConfig, Sample, make_batch
from models.mmdit import MMDiT
from tests.weights import randomized

CHANNELS, TEXT_DIM = 4, 12
DENSE = MoCConfig(dense=True)
MOC = MoCConfig(chunk_tokens=12, top_k=2)


def small_model(**changes) -> MMDiT:
    sizes = {"latent_channels": CHANNELS, "text_dim": TEXT_DIM, "dim": 48, "num_layers": 2, "num_heads": 2}
    model = randomized(MMDiT(**sizes, ffn_dim=64, **changes))
    model.execution = Execution("reference")
    return model


def sample(num_shots: int = 3, global_tokens: int = 3, frames: int = 2) -> Sample:
    latents = [torch.randn(CHANNELS, frames, 4, 6) for _ in range(num_shots)]
    lengths = [global_tokens, *range(2, 2 + num_shots)]
    return Sample(latents, [torch.randn(n, TEXT_DIM) for n in lengths])


def run(model: MMDiT, batch: Batch, config: MoCConfig, sigma: Tensor | None = None, drops=None) -> list[Tensor]:
    sigma = torch.linspace(0.2, 0.9, batch.num_shots) if sigma is None else sigma
    return model(batch.latents, sigma, batch.text, batch.layout, config, drops)


def pack(model: MMDiT, *samples: Sample) -> Batch:
    return make_batch(samples, model.stream, MOC.chunk_tokens)
