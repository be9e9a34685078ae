"""The held-out loss of one model under rival settings of attention, at the same noise."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moc import MoCConfig
from moc.batch import Batch
from moc.diffusion import Flow
from moc.errors import UserError
from moc.training import Parallel, Validator, rivals


@dataclass(frozen=True)
class RivalRow:
    """What one kind of attention comes to. clean_history: whether only the last shot is noisy. sparsity: of the first
    batch. loss: by noise level."""

    attention: str
    clean_history: bool
    sparsity: float
    loss: dict[float, float]

    @property
    def line(self) -> str:
        """The row for the terminal."""
        history = "clean history, last shot" if self.clean_history else "equal noise, all shots  "
        losses = "  ".join(f"sigma {sigma:g}: {loss:.4f}" for sigma, loss in self.loss.items())
        return f"{history}  {self.attention:<14} sparsity {self.sparsity:.0%}  {losses}"


def compare(
    model: nn.Module, moc: MoCConfig, flow: Flow, batches: list[Batch], seed: int, parallel: Parallel
) -> Iterator[RivalRow]:
    """The rows of dense, MoC and own-shot attention: with equal noise on all shots, then after a clean history. Every
    process takes part, with scenes of its own. Raises UserError, on all of them, where one has none."""
    if parallel.any(not batches):
        raise UserError(
            f"data.validation is too small: each of {parallel.data_ranks} processes needs a scene or more; raise it, "
            "or start fewer"
        )
    for clean_history in (False, True):
        validator = Validator(batches, flow, seed=seed, clean_history=clean_history)
        for name, attention in rivals(moc).items():
            sums = parallel.sum(validator.losses(model, attention, parallel))
            losses = dict(zip(validator.sigmas, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
            sparsity = validator.routing(model, attention, parallel)["sparsity"]
            yield RivalRow(name, clean_history, sparsity, losses)
