"""This module measures the held-out loss of one model under rival settings of attention, at the same noise."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evaluation.estimates import Estimate, estimate
from moc import MoCConfig
from moc.batch import Batch
from moc.diffusion import Flow
from moc.errors import UserError
from moc.training import Parallel, Validator, rivals
from moc.training.parallel import gather_lists


@dataclass(frozen=True)
class RivalRow:
    """A row is the result of one kind of attention. clean_history: whether only the last shot is noisy. sparsity: that
    of all scenes together. losses: by noise level, over scenes and draws of noise."""

    attention: str
    clean_history: bool
    sparsity: float
    losses: dict[float, Estimate]

    @property
    def line(self) -> str:
        """Returns the row for the terminal."""
        history = "clean history, last shot" if self.clean_history else "equal noise, all shots  "
        losses = "  ".join(f"sigma {sigma:g}: {loss}" for sigma, loss in self.losses.items())
        return f"{history}  {self.attention:<14} sparsity {self.sparsity:.0%}  {losses}"

    def record(self) -> dict:
        """Returns the row for JSON. loss: means; scenes, draws: halves of 95 % intervals, null of fewer than
        five."""
        halves = {
            name: {sigma: None if math.isnan(half) else half for sigma, half in values.items()}
            for name, values in (
                ("scenes", {sigma: loss.scenes for sigma, loss in self.losses.items()}),
                ("draws", {sigma: loss.draws for sigma, loss in self.losses.items()}),
            )
        }
        row = {"attention": self.attention, "clean_history": self.clean_history, "sparsity": self.sparsity}
        return row | {"loss": {sigma: loss.mean for sigma, loss in self.losses.items()}} | halves


def compare(
    model: nn.Module, moc: MoCConfig, flow: Flow, batches: list[Batch], seed: int, parallel: Parallel, draws: int = 1
) -> Iterator[RivalRow]:
    """Yields the rows of dense, MoC and own-shot attention: with equal noise on all shots, then after a clean history.
    Every process takes part, with scenes of its own. Raises UserError, on all of them, where one has none.

    batches: of one scene each, every `data_ranks`-th for a process. draws: how often noise is drawn, by seeds from
    `seed` on.
    """
    if parallel.any(not batches):
        raise UserError(
            f"too few scenes: each of {parallel.data_ranks} processes needs one or more; raise data.validation, or "
            "start fewer"
        )
    sparsity: dict[str, float] = {}  # by attention: a clean history changes which chunks are chosen, not how many
    for clean_history in (False, True):
        validators = [Validator(batches, flow, seed=seed + n, clean_history=clean_history) for n in range(draws)]
        for name, attention in rivals(moc).items():
            values = torch.stack([_of_each_scene(v, model, attention, parallel) for v in validators], dim=1)
            losses = {sigma: estimate(values[:, :, at]) for at, sigma in enumerate(validators[0].sigmas)}
            if name not in sparsity:
                sparsity[name] = _sparsity(validators[0], model, attention, parallel)
            yield RivalRow(name, clean_history, sparsity[name], losses)


def _of_each_scene(validator: Validator, model: nn.Module, attention: MoCConfig, parallel: Parallel) -> Tensor:
    """Returns the loss of each scene of all processes: [scenes, sigmas]."""
    ranks, alone = parallel.data_ranks, list(_alone(validator))
    found = torch.zeros(ranks * len(alone), len(validator.sigmas), 2, device=parallel.device)
    for index, (one, is_own) in enumerate(alone):
        found[parallel.data_rank + index * ranks] = is_own * one.losses(model, attention, parallel)
    found = parallel.sum(found)
    found = found[found[:, 0, 1] > 0]
    return found[..., 0] / found[..., 1]


def _sparsity(validator: Validator, model: nn.Module, attention: MoCConfig, parallel: Parallel) -> float:
    """Returns the share of pairs that attention leaves out in all scenes of all processes together."""
    sums = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    for one, is_own in _alone(validator):
        sparsity = one.routing(model, attention, parallel)["sparsity"]
        pairs = is_own * one.batches[0].layout.num_tokens ** 2
        sums += torch.tensor([sparsity * pairs, pairs], device=parallel.device)
    left_out, pairs = parallel.sum(sums).tolist()
    return left_out / pairs


def _alone(validator: Validator) -> Iterator[tuple[Validator, bool]]:
    """Yields a validator of each scene alone, and whether it counts: a process with fewer scenes than another repeats
    one, so that all make as many calls."""
    own = len(validator.batches)
    for index in range(max(gather_lists([own]))):
        yield replace(validator, batches=[validator.batches[index if index < own else 0]]), index < own
