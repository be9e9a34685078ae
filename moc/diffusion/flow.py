"""Rectified flow with a noise level for each shot. `Flow` owns the convention: loss and samplers both ask it.

    noisy = (1 - sigma) latent + sigma noise        velocity = noise - latent        sigma in [0, 1], 1 = pure noise

Training draws sigma for each shot from a shifted logit-normal. In a share of the samples the shots before a random one
are a near-clean history, so that the model learns to continue from shots it is given, with the small errors that
sampled shots have. Sources: LCT, arXiv 2503.10589 (a timestep for each shot, history noise); SD3, arXiv 2403.03206
(logit-normal, shift).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moc.batch import Batch
from moc.config import DropKey, MoCConfig
from moc.routing import hash32

Model = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class ShotLosses:
    """Mean squared velocity error of each shot and the noise level it was at, both [S]."""

    loss: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Flow:
    """shift: moves noise levels up for larger latents, in training and sampling (Wan: 3 at 480p, 5 above).
    logit_mean, logit_std: of the logit-normal sigma. history_rate: share of samples with a near-clean history, whose
    sigma is uniform in [0, history_sigma]."""

    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    history_rate: float = 0.5
    history_sigma: float = 0.1

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"flow.shift={self.shift} must be positive")
        for name in ("history_rate", "history_sigma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"flow.{name}={getattr(self, name)} must lie in [0, 1]")

    def shifted(self, sigma: Tensor) -> Tensor:
        """A uniform time in [0, 1] as the noise level the shift makes of it."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        return (1 - sigma) * latent + sigma * noise

    def velocity(self, latent: Tensor, noise: Tensor) -> Tensor:
        return noise - latent

    def draw_sigma(self, num_shots: int, generator: torch.Generator) -> Tensor:
        """Noise levels of one sample's shots: float32 [num_shots], on the CPU."""
        logits = self.logit_mean + self.logit_std * torch.randn(num_shots, generator=generator)
        sigma = self.shifted(logits.sigmoid())
        history = torch.rand(num_shots, generator=generator) * self.history_sigma
        has_history = torch.rand((), generator=generator) < self.history_rate
        first_noisy = torch.randint(num_shots, (), generator=generator)
        is_history = has_history & (torch.arange(num_shots) < first_noisy)
        return torch.where(is_history, history, sigma)

    def draw(self, batch: Batch, seed: int) -> tuple[Tensor, list[Tensor]]:
        """Noise levels [S] (CPU) and noise for a batch, keyed by (seed, position of the sample): the same whatever the
        number of ranks and the packing, and whether the run was resumed."""
        sigma: list[Tensor] = []
        noise: list[Tensor] = []
        for position, (_, shots) in zip(batch.positions, batch.layout.samples, strict=True):
            key = hash32(hash32(seed) ^ position)
            latents = batch.latents[len(noise) : len(noise) + len(shots)]
            sigma.append(self.draw_sigma(len(shots), torch.Generator().manual_seed(key)))
            generator = torch.Generator(latents[0].device).manual_seed(key)
            noise += [torch.randn(x.shape, generator=generator, device=x.device) for x in latents]
        return torch.cat(sigma), noise

    def loss(
        self,
        model: Model,
        batch: Batch,
        moc: MoCConfig,
        seed: int,
        drops: DropKey | None = None,
        sigma: Tensor | None = None,
        on_routes: Callable[[int, Tensor], None] | None = None,
    ) -> ShotLosses:
        """The training loss of every shot of a batch; `sigma` [S] overrides the drawn noise levels (validation)."""
        drawn, noise = self.draw(batch, seed)
        sigma = (drawn if sigma is None else sigma).to(batch.layout.device)
        latents = [x.float() for x in batch.latents]
        noisy = [self.add_noise(x, n, s) for x, n, s in zip(latents, noise, sigma, strict=True)]
        predicted = model(noisy, sigma, batch.text, batch.layout, moc, drops=drops, on_routes=on_routes)
        errors = [p.float() - self.velocity(x, n) for p, x, n in zip(predicted, latents, noise, strict=True)]
        return ShotLosses(torch.stack([error.square().mean() for error in errors]), sigma)
