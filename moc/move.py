"""`move` moves tensors to a device."""

import torch
from torch import Tensor


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns the tensor on `device`. A copy from CPU memory to a GPU goes through pinned memory, so that the CPU does
    not wait until the GPU has come to it; torch.compile traces a plain one, since it knows no pinned memory."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
