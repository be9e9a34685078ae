"""An attention's output may be kept from the forward pass to its recomputation in backward, which is then spared it."""

from collections.abc import Callable

from torch import Tensor


class Kept:
    """This object holds what one attention computed: its output, LSE and what else its backward reads."""

    def __init__(self) -> None:
        self._tensors: tuple[Tensor, ...] = ()

    def of(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Returns what `compute` returns, or what it returned the first time."""
        if not self._tensors:
            self._tensors = tuple(x.detach() for x in compute())
        return tuple(x.detach() for x in self._tensors)
