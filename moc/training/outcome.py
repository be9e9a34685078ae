"""An `Outcome` is a training step's loss and gradient norm, read a step late so that the host never waits for them.

A step whose loss or gradient is not finite is skipped on the device, before the optimizer steps (`found_inf`, which
fused AdamW heeds). The host hears of it when the next step is under way, counts it and names its scenes.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moc.batch import Batch
from moc.counts import count_of
from moc.diffusion.flow import NoiseLevels
from moc.training.ema import EMA
from moc.training.parallel import Parallel, gather_lists
from moc.training.shards import local

logger = logging.getLogger(__name__)


class Outcome:
    """An outcome is what came of a step. `read` waits for the device to have finished the step; the constructor does
    not."""

    def __init__(
        self, step: int, batches: Sequence[Batch], levels: Sequence[NoiseLevels], losses: Tensor, totals: Tensor
    ) -> None:
        """Takes the step's number, from 1 on, the levels of each batch and the losses [S] of this process's shots.
        totals: the loss, the gradient's norm and the number of finite shot losses, over all processes."""
        self.step, self._layouts, self._levels = step, [batch.layout for batch in batches], levels
        self._shot_ids = _of_each_shot(batches, [batch.ids for batch in batches])
        self._sources = _of_each_shot(batches, [batch.sources for batch in batches])
        self._losses, self._totals = (values.to("cpu", non_blocking=True) for values in (losses, totals))
        self._arrived = torch.cuda.Event() if totals.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def read(self) -> "Totals":
        if self._arrived:
            self._arrived.synchronize()
        return Totals(*self._totals.tolist())

    def target_shots(self) -> Iterator["ShotLoss"]:
        """Yields this process's target shots of finite loss, once `read` has returned."""
        indices = (group.shot + 1 for layout in self._layouts for group in layout.groups if group.shot >= 0)
        sigmas, targets = (
            torch.cat([getattr(level, name) for level in self._levels]).tolist() for name in ("sigma", "is_target")
        )
        columns = (self._losses.tolist(), sigmas, indices, self._shot_ids, self._sources)
        shots = (ShotLoss(*row) for row in zip(*columns, strict=True))
        return (shot for shot, target in zip(shots, targets, strict=True) if target and math.isfinite(shot.loss))

    def scenes(self) -> list[str]:
        """Returns the ids of the samples whose loss is not finite, or of all of the step where every loss is: nobody
        knows then whose gradient it was. Every process takes part."""
        finite = self._losses.isfinite().tolist()
        broken = gather_lists([name for name, fine in zip(self._shot_ids, finite, strict=True) if not fine])
        everyone = gather_lists(self._shot_ids)
        return list(dict.fromkeys(broken or everyone))

    def worst_scenes(self) -> list[str]:
        """Returns the three scenes of the largest losses, the worst first. Every process takes part."""
        shots = gather_lists([(shot.loss, shot.scene) for shot in self.target_shots()])
        return list(dict.fromkeys(scene for _, scene in sorted(shots, reverse=True)))[:3]


@dataclass(slots=True)  # hundreds are made a step: frozen, each would take twice as long
class ShotLoss:
    """This is a shot's loss, with its noise level, its number in its film from 1 on, its scene and the source of
    that."""

    loss: float
    sigma: float
    index: int
    scene: str
    source: str


def _of_each_shot(batches: Sequence[Batch], by_sample: Sequence[Sequence[str]]) -> list[str]:
    """Returns what is said of each sample of each batch, once for each of its shots."""
    return [
        value
        for batch, values in zip(batches, by_sample, strict=True)
        for value, (_, shots) in zip(values, batch.layout.samples, strict=True)
        for _ in shots
    ]


