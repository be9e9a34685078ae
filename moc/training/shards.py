"""Tensors of which each process holds a shard: to read and write them as whole ones, on any number of processes.

A tensor that is not sharded counts as one whose only shard is the whole.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; a change of it is one of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, sharded and on the device as `target` is; each process takes its shard of its own copy."""
    if isinstance(target, DTensor):
        moved = value.to(target.device)
        return distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)
    return value.to(target.device)


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Writes a whole tensor's values into a tensor."""
    local(target).copy_(local(sharded_like(value, target)))


def hollow(model: nn.Module) -> nn.Module:
    """A copy of a model that is not sharded yet, without values and memory for them."""
    values = {id(x): nn.Parameter(x.to("meta"), x.requires_grad) for x in model.parameters()}
    return deepcopy(model, values | {id(x): x.to("meta") for x in model.buffers()})


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, on the CPU where they were sharded; none unless `keep`. Every process takes part."""
    kept = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            # A gathered tensor may be a view of a padded one, which a file would not take.
            kept[name] = tensor if value is tensor else value.to("cpu", copy=True)
    return kept


def filled(empty: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The hollow copy of a model with these tensors for its own."""
    copy = deepcopy(empty)
    copy.load_state_dict(tensors, strict=False, assign=True)
    return copy
