"""This module sends a batch between processes as one tensor, since every tensor that is sent costs a millisecond of
sockets.

Only the loader and its own workers exchange parcels; none is ever written to a file.
"""

import io
import pickle
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16


class Parcel(NamedTuple):
    """A parcel holds an object and, apart, its tensors. shell: pickled, the dtype's name, shape, strides and first
    element of each tensor, then the object without its tensors. flat: uint8, the tensors' bytes.

    `shell` is bytes because a DataLoader that pins memory would look through lists and tuples number by number.
    """

    shell: bytes
    flat: Tensor


def wrap(content: Any) -> Parcel:
    """Wraps any picklable object with CPU tensors in it."""
    shell = io.BytesIO()
    pickler = _Pickler(shell)
    pickler.dump(content)
    tensors = [tensor.contiguous() for tensor in pickler.tensors]
    offsets = [0, *accumulate(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)]
    flat, entries = torch.empty(offsets.pop(), dtype=torch.uint8), []
    for tensor, offset in zip(tensors, offsets, strict=True):
        flat[offset : offset + tensor.nbytes] = tensor.flatten().view(torch.uint8)
        name = str(tensor.dtype).removeprefix("torch.")
        entries.append((name, tuple(tensor.shape), tensor.stride(), offset // tensor.itemsize))
    return Parcel(pickle.dumps(entries) + shell.getvalue(), flat)


def unwrap(parcel: Parcel) -> Any:
    """Returns the object again; its tensors are views of the parcel's memory, pinned if that is."""
    shell = io.BytesIO(parcel.shell)
    entries = pickle.load(shell)
    flat = {name: parcel.flat.view(getattr(torch, name)) for name in {name for name, *_ in entries}}
    views = [flat[name].as_strided(shape, strides, start) for name, shape, strides, start in entries]
    return _Unpickler(shell, views).load()


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
