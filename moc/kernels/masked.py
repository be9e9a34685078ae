"""Attention of short samples on a CPU: one dense call a sample, under a mask of the chunks that each query attends to.

In a sample of a few hundred tokens a call for each shot and each list of routed queries takes longer than the keys that
it leaves out. Anchors and routes are both sets of chunks, so the mask is a table of chunks, spread over their tokens.
The backward makes it anew, which costs less than to keep it.

Shape letters: L packed tokens, Lq queries, N heads, D head dim, M chunks of a sample, K slots of a query.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moc.config import MoCConfig
from moc.context import is_anchor
from moc.execution import Execution
from moc.kernels.anchors import refuse_second_derivative
from moc.layout import ShotLayout

MAX_TOKENS = 640  # of a sample: beyond, the keys that separate calls leave out are worth their calls

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Sample(NamedTuple):
    """queries: of q, keys: of the stream. first_chunk: of the sample; key_chunk int64 [keys]: counted from it.

    anchors fp32 [queries, M + 1]: 0 for the chunks that a query attends to whatever its routes, -inf for the others;
    the last column is for empty slots.
    """

    queries: slice
    keys: slice
    first_chunk: int
    key_chunk: Tensor
    anchors: Tensor

    def mask(self, routes: Tensor, dtype: torch.dtype) -> Tensor:
        """What to add to the scores, 0 or -inf: routes of the sample's queries [N, Lq, K] -> [1, N, Lq, keys]."""
        num_heads, num_queries, _ = routes.shape
        local = (routes.long() - self.first_chunk).masked_fill(routes < 0, self.anchors.shape[1] - 1)
        chunks = self.anchors.to(dtype).repeat(num_heads, 1, 1).scatter_(-1, local, 0.0)
        return chunks.gather(-1, self.key_chunk.expand(num_heads, num_queries, -1))[None]


def fits(q: Tensor, layout: ShotLayout, execution: Execution) -> bool:
    """Returns whether a mask is the fastest way, as far as the settings leave the choice."""
    short = max(end - start for start, end in layout.sample_ranges) <= MAX_TOKENS
    return q.device.type == "cpu" and short and execution.dense_kernel in ("auto", "cpu")


def attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Attention over anchors and routed chunks together: q [Lq, N, D], k, v [L, N, D], routes int [N, Lq, K] ->
    [Lq, N, D], same dtype, of any floating dtype. Arguments as those of `torch_backend.attend`."""
    first_query = layout.first_query(len(q))
    key = ("masked on a CPU", config.own_anchor, config.text_anchor, first_query)
    samples = layout.memo(key, lambda: _samples(layout, config, first_query))
    return _Attend.apply(q, k, v, routes, samples)


def _samples(layout: ShotLayout, config: MoCConfig, first_query: int) -> list[_Sample]:
    found = []
    chunk_bounds = layout.sample_first_chunk.tolist()
    for (start, end), first, last in zip(layout.sample_ranges, chunk_bounds, chunk_bounds[1:], strict=False):
        begin = max(start, first_query)
        if begin < end:
            chunks = torch.arange(first, last)
            barred = ~is_anchor(layout, config, chunks[:, None], chunks)
            table = torch.zeros(barred.shape).masked_fill(barred, -torch.inf)
            key_chunk = layout.token_chunk[start:end].long() - first
            anchors = torch.nn.functional.pad(table, (0, 1))[key_chunk[begin - start :]]
            queries = slice(begin - first_query, end - first_query)
            found.append(_Sample(queries, slice(start, end), first, key_chunk, anchors))
    return found


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[L, N, D] -> [1, N, L, D], without a copy."""
    return [x[None].transpose(1, 2) for x in tensors]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, routes, samples):
        out, lse = torch.empty_like(q), []
        for s in samples:
            mask = s.mask(routes[:, s.queries], q.dtype)
            result, own_lse = _forward(*_heads_first(q[s.queries], k[s.keys], v[s.keys]), attn_mask=mask)
            out[s.queries] = result[0].transpose(0, 1)
            lse.append(own_lse)
        ctx.save_for_backward(q, k, v, routes, out, *lse)
        ctx.samples = samples
        return out

    @staticmethod
    def backward(ctx, dout):
        refuse_second_derivative("torch")
        q, k, v, routes, out, *lse = ctx.saved_tensors
        grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for s, own_lse in zip(ctx.samples, lse, strict=True):
            mask = s.mask(routes[:, s.queries], q.dtype)
            tensors = _heads_first(dout[s.queries], q[s.queries], k[s.keys], v[s.keys], out[s.queries])
            results = _backward(*tensors, own_lse, 0.0, False, attn_mask=mask)
            for grad, rows, result in zip(grads, (s.queries, s.keys, s.keys), results, strict=True):
                grad[rows] = result[0].transpose(0, 1)
        return *grads, None, None
