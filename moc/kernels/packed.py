"""Many short attentions are one variable-length call: runs of queries, each with its own keys, gathered once a layer.

A launch costs the same for 72 tokens as for 4,000: a pack of hundreds of short shots is one call here, whatever the
number of its shots. Keys that several runs share (text) are copied for each; their gradients are added in a fixed
order. Which keys a run reads belongs to the stream, so it is tabulated once a batch and not once a layer.

Shape letters: L tokens of the keys, Lq queries, R gathered keys, U runs, N heads, D head dim.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moc.kernels import HAS_TRITON, dense
from moc.kernels.dense import DenseKernel, Lengths
from moc.move import move

MAX_NUMBERS = 1 << 31  # FlashAttention-2 addresses gathered keys by 32-bit numbers
MAX_RUNS = 65535

Range = tuple[int, int]


class Packed(NamedTuple):
    """Run i is the queries [query_starts[i], query_starts[i + 1]), which tile q; it attends to the keys
    key_index[key_starts[i] : key_starts[i + 1]], of which there is at least one.

    query_starts, key_starts: int32 [U + 1]. The others are int64, and empty where R = L and keys keep their order.
    key_index [R]: the token of each gathered row. rows [R], row_starts [L + 1]: token i has the gathered rows
    rows[row_starts[i] : row_starts[i + 1]], perhaps none. max_queries, max_keys: the most of any run.
    """

    query_starts: Tensor
    key_starts: Tensor
    key_index: Tensor
    rows: Tensor
    row_starts: Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def build(
        cls, lengths: Sequence[int], keys: Sequence[Sequence[Range]], num_tokens: int, device: torch.device,
        rows: Sequence[Range] = (),
    ) -> "Packed":  # fmt: skip
        """Tabulates runs of `lengths` queries on `device`, where numbering every key is no work for the host. Raises
        ValueError for more runs than FlashAttention-2 takes.

        keys: the ranges [start, end) of each run's keys among `num_tokens` tokens, or, where there are `rows`, among
        the tokens of these ranges, one range after another.
        """
        if len(lengths) > MAX_RUNS:
            raise ValueError(f"{len(lengths)} runs of queries in one call, of {MAX_RUNS} at most: pack fewer shots")
        counts = [sum(end - start for start, end in run) for run in keys]
        starts = torch.tensor([[0, *accumulate(sizes)] for sizes in (lengths, counts)], dtype=torch.int32)
        ranges = [one for run in keys for one in run if one[0] < one[1]]
        if _in_order(ranges, num_tokens):
            tables = [torch.empty(0, dtype=torch.int64, device=device)] * 3
        else:
            index = numbers_in(ranges, device)
            tables = _rows_of_tokens(numbers_in(rows, device)[index] if rows else index, num_tokens)
        return cls._make([*move(starts, device), *tables, max(lengths), max(counts)])

    def head_blocks(self, k: Tensor) -> list[slice]:
        """Returns runs of heads of k [L, N, D] whose gathered rows can be addressed."""
        num_heads, head_dim = k.shape[1:]
        numbers = max(len(self.key_index), len(k)) * head_dim
        size = max(1, min(num_heads, MAX_NUMBERS // numbers))
        return [slice(first, first + size) for first in range(0, num_heads, size)]

    def gather(self, x: Tensor) -> Tensor:
        """Returns the gathered rows [R, N, D] of x [L, N, D]."""
        return x.index_select(0, self.key_index) if len(self.key_index) else x

    def sum_rows(self, dkeys: Tensor, dvalues: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gradients of the tokens [L, N, D] of those of gathered rows [R, N, D], added in fp32 at least."""
        if not len(self.key_index):
            return dkeys, dvalues
        if HAS_TRITON and dkeys.is_cuda and dkeys.dtype != torch.float64:
            from moc.kernels.triton_rows import sum_rows

            return sum_rows(dkeys, dvalues, self.rows, self.row_starts)
        return self._sum(dkeys), self._sum(dvalues)

    def _sum(self, grad: Tensor) -> Tensor:
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(len(self.row_starts) - 1, *grad.shape[1:], dtype=wide)
        with dense.deterministic_algorithms(True):  # a GPU would add rows in any order
            total.index_add_(0, self.key_index, grad.to(wide))
        return total.to(grad.dtype)

    def runs(self) -> Iterator[tuple[slice, slice]]:
        """Yields the queries and the gathered keys of each run; waits for the device."""
        q, k = self.query_starts.tolist(), self.key_starts.tolist()
        for i in range(len(q) - 1):
            yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])

    def lengths(self) -> Lengths:
        return Lengths(self.query_starts, self.key_starts, self.max_queries, self.max_keys)


