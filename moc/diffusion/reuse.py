"""A step may take the velocity of an earlier one, where it is thought to have hardly changed.

How much it has changed is estimated from the shot itself, without asking the model: the latent's distance from where
the model was last asked, times how much the velocity changed per distance between the last two times (EasyCache, arXiv
2507.02860). diffusers' caches hook into the blocks of a model and compare features of all tokens: these are too much to
keep with an unfinished film, and decide once for shots at several noise levels. What is kept here belongs to one shot,
and is small.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from moc.diffusion.steps import Step

Way = list[float]  # describes a step's call; calls with equal lists differ only in latents and noise levels


@dataclass(frozen=True)
class Asked:
    """This is what the model was last asked about a shot: in which way, with the latent and the velocity then, both
    fp32 [C, T, H, W], and the rate, which is how much the velocity had changed since the time before, divided by the
    latent's distance; inf where it is not known."""

    way: Way
    latent: Tensor
    velocity: Tensor
    rate: float = inf

    def change(self, latent: Tensor) -> float:
        """Returns the share of itself by which the velocity is thought to have changed at another latent."""
        return self.rate * _size(latent - self.latent) / max(_size(self.velocity), 1e-12)

    def again(self, way: Way, latent: Tensor, velocity: Tensor) -> "Asked":
        """Returns what is kept once the model has been asked again."""
        distance = _size(latent - self.latent) if way == self.way else 0.0
        return Asked(way, latent, velocity, _size(velocity - self.velocity) / distance if distance else inf)


class StepReuse:
    """This object keeps what the model was last asked about each unfinished shot. reused: how many steps took a
    velocity again."""

    def __init__(
        self, threshold: float, reused: int = 0, remembered: Mapping[int, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Takes a velocity again where it is thought to have changed by less than the share `threshold`. reused,
        remembered: as an earlier one had them, by `remembered` of each shot."""
        self.threshold, self.reused = threshold, reused
        self._asked: dict[int, Asked] = {}
        for index, own in (remembered or {}).items():
            if "asked" in own:
                rate, *way = own["asked"].tolist()
                self._asked[index] = Asked(way, own["asked_latent"], own["asked_velocity"], rate)

    def known(
        self, step: Step, scales: Mapping[int, float], is_high: bool, latents: Mapping[int, Tensor]
    ) -> dict[int, Tensor] | None:
        """Returns the velocities of shots with these latents if those of all of them hold, else None: ask the model.
        scales, is_high: as in `guidance_scales`."""
        way = _way(step, scales, is_high)
        if not all(self._holds(way, index, latent) for index, latent in latents.items()):
            return None
        self.reused += 1
        return {index: self._asked[index].velocity for index in latents}

    def keep(
        self,
        step: Step,
        scales: Mapping[int, float],
        is_high: bool,
        latents: Mapping[int, Tensor],
        velocity: Mapping[int, Tensor],
    ) -> None:
        """Keeps what the model was asked about these shots, and answered; lets go of all others."""
        way = _way(step, scales, is_high)
        before = {index: self._asked.get(index, Asked([], x, velocity[index])) for index, x in latents.items()}
        self._asked = {index: before[index].again(way, latent, velocity[index]) for index, latent in latents.items()}

    def remembered(self, index: int) -> dict[str, Tensor]:
        """Returns what the next step needs of those before; it is kept with an unfinished film."""
        if index not in self._asked:
            return {}
        asked = self._asked[index]
        numbers = torch.tensor([asked.rate, *asked.way], dtype=torch.float64)
        return {"asked": numbers, "asked_latent": asked.latent, "asked_velocity": asked.velocity}

    def _holds(self, way: Way, index: int, latent: Tensor) -> bool:
        before = self._asked.get(index)
        return before is not None and before.way == way and before.change(latent) < self.threshold


def _way(step: Step, scales: Mapping[int, float], is_high: bool) -> Way:
    """Returns what of a step, besides latents and noise levels, decides the velocities."""
    pairs = (number for pair in scales.items() for number in pair)
    return [float(step.is_dense), float(is_high), float(len(step.shots)), *map(float, step.shots), *map(float, pairs)]


def _size(x: Tensor) -> float:
    return float(x.abs().mean())
