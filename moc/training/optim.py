"""Optimizers are made by name; their learning rate is a plain function of the step, so resuming needs no scheduler."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moc.errors import UserError, check_least
from moc.training.offload import OffloadedAdamW

Group = dict[str, Any]  # a group of an optimizer: its parameters and their settings


@dataclass(frozen=True)
class RateConfig:
    """These settings say the learning rate of some of the model's parameters.

    match: the parameters whose names match it, with * and ?.
    factor: what their learning rate is multiplied by; 0 freezes them.
    """

    match: str = "*"
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_least(self, "optim.rates", 0, "factor")


@dataclass(frozen=True)
class OptimConfig:
    """These settings say how the optimizer steps.

    name: adamw, adamw8bit (of bitsandbytes), muon (weights of two dimensions in the blocks, adamw for the rest), or
    where a class is imported from, such as torch.optim.Adafactor, schedulefree.AdamWScheduleFree or optimi.StableAdamW,
    which is given lr and args.
    args: more arguments of the optimizer's class, as +optim.args.momentum=0.9; muon's are of Muon.
    rates: the first one that a parameter matches says the factor of its learning rate; without one it is 1.
    lr: the learning rate after its rise.
    betas: the decay rates of the averages of the gradient and of its square.
    weight_decay: the share of a weight, times the learning rate, that each step takes off.
    eps: what is added to the denominator of a step.
    warmup_steps: the steps over which the learning rate rises.
    decay: "constant", or "cosine", which falls to zero over the run.
    clip_norm: the norm that gradients are clipped to.
    offload: keep adamw's averages in the host's memory, from where each comes to the device for its step.
    """

    name: str = "adamw"
    args: dict[str, Any] = field(default_factory=dict)
    rates: list[RateConfig] = field(default_factory=list)
    lr: float = 9e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.01
    eps: float = 1e-8
    warmup_steps: int = 100
    decay: str = "constant"
    clip_norm: float = 1.0
    offload: bool = False

    def __post_init__(self) -> None:
        check_least(self, "optim", 0, "lr", "clip_norm", "weight_decay", "eps", "warmup_steps")
        if self.lr == 0 or self.clip_norm == 0:
            raise UserError(f"optim.lr={self.lr} and optim.clip_norm={self.clip_norm} must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={list(self.betas)} must be two numbers in [0, 1)")
        if self.decay not in ("constant", "cosine"):
            raise UserError(f"optim.decay={self.decay!r} is not one of constant, cosine")
        if self.offload and self.name != "adamw":
            raise UserError(
                f"optim.offload=true is for optim.name=adamw, and this is {self.name}: leave one of them out"
            )
        if self.name not in _BUILDERS and "." not in self.name:
            raise UserError(
                f"optim.name={self.name!r} is not one of {', '.join(_BUILDERS)}, nor a class such as torch.optim.SGD"
            )


def freeze(model: nn.Module, rates: Sequence[RateConfig]) -> None:
    """Takes the gradient from parameters whose factor is 0. Raises UserError where a rate matches no parameter, or
    nothing is left to train."""
    names = [name for name, _ in model.named_parameters()]
    for rate in rates:
        if not any(fnmatchcase(name, rate.match) for name in names):
            raise UserError(f"optim.rates: no parameter's name matches {rate.match!r}; they are like {names[0]}")
    for name, parameter in model.named_parameters():
        if _factor(name, rates) == 0:
            parameter.requires_grad_(False)
    if rates and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("optim.rates freeze every parameter; leave some with a factor above 0")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Returns the optimizer over the trainable parameters; weight decay on matrices only. Raises UserError where it is
    not installed, does not take its arguments, cannot step, or takes whole weights alone and these are sharded."""
    build = _BUILDERS.get(config.name, _build_imported)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if (config.offload or config.name in _OF_WHOLE_WEIGHTS) and any(isinstance(p, DTensor) for p in trained.values()):
        raise UserError(
            f"optim.{'offload=true' if config.offload else f'name={config.name}'} takes whole weights, and "
            "parallel.shard or parallel.sequence share them out: take adamw without offload, whose states are shared "
            "out too"
        )
    try:
        return build(trained, config)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optim.name={config.name} does not take optim.args={config.args}: {error}; change them, or take another "
            "optimizer"
        ) from None


def take_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Steps where `finite` is true, and otherwise leaves weights and states as they are. Fused AdamW is told so on the
    device; other optimizers make the host wait for the answer."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group the learning rate times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Returns the learning rate of a step, counted from 0."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay == "constant" or step < config.warmup_steps:
        return config.lr * warmup
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Several(torch.optim.Optimizer):
    """Several optimizers, over different parameters, step here as one, with the groups and the states of all."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.state = self.state  # loading a checkpoint may have replaced it, like the groups
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.step()


def kept_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, float, torch.device]]:
    """Yields each parameter, the least number of bytes that an optimizer comes to keep for one byte of it, and where
    those lie between two steps. An optimizer that is not known here counts as one that keeps nothing."""
    for one in optimizer.optimizers if isinstance(optimizer, Several) else [optimizer]:
        kind = type(one)
        bytes_a_byte = _KEPT.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}", 0.0)
        for group in one.param_groups:
            yield from ((p, bytes_a_byte, state_device(one, p)) for p in group["params"])


def state_device(optimizer: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    """Returns where states of a parameter's shape lie between two steps; counts of steps lie beside the parameter."""
    return getattr(optimizer, "state_device", parameter.device)


