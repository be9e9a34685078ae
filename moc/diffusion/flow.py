"""Rectified flow gives each shot a noise level. `Flow` owns the convention: loss and samplers both ask it.

    noisy = (1 - sigma) latent + sigma noise        velocity = noise - latent        sigma in [0, 1], 1 = pure noise

Training draws sigma for each shot from a shifted logit-normal. Where a model is one of two experts, each for its own
noise levels (Wan2.2), it is cut off to the range of these. In a share of the samples the shots before a random one are
a near-clean history, so that the model learns to continue from shots it is given, with the small errors that sampled
shots have. Sources: LCT, arXiv 2503.10589 (a timestep for each shot, history noise); SD3, arXiv 2403.03206
(logit-normal, shift).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from moc.batch import Alike, Batch, each_shape, laid_out, shapes
from moc.config import DropKey, MoCConfig
from moc.errors import UserError
from moc.layout import ShotLayout
from moc.move import move
from moc.routing import hash32

Model = Callable[..., Sequence[Tensor]]
OnRoutes = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class NoiseLevels:
    """These are the noise level of each shot of a batch, and which shots are to be learned: sigma float32 [S],
    is_target bool [S], on the CPU. The others are history: they are given almost clean and have no loss, which would be
    all noise."""

    sigma: Tensor
    is_target: Tensor

    @classmethod
    def equal(cls, level: float, num_shots: int) -> "NoiseLevels":
        """Returns all shots at one level, all of them targets."""
        return cls(torch.full((num_shots,), level), torch.ones(num_shots, dtype=torch.bool))

    @classmethod
    def after_clean_history(cls, level: float, layout: ShotLayout) -> "NoiseLevels":
        """Returns the last shot of each sample at one level, a target; those before it clean."""
        last = torch.tensor([i + 1 == len(shots) for _, shots in layout.samples for i in range(len(shots))])
        return cls(torch.where(last, level, 0.0), last)


class Noised(NamedTuple):
    """This is what a model is given and is to predict, on the device: noisy latents and velocities [C, T, H, W], one
    each for each shot, their noise levels, sigma float32 [S], and the text and the layout of the batch."""

    latents: Sequence[Tensor]
    targets: Sequence[Tensor]
    sigma: Tensor
    text: Sequence[Tensor]
    layout: ShotLayout


@dataclass(frozen=True)
class Flow:
    """The flow owns the noise convention and says how training draws noise levels.

    shift: moves noise levels up for larger latents, in training and sampling (Wan: 3 at 480p, 5 above).
    logit_mean, logit_std: mean and deviation of sigma's logits before the shift.
    sigma_min, sigma_max: the range that the shifted sigma is cut off to.
    history_rate: the share of samples of two shots or more that have a near-clean history.
    history_sigma: the history's sigma is uniform in [0, history_sigma], whatever the range.
    dense_target: the share, in training, of the velocity of the same weights under dense attention in what is to be
        predicted; it takes one more forward, without gradients. Where sparse attention is fine-tuned, the data alone as
        target was found to do harm (SpargeAttention2).
    dense_attention: the weight, in training, of how far attention is from dense attention with the same queries, keys
        and values: the squared difference of a shot as a share of its square, averaged over the layers that route. It
        takes one dense attention a layer.
    Raises UserError where a value leaves its range.
    """

    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    history_rate: float = 0.5
    history_sigma: float = 0.1
    dense_target: float = 0.0
    dense_attention: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:  # refuses nan too
            raise UserError(f"flow.shift={self.shift} must be positive and finite")
        for name in ("history_rate", "history_sigma", "dense_target"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"flow.{name}={getattr(self, name)} must lie in [0, 1]")
        if not 0 <= self.dense_attention < math.inf:
            raise UserError(f"flow.dense_attention={self.dense_attention} must be 0 or more, and finite")
        if not 0 < self.logit_std < math.inf:
            raise UserError(f"flow.logit_std={self.logit_std} must be positive and finite")
        if not math.isfinite(self.logit_mean):
            raise UserError(f"flow.logit_mean={self.logit_mean} must be finite")
        if not 0 <= self.sigma_min < self.sigma_max <= 1:
            raise UserError(
                f"flow.sigma_min={self.sigma_min}, flow.sigma_max={self.sigma_max} must be a range in [0, 1]"
            )
        lowest, highest = self._quantiles()
        if highest - lowest < 1e-6:  # float64 has too few numbers in so narrow a range
            raise UserError(
                f"flow.sigma_min={self.sigma_min}, flow.sigma_max={self.sigma_max} hold a share of "
                f"{float(highest - lowest):.0e} of the logit-normal: set flow.shift and flow.logit_mean to fit them"
            )

    def shifted(self, sigma: Tensor) -> Tensor:
        """Returns the noise level that the shift makes of an unshifted one; both lie in [0, 1], whose ends stay as they
        are."""
        return sigma / (sigma + (1 - sigma) / self.shift)  # is exactly 1 at 1, where s x / (1 + (s - 1) x) rounds

    def level(self, share: float) -> float:
        """Returns the noise level a share of the way through the range that is trained."""
        return self.sigma_min + share * (self.sigma_max - self.sigma_min)

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """Returns the latent at noise level sigma in [0, 1], a number or a tensor that broadcasts against latent and
        noise, which are of one shape, such as [C, T, H, W]: 0 gives the latent, 1 the noise."""
        return (1 - sigma) * latent + sigma * noise

    def velocity(self, latent: Tensor, noise: Tensor) -> Tensor:
        """Returns what a model predicts: the derivative of `add_noise` by sigma, in the shape of latent and noise."""
        return noise - latent

    def draw_levels(self, batch: Batch, seed: int) -> NoiseLevels:
        """Draws the noise levels of a batch in training, keyed by (seed, position of the sample): they are the same
        whatever the number of ranks and the packing, and whether the run was resumed."""
        counts, generator = [len(shots) for _, shots in batch.layout.samples], torch.Generator()
        draws = [
            _draw_sample(count, generator.manual_seed(draw_key(seed, 2 * position)))
            for position, count in zip(batch.layout.positions, counts, strict=True)
        ]
        # A pack may hold hundreds of samples: what follows the draws is computed for all of them at once.
        normal, uniform, chance, first_target = (torch.cat(draws_of_all) for draws_of_all in zip(*draws, strict=True))
        of_sample = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        shot = torch.cat([torch.arange(count) for count in counts])
        is_target = (chance >= self.history_rate)[of_sample] | (shot >= first_target[of_sample])
        sigma = torch.where(is_target, self._level_of(normal), uniform * self.history_sigma)
        return NoiseLevels(sigma, is_target)

    def _level_of(self, normal: Tensor) -> Tensor:
        """Returns the noise levels of normal draws, float32: their quantiles are squeezed into those of the range."""
        lowest, highest = self._quantiles()
        quantile = lowest + (highest - lowest) * torch.special.ndtr(normal.double())
        logits = self.logit_mean + self.logit_std * torch.special.ndtri(quantile)
        return self.shifted(logits.sigmoid()).clamp(self.sigma_min, self.sigma_max).float()

    def _quantiles(self) -> Tensor:
        """Returns the quantiles of sigma_min and sigma_max in the logit-normal, float64 [2]; the shift adds its
        logarithm to the logits."""
        bounds = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64).logit() - math.log(self.shift)
        return torch.special.ndtr((bounds - self.logit_mean) / self.logit_std)

    def draw_noise(self, batch: Batch, seed: int) -> Alike:
        """Draws noise for each latent, on its device, keyed like the levels."""
        device, of_shots = batch.layout.device, shapes(batch.latents)
        numbers = (shape.numel() for shape in of_shots)
        sizes = [sum(islice(numbers, len(shots))) for _, shots in batch.layout.samples]
        noise, generator = torch.empty(sum(sizes), device=device), torch.Generator(device)
        for position, drawn in zip(batch.layout.positions, noise.split(sizes), strict=True):  # one launch a sample
            torch.randn(drawn.shape, generator=generator.manual_seed(draw_key(seed, 2 * position + 1)), out=drawn)
        return laid_out(noise, of_shots)

    def loss(
        self, model: Model, batch: Batch, levels: NoiseLevels, moc: MoCConfig, seed: int,
        drops: DropKey | None = None, on_routes: OnRoutes | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns the mean squared velocity error of every shot, history included: fp32 [S]. While gradients are taken,
        `dense_target` and `dense_attention` count.

        levels: noise levels of the batch's shots, on the CPU. moc: what attention attends to. seed: of the noise.
        drops, on_routes: handed to the model.
        """
        return self.errors(model, self.noised(batch, levels, seed), moc, drops, on_routes)

    def noised(self, batch: Batch, levels: NoiseLevels, seed: int) -> Noised:
        """Returns the batch at these noise levels."""
        sigma = move(levels.sigma, batch.layout.device)
        by_shot = Alike([(range(len(sigma)), sigma)])
        latents, noise = each_shape(Tensor.float, batch.latents), self.draw_noise(batch, seed)
        noisy = each_shape(lambda x, n, s: self.add_noise(x, n, s.view(-1, 1, 1, 1, 1)), latents, noise, by_shot)
        return Noised(noisy, each_shape(self.velocity, latents, noise), sigma, batch.text, batch.layout)

    def errors(
        self, model: Model, noised: Noised, moc: MoCConfig, drops: DropKey | None, on_routes: OnRoutes | None = None
    ) -> Tensor:
        """Returns the `loss` of what is drawn already, so that a CUDA graph can hold it."""
        noisy, targets, sigma, text, layout = noised
        if self.dense_target and torch.is_grad_enabled():
            targets = self._towards_dense(model, noised, moc)
        found: list[Tensor] = []
        told = {"on_distances": found.append} if self.dense_attention and torch.is_grad_enabled() else {}
        predicted = model(noisy, sigma, text, layout, moc, drops=drops, on_routes=on_routes, **told)
        error = each_shape(lambda p, t: (p.float() - t).square().flatten(1).mean(1), predicted, targets).stacked()
        return error + self.dense_attention * _share(found[0], layout) if found else error

    def _towards_dense(self, model: Model, noised: Noised, moc: MoCConfig) -> list[Tensor]:
        """Returns the targets, moved by `dense_target` to what the model says under dense attention."""
        with torch.no_grad():
            dense = model(noised.latents, noised.sigma, noised.text, noised.layout, replace(moc, dense=True))
        return [t.lerp(d.float(), self.dense_target) for t, d in zip(noised.targets, dense, strict=True)]


