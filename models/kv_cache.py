"""A KV cache keeps the keys and values of the finished shots of a story that is generated shot by shot.

Source: context-causal generation with cached keys and values, Long Context Tuning, arXiv 2503.10589, section 3.4.

Shape letters: L packed tokens, N heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moc.config import MoCConfig
from moc.errors import UserError
from moc.host_memory import host_memory
from moc.memory import host_free_bytes

LayerKV = tuple[Tensor, ...]  # keys, values and the like of a layer


@dataclass
class KVCache:
    """A cache keeps keys and values of the shots generated so far, by layer; one for each prompt and sample. No
    gradient flows through it.

    capacity: tokens of the longest stream that it is for. What a forward computes is written behind what is kept:
        nothing is copied, and nothing grows.
    num_layers: of the model. The memory of all of them is taken at once, when the first one is asked.
    anyone: whether a flag is set on any of the processes that compute a stream together, and have such caches. Where
        one of them has no memory left, all raise torch.OutOfMemoryError, and none waits for it within a forward.
    offload: that memory is the host's, and what a layer keeps comes to the device while the layer before computes.
        All of it comes: what the queries of a shot and their heads route to can together be nearly every chunk.
    num_tokens: of the shots that are kept.
    """

    capacity: int
    num_layers: int
    offload: bool = False
    anyone: Callable[[bool], bool] = bool
    num_tokens: int = 0
    _layers: dict[int, LayerKV] = field(default_factory=dict)
    _coming: dict[int, LayerKV] = field(default_factory=dict)  # the layer on its way to the device
    _hosts: list[Tensor] = field(default_factory=list)  # host memory, which stays pinned while it is held here
    _stream: torch.cuda.Stream | None = None

    def tokens_for(self, config: MoCConfig) -> int:
        """Returns the number of tokens kept. Raises UserError where they would depend on later shots."""
        if not config.flows_forward:
            raise UserError(
                "cached keys and values need a strict forward flow: moc.causal=true, moc.own_anchor=shot, "
                "moc.text_anchor=global_and_own, and no dense layers"
            )
        return self.num_tokens

    @torch.no_grad()
    def extended(self, layer: int, new: LayerKV, remember: bool) -> LayerKV:
        """Returns keys, values and the like [L, N, D] of tokens kept and of new ones together; the latter are kept too
        if `remember`. What is returned holds until the layer is asked again. Raises ValueError beyond the capacity."""
        start, end = self.num_tokens, self.num_tokens + len(new[0])
        if end > self.capacity:
            raise ValueError(f"a cache for {self.capacity} tokens is given {end}: make it for its longest stream")
        if not self._layers:
            self._take_memory(new)
        if self.offload:
            whole = self._brought(layer, new)
            if remember:
                _write(self._layers[layer], start, new)
        else:
            whole = self._layers[layer]
        _write(whole, start, new)
        return tuple(x[:end] for x in whole)

    def keep_first(self, num_tokens: int) -> None:
        """Forgets all but the first `num_tokens` tokens."""
        self.num_tokens = min(self.num_tokens, num_tokens)

    def _take_memory(self, like: LayerKV) -> None:
        problem, needed = "", self.num_layers * self.capacity * sum(x[0].nbytes for x in like)
        try:
            if self.offload and needed > host_free_bytes():  # the system ends a process that takes it all the same
                raise UserError(f"{needed / 2**30:.3g} GiB for keys and values are more than the host has left")
            for layer in range(self.num_layers):
                self._layers[layer] = tuple(self._memory(x) for x in like)
        except (torch.OutOfMemoryError, UserError) as error:
            problem = str(error)
        if self.anyone(bool(problem)):
            self._layers, self._hosts = {}, []
            raise torch.OutOfMemoryError(problem or "another process has no memory left for keys and values")

    def _memory(self, like: Tensor) -> Tensor:
        """Returns new memory [capacity, N, D] for tensors like this one."""
        shape = (self.capacity, *like.shape[1:])
        if not self.offload:
            return like.new_empty(shape)
        self._hosts.append(host_memory(like[0].nbytes * self.capacity, like.is_cuda))
        return self._hosts[-1].view(like.dtype).view(shape)

    def _brought(self, layer: int, new: LayerKV) -> LayerKV:
        """Returns what a layer keeps, on the device, with space behind it for what is new. The next layer starts on its
        way."""
        whole = self._coming.pop(layer) if layer in self._coming else self._bring(layer, new)
        if self._stream:
            torch.cuda.current_stream(new[0].device).wait_stream(self._stream)
        if layer + 1 in self._layers:
            self._coming[layer + 1] = self._bring(layer + 1, new)
        return whole

    def _bring(self, layer: int, new: LayerKV) -> LayerKV:
        """Copies, on a GPU by a stream of its own, which first waits for what may still read the memory it writes."""
        if new[0].is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(new[0].device)
        whole = tuple(x.new_empty(self.num_tokens + len(x), *x.shape[1:]) for x in new)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(new[0].device))
        with torch.cuda.stream(self._stream):  # a stream of None has no effect
            for to, kept in zip(whole, self._layers[layer], strict=True):
                to[: self.num_tokens].copy_(kept[: self.num_tokens], non_blocking=True)
        return whole


def _write(memory: LayerKV, start: int, new: LayerKV) -> None:
    """Writes the tensors [L, N, D] into memories from token `start` on."""
    for target, x in zip(memory, new, strict=True):
        target[start : start + len(x)].copy_(x, non_blocking=True)
