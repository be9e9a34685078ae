"""These functions take tensors of which each process holds a shard.

A tensor that is not sharded counts as one whose only shard is the whole.
"""

from copy import deepcopy

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Returns what this process holds of a tensor; a change of it is one of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor; every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def hollow(model: nn.Module) -> nn.Module:
    """Returns a copy of a model that is not sharded yet, without values and memory for them."""
    values = {id(x): nn.Parameter(x.to("meta"), x.requires_grad) for x in model.parameters()}
    return deepcopy(model, values | {id(x): x.to("meta") for x in model.buffers()})
