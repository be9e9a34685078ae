"""This module draws a large model with random weights, in no more memory than its weights take."""

from dataclasses import replace

import torch
from accelerate import init_empty_weights
from torch import nn

from models import ModelConfig, build_model
from models.frozen import Base, FrozenLinear, packed, replace_linears
from models.lora import Lora
from models.stream import StreamModel


def draw_model(
    config: ModelConfig,
    latent_channels: int,
    text_dim: int,
    device: torch.device,
    kept: str | None = None,
    base: Base = Base.fp32,
    dtype: torch.dtype = torch.float32,
) -> StreamModel:
    """Returns the model, its weights drawn on `device`: never more than one of them is held in another format than its
    own.

    config: without an adapter. latent_channels, text_dim: as in `models.build_model`. kept: the device that keeps the
    weights, by default `device`, which spares 28 GB of 14 B parameters their way to the host and back. base: how the
    linears of the blocks are kept. dtype: that of the other weights, but for those that the model keeps in fp32.
    """
    with init_empty_weights():
        model = build_model(config, latent_channels, text_dim)
    replace_linears(model, base)
    wide = set(model._keep_in_fp32_modules or ())
    for path, module in model.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if name == "scale" and isinstance(module, FrozenLinear):
                continue  # the scale is set together with its weight
            drawn = {name: draw(name, weight, device)}
            if name == "weight" and isinstance(module, FrozenLinear):
                drawn = packed(drawn[name], base)
            elif not wide & {*path.split("."), name}:
                drawn = {name: drawn[name].to(dtype)}
            for key, tensor in drawn.items():
                module.register_parameter(key, nn.Parameter(tensor.to(kept or device), weight.requires_grad))
    return model


def draw_adapted(
    config: ModelConfig, latent_channels: int, text_dim: int, device: torch.device, kept: str | None = None
) -> StreamModel:
    """Returns the model with an adapter, drawn by `draw_model`. config: with an adapter; what lies under it is kept as
    `lora_base` says."""
    sizes = replace(config, lora_rank=0, lora_targets=[], lora_base=Base.fp32)
    model = draw_model(sizes, latent_channels, text_dim, device, kept, config.lora_base)
    model.add_lora(Lora(config.lora_rank, config.lora_targets, "", ""))
    return model


def draw(name: str, weight: nn.Parameter, device: torch.device) -> torch.Tensor:
    """Returns random values: matrices keep the size of what they are given; norms are ones and biases zeros."""
    if weight.dim() < 2:
        return torch.full(weight.shape, float(name == "weight"), device=device)
    return torch.randn(weight.shape, device=device) * (weight.numel() / len(weight)) ** -0.5
