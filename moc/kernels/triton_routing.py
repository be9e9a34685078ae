"""Triton's routing takes chunk means in one pass over K, then scores and top-k together; scores are not stored.

A program takes BQ queries of one head, walks over the chunks they may route to, BC at a time, and keeps the best
chunks of each query in registers: as long as some query has a score above its worst kept one, each query takes its
best remaining score. Chunks come in stream order and only a strictly better score displaces a kept one, so ties go to
the lowest index. Means enter the matrix unit as a sum of terms of q's dtype (three bf16 or two fp16), which restores
fp32 accuracy, as q itself is exact. With many routes a query a shortlist comes first (`triton_shortlist`), unless
chunks are scored by the means of their sub-chunks.

Source: arXiv 2508.21058, section 3 (routing by mean-pooled keys). It equals `moc.routing.route`, except that the routes
of a query come in no order.

Shape letters: L packed tokens, N heads, D head dim (DP: padded to a power of two), M chunks, K routes a query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moc.config import DropKey, MoCConfig
from moc.context import candidate_runs
from moc.kernels.sizes import cdiv, next_power_of_2, padded, route_blocks
from moc.kernels.triton_bounds import candidate_bounds, candidate_mask, chunk_scores, log_mass
from moc.kernels.triton_drops import drop_routes
from moc.kernels.triton_kernels import load_rows
from moc.kernels.triton_shortlist import list_capacity, shortlist_pays, shortlist_routes
from moc.layout import ShotLayout
from moc.routes import Routes
from moc.routing import subchunk_tables

TERMS = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}


@triton.jit(do_not_specialize=["num_heads", "num_chunks"])
def means_kernel(
    k, means, slack, chunk_starts, num_heads, num_chunks, stride,
    TERMS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes the mean key of one chunk, or subchunk, and head. That of an empty subchunk is 0.

    means [TERMS, N, M, DP]: the mean, split into terms of k's dtype that add up to it.
    slack [N, M]: what a unit query's score with the first term alone can lack, rounding included.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(chunk_starts + chunk), tl.load(chunk_starts + chunk + 1)
    total = tl.zeros([DP], tl.float32)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.sum(load_rows(k + head * D, row, stride, row < last, D, DP).to(tl.float32), 0)
    rest = total / tl.maximum(last - first, 1)  # the part of the mean that no term holds yet
    length = tl.sqrt(tl.sum(rest * rest))
    pointer = means + (head * num_chunks + chunk) * DP + tl.arange(0, DP)
    for i in tl.static_range(TERMS):
        term = rest.to(means.dtype.element_ty)
        tl.store(pointer, term)
        rest -= term.to(tl.float32)
        pointer += num_heads * num_chunks * DP
        if i == 0:
            tl.store(slack + head * num_chunks + chunk, 1.01 * tl.sqrt(tl.sum(rest * rest)) + 2e-5 * length)


@triton.jit
def _keep_best(scores, chunk, values, kept, BC: tl.constexpr, NONE: tl.constexpr):
    """Moves the best of `scores` [BQ, BC] into the table (values, kept) [BQ, KP] until none of them belongs there."""
    worst = tl.min(values, 1)
    best = tl.max(scores, 1)
    while tl.max((best > worst).to(tl.int32), 0) > 0:
        takes = (best > worst)[:, None]
        found = tl.min(tl.where(scores == best[:, None], chunk[None, :], NONE), 1)
        # The chunk with the highest index goes where several kept ones are equally bad.
        victim = tl.max(tl.where(values == worst[:, None], kept, -NONE), 1)
        replaced = takes & (kept == victim[:, None])
        values = tl.where(replaced, best[:, None], values)
        kept = tl.where(replaced, found[:, None], kept)
        scores = tl.where(takes & (chunk[None, :] == found[:, None]), -float("inf"), scores)
        worst = tl.min(values, 1)
        best = tl.max(scores, 1)
    return values, kept


@triton.jit(
    do_not_specialize=["num_tokens", "num_heads", "num_chunks", "top_k"], do_not_specialize_on_alignment=["token_chunk"]
)
def route_kernel(
    q, means, log_shares, routes, counts, token_chunk, candidates, chunk_is_text, num_tokens, num_heads, num_chunks,
    subchunks, stride, top_k,
    TERMS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """A program routes BQ queries of one head; with a CAPACITY, only where some of them has a count [N, L] above it.

    log_shares: where chunks are scored by their subchunks, whose means are then given; else None. routes [N, L, K]: the
    chunks chosen, -1 in empty slots. KP: K padded to a power of two.
    """
    NONE: tl.constexpr = 1 << 30
    head = tl.program_id(1)
    token = tl.program_id(0) * BQ + tl.arange(0, BQ)
    valid = token < num_tokens
    wanted = CAPACITY == 0
    if CAPACITY > 0:
        wanted = tl.max(tl.load(counts + head.to(tl.int64) * num_tokens + token, mask=valid, other=0), 0) > CAPACITY
    if wanted:
        first, last, own_first, own_last = candidate_bounds(token, valid, token_chunk, candidates)
        queries = load_rows(q + head * D, token, stride, valid, D, DP)
        slot = tl.arange(0, KP)[None, :]
        # Slots past top_k hold infinity, which nothing displaces; empty slots differ by their negative index.
        values = tl.zeros([BQ, KP], tl.float32) + tl.where(slot < top_k, -float("inf"), float("inf"))
        kept = tl.zeros([BQ, KP], tl.int32) - 1 - slot
        for start in range(tl.min(tl.where(valid, first, NONE), 0), tl.max(last, 0), BC):
            chunk = start + tl.arange(0, BC)
            if log_shares is None:
                scores = chunk_scores(queries, means, head, chunk, num_heads, num_chunks, TERMS, DP, BQ, BC)
            else:
                scores = log_mass(
                    queries, means, log_shares, head, chunk, num_heads, num_chunks, subchunks, TERMS, D, DP, BQ, BC
                )
            allowed = candidate_mask(chunk, first, last, own_first, own_last, chunk_is_text, num_chunks)
            scores = tl.where(allowed, scores, -float("inf"))
            values, kept = _keep_best(scores, chunk, values, kept, BC, NONE)
        row = (head.to(tl.int64) * num_tokens + token)[:, None] * top_k
        tl.store(routes + row + slot, tl.maximum(kept, -1), mask=valid[:, None] & (slot < top_k))


def chunk_means(k: Tensor, chunk_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean key of each chunk as terms of k's dtype, and the slack of the first one.

    k [L, N, D], chunk_starts [M + 1] -> [TERMS, N, M, DP], DP the padded head dim, and fp32 [N, M]. Subchunks are taken
    like chunks.
    """
    _, num_heads, head_dim = k.shape
    num_chunks = chunk_starts.numel() - 1
    width = padded(head_dim)
    means = torch.empty(TERMS[k.dtype], num_heads, num_chunks, width, dtype=k.dtype, device=k.device)
    slack = torch.empty(num_heads, num_chunks, dtype=torch.float32, device=k.device)
    means_kernel[(num_chunks, num_heads)](
        k, means, slack, chunk_starts, num_heads, num_chunks, k.stride(0),
        TERMS=TERMS[k.dtype], D=head_dim, DP=width, BLOCK=64, num_warps=4,
    )  # fmt: skip
    return means, slack


