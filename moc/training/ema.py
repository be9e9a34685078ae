"""Averaged weights are what validation and sampling use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moc.errors import UserError
from moc.training.shards import local


class EMA:
    """Keeps an exponential moving average of a model's trained weights, in their dtype, warmed up by (1 + n) / (10 + n)
    after n updates; the first one takes the weights as they are. Unlike torch's AveragedModel it never waits for the
    GPU.

    averages: by the parameter's name, sharded as the parameter is.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema decay={decay} must lie in [0, 1)")
        self.decay, self.num_updates = decay, 0
        self.averages = {name: weight.clone() for name, weight in _trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        averaged, current = ([local(x) for x in tensors.values()] for tensors in (self.averages, _trained(model)))
        torch._foreach_lerp_(averaged, current, 1 - decay)
        self.num_updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Gives the model the averaged weights while the block lasts, and `averages` the model's own: what is loaded
        into the model meanwhile becomes the average."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, weight in _trained(model).items():
            average, own = local(self.averages[name]), local(weight)
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)

    def restore(self, num_updates: int) -> None:
        """Says how many updates the averages already hold."""
        self.num_updates = num_updates


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
