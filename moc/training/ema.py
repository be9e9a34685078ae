"""Averaged weights: what validation and sampling use."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from moc.errors import UserError


class EMA:
    """An exponential moving average of a model's trained weights, in their dtype, warmed up by (1 + n) / (10 + n) after
    n updates; the first one takes the weights as they are. Unlike torch's AveragedModel it never waits for the GPU.

    model: has the averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema decay={decay} must lie in [0, 1)")
        self.decay, self.num_updates = decay, 0
        self.model: Any = deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        pairs = [(a, p) for a, p in zip(self.model.parameters(), model.parameters(), strict=True) if p.requires_grad]
        averaged, current = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(averaged, current, 1 - decay)
        self.num_updates += 1

    def restore(self, num_updates: int) -> None:
        """Says how many updates the weights already hold; the weights themselves are loaded into `model`."""
        self.num_updates = num_updates