def _route(
    q: Tensor, k: Tensor, starts: Tensor, token_chunk: Tensor, candidates: Tensor, chunk_is_text: Tensor, top_k: int,
    log_shares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns routes int32 [N, Lq, K]. starts: of the chunks or, where `log_shares` [M, subchunks] is given, of their
    subchunks."""
    num_tokens, num_heads, head_dim = q.shape
    routes = torch.empty(num_heads, num_tokens, top_k, dtype=torch.int32, device=q.device)
    if not top_k:
        return routes
    means, slack = chunk_means(k, starts)
    tables = (token_chunk, candidates, chunk_is_text)
    settings = {"TERMS": TERMS[q.dtype], "D": head_dim, "DP": means.shape[-1]}
    subchunks = 1 if log_shares is None else log_shares.shape[1]
    block, counts, capacity = route_blocks(q, top_k, subchunks), None, 0
    if subchunks == 1 and shortlist_pays(q, top_k):
        counts, capacity = shortlist_routes(q, means, slack, routes, tables, **settings), list_capacity(top_k)
    route_kernel[(cdiv(num_tokens, block["BQ"]), num_heads)](
        q, means, log_shares, routes, counts, *tables, num_tokens, num_heads, len(chunk_is_text), subchunks,
        q.stride(0), top_k, **settings, KP=max(2, next_power_of_2(top_k)), CAPACITY=capacity, **block,
    )  # fmt: skip
    return routes


_operator = torch.library.custom_op("moc::route", _route, mutates_args=())


@_operator.register_fake
def _(q: Tensor, k: Tensor, *args) -> Tensor:
    return q.new_empty((q.shape[1], q.shape[0], args[4]), dtype=torch.int32)


def route(q: Tensor, k: Tensor, layout: ShotLayout, config: MoCConfig, drops: DropKey | None = None) -> Tensor:
    """Returns the routes of every query and head: q [Lq, N, D], k [L, N, D] -> int32 [N, Lq, K], in no order, -1 where
    a slot is empty. K is top_k, and top_k + drop_in_max where drops apply.
    """
    starts, log_shares = layout.chunk_cu_seqlens, None
    if config.descriptor_subchunks > 1:
        starts, log_shares = subchunk_tables(layout, config.descriptor_subchunks)
    routes = (_operator if torch.compiler.is_compiling() else _route)(
        q.detach().contiguous(), k.detach().contiguous(), starts, layout.token_chunk[-len(q) :],
        candidate_runs(layout, config), layout.chunk_is_text, config.top_k, log_shares,
    )  # fmt: skip
    if drops is None or not config.has_drops:
        return routes
    whole = Routes(routes).whole(layout)  # draws are keyed by the offset in the stream
    return drop_routes(whole, layout, config, drops)[:, -len(q) :]
