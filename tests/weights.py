"""This module gives random weights for models of tests."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def randomized(model: Model) -> Model:
    """Returns the model with noise on every weight, so that every path matters: fresh ones are zero at outputs and
    gates, and norms are all alike."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model