def _in_order(ranges: Sequence[Range], num_tokens: int) -> bool:
    """Returns whether ranges, none empty, are the tokens 0 to `num_tokens`, one after another."""
    ends = [0, *(end for _, end in ranges)]
    return ends[-1] == num_tokens and all(start == end for (start, _), end in zip(ranges, ends[:-1], strict=True))


def numbers_in(ranges: Sequence[Range], device: torch.device) -> Tensor:
    """Returns the numbers of ranges [start, end), one range after another: int64, on `device`."""
    total = sum(end - start for start, end in ranges)
    starts, ends = move(torch.tensor(ranges, dtype=torch.int64).view(-1, 2), device).unbind(1)
    sizes = ends - starts
    before = sizes.cumsum(0) - sizes
    offsets = (starts - before).repeat_interleave(sizes, output_size=total)
    return torch.arange(total, device=device) + offsets


def _rows_of_tokens(index: Tensor, num_tokens: int) -> list[Tensor]:
    """Returns key_index, rows and row_starts of tokens `index` of the gathered rows; waits for no device."""
    tokens, rows = index.sort(stable=True)
    return [index, rows, torch.searchsorted(tokens, torch.arange(num_tokens + 1, device=index.device))]


def forward(kernel: DenseKernel, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Returns out [Lq, N, D] and lse [N, Lq], which is fp32 at least, of q [Lq, N, D], k, v [L, N, D]."""
    keys, values = packed.gather(k), packed.gather(v)
    if varlen := dense.choose_varlen(kernel, q):
        by_heads = [
            varlen.forward(q[:, h], keys[:, h], values[:, h], lengths=packed.lengths()) for h in packed.head_blocks(k)
        ]
        return _join([out for out, _ in by_heads], 1), _join([lse for _, lse in by_heads], 0)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, rows in packed.runs():
        out[queries], lse[:, queries] = kernel.forward(q[queries], keys[rows], values[rows])
    return out, lse


def backward(
    kernel: DenseKernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: Packed,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dq, dk, dv, given out and lse, which may be those of a softmax over more keys."""
    keys, values = packed.gather(k), packed.gather(v)
    if varlen := dense.choose_varlen(kernel, q):
        by_heads = []
        for h in packed.head_blocks(k):
            given = (x[:, h] for x in (dout, q, keys, values, out))
            by_heads.append(varlen.backward(*given, lse[h], deterministic, lengths=packed.lengths()))
        dq, dkeys, dvalues = (_join(grads, 1) for grads in zip(*by_heads, strict=True))
    else:
        dq, dkeys, dvalues = torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)
        for queries, rows in packed.runs():
            dq[queries], dkeys[rows], dvalues[rows] = kernel.backward(
                dout[queries], q[queries], keys[rows], values[rows], out[queries], lse[:, queries], deterministic
            )
    return dq, *packed.sum_rows(dkeys, dvalues)


def _join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, packed):
        ctx.kernel, ctx.packed = dense.choose(q), packed
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = forward(ctx.kernel, q, k, v, packed)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        dense.refuse_second_derivative()
        q, k, v, out, lse = ctx.saved_tensors
        return *backward(ctx.kernel, dout.contiguous(), q, k, v, out, lse, ctx.packed), None


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Attends from each run to its keys, differentiably: q [Lq, N, D], k, v [L, N, D] -> [Lq, N, D], same dtype."""
    return _Attend.apply(q, k, v, packed)
