"""Where a query has many routes, these Triton kernels rule most chunks out before any is ranked.

Three kernels, each over blocks of queries of one head that may all route to the same chunks:

    bound    keeps the best score of each of TILES tiles of chunks. top_k tiles reach the top_k-th best of these, so
             top_k chunks do: a lower bound of the scores to keep, which few others reach. The first term of the means
             is enough here, less what the others could add (`slack`, by Cauchy-Schwarz).
    list     with exact scores, the chunks that reach the bound, in stream order
    select   the worst of a list go until top_k are left; of equal ones, the last in the stream

Blocks whose queries differ in what they may route to, and those where some list outgrows its capacity (many equal
scores), are left to `triton_routing.route_kernel`, which takes any; a count above the capacity tells.

Source: arXiv 2508.21058, section 3 (routing by mean-pooled keys). It equals `moc.routing.route`, except that the routes
of a query come in no order.

Shape letters: L packed tokens, N heads, D head dim (DP: padded to a power of two), M chunks, K routes a query,
R capacity of a list, Nb heads of a head block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moc.kernels.dense import capability
from moc.kernels.sizes import cdiv, next_power_of_2
from moc.kernels.triton_bounds import candidate_bounds, chunk_scores
from moc.kernels.triton_kernels import load_rows

BISECTIONS = tl.constexpr(16)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest number of fp32
MAX_ENTRIES = 1 << 24  # the most entries held at a time; the lists of a large q may take half its bytes
TILES = 128


@triton.jit
def _shared_range(start, end, token_chunk, candidates):
    """Returns whether queries [start, end) may all route to the same chunks, and the bounds of the first query's."""
    first, last, own_first, own_last = candidate_bounds(start, start < end, token_chunk, candidates)
    # An own run, even an empty one, begins elsewhere in each shot, or in each chunk.
    _, _, last_own, _ = candidate_bounds(end - 1, start < end, token_chunk, candidates)
    return own_first == last_own, first, last, own_first, own_last


@triton.jit
def _shared_mask(chunk, last, own_first, own_last, chunk_is_text):
    """Returns [BC]: 0 for each chunk from the first one on that the queries may route to, -inf for the others."""
    video = tl.load(chunk_is_text + chunk, mask=chunk < last, other=1) == 0
    own = (chunk >= own_first) & (chunk < own_last)
    return tl.where(video & (own == 0), 0.0, -float("inf"))


