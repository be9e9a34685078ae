"""Triton kernels of the routed part: gathered queries against whole chunks, and the sums over a query's routes.

A *tile* is up to BM queries that chose one chunk in one head (see `triton_index`). Every kernel owns what it writes:

    forward   a tile x its chunk -> partial output and LSE of each (query, slot)
    merge     anchored part and partials of a query -> output and LSE
    dq        a tile x its chunk -> partial dQ of each (query, slot); `add_dq` sums them
    dkv       BN keys of a chunk x all queries of its list -> dK, dV, added to the anchored part's

so there are no atomics, and gradients repeat bit for bit. Exact math for attention in parts: FlashAttention's backward
with the merged LSE and D = rowsum(dO * O).

Shape letters: L packed tokens, N heads, D head dim (DP: padded to a power of two), M chunks, K slots of a query.
q, k, v, out and their gradients are contiguous [L, N, D]; lse, delta [N, L]; partials of heads [h0, h1) [h1 - h0, L, K, D].
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, row, stride, mask, D: tl.constexpr, DP: tl.constexpr):
    """Rows of one head as [rows, DP]; `base` points at that head of token 0; masked rows and columns are 0."""
    column = tl.arange(0, DP)
    mask = mask[:, None]
    if DP != D:
        mask = mask & (column < D)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, stride, value, mask, D: tl.constexpr, DP: tl.constexpr):
    column = tl.arange(0, DP)
    mask = mask[:, None]
    if DP != D:
        mask = mask & (column < D)[None, :]
    tl.store(base + row.to(tl.int64)[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _open_tile(entries, starts, tile_starts, tile_list, tile, num_chunks, num_slots, BM: tl.constexpr):
    """Head, chunk, entries, tokens and validity of a tile's queries."""
    list_id = tl.load(tile_list + tile)
    first = tl.load(starts + list_id)
    count = tl.load(starts + list_id + 1) - first
    row = (tile - tl.load(tile_starts + list_id)) * BM + tl.arange(0, BM)
    valid = row < count
    entry = tl.load(entries + first + row, mask=valid, other=0)
    return list_id // num_chunks, list_id % num_chunks, entry, entry // num_slots, valid


