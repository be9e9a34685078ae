"""Sending a batch between processes as one tensor: each tensor of its own costs a millisecond of sockets.

Only the loader and its own workers exchange parcels; none is ever written to a file.
"""

import io
import pickle
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16


class Parcel(NamedTuple):
    """shell: the object without its tensors. flat: uint8, their bytes. tensors: (dtype name, shape, offset) of each."""

    shell: bytes
    flat: Tensor
    tensors: list[tuple[str, list[int], int]]


def wrap(content: Any) -> Parcel:
    """Any picklable object with CPU tensors in it."""
    shell = io.BytesIO()
    pickler = _Pickler(shell)
    pickler.dump(content)
    places, size = [], 0
    for tensor in pickler.tensors:
        places.append((str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    flat = torch.empty(size, dtype=torch.uint8)
    for tensor, (_, _, offset) in zip(pickler.tensors, places, strict=True):
        flat[offset : offset + tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
    return Parcel(shell.getvalue(), flat, places)


def unwrap(parcel: Parcel) -> Any:
    """The object again; its tensors are views of the parcel's memory, pinned if that is."""
    views = []
    for name, shape, offset in parcel.tensors:
        dtype = getattr(torch, name)
        size = torch.Size(shape).numel() * dtype.itemsize
        views.append(parcel.flat[offset : offset + size].view(dtype).view(shape))
    return _Unpickler(io.BytesIO(parcel.shell), views).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]
