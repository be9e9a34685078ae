"""Averaged weights are what validation and sampling use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moc.errors import UserError
from moc.training.shards import local


class EMA:
    """This object keeps an exponential moving average of a model's trained weights, in their dtype, warmed up by (1 +
    n) / (10 + n) after n updates; the first one takes the weights as they are. Unlike torch's AveragedModel it never
    waits for the GPU.

    weights: the trained ones, by name, as they are when it is made, on the device and sharded. averages: by the same
    names, sharded as the weights are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema decay={decay} must lie in [0, 1)")
        self.decay, self.num_updates = decay, 0
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        averaged, current = ([local(x) for x in tensors.values()] for tensors in (self.averages, self.weights))
        torch._foreach_lerp_(averaged, current, 1 - decay)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the averaged weights while the block lasts, and `averages` the model's own: what is loaded
        into the model meanwhile becomes the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            average, own = local(self.averages[name]), local(weight)
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)

    def restore(self, num_updates: int) -> None:
        """Says how many updates the averages already hold."""
        self.num_updates = num_updates
