"""One kernel replaces several in the pointwise work around attention: norms, modulation, gates, rotation."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

from moc.kernels import HAS_TRITON

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps a function of tensors: where the first is on a GPU, the kernel of its name in `models.pointwise` runs."""

    @wraps(function)
    def choose(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (HAS_TRITON and isinstance(args[0], Tensor) and args[0].is_cuda):
            return function(*args, **kwargs)
        from models import pointwise  # imports Triton

        return getattr(pointwise, function.__name__)(*args, **kwargs)

    return choose