def _share(distances: Tensor, layout: ShotLayout) -> Tensor:
    """Sums the distances of video tokens, fp32 [Lv, layers, 2], over each shot, and returns the first sum as a share of
    the second, averaged over the layers: fp32 [S]."""

    def shot_lengths() -> Tensor:
        lengths = torch.tensor([math.prod(group.grid) for group in layout.groups if group.grid is not None])
        return move(lengths, layout.device)

    sums = torch.segment_reduce(distances, "sum", lengths=layout.memo("shot lengths", shot_lengths), unsafe=True)
    return (sums[..., 0] / sums[..., 1].clamp(min=1e-12)).mean(1)


def _draw_sample(num_shots: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws for one sample a normal and a uniform number for each shot, fp32 [S] twice, a uniform one that says whether
    it has a history, fp32 [1], and the first shot after that, int64 [1]."""
    normal, uniform = torch.randn(num_shots, generator=generator), torch.rand(num_shots, generator=generator)
    chance = torch.rand(1, generator=generator)
    return normal, uniform, chance, torch.randint(min(1, num_shots - 1), num_shots, (1,), generator=generator)


def draw_key(seed: int, number: int) -> int:
    """Returns the key of random draws. Levels take even numbers and noise odd ones: one stream of random numbers for
    both would tie them."""
    return hash32(hash32(seed) ^ number)
