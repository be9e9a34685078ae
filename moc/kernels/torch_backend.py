"""Backend `torch` merges anchored and routed attention of stock kernels by their LSE. It runs on CPUs and any GPU.

Anchored attention is dense calls (`anchors`). Routed attention gathers the queries that chose a chunk against that
chunk, in one variable-length call where a kernel takes it, else in one small dense call a list. A few heads at a time
bound the memory. The backward of either gets the merged output and LSE, which makes it exact. Short samples on a CPU
take one call each, under a mask (`masked`).

Shape letters: L packed tokens, Lq queries, N heads, Nb heads of a head block, D head dim, M chunks, K slots of a query,
R routed rows. In lists and tables of slots, tokens are queries and count from the first of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moc.config import MoCConfig
from moc.errors import UserError
from moc.execution import AUTO, Execution
from moc.kept import Kept
from moc.kernels import anchors, dense, masked
from moc.kernels.anchors import AnchorPlan
from moc.kernels.dense import DenseKernel, Lengths
from moc.kernels.packed import MAX_RUNS
from moc.layout import ShotLayout
from moc.move import move
from moc.routing import route

__all__ = ["attend", "route"]

MAX_ELEMENTS = 1 << 29  # the most numbers of gathered queries held at a time; FA2 faults past 2^31


def attend(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, layout: ShotLayout, config: MoCConfig,
    execution: Execution = AUTO, kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """Attends to anchors and routed chunks together: q [Lq, N, D], k, v [L, N, D] -> [Lq, N, D], same dtype.

    routes: int [N, Lq, K], no chunk twice in a row and none that the anchors cover; None (or K = 0) for anchors alone.
    Takes any device and floating dtype. Waits for the device once for each head block. Has no second derivative.
    """
    if config.dense or routes is None:
        routes = torch.empty(q.shape[1], len(q), 0, dtype=torch.int32, device=q.device)
    else:
        if masked.fits(q, layout, execution):
            return masked.attend(q, k, v, routes, layout, config)
        routes = anchors.with_own_chunk(routes, layout, config)
    return _Attend.apply(q, k, v, routes, layout, config, execution, kept)


@dataclass(frozen=True)
class _Lists:
    """These are the routed rows of heads [first, first + Nb), sorted by (head, chunk), then by token.

    head (within the block), token: int64 [R]. starts: first row of each list, and R. row: int64 [Nb, L, K], the row of
    each slot, -1 where it is empty.
    """

    first: int
    num_heads: int
    head: Tensor
    token: Tensor
    starts: list[int]
    row: Tensor

    @property
    def heads(self) -> slice:
        return slice(self.first, self.first + self.num_heads)

    def rows(self, x: Tensor) -> Tensor:
        """Returns the rows [R, D] of x [L, N, D]."""
        return x[self.token, self.first + self.head]

    def non_empty(self) -> Iterator[tuple[int, slice]]:
        for index, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            if end > start:
                yield index, slice(start, end)

    def sum_slots(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sums rows [R, D], times weights [Nb, L, K] (None: ones), over slots: [L, Nb, D] in fp32 at least."""
        weights = (self.row >= 0).to(rows.dtype) if weights is None else weights
        total = rows.new_zeros(*self.row.shape[:2], rows.shape[-1])
        for slot in range(self.row.shape[-1]):
            total += rows[self.row[..., slot].clamp(min=0)] * weights[..., slot, None]
        return total.transpose(0, 1)


