"""Averaged weights: what validation and sampling use."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from moc.errors import UserError


class EMA:
    """An exponential moving average of a model's weights, in its dtype, warmed up by (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema decay={decay} must lie in [0, 1)")
        self.decay = decay
        self._averaged = AveragedModel(model, multi_avg_fn=self._average)
        self._averaged.requires_grad_(False)

    @property
    def model(self) -> Any:
        """The model with the averaged weights."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        self._averaged.update_parameters(model)

    def restore(self, num_updates: int) -> None:
        """Says how many updates the weights already hold; the weights themselves are loaded into `model`."""
        self._averaged.n_averaged.fill_(num_updates)

    @torch.no_grad()
    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_updates: Tensor | int) -> None:
        decay = min(self.decay, (1 + int(num_updates)) / (10 + int(num_updates)))
        torch._foreach_lerp_(list(averaged), list(current), 1 - decay)
