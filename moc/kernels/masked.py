"""Short samples on a CPU take one dense call a shot here, under a mask of the chunks that each query attends to.

In a sample of a few hundred tokens a call for each list of routed queries takes longer than the keys that it leaves
out; a call for each shot leaves out those that come after all it attends to. Anchors and routes are both sets of
chunks, so the mask is a table of chunks, spread over their tokens.

Shape letters: L packed tokens, Lq queries, N heads, D head dim, M chunks of a sample, K slots of a query.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moc.config import MoCConfig
from moc.context import is_anchor
from moc.execution import Execution
from moc.kernels.dense import refuse_second_derivative
from moc.layout import ShotLayout

MAX_TOKENS = 640  # in a longer sample separate calls are faster, since they leave out keys

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Run(NamedTuple):
    """A run is the call of one group. queries: the group's in q. start: its sample's in the stream. first_chunk: the
    sample's. key_chunk: int64 [tokens of the sample], each one's chunk, counted from it. ends: how many tokens so many
    chunks have. num_anchored: the number of chunks up to the last anchor.

    anchors fp32 [queries, M + 1]: 0 for the chunks that a query attends to whatever its routes, -inf for the others;
    the last column is for empty slots.
    """

    queries: slice
    start: int
    first_chunk: int
    key_chunk: Tensor
    ends: list[int]
    num_anchored: int
    anchors: Tensor

    def mask(self, routes: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns what to add to the scores, 0 or -inf: routes of the run's queries [N, Lq, K] -> [1, N, Lq, keys], of
        the keys up to the last one that is attended to."""
        local = (routes.long() - self.first_chunk).masked_fill(routes < 0, self.anchors.shape[1] - 1)
        chunks = self.anchors.to(dtype).repeat(len(routes), 1, 1).scatter_(-1, local, 0.0)
        num_routed = int(routes.max()) + 1 - self.first_chunk if routes.numel() else 0
        keys = self.key_chunk[: self.ends[max(self.num_anchored, num_routed, 1)]]
        return chunks.gather(-1, keys.expand(*routes.shape[:2], -1))[None]


def fits(q: Tensor, layout: ShotLayout, execution: Execution) -> bool:
    """Returns whether a mask is the fastest way, as far as the settings leave the choice."""
    short = max(end - start for start, end in layout.sample_ranges) <= MAX_TOKENS
    return q.device.type == "cpu" and short and execution.dense_kernel in ("auto", "cpu")


def attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Computes attention over anchors and routed chunks together: q [Lq, N, D], k, v [L, N, D], routes int [N, Lq, K]
    -> [Lq, N, D], same dtype, of any floating dtype. The arguments are those of `torch_backend.attend`."""
    key = ("masked on a CPU", config.own_anchor, config.text_anchor, len(q))
    runs = layout.memo(key, lambda: _runs(layout, config, len(q)))
    return _Attend.apply(q, k, v, routes, runs)


def _runs(layout: ShotLayout, config: MoCConfig, num_queries: int) -> list[_Run]:
    found, offset = [], layout.num_tokens - num_queries
    for group in layout.groups:
        begin, (start, end) = max(group.start, offset), layout.sample_ranges[group.sample]
        if begin < group.end:
            first, last = layout.sample_first_chunk[group.sample : group.sample + 2].tolist()
            chunks = torch.arange(first, last)
            is_seen = is_anchor(layout, config, layout.token_chunk[begin : group.end, None].long(), chunks)
            table = torch.zeros(is_seen.shape).masked_fill(~is_seen, -torch.inf)
            key_chunk = layout.token_chunk[start:end].long() - first
            ends = (layout.chunk_cu_seqlens[first : last + 1] - start).tolist()
            num_anchored = int((is_seen * (chunks + 1 - first)).max())
            queries, anchors = slice(begin - offset, group.end - offset), nn.functional.pad(table, (0, 1))
            found.append(_Run(queries, start, first, key_chunk, ends, num_anchored, anchors))
    return found


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Returns tensors [L, N, D] as [1, N, L, D], without a copy."""
    return [x[None].transpose(1, 2) for x in tensors]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, routes, runs):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # the kernel reads a head's numbers side by side
        out, kept = torch.empty_like(q), []
        for run in runs:
            mask = run.mask(routes[:, run.queries], q.dtype)
            keys = slice(run.start, run.start + mask.shape[-1])
            result, lse = _forward(*_heads_first(q[run.queries], k[keys], v[keys]), attn_mask=mask)
            out[run.queries] = result[0].transpose(0, 1)
            kept += [lse, mask]
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.runs = runs
        return out

    @staticmethod
    def backward(ctx, dout):
        refuse_second_derivative()
        q, k, v, out, *kept = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for run, lse, mask in zip(ctx.runs, kept[::2], kept[1::2], strict=True):
            keys = slice(run.start, run.start + mask.shape[-1])
            tensors = _heads_first(dout[run.queries], q[run.queries], k[keys], v[keys], out[run.queries])
            results = _backward(*tensors, lse, 0.0, False, attn_mask=mask)
            for grad, rows, result in zip(grads, (run.queries, keys, keys), results, strict=True):
                grad[rows] += result[0].transpose(0, 1)
        return *grads, None, None
