"""Short samples in Triton attend densely within a sample, under a mask of the chunks that each query attends to.

In a sample of a few hundred tokens the anchors and the routes are most of the keys, and lists of gathered queries cost
more than the keys they leave out. What a query of a head attends to is a set of chunks of its sample: the bits of one
word, anchors' and routes' together. So forward is one kernel and backward three, FlashAttention's with that mask, and
nothing is merged:

    forward   BM queries x the keys of their sample, up to the last chunk that one of them attends to -> output, LSE
    dq        the same -> dQ
    dkv       BN keys x the queries of their sample, those blocks that attend to one of them -> dK, dV

Every kernel owns what it writes: there are no atomics, and gradients repeat bit for bit.

Shape letters: L packed tokens, N heads, D head dim (DP: padded to a power of two), M chunks, K slots of a query.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moc.config import MoCConfig
from moc.context import is_anchor
from moc.kernels.dense import refuse_second_derivative
from moc.kernels.sizes import cdiv, masked_blocks, padded
from moc.kernels.triton_kernels import LOG2E, delta_kernel, load_rows, store_rows
from moc.layout import ShotLayout
from moc.move import move

MAX_CHUNKS = 64  # a sample has one bit of a word for each
MAX_TOKENS = 2048  # samples up to this mean length are masked, since lists of keys save them no time on an H100


class MaskedPlan(NamedTuple):
    """This is how the attention of a stream is laid out. blocks int32 [n, 4]: up to a tile of a sample's tokens: start,
    end, then the sample's.

    token_chunk int32 [L]: each token's chunk, counted within its sample. first_chunk int32 [L]: its sample's first one.
    anchors int64 [L]: the chunks of its sample that a token attends to whatever its routes, as bits.
    """

    blocks: Tensor
    token_chunk: Tensor
    first_chunk: Tensor
    anchors: Tensor


def masked_plan(q: Tensor, layout: ShotLayout, config: MoCConfig) -> MaskedPlan | None:
    """Returns the plan of a stream of short samples, made once for q's tile; None where they are long or have too many
    chunks.

    It takes dtype, head dim and device from q [L, N, D].
    """
    tile = masked_blocks(q).tile
    key = ("masked", config.own_anchor, config.text_anchor, tile)
    return layout.memo(key, lambda: _plan(layout, config, tile) if _is_short(layout) else None)


def _is_short(layout: ShotLayout) -> bool:
    if layout.num_tokens > MAX_TOKENS * layout.num_samples:
        return False
    counts = [0] * layout.num_samples
    for group in layout.groups:
        counts[group.sample] += group.num_chunks
    return max(counts) <= MAX_CHUNKS


def _plan(layout: ShotLayout, config: MoCConfig, tile: int) -> MaskedPlan:
    blocks = [
        (block, min(block + tile, end), start, end)
        for start, end in layout.sample_ranges
        for block in range(start, end, tile)
    ]
    first_chunk = layout.sample_first_chunk[layout.token_sample]
    return MaskedPlan(
        move(torch.tensor(blocks, dtype=torch.int32), layout.device),
        layout.token_chunk - first_chunk,
        first_chunk,
        _anchor_bits(layout, config)[layout.token_chunk],
    )


def _anchor_bits(layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Returns int64 [M]: for each chunk, the chunks of its sample that its tokens attend to whatever their routes, as
    bits."""
    query = torch.arange(layout.num_chunks, device=layout.device)[:, None]
    bit = torch.arange(MAX_CHUNKS, device=layout.device)
    key = layout.sample_first_chunk[layout.chunk_sample[query]] + bit
    seen = is_anchor(layout, config, query, key.clamp(max=layout.num_chunks - 1)) & (key < layout.num_chunks)
    return (seen.long() << bit).sum(-1)


@triton.jit
def _open_block(blocks):
    """Reads start and end of this program's block, and of its sample, in tokens."""
    block = blocks + tl.program_id(0) * 4
    return tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)


@triton.jit
def _attended(anchors, routes, first_chunk, token, valid, head, num_tokens, num_slots):
    """Returns int64 [BM]: bit c says whether a query attends to chunk c of its sample, by an anchor or a route."""
    bits = tl.load(anchors + token, mask=valid, other=0)
    first = tl.load(first_chunk + token, mask=valid, other=0)
    row = (head.to(tl.int64) * num_tokens + token) * num_slots
    one = tl.full([1], 1, tl.int64)
    for slot in range(num_slots):
        chunk = tl.load(routes + row + slot, mask=valid, other=-1)
        bits |= tl.where(chunk >= 0, one << tl.maximum(chunk - first, 0).to(tl.int64), 0)
    return bits


