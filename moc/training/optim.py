"""AdamW and its learning rate: both plain functions of the config and the step, so that resuming needs no scheduler."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from moc.errors import UserError, check_least


@dataclass(frozen=True)
class OptimConfig:
    """lr rises over warmup_steps, then stays (decay "constant") or falls to zero over the run ("cosine")."""

    lr: float = 9e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.01
    eps: float = 1e-8
    warmup_steps: int = 100
    decay: str = "constant"
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_least(self, "optim", 0, "lr", "clip_norm", "weight_decay", "eps", "warmup_steps")
        if self.lr == 0 or self.clip_norm == 0:
            raise UserError(f"optim.lr={self.lr} and optim.clip_norm={self.clip_norm} must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={list(self.betas)} must be two numbers in [0, 1)")
        if self.decay not in ("constant", "cosine"):
            raise UserError(f"optim.decay={self.decay!r} is not one of constant, cosine")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only. Fused, since it then heeds `found_inf`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)  # type: ignore[arg-type]


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """The learning rate of a step, counted from 0."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay == "constant" or step < config.warmup_steps:
        return config.lr * warmup
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
