"""Linears that are not trained are kept in few bytes, under an adapter or to sample: as bf16, as fp8 or as int8 with a
scale a row.

torchao has such weights too, as tensors of a class of its own. They have no memory that one copy could move between
the host and a GPU, and safetensors stores none. These are plain tensors, which DDP sends, FSDP2 shards and a swap of
blocks copies as any other.
"""

from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType, scaled_mm

from moc.errors import UserError
from models.fuse import fused

_LARGEST = {"fp8": 448.0, "int8": 127.0}  # the largest number of each format
_FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # the least compute capability of GPUs that multiply in fp8


class Base(StrEnum):
    """This setting says how weights that are not trained are kept."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"
    int8 = "int8"


class Rounded(NamedTuple):
    """These are rows [..., D] in fp8, as linears multiply them.

    numbers: float8_e4m3fn [..., D]. scale: fp32 [..., 1], what each row is multiplied by. dtype: the rows' own.
    """

    numbers: Tensor
    scale: Tensor
    dtype: torch.dtype


class FrozenLinear(nn.Linear):
    """This linear layer computes as `linear` does, with its weight rounded to a format.

    weight: bfloat16, int8, or the bits of fp8 (e4m3) as uint8, since neither gloo nor NCCL sends that type everywhere.
    scale: fp32 [out_features, 1], what a row of whole numbers or fp8 is multiplied by; none in bf16. The product is
    taken in fp32 and rounded once, to autocast's dtype or to the input's, whenever the layer is used: the only memory
    it takes then is that of one weight. fp8_matmul: round the input to fp8 too, with a scale a row, and multiply in
    fp8; there is no gradient then.
    """

    scale: nn.Parameter | None
    fp8_matmul = False

    def __init__(self, linear: nn.Linear, base: Base) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        kept = packed(linear.weight.detach(), base)
        self.weight = nn.Parameter(kept["weight"], False)
        self.register_parameter("scale", nn.Parameter(kept["scale"], False) if "scale" in kept else None)
        self.register_parameter("bias", linear.bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor | Rounded) -> Tensor:
        """Returns the product with rows x [..., in_features], which `taken_by` may have rounded already."""
        x = taken_by(self, x) if isinstance(x, Tensor) else x
        device = self.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if isinstance(x, Rounded):
            return self._in_fp8(x).to(dtype)
        return _Linear.apply(x, self.weight, self.scale, self.bias, dtype)

    def _in_fp8(self, x: Rounded) -> Tensor:
        weight, scale = self.weight.view(_FP8).t(), self.scale.view(1, -1)  # type: ignore[union-attr]
        bias = None if self.bias is None else self.bias.bfloat16()  # on an H100 the product is in bf16
        numbers, row_scale, by_row = x.numbers.flatten(end_dim=-2), x.scale.view(-1, 1), ScalingType.RowWise
        # Hopper sums fast with fewer bits than fp32 has, which moves a velocity no further than fp8 itself.
        out = scaled_mm(numbers, weight, row_scale, by_row, scale, by_row, bias=bias, use_fast_accum=True)
        return out.unflatten(0, x.numbers.shape[:-1])


def taken_by(linear: nn.Module, x: Tensor, gelu: bool = False) -> Tensor | Rounded:
    """Returns x, or its GELU by its tanh, as a linear takes it. One that multiplies in fp8 takes it rounded: linears
    that share an input can so have it rounded once, and GELU is a part of the rounding."""
    if isinstance(linear, FrozenLinear) and linear.fp8_matmul:
        return Rounded(*rounded(x, gelu), x.dtype)
    return F.gelu(x, approximate="tanh") if gelu else x


@fused
def rounded(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Rounds each row of x [..., D], or of its GELU, to fp8 as `packed` does; returns the numbers and the scale."""
    rows = packed(F.gelu(x.float(), approximate="tanh") if gelu else x, Base.fp8)
    return rows["weight"].view(_FP8), rows["scale"]


def packed(weight: Tensor, base: Base) -> dict[str, Tensor]:
    """Returns the `weight` and, where it has one, the `scale` of a `FrozenLinear` for a weight [..., out, in] of any
    dtype. The largest number of a row becomes the largest of the format."""
    if base is Base.bf16:
        return {"weight": weight.bfloat16()}
    weight, largest = weight.float(), _LARGEST[base]
    # A row of zeros has a scale too: it would divide by none.
    # Products with these numbers are the same on every device; CPUs and GPUs divide by a number differently.
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * largest) * (1 / largest)
    scaled = weight * scale.reciprocal()
    numbers = scaled.round().to(torch.int8) if base is Base.int8 else scaled.to(_FP8).view(torch.uint8)
    return {"weight": numbers, "scale": scale}


def unpacked(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns the weight that `packed` was given, to the format's rounding, in `dtype`."""
    if scale is None:
        return weight.to(dtype)
    numbers = weight.view(_FP8) if weight.dtype == torch.uint8 else weight
    return (numbers.float() * scale).to(dtype)


class _Linear(torch.autograd.Function):
    """This function keeps the packed weight for backward, where autograd of the operations would keep the unpacked
    one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dtype = x.dtype
        return F.linear(x.to(dtype), unpacked(weight, scale, dtype), bias if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return (grad @ unpacked(weight, scale, grad.dtype)).to(ctx.dtype), None, None, None, None


def replace_linears(model: Any, base: Base) -> dict[str, FrozenLinear]:
    """Replaces the linears of a model's blocks by frozen ones, but for those that it keeps in fp32; returns these by
    name. model: a `StreamModel`, which may lie on the meta device. base: fp32 leaves it as it is."""
    if base is Base.fp32:
        return {}
    wide = set(model._keep_in_fp32_modules or ())
    frozen: dict[str, FrozenLinear] = {}
    for name, module in list(model.blocks.named_modules()):
        is_frozen = isinstance(module, FrozenLinear)
        if isinstance(module, nn.Linear) and not is_frozen and not wide & set(name.split(".")):
            frozen[f"blocks.{name}"] = FrozenLinear(module, base)
            model.blocks.set_submodule(name, frozen[f"blocks.{name}"])
    return frozen


def has_fp8_matmuls(device: torch.device) -> bool:
    """Returns whether this torch multiplies in fp8 on a device, which torch 2.11 does on no CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    numbers, scale = torch.zeros(16, 16, device=device).to(_FP8), torch.ones(16, 1, device=device)
    try:
        scaled_mm(numbers, numbers.t(), scale, ScalingType.RowWise, scale.t(), ScalingType.RowWise)
    except NotImplementedError:
        return False
    return True


def multiply_in_fp8(model: Any, device: torch.device) -> None:
    """Has the frozen fp8 linears of a model multiply in fp8, where their sizes are multiples of 16. Raises UserError
    for a device that has no such matmuls."""
    if not has_fp8_matmuls(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise UserError(f"{name} has no fp8 matmuls with torch {torch.__version__}; leave out fp8_matmuls")
    for module in model.modules():
        if isinstance(module, FrozenLinear) and module.weight.dtype == torch.uint8:
            module.fp8_matmul = module.in_features % 16 == 0 == module.out_features % 16


def packed_tensors(name: str, value: Tensor, frozen: Collection[str], base: Base) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that hold one of a model's own: of the weight of a frozen linear, by `replace_linears`, its
    packed ones; any other is as it is."""
    layer, _, kind = name.rpartition(".")
    if layer not in frozen or kind != "weight":
        yield name, value
        return
    for kind, tensor in packed(value, base).items():
        yield f"{layer}.{kind}", tensor
