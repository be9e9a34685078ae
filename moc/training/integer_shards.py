"""FSDP2 of torch 2.11 is made to shard integers, such as frozen weights of one byte.

It makes each shard a parameter with a gradient before it asks whether the weight has one, which integers refuse.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.distributed.tensor import DTensor


@contextmanager
def integer_shards() -> Iterator[None]:
    """While it lasts, integers that are asked for a gradient stay without one, instead of raising."""
    require = DTensor.requires_grad_

    def requires_grad_(self: DTensor, required: bool = True) -> Any:
        return require(self, required and (self.is_floating_point() or self.is_complex()))

    with mock.patch.object(DTensor, "requires_grad_", requires_grad_):
        yield
