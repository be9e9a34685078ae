"""This module draws the random weights of a model that a GPU cannot hold whole, block by block."""

from types import MethodType, SimpleNamespace

import torch
from torch import Tensor, nn

from models import ModelConfig, build_model
from models.frozen import Base, freeze_linears
from models.stream import StreamModel


def draw_in_blocks(
    config: ModelConfig, latent_channels: int, text_dim: int, device: torch.device, dtype: torch.dtype, base: Base
) -> StreamModel:
    """Returns a model of random weights in the host's memory. Each block is drawn and rounded on `device`, which thus
    holds one at a time. dtype: that of the weights, but for those that the model keeps in fp32. base: how the linears
    of the blocks are kept; fp32 leaves them in `dtype`."""
    with torch.device("meta"):
        model = build_model(config, latent_channels=latent_channels, text_dim=text_dim)
    wide = set(model._keep_in_fp32_modules or ())
    rest = [(name, module) for name, module in model.named_children() if name != "blocks"]
    for name, module in [*rest, *model.blocks.named_children()]:
        _draw(module.to_empty(device=device))
        for weight_name, weight in module.named_parameters(prefix=name):
            if not wide & set(weight_name.split(".")):
                weight.data = weight.data.to(dtype)
        if module in model.blocks:
            one = SimpleNamespace(blocks=nn.ModuleList([module]), _keep_in_fp32_modules=tuple(wide))
            freeze_linears(one, base)
        module.to("cpu")
    for name, weight in model.named_parameters(recurse=False):
        setattr(model, name, nn.Parameter(_drawn(weight).to(torch.float32 if name in wide else dtype)))
    return model


def _draw(module: nn.Module) -> None:
    """Draws the weights of a module as its layers begin with, and those of no layer around 0."""
    for layer in module.modules():
        if isinstance(reset := getattr(layer, "reset_parameters", None), MethodType):
            reset()
        else:
            for weight in layer.parameters(recurse=False):
                weight.data.copy_(_drawn(weight))


def _drawn(weight: Tensor) -> Tensor:
    """Returns random numbers in the shape of a weight, on the CPU."""
    return torch.randn(weight.shape) * weight.shape[-1] ** -0.5
