"""The host's memory keeps what a GPU does not need at once: tensors for backward, averages of AdamW."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moc.host_memory import Offsets, host_memory

_LEAST = 1 << 20  # bytes; smaller tensors stay where they are
_PIECE = 1 << 26  # bytes; torch rounds pinned memory up to powers of two, so a large tensor is split

_STEPPED = 1 << 26  # parameters of up to this many numbers in all step together


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
            flat.record_stream(self._stream)  # its memory is not reused before the copy is done
        return _OnHost(tensor.shape, tensor.device, pieces)

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self._stream:
            torch.cuda.current_stream(kept.device).wait_stream(self._stream)
        return kept.back()


@dataclass
class _OnHost:
    """This is a tensor on the host, in pieces, and the device that it came from."""

    shape: torch.Size
    device: torch.device
    pieces: list[Tensor]

    def back(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.pieces[0].dtype, device=self.device)
        for target, piece in zip(out.view(-1).split(len(self.pieces[0])), self.pieces, strict=True):
            target.copy_(piece, non_blocking=True)
        return out


class OffloadedAdamW(torch.optim.AdamW):
    """This is AdamW whose averages of gradients wait on the host. In a step those of some parameters come to the
    device, which computes as ever, and go back; the host waits for the last of them."""

    state_device = torch.device("cpu")  # states of a parameter's shape wait here between steps

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._hosts: dict[tuple[Tensor, str], Tensor] = {}
        self._memory: list[Tensor] = []  # the host's memory that holds those states

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        try:
            for group in groups:
                for some in _together(group["params"]):
                    for parameter, state, key in self._averages(some):
                        state[key] = state[key].to(parameter.device, copy=True, non_blocking=True)
                    self.param_groups = [group | {"params": some}]
                    super().step()
                    self._rest(some)
        finally:
            self.param_groups = groups
            if self._memory and self._memory[0].is_pinned():
                torch.cuda.current_stream().synchronize()  # waits until the copies to the host are done

    def _rest(self, parameters: Sequence[Tensor]) -> None:
        """Sends the averages of these parameters on their way to the host."""
        averages = list(self._averages(parameters))
        new = [(parameter, key) for parameter, _, key in averages if (parameter, key) not in self._hosts]
        if new:
            offsets = Offsets([self.state[parameter][key] for parameter, key in new])
            self._memory.append(host_memory(offsets.size, new[0][0].is_cuda))
            self._hosts |= dict(zip(new, offsets.views(self._memory[-1]), strict=True))
        for parameter, state, key in averages:
            state[key] = self._hosts[parameter, key].copy_(state[key], non_blocking=True)

    def _averages(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor], str]]:
        """Yields each parameter, its state and the name of a tensor in it, but for the count of steps."""
        for parameter in parameters:
            state = self.state.get(parameter, {})
            yield from ((parameter, state, key) for key in list(state) if state[key].dim())


def _together(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields runs of parameters, each of few numbers or one of them."""
    some: list[Tensor] = []
    numbers = 0
    for parameter in parameters:
        size = parameter.numel()
        if some and numbers + size > _STEPPED:
            yield some
            some, numbers = [], 0
        some.append(parameter)
        numbers += size
    yield some