@triton.jit
def _last_key(bits, start, end, token_chunk, STEP: tl.constexpr):
    """Returns where the last block of STEP keys, counted from `start`, ends that some query attends to."""
    last = end
    searching = True  # goes back block by block until a query attends to a block's first chunk or a later one
    while searching:
        block = start + (last - 1 - start) // STEP * STEP
        lowest = tl.load(token_chunk + block).to(tl.int64)
        searching = (block > start) & (tl.max(((bits >> lowest) != 0).to(tl.int32), 0) == 0)
        last = tl.where(searching, block, last)
    return last


@triton.jit
def _seen(bits, chunk, inside):
    """Returns bool [BM, BN]: whether each query attends to each key. chunk [BN]: of the keys, within the sample."""
    return (((bits[:, None] >> chunk.to(tl.int64)[None, :]) & 1) != 0) & inside[None, :]


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def masked_forward_kernel(
    q, k, v, out, lse, routes, blocks, token_chunk, first_chunk, anchors, num_tokens, num_slots, stride, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program computes output and LSE of BM queries of one head; a query without keys gets 0 and -inf.

    It loads its queries once and walks over the keys of their sample, BN at a time.
    """
    head = tl.program_id(1)
    query_start, query_end, first, end = _open_block(blocks)
    token = query_start + tl.arange(0, BM)
    valid = token < query_end
    bits = _attended(anchors, routes, first_chunk, token, valid, head, num_tokens, num_slots)
    queries = load_rows(q + head * D, token, stride, valid, D, DP)
    acc = tl.zeros([BM, DP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], -float("inf"), tl.float32)
    for start in range(first, _last_key(bits, first, end, token_chunk, BN), BN):
        key = start + tl.arange(0, BN)
        inside = key < end
        keys = load_rows(k + head * D, key, stride, inside, D, DP)
        seen = _seen(bits, tl.load(token_chunk + key, mask=inside, other=0), inside)
        scores = tl.where(seen, tl.dot(queries, keys.T, input_precision="tf32x3") * scale_log2, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key so far
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(weights, 1)
        values = load_rows(v + head * D, key, stride, inside, D, DP)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="tf32x3")
        peak = new_peak
    some = tl.where(total > 0, total, 1.0)
    store_rows(out + head * D, token, stride, acc / some[:, None], valid, D, DP)
    row = head.to(tl.int64) * num_tokens + token
    tl.store(lse + row, tl.where(total > 0, (peak + tl.log2(some)) / LOG2E, -float("inf")), mask=valid)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def masked_dq_kernel(
    q, k, v, dout, lse, delta, dq, routes, blocks, token_chunk, first_chunk, anchors, num_tokens, num_slots, stride,
    scale, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program computes dQ of BM queries of one head, walking over keys as the forward does."""
    head = tl.program_id(1)
    query_start, query_end, first, end = _open_block(blocks)
    token = query_start + tl.arange(0, BM)
    valid = token < query_end
    bits = _attended(anchors, routes, first_chunk, token, valid, head, num_tokens, num_slots)
    queries = load_rows(q + head * D, token, stride, valid, D, DP)
    grads = load_rows(dout + head * D, token, stride, valid, D, DP)
    row = head.to(tl.int64) * num_tokens + token
    row_lse = tl.load(lse + row, mask=valid, other=0.0) * LOG2E
    row_delta = tl.load(delta + row, mask=valid, other=0.0)
    acc = tl.zeros([BM, DP], tl.float32)
    # Weights are those of the forward, from its LSE; keys that a query does not see have none.
    for start in range(first, _last_key(bits, first, end, token_chunk, BN), BN):
        key = start + tl.arange(0, BN)
        inside = key < end
        keys = load_rows(k + head * D, key, stride, inside, D, DP)
        values = load_rows(v + head * D, key, stride, inside, D, DP)
        seen = _seen(bits, tl.load(token_chunk + key, mask=inside, other=0), inside)
        scores = tl.dot(queries, keys.T, input_precision="tf32x3") * (scale * LOG2E)
        weights = tl.where(seen, tl.exp2(scores - row_lse[:, None]), 0.0)
        dweights = tl.dot(grads, values.T, input_precision="tf32x3")
        dscores = weights * (dweights - row_delta[:, None])
        acc = tl.dot(dscores.to(keys.dtype), keys, acc, input_precision="tf32x3")
    store_rows(dq + head * D, token, stride, acc * scale, valid, D, DP)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def masked_dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, routes, blocks, token_chunk, first_chunk, anchors, num_tokens, num_slots, stride,
    scale, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program computes dK and dV of BN keys of one head, from blocks of BM queries that attend to some of them."""
    head = tl.program_id(1)
    key_start, key_end, first, end = _open_block(blocks)
    key = key_start + tl.arange(0, BN)
    inside = key < key_end
    keys = load_rows(k + head * D, key, stride, inside, D, DP)
    values = load_rows(v + head * D, key, stride, inside, D, DP)
    chunk = tl.load(token_chunk + key, mask=inside, other=0)
    # These are the bits of the block's chunks, from the first to the last of them.
    one = tl.full([1], 1, tl.int64)
    lowest = tl.load(token_chunk + key_start).to(tl.int64)
    highest = tl.load(token_chunk + key_end - 1).to(tl.int64)
    here = ((one << highest) - (one << lowest)) | (one << highest)
    dkeys = tl.zeros([BN, DP], tl.float32)
    dvalues = tl.zeros([BN, DP], tl.float32)
    for start in range(first, end, BM):
        token = start + tl.arange(0, BM)
        valid = token < end
        bits = _attended(anchors, routes, first_chunk, token, valid, head, num_tokens, num_slots)
        if tl.max(((bits & here) != 0).to(tl.int32), 0) > 0:  # otherwise no query of the block sees these keys
            queries = load_rows(q + head * D, token, stride, valid, D, DP)
            grads = load_rows(dout + head * D, token, stride, valid, D, DP)
            row = head.to(tl.int64) * num_tokens + token
            row_lse = tl.load(lse + row, mask=valid, other=0.0) * LOG2E
            row_delta = tl.load(delta + row, mask=valid, other=0.0)
            seen = _seen(bits, chunk, inside) & valid[:, None]
            scores = tl.dot(queries, keys.T, input_precision="tf32x3") * (scale * LOG2E)
            weights = tl.where(seen, tl.exp2(scores - row_lse[:, None]), 0.0)
            dvalues = tl.dot(weights.to(grads.dtype).T, grads, dvalues, input_precision="tf32x3")
            dweights = tl.dot(grads, values.T, input_precision="tf32x3")
            dscores = weights * (dweights - row_delta[:, None])
            dkeys = tl.dot(dscores.to(queries.dtype).T, queries, dkeys, input_precision="tf32x3")
    store_rows(dk + head * D, key, stride, dkeys * scale, inside, D, DP)
    store_rows(dv + head * D, key, stride, dvalues, inside, D, DP)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, routes, plan):
        num_tokens, num_heads, head_dim = q.shape
        out, blocks = torch.empty_like(q), masked_blocks(q)
        lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
        masked_forward_kernel[(len(plan.blocks), num_heads)](
            q, k, v, out, lse, routes, *plan, num_tokens, routes.shape[-1], q.stride(0),
            head_dim**-0.5 * LOG2E.value, D=head_dim, DP=padded(head_dim), BM=blocks.tile, **blocks.forward,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, routes, *plan)
        return out

    @staticmethod
    def backward(ctx, dout):
        refuse_second_derivative()
        q, k, v, out, lse, routes, *plan = ctx.saved_tensors
        num_tokens, num_heads, head_dim = q.shape
        dout, delta = dout.contiguous(), torch.empty_like(lse)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        shape = {"D": head_dim, "DP": padded(head_dim)}
        delta_kernel[(cdiv(num_tokens, 64), num_heads)](out, dout, delta, num_tokens, q.stride(0), **shape, BT=64)
        sizes = (num_tokens, routes.shape[-1], q.stride(0), head_dim**-0.5)
        blocks = masked_blocks(q)
        for kernel, grads, block in (
            (masked_dq_kernel, (dq,), {"BM": blocks.tile, **blocks.dq}),
            (masked_dkv_kernel, (dk, dv), {"BN": blocks.tile, **blocks.dkv}),
        ):
            kernel[(len(plan[0]), num_heads)](
                q, k, v, dout, lse, delta, *grads, routes, *plan, *sizes, **shape, **block
            )
        return dq, dk, dv, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: MaskedPlan) -> Tensor:
    """Attends to anchors and routed chunks: q, k, v [L, N, D], routes int32 [N, L, K] -> [L, N, D], same dtype.

    plan: `masked_plan` of this q.
    """
    return _Masked.apply(q.contiguous(), k.contiguous(), v.contiguous(), routes.contiguous(), plan)
