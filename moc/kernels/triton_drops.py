"""One Triton kernel does context drop-off and drop-in on finished routes, with the bits of `moc.routing.apply_drops`.

Every draw is a counter hash of (seed, step, layer, head, the sample's position in the run, the token's offset in its
sample), so a recomputation, another head split, another pack or another rank draws alike.

Source: arXiv 2508.21058, section 3 (context drop-off, drop-in).
Shape letters: L packed tokens, N heads, K routes a query, R drop_in_max.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moc.config import DropKey, MoCConfig
from moc.context import candidate_runs
from moc.kernels.sizes import cdiv, next_power_of_2
from moc.kernels.triton_bounds import candidate_bounds, candidate_mask
from moc.layout import ShotLayout
from moc.routing import COUNT_IN, COUNT_OFF, KEY_IN, KEY_OFF, drop_base, poisson_thresholds

_COUNT_OFF, _COUNT_IN = tl.constexpr(COUNT_OFF), tl.constexpr(COUNT_IN)
_KEY_OFF, _KEY_IN = tl.constexpr(KEY_OFF), tl.constexpr(KEY_IN)


@triton.jit
def _hash32(x):
    """Equals `moc.routing.hash32`."""
    x = x ^ (x >> 16)
    x = x * tl.full([1], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([1], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _draw(words, STREAM: tl.constexpr, index):
    """Equals `moc.routing.draw`: the random word of a query's word, a stream and an index."""
    golden = tl.full([1], 0x9E3779B9, tl.uint32)
    return _hash32(_hash32(words ^ (golden * STREAM)) + index.to(tl.uint32) * golden)


