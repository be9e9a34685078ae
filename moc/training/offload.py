"""What backward needs, kept in the host's memory meanwhile."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LEAST = 1 << 20  # bytes; smaller tensors stay where they are
_PIECE = 1 << 26  # bytes; torch takes pinned memory in powers of two, which may be twice a large tensor in one piece


class OffloadActivations(torch.autograd.graph.saved_tensors_hooks):
    """While it lasts, large tensors that are saved for backward wait on the host, as under torch's `save_on_cpu`: from
    a GPU they go on a stream of their own, and they come back when backward asks for them. Under activation
    checkpointing those are the inputs of the blocks. Weights stay where they are."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _OnHost":
        if tensor.nbytes < _LEAST or not tensor.is_contiguous() or isinstance(tensor, nn.Parameter):
            return tensor
        flat = tensor.detach().view(-1)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            split = flat.split(_PIECE // flat.element_size())
            pieces = [piece.to("cpu", non_blocking=True, copy=True) for piece in split]
        if self._stream:
            flat.record_stream(self._stream)  # its memory is not used again before it has gone
        return _OnHost(tensor.shape, tensor.device, pieces)

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self._stream:
            torch.cuda.current_stream(kept.device).wait_stream(self._stream)
        return kept.back()


@dataclass
class _OnHost:
    """A tensor on the host, in pieces, and the device that it came from."""

    shape: torch.Size
    device: torch.device
    pieces: list[Tensor]

    def back(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.pieces[0].dtype, device=self.device)
        for place, piece in zip(out.view(-1).split(len(self.pieces[0])), self.pieces, strict=True):
            place.copy_(piece, non_blocking=True)
        return out