@dataclass(frozen=True)
class Totals:
    """These numbers sum up a step. loss, grad_norm: over all processes. num_finite: how many of its shots have a finite
    loss."""

    loss: float = math.nan
    grad_norm: float = math.nan
    num_finite: float = 0

    @property
    def skipped(self) -> bool:
        """Returns whether the optimizer left the step out."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))

    def finite(self) -> dict[str, float]:
        """Returns those of the loss and the norm that can be logged: JSON has no NaN."""
        values = {"loss": self.loss, "grad_norm": self.grad_norm}
        return {name: value for name, value in values.items() if math.isfinite(value)}


class TooManySkipped(FloatingPointError):
    """This error is raised where too many steps in a row were skipped."""


class SkipCount:
    """This object counts skipped steps, names their scenes and ends the run past `most` of them in a row. tells:
    whether this process logs them, as one of all does."""

    def __init__(self, most: int, tells: bool) -> None:
        self.most, self.tells, self.total, self.in_a_row = most, tells, 0, 0

    def add(self, outcome: Outcome, totals: Totals) -> list[str]:
        """Returns the scenes of a skipped step, none for another. Every process takes part.

        Raises TooManySkipped past `most` skipped steps in a row.
        """
        if not totals.skipped:
            self.in_a_row = 0
            return []
        self.total += 1
        self.in_a_row += 1
        scenes = outcome.scenes()
        what = f"loss {totals.loss:g}, gradient norm {totals.grad_norm:g}"
        if self.tells:
            logger.warning("step %d is skipped (%s); its scenes: %s", outcome.step, what, ", ".join(scenes))
        if self.in_a_row > self.most:
            raise TooManySkipped(
                f"{count_of(self.in_a_row, 'step')} in a row had no finite loss and gradient, the last of them step "
                f"{outcome.step} ({what}; scenes {', '.join(scenes)}), which is more than "
                f"trainer.max_skipped_steps={self.most}: look at these scenes, lower optim.lr, or raise the limit"
            )
        return scenes


class Spikes:
    """This object reports losses and gradient norms far above what they were before, with the scenes of the largest
    losses.

    Far means so many standard deviations of their logarithm, over some hundred past steps, and twice the usual value.
    tells: whether this process logs them, as one of all does.
    """

    DEVIATIONS, WARM_UP, MEMORY = 6.0, 50, 100

    def __init__(self, tells: bool) -> None:
        self.tells = tells
        self._moments = {"loss": (0.0, 0.0), "grad_norm": (0.0, 0.0)}  # mean and variance of the logarithms
        self._steps = 0

    def add(self, outcome: Outcome, totals: Totals) -> list[str]:
        """Returns the scenes of a spike, none for another step. Every process takes part, and all see the same
        totals."""
        if totals.skipped:
            return []
        self._steps += 1
        told = [self._look(name, getattr(totals, name)) for name in self._moments]
        if self._steps <= self.WARM_UP or not any(told):
            return []
        scenes = outcome.worst_scenes()
        what = ", ".join(filter(None, told))
        if self.tells:
            logger.warning(
                "step %d is a spike (%s); its scenes of the largest loss: %s", outcome.step, what, ", ".join(scenes)
            )
        return scenes

    def _look(self, name: str, value: float) -> str:
        """Returns what is to be told of a value, if anything; takes it into the moments."""
        logarithm, (mean, variance) = math.log(max(value, 1e-30)), self._moments[name]
        above = logarithm - mean
        weight = max(1 / self._steps, 1 / self.MEMORY)
        self._moments[name] = mean + weight * above, (1 - weight) * (variance + weight * above**2)
        far = above > max(math.log(2), self.DEVIATIONS * math.sqrt(variance))
        return f"{name} {value:g}, usually {math.exp(mean):g}" if far else ""


def check_finite(parallel: Parallel, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Raises FloatingPointError, on every process, where a weight, an average or an optimizer state is not finite."""
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    trained = (weight for weight in model.parameters() if weight.requires_grad)
    tensors = {"weights": trained, "averaged weights": ema.averages.values(), "optimizer's states": states}
    for name, values in tensors.items():
        finite = _by_device(local(value).isfinite().all() for value in values)
        if parallel.any(not all(map(bool, finite))):
            raise FloatingPointError(
                f"the {name} are not finite after step {step}, and no checkpoint of it is written; lower optim.lr and "
                "resume from the newest checkpoint"
            )


def _by_device(flags: Iterable[Tensor]) -> list[Tensor]:
    """Returns whether all flags of a device are set, for each device that some lie on, so that the host waits once for
    each."""
    found: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        found.setdefault(flag.device, []).append(flag)
    return [torch.stack(some).all() for some in found.values()]
