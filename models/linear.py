"""The linear layers of the MMDiT's blocks keep autocast's casts out of the graph of gradients, and may leave their bias
to the kernel that comes after them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Product = tuple[Tensor, Tensor | None]  # what a layer computes, and the bias that is left to add


class Linear(nn.Linear):
    """This linear layer computes as nn.Linear does. Under autocast on a GPU the matmul writes the weight's gradient in
    the weight's own dtype; autograd would round it to autocast's and cast it back, in four launches more a layer."""

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """Returns the product with the weight, with the bias added unless it is left to what comes next."""
        bias = self.bias if add_bias else None
        if not (x.is_cuda and torch.is_autocast_enabled("cuda")):
            return F.linear(x, self.weight, bias)
        return _Linear.apply(x, self.weight, bias, torch.get_autocast_dtype("cuda"))


def product(layer: nn.Module, x: Tensor) -> Product:
    """Returns layer(x) without the bias that it leaves, and that bias, if any (`left_bias`)."""
    if isinstance(layer, Linear) and (bias := left_bias(layer, x)) is not None:
        return layer(x, add_bias=False), bias
    return layer(x), None


def left_bias(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Returns the bias that `product` leaves to what comes next, if any: on a GPU a kernel, which reads these numbers
    anyway, adds it and sums its gradient. Layers with adapters and frozen ones keep theirs."""
    return layer.bias if isinstance(layer, Linear) and x.is_cuda else None


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.x_dtype, ctx.dtype = x.dtype, weight.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        of_x, of_weight, *_ = ctx.needs_input_grad
        # Autograd too keeps no input where the weight is frozen, and keeps the weight transposed: by that the
        # offloading of activations knows it, and leaves it on the GPU.
        ctx.save_for_backward(x if of_weight else None, weight.t() if of_x else None)
        return F.linear(x, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, transposed = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        dx = _product(rows, transposed.t(), ctx.x_dtype).view(*grad.shape[:-1], -1) if of_x else None
        dweight = _product(rows.t(), x.flatten(0, -2), ctx.dtype) if of_weight else None
        return dx, dweight, rows.sum(0, dtype=ctx.dtype) if of_bias else None, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a @ b, summed in fp32 and rounded to `dtype` alone; CPUs round to that of a and b first."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda and dtype != a.dtype else (a @ b).to(dtype)