@triton.jit(
    do_not_specialize=["num_tokens", "num_heads", "num_chunks", "top_k"], do_not_specialize_on_alignment=["token_chunk"]
)
def bound_kernel(
    q, means, slack, bounds, token_chunk, candidates, chunk_is_text, num_tokens, num_heads, num_chunks, stride, top_k,
    TERMS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program writes, for BQ queries of one head, a bound that at least top_k chunks' scores reach, and few others.

    bounds [N, L]: the lowest number where there are fewer than top_k chunks.
    """
    head, start = tl.program_id(1), tl.program_id(0) * BQ
    end = tl.minimum(start + BQ, num_tokens)
    shared, first, last, own_first, own_last = _shared_range(start, end, token_chunk, candidates)
    if shared:
        token = start + tl.arange(0, BQ)
        valid = token < num_tokens
        queries = load_rows(q + head * D, token, stride, valid, D, DP)
        length = tl.sqrt(tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1))
        tile = tl.arange(0, TILES)
        best = tl.zeros([BQ, TILES], tl.float32) - float("inf")
        for block in tl.range(first, last, TILES, num_stages=STAGES):
            # The tiles are shifted from block to block, so that no period of the chunks fills one tile.
            chunk = block + (tile + (block - first) // TILES * 37) % TILES
            scores = chunk_scores(queries, means, head, chunk, num_heads, num_chunks, 1, DP, BQ, TILES)
            mask = _shared_mask(chunk, last, own_first, own_last, chunk_is_text)
            less = tl.load(slack + head * num_chunks + chunk, mask=chunk < num_chunks, other=0.0)
            best = tl.maximum(best, scores + (mask[None, :] - length[:, None] * less[None, :]))

        high = tl.max(best, 1)
        low = tl.min(tl.where(best > -float("inf"), best, high[:, None]), 1)
        enough = tl.sum((best > -float("inf")).to(tl.int32), 1) >= top_k
        for _ in range(BISECTIONS):
            middle = 0.5 * low + 0.5 * high
            reached = tl.sum((best >= middle[:, None]).to(tl.int32), 1) >= top_k
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
        tl.store(bounds + head.to(tl.int64) * num_tokens + token, tl.where(enough, low, LOWEST), mask=valid)


@triton.jit(
    do_not_specialize=["first_head", "num_tokens", "num_heads", "num_chunks"],
    do_not_specialize_on_alignment=["token_chunk"],
)
def list_kernel(
    q, means, bounds, lists, counts, token_chunk, candidates, chunk_is_text, first_head, num_tokens, num_heads,
    num_chunks, stride,
    TERMS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CAPACITY: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program lists, for BQ queries of one head, the chunks whose scores reach the bound, in stream order.

    lists int64 [Nb, L, R]: score in the upper half, chunk in the lower. counts [N, L]: how many reach it.
    """
    head, start = first_head + tl.program_id(1), tl.program_id(0) * BQ
    token = start + tl.arange(0, BQ)
    valid = token < num_tokens
    table_row = head.to(tl.int64) * num_tokens + token
    end = tl.minimum(start + BQ, num_tokens)
    shared, first, last, own_first, own_last = _shared_range(start, end, token_chunk, candidates)
    if shared:
        queries = load_rows(q + head * D, token, stride, valid, D, DP)
        bound = tl.load(bounds + table_row, mask=valid, other=float("inf"))
        row = lists + (tl.program_id(1).to(tl.int64) * num_tokens + token)[:, None] * CAPACITY - 1
        column = tl.arange(0, BC)
        up_to = (column[:, None] <= column[None, :]).to(q.dtype.element_ty)
        count = tl.zeros([BQ], tl.int32)
        for block in tl.range(first, last, BC, num_stages=STAGES):
            chunk = block + column
            scores = chunk_scores(queries, means, head, chunk, num_heads, num_chunks, TERMS, DP, BQ, BC)
            mask = _shared_mask(chunk, last, own_first, own_last, chunk_is_text)
            taken = scores + mask[None, :] >= bound[:, None]
            # A product with a triangle counts the taken up to each column.
            rank = tl.dot(taken.to(q.dtype.element_ty), up_to, input_precision="tf32x3").to(tl.int32) + count[:, None]
            entry = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | chunk[None, :].to(tl.int64)
            tl.store(row + rank, entry, mask=taken & (rank <= CAPACITY))
            count += tl.sum(taken.to(tl.int32), 1)
        tl.store(counts + table_row, count, mask=valid)
    else:
        tl.store(counts + table_row, CAPACITY + 1 + tl.zeros([BQ], tl.int32), mask=valid)


@triton.jit(do_not_specialize=["first_head", "num_tokens", "top_k"])
def select_kernel(
    lists, counts, routes, first_head, num_tokens, top_k, CAPACITY: tl.constexpr, BQ: tl.constexpr
):  # fmt: skip
    """A program writes the top_k best of each of BQ lists that fit their capacity to routes [N, L, K]."""
    GONE: tl.constexpr = (1 << 63) - 1  # above every key
    token = tl.program_id(0) * BQ + tl.arange(0, BQ)
    table_row = (first_head + tl.program_id(1)).to(tl.int64) * num_tokens + token
    count = tl.load(counts + table_row, mask=token < num_tokens, other=CAPACITY + 1)
    fits = count <= CAPACITY
    slot = tl.arange(0, CAPACITY)[None, :]
    listed = (slot < count[:, None]) & fits[:, None]
    row = lists + (tl.program_id(1).to(tl.int64) * num_tokens + token)[:, None] * CAPACITY
    entry = tl.load(row + slot, mask=listed, other=0)
    chunk = entry.to(tl.int32)
    # Adding 0.0 turns -0.0 into 0.0.
    bits = ((entry >> 32).to(tl.int32).to(tl.float32, bitcast=True) + 0.0).to(tl.int32, bitcast=True)
    # Keys order as scores do, and equal scores by falling index of the chunk.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = tl.where(listed, (ordered.to(tl.int64) << 32) | (CAPACITY - slot), GONE)
    surplus = tl.where(fits, count - top_k, 0)
    for i in range(tl.max(surplus, 0)):
        worst = tl.min(keys, 1)
        keys = tl.where((keys == worst[:, None]) & (i < surplus)[:, None], GONE, keys)
    stays = keys < GONE
    out = routes + table_row[:, None] * top_k
    tl.store(out + tl.cumsum(stays.to(tl.int32), 1) - 1, chunk, mask=stays)
    tl.store(out + slot, tl.zeros_like(chunk) - 1, mask=(slot >= count[:, None]) & (slot < top_k) & fits[:, None])


def shortlist_pays(q: Tensor, top_k: int) -> bool:
    """Returns whether a shortlist is faster than ranking as one walks: in half precision, and on a CPU, interpreted."""
    return 16 < top_k <= TILES // 2 and (q.dtype != torch.float32 or not capability(q.device))


def list_capacity(top_k: int) -> int:
    """Returns the capacity of a list: top_k, the few more that the bound lets through, and some."""
    return next_power_of_2(top_k + top_k // 4 + 8)


def shortlist_routes(
    q: Tensor, means: Tensor, slack: Tensor, routes: Tensor, tables: tuple[Tensor, ...], **settings: object
) -> Tensor:
    """Writes `routes` [N, L, K] where it can; returns counts int32 [N, L], above `list_capacity(K)` where it left some
    out.

    means, slack: of `triton_routing.chunk_means`; tables: those of the layout; settings: constants of the kernels.
    """
    num_heads, num_tokens, top_k = routes.shape
    capacity, num_chunks, stride = list_capacity(top_k), means.shape[2], q.stride(0)
    bounds = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
    counts = torch.empty(num_heads, num_tokens, dtype=torch.int32, device=q.device)
    blocks = (cdiv(num_tokens, 64), num_heads)
    bound_kernel[blocks](
        q, means, slack, bounds, *tables, num_tokens, num_heads, num_chunks, stride, top_k, **settings,
        BQ=64, TILES=TILES, STAGES=2, num_warps=4,
    )  # fmt: skip
    size = max(1, min(num_heads, max(MAX_ENTRIES, q.numel() // 8) // (num_tokens * capacity)))
    lists = torch.empty(size, num_tokens, capacity, dtype=torch.int64, device=q.device)
    for first in range(0, num_heads, size):
        heads = min(size, num_heads - first)
        list_kernel[(blocks[0], heads)](
            q, means, bounds, lists, counts, *tables, first, num_tokens, num_heads, num_chunks, stride, **settings,
            CAPACITY=capacity, BQ=64, BC=32, STAGES=2, num_warps=4,
        )  # fmt: skip
        select_kernel[(cdiv(num_tokens, 8), heads)](
            lists, counts, routes, first, num_tokens, top_k, CAPACITY=capacity, BQ=8, num_warps=1
        )
    return counts
