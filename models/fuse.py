"""One kernel in place of several for the pointwise work around attention: norms, modulation, gates, rotation."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def fused(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """`function` of tensors, compiled where its first argument is on a GPU, and as it is elsewhere.

    Eager, each of its operations reads and writes all tokens in fp32; compiled, they are read and written once.
    Compilation happens at the first call (some seconds), and once more when a second stream length is met.
    """

    @cache
    def compiled() -> Callable[P, Tensor]:
        return torch.compile(function)

    @wraps(function)
    def choose(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        on_gpu = isinstance(args[0], Tensor) and args[0].is_cuda
        return (compiled() if on_gpu else function)(*args, **kwargs)

    return choose
