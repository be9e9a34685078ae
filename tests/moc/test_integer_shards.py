"""Shards of integers become parameters without a gradient, as FSDP2 of torch 2.11 makes them."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from moc.training.integer_shards import integer_shards


def shard(dtype: torch.dtype) -> DTensor:
    """Returns a tensor on a mesh of one process, which needs no process group."""
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    return DTensor.from_local(torch.ones(2, 3, dtype=dtype), mesh, [Replicate()], run_check=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integers_become_parameters_without_a_gradient(dtype):
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Parameter(shard(dtype))
    with integer_shards():
        weight = nn.Parameter(shard(dtype))
        assert not weight.requires_grad_(False).requires_grad
    assert isinstance(weight, nn.Parameter)
    assert weight.dtype == dtype
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Parameter(shard(dtype))


def test_other_weights_have_gradients():
    with integer_shards():
        assert nn.Parameter(shard(torch.bfloat16)).requires_grad
