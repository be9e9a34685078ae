"""These Triton kernels attend with gathered queries to whole chunks, and sum over each query's routes.

A *tile* is up to BM queries that chose one chunk in one head (see `triton_index`). Every kernel owns what it writes:

    forward   a tile x its chunk -> partial output and LSE of each (query, slot)
    merge     anchored output and partials of a query -> output and LSE
    dq        a tile x its chunk -> partial dQ of each (query, slot); `add_dq` sums them
    dkv       BN keys of a chunk x all queries of its list -> dK, dV, added to those of the anchors

so there are no atomics, and gradients repeat bit for bit. Attention in several calls is exact: backward is
FlashAttention's with the merged LSE and D = rowsum(dO * O).

Shape letters: L packed tokens, N heads, D head dim (DP: padded to a power of two), M chunks, K slots of a query.
q, k, v, out and their gradients are contiguous [L, N, D]; lse, delta [N, L]; partials [heads of a head block, L, K, D].
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(1e30)  # an LSE that leaves no weight to any key


@triton.jit
def load_rows(base, row, stride, mask, D: tl.constexpr, DP: tl.constexpr):
    """Loads rows of one head as [rows, DP]; masked rows and columns are 0.

    base: points at that head of token 0. row: [rows], tokens. stride: elements from one token to the next.
    """
    column = tl.arange(0, DP)
    mask = mask[:, None]
    if DP != D:
        mask = mask & (column < D)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, stride, value, mask, D: tl.constexpr, DP: tl.constexpr):
    """Stores value [rows, DP] in base's dtype; the arguments are those of `load_rows`."""
    column = tl.arange(0, DP)
    mask = mask[:, None]
    if DP != D:
        mask = mask & (column < D)[None, :]
    tl.store(base + row.to(tl.int64)[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(
    source, head, start, last, stride, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr
):
    """Loads BN rows of one head from `start` on as [BN, DP].

    source: with TMA a tensor descriptor, whose rows past `last` are not masked; else a pointer.
    """
    if TMA:
        rows = source.load([start, head, 0]).reshape([BN, DP])
    else:
        row = start + tl.arange(0, BN)
        rows = load_rows(source + head * D, row, stride, row < last, D, DP)
    return rows


@triton.jit
def _open_tile(entries, starts, tile_starts, tile_list, tile, num_chunks, num_slots, BM: tl.constexpr):
    """Reads which head and chunk a tile belongs to, and the entries, tokens and validity [BM] of its queries.

    An entry is the index of a (token, slot) pair in the route table of one head.
    """
    list_id = tl.load(tile_list + tile)
    first = tl.load(starts + list_id)
    count = tl.load(starts + list_id + 1) - first
    row = (tile - tl.load(tile_starts + list_id)) * BM + tl.arange(0, BM)
    valid = row < count
    entry = tl.load(entries + first + row, mask=valid, other=0)
    return list_id // num_chunks, list_id % num_chunks, entry, entry // num_slots, valid


@triton.jit
def _forward_blocks(
    acc, total, peak, q, k, v, head, first, last, stride, scale_log2,
    MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Takes keys [first, last) into the online softmax of q [BM, DP].

    acc [BM, DP]: weighted sum of the values so far. total [BM]: sum of the weights. peak [BM]: the largest score, not
    yet scaled. MASKED says whether the last block of keys reaches past `last`.
    """
    for start in range(first, last, BN):
        keys = load_keys(k, head, start, last, stride, D, DP, BN, TMA)
        scores = tl.dot(q, keys.T, input_precision="tf32x3")
        if MASKED:
            scores = tl.where((start + tl.arange(0, BN) < last)[None, :], scores, -float("inf"))
        # A larger peak shrinks what is summed so far, so that no exponential overflows.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores * scale_log2 - (new_peak * scale_log2)[:, None])
        shrink = tl.exp2((peak - new_peak) * scale_log2)
        total = total * shrink + tl.sum(weights, 1)
        values = load_keys(v, head, start, last, stride, D, DP, BN, TMA)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="tf32x3")
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["first_list", "last_list", "num_tokens", "num_chunks", "num_slots"])
def forward_kernel(
    q, k, v, entries, starts, tile_starts, tile_list, chunk_starts, partial, partial_lse,
    first_list, last_list, num_tokens, num_chunks, num_slots, stride, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A program attends from one tile to its chunk and writes partial output and LSE of each of its (query, slot).

    Programs take the tiles of lists [first_list, last_list); the grid may have more of them than there are tiles.
    """
    tile = tl.load(tile_starts + first_list) + tl.program_id(0)
    if tile < tl.load(tile_starts + last_list):
        head, chunk, entry, token, valid = _open_tile(
            entries, starts, tile_starts, tile_list, tile, num_chunks, num_slots, BM
        )
        queries = load_rows(q + head * D, token, stride, valid, D, DP)
        first, last = tl.load(chunk_starts + chunk), tl.load(chunk_starts + chunk + 1)
        middle = first + (last - first) // BN * BN  # whole blocks of keys end here; only the last one needs a mask
        acc = tl.zeros([BM, DP], tl.float32)
        total = tl.zeros([BM], tl.float32)
        peak = tl.full([BM], -float("inf"), tl.float32)
        acc, total, peak = _forward_blocks(
            acc, total, peak, queries, k, v, head, first, middle, stride, scale_log2, False, D, DP, BN, TMA
        )
        acc, total, peak = _forward_blocks(
            acc, total, peak, queries, k, v, head, middle, last, stride, scale_log2, True, D, DP, BN, TMA
        )
        # Each (query, slot) is written by one program alone: no atomics, and the same bits each time.
        partial += (head - first_list // num_chunks).to(tl.int64) * num_tokens * num_slots * D
        store_rows(partial, entry, D, acc / total[:, None], valid, D, DP)
        partial_lse += head.to(tl.int64) * num_tokens * num_slots
        tl.store(partial_lse + entry, (peak * scale_log2 + tl.log2(total)) / LOG2E, mask=valid)


@triton.jit(do_not_specialize=["first_head", "num_tokens", "num_slots"])
def merge_kernel(
    out, lse, merged_lse, partial, partial_lse, routes, first_head, num_tokens, num_slots, stride,
    D: tl.constexpr, DP: tl.constexpr, SLOTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A program merges, for BT queries of one head, the partials of every slot that holds a route into `out`.

    out: the anchored attention's output, changed in place. merged_lse: the LSE of both, which is not written to `lse`:
    several warps load the few LSE of a program, and one may store before another has loaded.
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    head = first_head + tl.program_id(1)
    valid = token < num_tokens
    first = head.to(tl.int64) * num_tokens + token
    slot = tl.arange(0, SLOTS)[None, :]
    cell = first[:, None] * num_slots + slot
    inside = valid[:, None] & (slot < num_slots)
    # Neither load waits for the other: what lies in empty slots is dropped afterwards.
    routed = tl.load(routes + cell, mask=inside, other=-1) >= 0
    slot_lse = tl.where(routed, tl.load(partial_lse + cell, mask=inside, other=0.0), -float("inf"))
    own = tl.load(lse + first, mask=valid, other=-float("inf"))
    peak = tl.maximum(own, tl.max(slot_lse, 1))
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    merged = peak + tl.log(tl.exp(own - peak) + tl.sum(tl.exp(slot_lse - peak[:, None]), 1))
    tl.store(merged_lse + first, merged, mask=valid)
    merged = tl.where(merged == -float("inf"), 0.0, merged)

    out += head * D
    acc = load_rows(out, token, stride, valid, D, DP).to(tl.float32) * tl.exp(own - merged)[:, None]
    row = tl.program_id(1).to(tl.int64) * num_tokens + token
    for k in range(num_slots):
        held = tl.load(routes + first * num_slots + k, mask=valid, other=-1) >= 0
        one_lse = tl.load(partial_lse + first * num_slots + k, mask=valid, other=0.0)
        value = load_rows(partial, row * num_slots + k, D, held, D, DP)
        acc += value.to(tl.float32) * tl.where(held, tl.exp(one_lse - merged), 0.0)[:, None]
    store_rows(out, token, stride, acc, valid, D, DP)


@triton.jit(do_not_specialize=["num_tokens"])
def delta_kernel(out, dout, delta, num_tokens, stride, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr):
    """A program writes delta = rowsum(dO * O), fp32, of BT tokens of one head."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    head = tl.program_id(1)
    valid = token < num_tokens
    o = load_rows(out + head * D, token, stride, valid, D, DP).to(tl.float32)
    do = load_rows(dout + head * D, token, stride, valid, D, DP).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * num_tokens + token, tl.sum(o * do, 1), mask=valid)


@triton.jit
def _dq_blocks(
    acc, q, do, lse, delta, k, v, head, first, last, stride, scale_log2,
    MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds dS K over keys [first, last) to acc [BM, DP], which is dQ before its scale.

    lse, delta [BM]: of the queries, lse in base 2. MASKED says whether the last block of keys reaches past `last`.
    """
    for start in range(first, last, BN):
        keys = load_keys(k, head, start, last, stride, D, DP, BN, TMA)
        values = load_keys(v, head, start, last, stride, D, DP, BN, TMA)
        # The LSE is the merged one of anchors and routes, so these are weights of the whole softmax.
        weights = tl.exp2(tl.dot(q, keys.T, input_precision="tf32x3") * scale_log2 - lse[:, None])
        dweights = tl.dot(do, values.T, input_precision="tf32x3")
        dscores = weights * (dweights - delta[:, None])
        if MASKED:
            dscores = tl.where((start + tl.arange(0, BN) < last)[None, :], dscores, 0.0)
        acc = tl.dot(dscores.to(keys.dtype), keys, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["first_list", "last_list", "num_tokens", "num_chunks", "num_slots"])
def dq_kernel(
    q, k, v, dout, lse, delta, entries, starts, tile_starts, tile_list, chunk_starts, partial,
    first_list, last_list, num_tokens, num_chunks, num_slots, stride, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A program computes what one tile's chunk gives to dQ, and writes it as the partial of each (query, slot)."""
    tile = tl.load(tile_starts + first_list) + tl.program_id(0)
    if tile < tl.load(tile_starts + last_list):
        head, chunk, entry, token, valid = _open_tile(
            entries, starts, tile_starts, tile_list, tile, num_chunks, num_slots, BM
        )
        # All of a query's own is loaded once; its keys come by in blocks.
        queries = load_rows(q + head * D, token, stride, valid, D, DP)
        grads = load_rows(dout + head * D, token, stride, valid, D, DP)
        row = head.to(tl.int64) * num_tokens + token
        row_lse = tl.load(lse + row, mask=valid, other=0.0) * LOG2E
        row_delta = tl.load(delta + row, mask=valid, other=0.0)
        first, last = tl.load(chunk_starts + chunk), tl.load(chunk_starts + chunk + 1)
        middle = first + (last - first) // BN * BN
        acc = tl.zeros([BM, DP], tl.float32)
        scale_log2 = scale * LOG2E
        acc = _dq_blocks(
            acc, queries, grads, row_lse, row_delta, k, v, head, first, middle, stride, scale_log2,
            False, D, DP, BN, TMA,
        )  # fmt: skip
        acc = _dq_blocks(
            acc, queries, grads, row_lse, row_delta, k, v, head, middle, last, stride, scale_log2,
            True, D, DP, BN, TMA,
        )  # fmt: skip
        partial += (head - first_list // num_chunks).to(tl.int64) * num_tokens * num_slots * D
        store_rows(partial, entry, D, acc * scale, valid, D, DP)


@triton.jit(do_not_specialize=["first_head", "num_tokens", "num_slots"])
def add_dq_kernel(
    dq, partial, routes, first_head, num_tokens, num_slots, stride,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A program adds to `dq`, for BT queries of one head, the partial dQ of every slot that holds a route."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    head = first_head + tl.program_id(1)
    valid = token < num_tokens
    dq += head * D
    acc = load_rows(dq, token, stride, valid, D, DP).to(tl.float32)
    table_row = head.to(tl.int64) * num_tokens + token
    # Partials are of the heads from `first_head` on alone, routes of all heads.
    row = tl.program_id(1).to(tl.int64) * num_tokens + token
    for k in range(num_slots):
        routed = tl.load(routes + table_row * num_slots + k, mask=valid, other=-1) >= 0
        acc += load_rows(partial, row * num_slots + k, D, routed, D, DP).to(tl.float32)
    store_rows(dq, token, stride, acc, valid, D, DP)


@triton.jit
def _with_terms(columns, value, FIRST: tl.constexpr, TERMS: tl.constexpr):
    """Returns columns [BM, 16] with -value [BM] from column FIRST on, as TERMS terms of their dtype that add up to
    it."""
    rest = -value
    column = tl.arange(0, 16)[None, :]
    for i in tl.static_range(TERMS):
        term = rest.to(columns.dtype)
        columns = tl.where(column == FIRST + i, term[:, None], columns)
        rest -= term.to(tl.float32)
    return columns


@triton.jit(do_not_specialize=["first_tile", "num_lists", "num_tokens", "num_chunks", "num_slots"])
def gather_kernel(
    q, dout, lse, delta, q_list, dout_list, terms_list, entries, starts, tile_starts, tile_list,
    first_tile, num_lists, num_tokens, num_chunks, num_slots, stride, scale,
    TERMS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A program copies one tile's queries, gradients and terms to BM rows, which `dkv_kernel` then reads in order.

    A row that no query fills gets an LSE so large that it has no weight.

    terms_list [rows, 16]: -lse / scale and -delta of each query, TERMS columns each; the other columns are 0.
    """
    tile = first_tile + tl.program_id(0)
    if tile < tl.load(tile_starts + num_lists):
        head, _, _, token, valid = _open_tile(entries, starts, tile_starts, tile_list, tile, num_chunks, num_slots, BM)
        list_row = tl.program_id(0) * BM + tl.arange(0, BM)
        row = head.to(tl.int64) * num_tokens + token
        store_rows(q_list, list_row, D, load_rows(q + head * D, token, stride, valid, D, DP), row >= 0, D, DP)
        store_rows(dout_list, list_row, D, load_rows(dout + head * D, token, stride, valid, D, DP), row >= 0, D, DP)
        terms = tl.zeros([BM, 16], terms_list.dtype.element_ty)
        terms = _with_terms(terms, tl.load(lse + row, mask=valid, other=FAR) / scale, 0, TERMS)
        terms = _with_terms(terms, tl.load(delta + row, mask=valid, other=0.0), TERMS, TERMS)
        store_rows(terms_list, list_row, 16, terms, row >= 0, 16, 16)


@triton.jit
def load_list(source, start, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, TMA: tl.constexpr):
    """Loads BM gathered rows from `start` on as [BM, DP]; source is a tensor descriptor with TMA, else a pointer."""
    if TMA:
        rows = source.load([start, 0])
    else:
        row = start + tl.arange(0, BM)
        rows = load_rows(source, row, D, row >= 0, D, DP)
    return rows


@triton.jit(do_not_specialize=["first_tile", "num_tiles", "num_blocks", "num_chunks"])
def dkv_kernel(
    q_list, dout_list, terms_list, k, v, dk, dv, starts, tile_starts, chunk_starts,
    first_tile, num_tiles, num_blocks, num_chunks, stride, scale,
    TERMS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """A program owns BN keys of one chunk and head; it adds what the queries of their list give to dK and dV.

    It loads the keys once and walks over what the list has in the gathered tiles [first_tile, first_tile +
    num_tiles).

    LSE and delta come through the matrix unit, as further columns of Q and dO: loaded as vectors they would stall
    every step and be spread over many registers.
    """
    list_id, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    head, chunk = list_id // num_chunks, list_id % num_chunks
    first = (tl.load(tile_starts + list_id) - first_tile) * TILE
    last = first + tl.load(starts + list_id + 1) - tl.load(starts + list_id)
    first, last = tl.maximum(first, 0), tl.minimum(last, num_tiles * TILE)  # part of a list may lie in other tiles
    row = tl.load(chunk_starts + chunk) + block * BN + tl.arange(0, BN)
    inside = row < tl.load(chunk_starts + chunk + 1)
    if (first < last) & (tl.max(inside.to(tl.int32), 0) > 0):
        keys = load_rows(k + head * D, row, stride, inside, D, DP)
        values = load_rows(v + head * D, row, stride, inside, D, DP)
        dkeys = tl.zeros([BN, DP], tl.float32)
        dvalues = tl.zeros([BN, DP], tl.float32)
        TERM: tl.constexpr = tl.float32 if TERMS == 1 else tl.bfloat16
        column = tl.zeros([BN, 16], tl.int32) + tl.arange(0, 16)[None, :]
        take_lse = (column < TERMS).to(TERM)
        take_delta = ((column >= TERMS) & (column < 2 * TERMS)).to(TERM)
        for start in range(first, last, BM):
            # Scores begin as -lse / scale, and dweights as -delta, before the products are added.
            terms = load_list(terms_list, start, 16, 16, BM, TMA).T
            queries = load_list(q_list, start, D, DP, BM, TMA)
            scores = tl.dot(take_lse, terms, input_precision="tf32x3")
            scores = tl.dot(keys, queries.T, scores, input_precision="tf32x3")
            weights = tl.exp2(scores * (scale * LOG2E))
            grads = load_list(dout_list, start, D, DP, BM, TMA)
            dvalues = tl.dot(weights.to(grads.dtype), grads, dvalues, input_precision="tf32x3")
            dweights = tl.dot(take_delta, terms, input_precision="tf32x3")
            dweights = tl.dot(values, grads.T, dweights, input_precision="tf32x3")
            dkeys = tl.dot((weights * dweights).to(queries.dtype), queries, dkeys, input_precision="tf32x3")
        # dK and dV hold what the anchors gave, or earlier tiles; no other program has these keys.
        dkeys = dkeys * scale + load_rows(dk + head * D, row, stride, inside, D, DP).to(tl.float32)
        dvalues += load_rows(dv + head * D, row, stride, inside, D, DP).to(tl.float32)
        store_rows(dk + head * D, row, stride, dkeys, inside, D, DP)
        store_rows(dv + head * D, row, stride, dvalues, inside, D, DP)