@triton.jit
def _forward_blocks(
    acc, total, peak, q, k, v, first, last, stride, scale_log2,
    MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Online softmax of q over keys [first, last)."""
    for start in range(first, last, BN):
        row = start + tl.arange(0, BN)
        inside = row < last
        keys = load_rows(k, row, stride, inside, D, DP)
        scores = tl.dot(q, keys.T, input_precision="ieee") * scale_log2
        if MASKED:
            scores = tl.where(inside[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        values = load_rows(v, row, stride, inside, D, DP)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def forward_kernel(
    q, k, v, entries, starts, tile_starts, tile_list, chunk_starts, partial, partial_lse,
    first_list, last_list, num_tokens, num_chunks, num_slots, stride, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile = tl.load(tile_starts + first_list) + tl.program_id(0)
    if tile < tl.load(tile_starts + last_list):
        head, chunk, entry, token, valid = _open_tile(
            entries, starts, tile_starts, tile_list, tile, num_chunks, num_slots, BM
        )
        queries = load_rows(q + head * D, token, stride, valid, D, DP)
        first, last = tl.load(chunk_starts + chunk), tl.load(chunk_starts + chunk + 1)
        middle = first + (last - first) // BN * BN
        acc = tl.zeros([BM, DP], tl.float32)
        total = tl.zeros([BM], tl.float32)
        peak = tl.full([BM], -float("inf"), tl.float32)
        k += head * D
        v += head * D
        acc, total, peak = _forward_blocks(
            acc, total, peak, queries, k, v, first, middle, stride, scale_log2, False, D, DP, BN
        )
        acc, total, peak = _forward_blocks(
            acc, total, peak, queries, k, v, middle, last, stride, scale_log2, True, D, DP, BN
        )
        partial += (head - first_list // num_chunks).to(tl.int64) * num_tokens * num_slots * D
        store_rows(partial, entry, D, acc / total[:, None], valid, D, DP)
        partial_lse += head.to(tl.int64) * num_tokens * num_slots
        tl.store(partial_lse + entry, (peak + tl.log2(total)) / LOG2E, mask=valid)


@triton.jit
def merge_kernel(
    out, lse, partial, partial_lse, first_head, num_tokens, num_slots, stride,
    D: tl.constexpr, DP: tl.constexpr, SLOTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Adds the routed partials to `out` and `lse`, in place; a slot with LSE -inf is empty."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    head = first_head + tl.program_id(1)
    valid = token < num_tokens
    first = head.to(tl.int64) * num_tokens + token
    slot = tl.arange(0, SLOTS)
    mask = valid[:, None] & (slot < num_slots)[None, :]
    parts = tl.load(partial_lse + first[:, None] * num_slots + slot[None, :], mask=mask, other=-float("inf"))
    own = tl.load(lse + first, mask=valid, other=-float("inf"))
    peak = tl.maximum(own, tl.max(parts, 1))
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    merged = peak + tl.log(tl.exp(own - peak) + tl.sum(tl.exp(parts - peak[:, None]), 1))
    tl.store(lse + first, merged, mask=valid)
    merged = tl.where(merged == -float("inf"), 0.0, merged)

    out += head * D
    acc = load_rows(out, token, stride, valid, D, DP).to(tl.float32) * tl.exp(own - merged)[:, None]
    row = tl.program_id(1).to(tl.int64) * num_tokens + token
    for k in range(num_slots):
        part = tl.load(partial_lse + first * num_slots + k, mask=valid, other=-float("inf"))
        value = load_rows(partial, row * num_slots + k, D, part > -float("inf"), D, DP)
        acc += value.to(tl.float32) * tl.exp(part - merged)[:, None]
    store_rows(out, token, stride, acc, valid, D, DP)


@triton.jit
def delta_kernel(out, dout, delta, num_tokens, stride, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr):
    """delta = rowsum(dO * O)."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    head = tl.program_id(1)
    valid = token < num_tokens
    o = load_rows(out + head * D, token, stride, valid, D, DP).to(tl.float32)
    do = load_rows(dout + head * D, token, stride, valid, D, DP).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * num_tokens + token, tl.sum(o * do, 1), mask=valid)