def _factor(name: str, rates: Sequence[RateConfig]) -> float:
    return next((rate.factor for rate in rates if fnmatchcase(name, rate.match)), 1.0)


def _groups(parameters: dict[str, nn.Parameter], config: OptimConfig) -> list[Group]:
    """Puts parameters of one factor and one weight decay together; matrices come first."""
    groups: dict[tuple[float, float], Group] = {}
    for is_matrix in (True, False):
        for name, parameter in parameters.items():
            if (parameter.dim() >= 2) is is_matrix:
                factor, decay = _factor(name, config.rates), config.weight_decay if is_matrix else 0.0
                new = {"params": [], "weight_decay": decay, "factor": factor}
                groups.setdefault((factor, decay), new)["params"].append(parameter)
    return list(groups.values())


def _build_adamw(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Builds a fused AdamW, since it then heeds `found_inf`."""
    settings: dict[str, Any] = {"betas": tuple(config.betas), "eps": config.eps, "fused": True} | config.args
    kind = OffloadedAdamW if config.offload else torch.optim.AdamW
    return kind(_groups(parameters, config), lr=config.lr, **settings)


def _build_adamw8bit(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "optim.name=adamw8bit needs a package that is not installed: pip install bitsandbytes"
        ) from None
    settings = {"betas": tuple(config.betas), "eps": config.eps} | config.args
    return AdamW8bit(_groups(parameters, config), lr=config.lr, **settings)


def _build_muon(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Builds a Muon whose steps have the size of AdamW's, so that one learning rate suits both (arXiv 2502.16982)."""
    hidden = {name: p for name, p in parameters.items() if p.dim() == 2 and name.startswith("blocks.")}
    others = {name: p for name, p in parameters.items() if name not in hidden}
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        settings = {"adjust_lr_fn": "match_rms_adamw"} | config.args
        optimizers.append(torch.optim.Muon(_groups(hidden, config), lr=config.lr, **settings))
    if others:
        adamw: dict[str, Any] = {"betas": tuple(config.betas), "eps": config.eps, "fused": True}
        optimizers.append(torch.optim.AdamW(_groups(others, config), lr=config.lr, **adamw))
    return Several(optimizers)


def _build_imported(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    module, _, name = config.name.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"optim.name={config.name} cannot be imported ({error}); install its package") from None
    own: dict[str, Any] = {}
    if module.partition(".")[0] == "optimi":  # optimi's Triton kernels need a GPU, and take no shards
        own["triton"] = all(p.is_cuda and not isinstance(p, DTensor) for p in parameters.values())

    def build(groups: list[Group]) -> torch.optim.Optimizer:
        optimizer = kind(groups, lr=config.lr, **own | config.args)
        if hasattr(optimizer, "train"):  # schedule-free optimizers take gradients at these weights, and we average them
            optimizer.train()
        return optimizer

    groups = _groups(parameters, config)
    _try_step(build([group | {"params": [_small(group["params"][0])]} for group in groups]), config)
    return build(groups)


def _small(parameter: nn.Parameter) -> nn.Parameter:
    """Returns a parameter of size 2 in each dimension, with a gradient of zeros, of another one's dtype and device."""
    small = nn.Parameter(torch.zeros((2,) * parameter.dim(), dtype=parameter.dtype, device=parameter.device))
    small.grad = torch.zeros_like(small)
    return small


def _try_step(optimizer: torch.optim.Optimizer, config: OptimConfig) -> None:
    """Raises UserError where an optimizer cannot step, such as one that takes sparse gradients alone."""
    try:
        optimizer.step()
    except Exception as error:  # others' code raises any type
        raise UserError(
            f"optim.name={config.name} with optim.args={config.args} cannot make a step here: {error}; take another "
            "optimizer, or change them"
        ) from error


_OF_WHOLE_WEIGHTS = ("adamw8bit", "torch.optim.Adafactor")
_BUILDERS = {"adamw": _build_adamw, "adamw8bit": _build_adamw8bit, "muon": _build_muon}
# Bytes kept for each byte of a float32 parameter. AdamW8bit keeps two averages of one byte a number.
_KEPT = {"torch.AdamW": 2.0, "moc.OffloadedAdamW": 2.0, "torch.Muon": 1.0, "bitsandbytes.AdamW8bit": 0.5}
