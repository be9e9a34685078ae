"""A GPU copies from and to this memory of the host at full speed; `Offsets` says where tensors lie in it."""

from collections.abc import Sequence
from weakref import finalize

import torch
from torch import Tensor

from moc.errors import UserError

_ALIGNMENT = 256  # bytes; every tensor begins at a multiple of them
_PAGE = 4096  # bytes; pages are pinned whole, and none twice


class Offsets:
    """This object says where tensors like some given ones lie, one after another, in memory of `size` bytes."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._offsets: list[tuple[int, int, torch.dtype, torch.Size]] = []
        self.size = 0
        for tensor in tensors:
            self._offsets.append((self.size, self.size + tensor.nbytes, tensor.dtype, tensor.shape))
            self.size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    def views(self, memory: Tensor) -> list[Tensor]:
        """Returns the tensors in `memory`, uint8 [size or more]."""
        return [memory[start:end].view(dtype).view(shape) for start, end, dtype, shape in self._offsets]


def host_memory(size: int, pinned: bool) -> Tensor:
    """Returns new memory, uint8 [size]; pinned as long as the tensor returned lasts. torch's own pinned memory comes in
    powers of two, of which a block of 14 B would fill two thirds. Raises UserError where it cannot be pinned."""
    memory = torch.empty(size + 2 * _PAGE, dtype=torch.uint8).numpy()
    start = -memory.ctypes.data % _PAGE
    # This has a storage of its own, since torch asks whether a storage's beginning is pinned.
    host = torch.from_numpy(memory[start : start + size])
    if pinned and size:
        whole = -(-size // _PAGE) * _PAGE
        error = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), whole, 1))  # 1 pins for all devices
        if error:
            raise UserError(
                f"{whole / 2**20:.0f} MiB of the host's memory cannot be pinned (CUDA error {error}): make room there, "
                "or keep less in it: parallel.swap_blocks, optim.offload, sampler.offload_cache"
            )
        finalize(host, _unpin, host.data_ptr()).atexit = False
    return host


def _unpin(pointer: int) -> None:
    """Gives pinned memory back, once what the GPU still copies from it or to it has come."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(pointer)
