"""Routing kernel for many routes a query: a shortlist in memory, cut back to the best `top_k` whenever it is full.

Keeping dozens of routes sorted in registers costs more than the scores. Here each program appends every score above
the query's current top_k-th to a shortlist of CAPACITY places (a scratch that stays in cache), and at times cuts it to
the top_k best, found by bisection on the scores' bits. The order of appending is that of the stream, so of equal
scores the lowest chunk stays.

Shape letters: L packed tokens, N heads, D head dim (DP: padded to a power of two), M chunks, K routes a query.
"""

import triton
import triton.language as tl

from moc.kernels.triton_bounds import candidate_bounds, candidate_mask
from moc.kernels.triton_kernels import load_rows

LOWEST = tl.constexpr(-(1 << 31))


@triton.jit
def _ordered(x):
    """fp32 -> int32 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(keys, top_k):
    """The top_k-th largest of each row of keys [BQ, CAPACITY]; the lowest int where there are fewer."""
    low = tl.zeros([keys.shape[0]], tl.int32) + LOWEST  # at least top_k keys reach it
    high = tl.max(keys, 1)  # as a bound that fewer reach, once 1 is added
    many = tl.sum((keys > LOWEST).to(tl.int32), 1) >= top_k
    low = tl.where(many, tl.min(tl.where(keys > LOWEST, keys, high[:, None]), 1), low)
    found = (low == high) | (many == 0)
    while tl.min(found.to(tl.int32), 0) == 0:
        # The mean of low and high, rounded up, without overflow.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        reach = tl.sum((keys >= middle[:, None]).to(tl.int32), 1)
        low = tl.where((found == 0) & (reach >= top_k), middle, low)
        high = tl.where((found == 0) & (reach < top_k), middle - 1, high)
        found = found | (low == high) | (reach == top_k)
    return low


@triton.jit
def _best(scores, place, held, top_k):
    """Which held places [ROWS, CAPACITY] of the shortlist have the best top_k scores; of equal ones the first."""
    value = tl.load(scores + place, mask=held, other=0.0)
    keys = tl.where(held, _ordered(value + 0.0), LOWEST)  # + 0.0: of -0 and 0 neither is less
    bound = _threshold(keys, top_k)[:, None]
    above = held & (keys > bound)
    equal = held & (keys == bound)
    room = top_k - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))


@triton.jit
def _make_room(scores, chunks, counts, bars, top_k, BQ: tl.constexpr, CAPACITY: tl.constexpr, ROWS: tl.constexpr):
    """Cuts each query's shortlist to its best top_k; updates its length and the score a further one must exceed."""
    for first in range(0, BQ, ROWS):
        row = first + tl.arange(0, ROWS)
        count = tl.load(counts + row)
        place = row[:, None] * CAPACITY + tl.arange(0, CAPACITY)[None, :]
        held = tl.arange(0, CAPACITY)[None, :] < count[:, None]
        stays = _best(scores, place, held, top_k)
        new = row[:, None] * CAPACITY + tl.cumsum(stays.to(tl.int32), 1) - 1
        value = tl.load(scores + place, mask=stays, other=float("inf"))
        chunk = tl.load(chunks + place, mask=stays, other=0)
        tl.debug_barrier()
        tl.store(scores + new, value, mask=stays)
        tl.store(chunks + new, chunk, mask=stays)
        count = tl.sum(stays.to(tl.int32), 1)
        tl.store(counts + row, count)
        tl.store(bars + row, tl.where(count == top_k, tl.min(value, 1), -float("inf")))


