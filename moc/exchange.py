"""In sequence parallelism several processes hold one stream: each has a run of its tokens, and within attention some of
its heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Everything but attention works on one token at a time, so that a process computes its own tokens alone. Attention is
given all tokens of its share of the heads: two exchanges around it turn one split into the other.

Shape letters: P processes, L tokens of the stream, Lr those of a process, N heads, D head dim.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moc.errors import UserError


@dataclass(frozen=True)
class Exchange:
    """An exchange links processes that hold one stream. group: theirs in torch.distributed. rank, size: of this process
    in it.
    waiting: a context in which it waits for the others, for who wants to know how long that takes."""

    group: Any
    rank: int
    size: int
    waiting: Callable[[], AbstractContextManager] = nullcontext

    def bounds(self, start: int, end: int) -> list[int]:
        """Returns where the run of each process begins, and the end of the last: [P + 1]. Lengths differ by one at
        most. Raises UserError where the tokens are too few."""
        if end - start < self.size:
            raise UserError(
                f"a stream of {end - start} tokens is too short for parallel.sequence={self.size}: lower it"
            )
        return [start + (end - start) * rank // self.size for rank in range(self.size + 1)]

    def to_heads(self, x: Tensor, num_tokens: int) -> Tensor:
        """Turns this process's tokens of all heads [Lr, N, D] to all `num_tokens` of its heads [L, N / P, D]. Raises
        UserError where the processes do not divide the heads."""
        if x.shape[1] % self.size:
            raise UserError(f"parallel.sequence={self.size} does not divide the model's {x.shape[1]} heads; set it so")
        by_rank = x.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1)
        return _AllToAll.apply(by_rank, [len(x)] * self.size, self._lengths(num_tokens), self)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Undoes `to_heads`: returns [Lr, N, D] of x [L, N / P, D]."""
        lengths = self._lengths(len(x))
        by_rank = _AllToAll.apply(x, lengths, [lengths[self.rank]] * self.size, self)
        return by_rank.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2)

    def gather(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Returns the rows of all processes, one after another: [Lr, C] -> [L, C]. lengths: rows of each. All must go
        on to compute the same with the result, as its gradient is not added up."""
        return _Gather.apply(x, lengths, self)

    def _lengths(self, num_tokens: int) -> list[int]:
        bounds = self.bounds(0, num_tokens)
        return [end - start for start, end in pairwise(bounds)]

    def all_to_all(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends runs of rows of x, of these lengths, to each process in turn; returns the runs that came from each."""
        x, out = x.contiguous(), x.new_empty(sum(received), *x.shape[1:])
        with self.waiting():
            dist.all_to_all_single(out, x, received, sent, self.group)
        return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], exchange: Exchange) -> Tensor:
        ctx.sent, ctx.received, ctx.exchange = sent, received, exchange
        return exchange.all_to_all(x, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.exchange.all_to_all(grad, ctx.received, ctx.sent), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], exchange: Exchange) -> Tensor:
        start = sum(lengths[: exchange.rank])
        ctx.own = slice(start, start + len(x))
        copies = x.expand(exchange.size, *x.shape).flatten(0, 1)
        return exchange.all_to_all(copies, [len(x)] * exchange.size, lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.own], None, None