@triton.jit
def _unit(word):
    """Equals `moc.routing.unit`: the upper 24 bits of a word as fp32 in [0, 1)."""
    return (word >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _query_words(token, valid, head, base, token_sample, sample_starts, sample_position):
    """Equals `moc.routing.query_words`: a random word for each of the tokens [BQ] of one head."""
    golden = tl.full([1], 0x9E3779B9, tl.uint32)
    sample = tl.load(token_sample + token, mask=valid, other=0)
    by_head = _hash32(tl.load(base).to(tl.uint32) ^ _hash32(head.to(tl.uint32) + golden))
    by_sample = _hash32(by_head ^ _hash32(tl.load(sample_position + sample).to(tl.uint32) + golden))
    return _hash32(by_sample ^ (token - tl.load(sample_starts + sample)).to(tl.uint32))


@triton.jit
def _drop_off(routes, words, first_chunk, drop_off_max, KP: tl.constexpr):
    """Returns routes [BQ, KP] without those of the lowest keys, of which each query loses a random number."""
    NEVER: tl.constexpr = 1 << 32  # above every key
    held = tl.sum((routes >= 0).to(tl.int32), 1)
    share = _unit(_draw(words, _COUNT_OFF, tl.zeros([1], tl.uint32))) * drop_off_max
    number = tl.floor(share * held.to(tl.float32)).to(tl.int32)
    keys = tl.where(routes >= 0, _draw(words[:, None], _KEY_OFF, routes - first_chunk[:, None]).to(tl.int64), NEVER)
    slot = tl.arange(0, KP)[None, :]
    for i in range(tl.max(number, 0)):
        lowest = tl.min(keys, 1)
        victim = tl.min(tl.where(keys == lowest[:, None], slot, KP), 1)
        goes = (slot == victim[:, None]) & (i < number)[:, None]
        routes = tl.where(goes, -1, routes)
        keys = tl.where(goes, NEVER, keys)
    return routes


@triton.jit
def _keep_lowest(keys, chunk, best, added, routed):
    """Moves the lowest of `keys` [BQ, BC] into the table (best, added) [BQ, RP], leaving out chunks in `routed`."""
    NEVER: tl.constexpr = 1 << 32
    NONE: tl.constexpr = 1 << 30
    worst = tl.max(best, 1)
    lowest = tl.min(keys, 1)
    while tl.max((lowest < worst).to(tl.int32), 0) > 0:
        found = tl.min(tl.where(keys == lowest[:, None], chunk[None, :], NONE), 1)
        is_new = tl.max((routed == found[:, None]).to(tl.int32), 1) == 0
        victim = tl.max(tl.where(best == worst[:, None], added, -NONE), 1)
        replaced = ((lowest < worst) & is_new)[:, None] & (best == worst[:, None]) & (added == victim[:, None])
        best = tl.where(replaced, lowest[:, None], best)
        added = tl.where(replaced, found[:, None], added)
        keys = tl.where(chunk[None, :] == found[:, None], NEVER, keys)
        worst = tl.max(best, 1)
        lowest = tl.min(keys, 1)
    return best, added


@triton.jit
def _store_lowest(out, best, added, number, valid, drop_in_max):
    """Stores, for each query, `number` of the chunks `added` [BQ, RP], those of the lowest keys `best` first."""
    NEVER: tl.constexpr = 1 << 32
    for i in range(drop_in_max):
        least = tl.min(tl.where(added >= 0, best, NEVER), 1)
        here = (added >= 0) & (best == least[:, None])
        chosen = tl.max(tl.where(here, added, -1), 1)
        tl.store(out + i, tl.where(i < number, chosen, -1)[:, None], mask=valid[:, None])
        added = tl.where(here & (added == chosen[:, None]), -1, added)


@triton.jit(do_not_specialize=["first_head", "num_tokens", "num_chunks", "top_k", "drop_in_max"])
def drop_kernel(
    routes, dropped, thresholds, token_chunk, candidates, chunk_is_text, token_sample, sample_starts, sample_position,
    base, first_head, drop_off_max, num_tokens, num_chunks, top_k, drop_in_max,
    KP: tl.constexpr, RP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A program drops from, and adds to, the routes of BQ queries of one head: [N, L, K] -> dropped [N, L, K + R].

    base int64 [1]: see `drop_base`. thresholds [R]: cumulative Poisson probabilities of the number added. KP, RP: K
    and R padded to powers of two.
    """
    NEVER: tl.constexpr = 1 << 32
    token = tl.program_id(0) * BQ + tl.arange(0, BQ)
    head = tl.program_id(1)
    valid = token < num_tokens
    words = _query_words(token, valid, first_head + head, base, token_sample, sample_starts, sample_position)
    # A chunk's draw goes by its index in the sample, whose chunks begin with `first`.
    first, last, own_first, own_last = candidate_bounds(token, valid, token_chunk, candidates)
    slot = tl.arange(0, KP)[None, :]
    row = (head.to(tl.int64) * num_tokens + token)[:, None]
    present = valid[:, None] & (slot < top_k)
    routed = tl.load(routes + row * top_k + slot, mask=present, other=-1)
    out = dropped + row * (top_k + drop_in_max)
    tl.store(out + slot, _drop_off(routed, words, first, drop_off_max, KP), mask=present)

    # Drop-in: of the candidates not routed before drop-off, the lowest keys come.
    if drop_in_max > 0:
        u = _unit(_draw(words, _COUNT_IN, tl.zeros([1], tl.uint32)))
        number = tl.zeros([BQ], tl.int32)
        for j in range(drop_in_max):
            number += (u >= tl.load(thresholds + j)).to(tl.int32)
        column = tl.arange(0, RP)[None, :]
        # Nothing displaces -1: a query that adds few, most often none, looks for no more than those.
        best = tl.where(column < number[:, None], tl.full([BQ, RP], NEVER, tl.int64), -1)
        added = tl.zeros([BQ, RP], tl.int32) - 1 - column
        for start in range(tl.min(tl.where(valid, first, num_chunks), 0), tl.max(last, 0), BC):
            chunk = start + tl.arange(0, BC)
            allowed = candidate_mask(chunk, first, last, own_first, own_last, chunk_is_text, num_chunks)
            draws = _draw(words[:, None], _KEY_IN, chunk[None, :] - first[:, None]).to(tl.int64)
            best, added = _keep_lowest(tl.where(allowed, draws, NEVER), chunk, best, added, routed)
        _store_lowest(out + top_k, best, added, number, valid, drop_in_max)


def _drop_routes(
    routes: Tensor, token_chunk: Tensor, candidates: Tensor, chunk_is_text: Tensor, token_sample: Tensor,
    sample_starts: Tensor, sample_position: Tensor, base: Tensor, drop_off_max: float, drop_in_rate: float,
    drop_in_max: int, first_head: int,
) -> Tensor:  # fmt: skip
    num_heads, num_tokens, top_k = routes.shape
    dropped = routes.new_empty(num_heads, num_tokens, top_k + drop_in_max)
    thresholds, block = poisson_thresholds(drop_in_rate, drop_in_max, routes.device), 32
    drop_kernel[(cdiv(num_tokens, block), num_heads)](
        routes, dropped, thresholds, token_chunk, candidates, chunk_is_text,
        token_sample, sample_starts, sample_position, base, first_head, drop_off_max, num_tokens, len(chunk_is_text),
        top_k, drop_in_max,
        KP=max(2, next_power_of_2(top_k)), RP=max(2, next_power_of_2(drop_in_max)), BQ=block, BC=16, num_warps=2,
    )  # fmt: skip
    return dropped


_operator = torch.library.custom_op("moc::drop_routes", _drop_routes, mutates_args=())


@_operator.register_fake
def _(routes: Tensor, *args) -> Tensor:
    num_heads, num_tokens, top_k = routes.shape
    return routes.new_empty((num_heads, num_tokens, top_k + args[9]))


def drop_routes(routes: Tensor, layout: ShotLayout, config: MoCConfig, drops: DropKey) -> Tensor:
    """Returns routes int32 [N, L, K] after context drop-off and drop-in: [N, L, K + drop_in_max]."""
    word = drop_base(drops)
    base = word.view(1) if isinstance(word, Tensor) else torch.full((1,), word, dtype=torch.int64, device=routes.device)
    return (_operator if torch.compiler.is_compiling() else _drop_routes)(
        routes, layout.token_chunk, candidate_runs(layout, config), layout.chunk_is_text, layout.token_sample,
        layout.sample_cu_seqlens, layout.sample_position, base, config.drop_off_max, config.drop_in_rate,
        config.drop_in_max, drops.first_head,
    )  # fmt: skip