@triton.jit
def _write_routes(
    scores, chunks, counts, routes, first_token, num_tokens, top_k,
    BQ: tl.constexpr, CAPACITY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes the best top_k of each query's shortlist to routes [L, K], -1 where there are fewer."""
    slot = tl.arange(0, CAPACITY)[None, :]
    for first in range(0, BQ, ROWS):
        row = first + tl.arange(0, ROWS)
        place = row[:, None] * CAPACITY + slot
        stays = _best(scores, place, slot < tl.load(counts + row)[:, None], top_k)
        valid = (first_token + row < num_tokens)[:, None]
        out = routes + (first_token + row).to(tl.int64)[:, None] * top_k
        chunk = tl.load(chunks + place, mask=stays, other=0)
        tl.store(out + tl.cumsum(stays.to(tl.int32), 1) - 1, chunk, mask=stays & valid)
        empty = (slot >= tl.sum(stays.to(tl.int32), 1)[:, None]) & (slot < top_k)
        tl.store(out + slot, tl.zeros([ROWS, CAPACITY], tl.int32) - 1, mask=empty & valid)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_chunks", "top_k"])
def shortlist_kernel(
    q, means, routes, scores, chunks, counts, bars, token_chunk, chunk_group, chunk_sample, chunk_is_text,
    group_first_chunk, group_shot, sample_first_chunk, num_tokens, num_heads, num_chunks, stride, top_k,
    TERMS: tl.constexpr, CAPACITY: tl.constexpr, CAUSAL: tl.constexpr, OWN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Routes as `route_kernel`.

    Scratch of each program: scores, chunks [BQ, CAPACITY], the shortlists; counts, bars [BQ], their state.
    """
    row = tl.arange(0, BQ)
    column = tl.arange(0, DP)
    scores += tl.program_id(0) * BQ * CAPACITY
    chunks += tl.program_id(0) * BQ * CAPACITY
    counts += tl.program_id(0) * BQ
    bars += tl.program_id(0) * BQ
    num_blocks = tl.cdiv(num_tokens, BQ)
    for work in range(tl.program_id(0), num_blocks * num_heads, tl.num_programs(0)):
        head = work // num_blocks
        token = work % num_blocks * BQ + row
        valid = token < num_tokens
        first, last, skip_first, skip_last = candidate_bounds(
            token, valid, token_chunk, chunk_group, chunk_sample, group_first_chunk, group_shot, sample_first_chunk,
            CAUSAL, OWN,
        )  # fmt: skip
        queries = load_rows(q + head * D, token, stride, valid, D, DP)
        count = tl.zeros([BQ], tl.int32)
        bar = tl.full([BQ], -float("inf"), tl.float32)
        for start in range(tl.min(tl.where(valid, first, num_chunks), 0), tl.max(last, 0), BC):
            chunk = start + tl.arange(0, BC)
            rows = (head * num_chunks + chunk).to(tl.int64)[:, None] * DP + column[None, :]
            score = tl.zeros([BQ, BC], tl.float32)
            for term in tl.static_range(TERMS):
                table = means + (TERMS - 1 - term) * num_heads * num_chunks * DP
                mean = tl.load(table + rows, mask=(chunk < num_chunks)[:, None], other=0.0)
                score = tl.dot(queries, mean.T, score, input_precision="ieee")
            allowed = candidate_mask(chunk, first, last, skip_first, skip_last, chunk_is_text, num_chunks)
            enters = allowed & (score > bar[:, None])
            new = row[:, None] * CAPACITY + count[:, None] + tl.cumsum(enters.to(tl.int32), 1) - 1
            tl.store(scores + new, score, mask=enters)
            tl.store(chunks + new, tl.zeros([BQ, BC], tl.int32) + chunk[None, :], mask=enters)
            count += tl.sum(enters.to(tl.int32), 1)
            if tl.max(count, 0) > CAPACITY - BC:
                tl.store(counts + row, count)
                tl.debug_barrier()
                _make_room(scores, chunks, counts, bars, top_k, BQ, CAPACITY, ROWS)
                tl.debug_barrier()
                count = tl.load(counts + row)
                bar = tl.load(bars + row)
        tl.store(counts + row, count)
        tl.debug_barrier()
        out = routes + head.to(tl.int64) * num_tokens * top_k
        _write_routes(scores, chunks, counts, out, work % num_blocks * BQ, num_tokens, top_k, BQ, CAPACITY, ROWS)
        tl.debug_barrier()