def _lists(routes: Tensor, num_chunks: int, head_dim: int) -> Iterator[_Lists]:
    num_heads, num_tokens, num_slots = routes.shape
    block = MAX_ELEMENTS // max(1, num_tokens * num_slots * head_dim)
    block = max(1, min(num_heads, block, MAX_RUNS // num_chunks))
    for first in range(0, num_heads, block):
        table = routes[first : first + block].long()
        heads = len(table)
        list_id = (table + num_chunks * torch.arange(heads, device=table.device)[:, None, None]).flatten()
        list_id = list_id.masked_fill(table.flatten() < 0, heads * num_chunks)
        counts = list_id.bincount(minlength=heads * num_chunks + 1)[:-1]
        starts = [0, *counts.cumsum(0).tolist()]
        if not starts[-1]:
            continue
        entries = list_id.argsort(stable=True)[: starts[-1]]
        row = torch.full_like(list_id, -1)
        row[entries] = torch.arange(len(entries), device=table.device)
        head, token = entries // (num_tokens * num_slots), entries // num_slots % num_tokens
        yield _Lists(first, heads, head, token, starts, row.view_as(table))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, routes, layout, config, execution, kept):
        kernel = dense.choose(q, execution.dense_kernel, execution.deterministic)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        plan = anchors.anchor_plan(layout, config, len(q))
        inputs = kernel, q, k, v, routes, layout, plan
        out, lse = kept.of(lambda: _forward(*inputs)) if kept else _forward(*inputs)
        ctx.save_for_backward(q, k, v, out, lse, routes)
        ctx.layout, ctx.deterministic, ctx.kernel, ctx.plan = layout, execution.deterministic, kernel, plan
        return out

    @staticmethod
    def backward(ctx, dout):
        dense.refuse_second_derivative()
        q, k, v, out, lse, routes = ctx.saved_tensors
        dout, layout, deterministic, kernel = dout.contiguous(), ctx.layout, ctx.deterministic, ctx.kernel
        dq, dk, dv = anchors.backward(kernel, dout, q, k, v, out, lse, ctx.plan, deterministic)
        if routes.shape[-1]:
            for lists in _lists(routes, layout.num_chunks, q.shape[-1]):
                dout_rows, q_rows, out_rows = (lists.rows(x) for x in (dout, q, out))
                row_lse = lse[lists.first + lists.head, lists.token]
                dq_rows, dk_heads, dv_heads = _routed(q, kernel).backward(
                    dout_rows, q_rows, out_rows, row_lse, k, v, lists, layout, deterministic
                )
                wide = torch.promote_types(q.dtype, torch.float32)
                for total, added in zip(
                    (dq, dk, dv), (lists.sum_slots(dq_rows.to(wide)), dk_heads, dv_heads), strict=True
                ):
                    total[:, lists.heads] = (total[:, lists.heads].to(wide) + added).to(total.dtype)
        return dq, dk, dv, *(None,) * 5


def _forward(
    kernel: DenseKernel, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, layout: ShotLayout, plan: AnchorPlan
) -> tuple[Tensor, Tensor]:
    """Returns out [Lq, N, D] and lse [N, Lq]."""
    out, lse = anchors.forward(kernel, q, k, v, plan)
    if routes.shape[-1]:
        for lists in _lists(routes, layout.num_chunks, q.shape[-1]):
            rows = _routed(q, kernel).forward(lists.rows(q), k, v, lists, layout)
            _merge(out, lse, *rows, lists)
    return out, lse


def _merge(out: Tensor, lse: Tensor, rows: Tensor, row_lse: Tensor, lists: _Lists) -> None:
    """Adds routed rows [R, D] with their LSE [R] to out [L, N, D] and lse [N, L], in place."""
    table = row_lse[lists.row.clamp(min=0)].masked_fill(lists.row < 0, -torch.inf)
    own = lse[lists.heads]
    merged = torch.logaddexp(own, table.logsumexp(-1))
    finite = merged.masked_fill(merged == -torch.inf, 0.0)  # a query without any key: all weights exp(-inf - 0) = 0
    own_weight = (own - finite).exp().T[..., None]
    routed = lists.sum_slots(rows.to(lse.dtype), (table - finite[..., None]).exp())
    out[:, lists.heads] = (out[:, lists.heads] * own_weight + routed).to(out.dtype)
    lse[lists.heads] = merged


def _routed(q: Tensor, kernel: DenseKernel) -> "_ByList | _VarLen":
    varlen = dense.choose_varlen(kernel, q)
    return _VarLen(varlen) if varlen else _ByList(kernel)


@dataclass(frozen=True)
class _ByList:
    """This object attends from routed rows to chunks by one dense call for each (head, chunk)."""

    kernel: DenseKernel

    @staticmethod
    def _keys(index: int, lists: _Lists, layout: ShotLayout) -> tuple[slice, slice]:
        """Returns tokens and head of a list's keys."""
        head, chunk = divmod(index, layout.num_chunks)
        start = layout.chunks[chunk].start
        return slice(start, start + layout.chunks[chunk].length), slice(lists.first + head, lists.first + head + 1)

    def forward(self, q_rows: Tensor, k: Tensor, v: Tensor, lists: _Lists, layout: ShotLayout) -> tuple[Tensor, Tensor]:
        """Returns output [R, D] and LSE [R] of the routed rows."""
        rows = torch.empty_like(q_rows)
        row_lse = q_rows.new_empty(len(q_rows), dtype=torch.promote_types(q_rows.dtype, torch.float32))
        for index, of_list in lists.non_empty():
            keys = self._keys(index, lists, layout)
            out, lse = self.kernel.forward(q_rows[of_list, None], k[keys], v[keys])
            rows[of_list], row_lse[of_list] = out[:, 0], lse[0]
        return rows, row_lse

    def backward(
        self, dout: Tensor, q_rows: Tensor, out: Tensor, row_lse: Tensor, k: Tensor, v: Tensor,
        lists: _Lists, layout: ShotLayout, deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns dq of the rows [R, D], and dk, dv [L, Nb, D]."""
        dq_rows = torch.empty_like(q_rows)
        dk, dv = torch.zeros_like(k[:, lists.heads]), torch.zeros_like(v[:, lists.heads])
        for index, of_list in lists.non_empty():
            tokens, head = self._keys(index, lists, layout)
            dq_list, dk_list, dv_list = self.kernel.backward(
                dout[of_list, None], q_rows[of_list, None], k[tokens, head], v[tokens, head], out[of_list, None],
                row_lse[None, of_list], deterministic,
            )  # fmt: skip
            dq_rows[of_list] = dq_list[:, 0]
            dk[tokens, index // layout.num_chunks], dv[tokens, index // layout.num_chunks] = (
                dk_list[:, 0],
                dv_list[:, 0],
            )
        return dq_rows, dk, dv


@dataclass(frozen=True)
class _VarLen:
    """This object attends from routed rows to chunks by one variable-length call for all lists of a head block."""

    kernel: DenseKernel

    @staticmethod
    def _head_major(x: Tensor, lists: _Lists) -> Tensor:
        """Returns the block's heads of x [L, N, D] one after another, [Nb * L, 1, D]."""
        return x[:, lists.heads].transpose(0, 1).reshape(-1, 1, x.shape[-1])

    @staticmethod
    def _lengths(lists: _Lists, layout: ShotLayout) -> Lengths:
        if len(lists.starts) > MAX_RUNS + 1:  # of one head: a head block of several is small enough
            raise UserError(
                f"a pack has {layout.num_chunks} chunks, and one call of FlashAttention takes {MAX_RUNS} at most: "
                "raise moc.chunk_tokens, pack fewer shots, or take execution.backend=triton"
            )
        chunk_starts = layout.chunk_cu_seqlens
        by_head = chunk_starts[:-1] + layout.num_tokens * torch.arange(
            lists.num_heads, device=chunk_starts.device, dtype=torch.int32
        ).unsqueeze(1)
        end = chunk_starts[-1:] * lists.num_heads
        starts = move(torch.tensor(lists.starts, dtype=torch.int32), chunk_starts.device)
        longest = max(end - start for start, end in zip(lists.starts, lists.starts[1:], strict=False))
        return Lengths(starts, torch.cat([by_head.flatten(), end]), longest, layout.max_chunk_tokens)

    def forward(self, q_rows: Tensor, k: Tensor, v: Tensor, lists: _Lists, layout: ShotLayout) -> tuple[Tensor, Tensor]:
        """Returns output [R, D] and LSE [R] of the routed rows."""
        keys, values = self._head_major(k, lists), self._head_major(v, lists)
        out, lse = self.kernel.forward(q_rows[:, None], keys, values, lengths=self._lengths(lists, layout))
        return out[:, 0], lse[0]

    def backward(
        self, dout: Tensor, q_rows: Tensor, out: Tensor, row_lse: Tensor, k: Tensor, v: Tensor,
        lists: _Lists, layout: ShotLayout, deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns dq of the rows [R, D], and dk, dv [L, Nb, D]."""
        keys, values = self._head_major(k, lists), self._head_major(v, lists)
        dq, dk, dv = self.kernel.backward(
            dout[:, None], q_rows[:, None], keys, values, out[:, None], row_lse[None], deterministic,
            lengths=self._lengths(lists, layout),
        )  # fmt: skip
        dk, dv = (x.view(lists.num_heads, -1, x.shape[-1]).transpose(0, 1) for x in (dk, dv))
        return dq[:, 0], dk, dv