@triton.jit
def _dq_blocks(
    acc, q, do, lse, delta, k, v, first, last, stride, scale_log2,
    MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    for start in range(first, last, BN):
        row = start + tl.arange(0, BN)
        inside = row < last
        keys = load_rows(k, row, stride, inside, D, DP)
        values = load_rows(v, row, stride, inside, D, DP)
        weights = tl.exp2(tl.dot(q, keys.T, input_precision="ieee") * scale_log2 - lse[:, None])
        dweights = tl.dot(do, values.T, input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        if MASKED:
            dscores = tl.where(inside[None, :], dscores, 0.0)
        acc = tl.dot(dscores.to(keys.dtype), keys, acc, input_precision="ieee")
    return acc


@triton.jit
def dq_kernel(
    q, k, v, dout, lse, delta, entries, starts, tile_starts, tile_list, chunk_starts, partial,
    first_list, last_list, num_tokens, num_chunks, num_slots, stride, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile = tl.load(tile_starts + first_list) + tl.program_id(0)
    if tile < tl.load(tile_starts + last_list):
        head, chunk, entry, token, valid = _open_tile(
            entries, starts, tile_starts, tile_list, tile, num_chunks, num_slots, BM
        )
        queries = load_rows(q + head * D, token, stride, valid, D, DP)
        grads = load_rows(dout + head * D, token, stride, valid, D, DP)
        row = head.to(tl.int64) * num_tokens + token
        row_lse = tl.load(lse + row, mask=valid, other=0.0) * LOG2E
        row_delta = tl.load(delta + row, mask=valid, other=0.0)
        first, last = tl.load(chunk_starts + chunk), tl.load(chunk_starts + chunk + 1)
        middle = first + (last - first) // BN * BN
        acc = tl.zeros([BM, DP], tl.float32)
        k += head * D
        v += head * D
        acc = _dq_blocks(
            acc, queries, grads, row_lse, row_delta, k, v, first, middle, stride, scale * LOG2E, False, D, DP, BN
        )
        acc = _dq_blocks(
            acc, queries, grads, row_lse, row_delta, k, v, middle, last, stride, scale * LOG2E, True, D, DP, BN
        )
        partial += (head - first_list // num_chunks).to(tl.int64) * num_tokens * num_slots * D
        store_rows(partial, entry, D, acc * scale, valid, D, DP)


@triton.jit
def add_dq_kernel(
    dq, partial, routes, first_head, num_tokens, num_slots, stride,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dq += the partial dQ of every slot that holds a route."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    head = first_head + tl.program_id(1)
    valid = token < num_tokens
    dq += head * D
    acc = load_rows(dq, token, stride, valid, D, DP).to(tl.float32)
    table_row = head.to(tl.int64) * num_tokens + token
    row = tl.program_id(1).to(tl.int64) * num_tokens + token
    for k in range(num_slots):
        routed = tl.load(routes + table_row * num_slots + k, mask=valid, other=-1) >= 0
        acc += load_rows(partial, row * num_slots + k, D, routed, D, DP).to(tl.float32)
    store_rows(dq, token, stride, acc, valid, D, DP)


@triton.jit
def dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, entries, starts, chunk_starts,
    num_blocks, num_tokens, num_chunks, num_slots, stride, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK, dV of BN keys of one chunk and head from all queries of its list, added to what is there."""
    list_id, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    head, chunk = list_id // num_chunks, list_id % num_chunks
    first, last = tl.load(starts + list_id), tl.load(starts + list_id + 1)
    row = tl.load(chunk_starts + chunk) + block * BN + tl.arange(0, BN)
    inside = row < tl.load(chunk_starts + chunk + 1)
    if (first < last) & (tl.max(inside.to(tl.int32), 0) > 0):
        keys = load_rows(k + head * D, row, stride, inside, D, DP)
        values = load_rows(v + head * D, row, stride, inside, D, DP)
        dkeys = tl.zeros([BN, DP], tl.float32)
        dvalues = tl.zeros([BN, DP], tl.float32)
        lse += head.to(tl.int64) * num_tokens
        delta += head.to(tl.int64) * num_tokens
        q += head * D
        dout += head * D
        for start in range(first, last, BM):
            place = start + tl.arange(0, BM)
            valid = place < last
            token = tl.load(entries + place, mask=valid, other=0) // num_slots
            queries = load_rows(q, token, stride, valid, D, DP)
            row_lse = tl.load(lse + token, mask=valid, other=float("inf")) * LOG2E
            weights = tl.exp2(tl.dot(keys, queries.T, input_precision="ieee") * (scale * LOG2E) - row_lse[None, :])
            grads = load_rows(dout, token, stride, valid, D, DP)
            dvalues = tl.dot(weights.to(grads.dtype), grads, dvalues, input_precision="ieee")
            dweights = tl.dot(values, grads.T, input_precision="ieee")
            row_delta = tl.load(delta + token, mask=valid, other=0.0)
            dscores = weights * (dweights - row_delta[None, :])
            dkeys = tl.dot(dscores.to(queries.dtype), queries, dkeys, input_precision="ieee")
        dkeys = dkeys * scale + load_rows(dk + head * D, row, stride, inside, D, DP).to(tl.float32)
        dvalues += load_rows(dv + head * D, row, stride, inside, D, DP).to(tl.float32)
        store_rows(dk + head * D, row, stride, dkeys, inside, D, DP)
        store_rows(dv + head * D, row, stride, dvalues, inside, D, DP)
