"""Routing chooses, in plain tensor code, the chunks that each query of each head attends to besides its anchors.

A query scores every candidate chunk by `q . mean(K_chunk)`, or by the means of its sub-chunks (`descriptor_subchunks`),
and takes the `top_k` best; routing has no parameters. In training, context drop-off removes some of the routes and
context drop-in adds random ones. The draws come from a counter hash of (seed, step, layer, global head, the sample's
position in the run, the token's offset in its sample), so that they agree between devices, ranks, packs, head splits
and recomputation; every backend draws the same bits.

Source: arXiv 2508.21058, section 3 (routing, causal routing, context drop-off and drop-in) and appendix I (outer loop).

Shape letters: L packed tokens, N heads, D head dim, M chunks, K routes a query, G groups, S shots.
"""

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from moc.config import Candidates, DropKey, MoCConfig
from moc.context import is_candidate
from moc.layout import ShotLayout
from moc.move import move

SCORES_PER_BLOCK = 1 << 26  # the most scores, over all heads, that `route` holds at a time


def descriptors(k: Tensor, layout: ShotLayout, subchunks: int = 1) -> Tensor:
    """Returns the mean key of every chunk, or of each of its subchunks: k [L, N, D] -> [M * subchunks, N, D], in fp32
    (fp64 for fp64 keys). That of an empty one, in a chunk of fewer tokens than subchunks, is 0."""
    wide = k if k.dtype == torch.float64 else k.float()
    offsets = layout.chunk_cu_seqlens if subchunks == 1 else subchunk_tables(layout, subchunks)[0]
    return torch.segment_reduce(wide, "mean", offsets=offsets.long(), unsafe=True, initial=0)


def subchunk_tables(layout: ShotLayout, subchunks: int) -> tuple[Tensor, Tensor]:
    """Returns where the subchunks of all chunks begin, and the end of the last, int32 [M * subchunks + 1]; and the log
    of each one's share of its chunk's tokens, fp32 [M, subchunks]. Of the subchunks of a chunk the last is never empty;
    the log of an empty one's share is -inf."""
    return layout.table(("subchunks", subchunks), lambda: _subchunk_tables(layout, subchunks))


def _subchunk_tables(layout: ShotLayout, subchunks: int) -> tuple[Tensor, Tensor]:
    starts = layout.chunk_cu_seqlens
    cuts = torch.arange(subchunks, device=starts.device)
    offsets = torch.cat([(starts[:-1, None] + starts.diff()[:, None] * cuts // subchunks).flatten(), starts[-1:]])
    tokens = offsets.diff().unflatten(0, (-1, subchunks))
    return offsets.int(), (tokens / tokens.sum(1, keepdim=True)).log()


def _log_mass(scores: Tensor, layout: ShotLayout, subchunks: int, head_dim: int) -> Tensor:
    """Returns the scores of chunks by those of their subchunks, as `MoCConfig.descriptor_subchunks` says:
    [N, l, M * subchunks] -> [N, l, M]."""
    _, log_shares = subchunk_tables(layout, subchunks)
    return (scores.unflatten(-1, (-1, subchunks)) * head_dim**-0.5 + log_shares).logsumexp(-1)


@torch.no_grad()
def route(q: Tensor, k: Tensor, layout: ShotLayout, config: MoCConfig, drops: DropKey | None = None) -> Tensor:
    """Returns the routes of every query and head: q [Lq, N, D], k [L, N, D] -> int32 [N, Lq, K], best first, -1 where a
    slot is empty. K is top_k, and top_k + drop_in_max where drops apply (`drops` given and the config has any). Ties go
    to the lowest chunk index. Scores are exact to fp32 rounding, under autocast too.
    """
    subchunks = config.descriptor_subchunks
    if subchunks > 1 and layout.num_samples > 1 and len(q) == len(k):
        return _route_each_sample(q, k, layout, config, drops)
    means = descriptors(k, layout, subchunks)
    applies_drops = drops is not None and config.has_drops
    if config.candidates is Candidates.first and not applies_drops and subchunks == 1:
        return _route_to_first(q, means, layout, config)
    chunks = torch.arange(layout.num_chunks, device=layout.device)
    block = max(1, SCORES_PER_BLOCK // (q.shape[1] * len(means)))
    blocks = []
    for start, end, queries in _query_blocks(q, layout, block):
        with torch.autocast(q.device.type, enabled=False):
            scores = torch.einsum("lnd,mnd->nlm", queries.to(means.dtype), means)
            scores = scores if subchunks == 1 else _log_mass(scores, layout, subchunks, q.shape[-1])
        allowed = is_candidate(layout, config, layout.token_chunk[start:end, None], chunks)
        routes = best_chunks(scores, allowed, config.top_k)
        if drops is not None and config.has_drops:
            routes = apply_drops(routes, allowed, layout, config, drops, start)
        blocks.append(routes)
    return torch.cat(blocks, dim=1)


def _route_each_sample(q: Tensor, k: Tensor, layout: ShotLayout, config: MoCConfig, drops: DropKey | None) -> Tensor:
    """Returns the same, sample by sample: scores of a whole pack would nearly all be of chunks in other samples."""
    streams = layout.memo("samples alone", lambda: _samples_alone(layout))
    tables, first_chunk = [], 0
    for number, (start, end) in enumerate(layout.sample_ranges):
        # It is no copy, since its values change under a CUDA graph.
        stream = streams[number].copied(layout.sample_position[number : number + 1])
        routes = route(q[start:end], k[start:end], stream, config, drops)
        tables.append(torch.where(routes < 0, routes, routes + first_chunk))
        first_chunk += stream.num_chunks
    return torch.cat(tables, dim=1)


def _samples_alone(layout: ShotLayout) -> list[ShotLayout]:
    return [
        ShotLayout([sample], layout.chunk_tokens, [position]).to(layout.device)
        for sample, position in zip(layout.samples, layout.positions, strict=True)
    ]


def _query_blocks(q: Tensor, layout: ShotLayout, block: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (start, end, queries) of up to `block` of q [Lq, N, D], the last ones of the stream, at a time."""
    start = layout.num_tokens - len(q)
    for queries in q.split(block):
        yield start, start + len(queries), queries
        start += len(queries)


def _route_to_first(q: Tensor, means: Tensor, layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Returns the same for `candidates: first`: a query is scored against the first chunks of its sample's shots
    alone."""
    table = layout.memo("first chunks", lambda: _first_chunks(layout))
    block = max(1, SCORES_PER_BLOCK // (table.shape[1] * means[0].numel()))
    blocks = []
    for start, end, queries in _query_blocks(q, layout, block):
        chunks = table[layout.token_sample[start:end]]  # [block, S]
        with torch.autocast(q.device.type, enabled=False):
            scores = torch.einsum("lnd,lsnd->nls", queries.to(means.dtype), means[chunks.clamp(min=0)])
        query_chunk = layout.token_chunk[start:end, None]
        allowed = (chunks >= 0) & is_candidate(layout, config, query_chunk, chunks.clamp(min=0))
        best = best_chunks(scores, allowed, config.top_k)
        named = chunks.expand(len(best), -1, -1).gather(2, best.clamp(min=0).long())
        blocks.append(named.masked_fill(best < 0, -1).int())
    return torch.cat(blocks, dim=1)


def _first_chunks(layout: ShotLayout) -> Tensor:
    """Returns the first video chunk of each shot of each sample, int64 [samples, S], -1 where there are fewer shots."""
    rows: list[list[int]] = [[] for _ in range(layout.num_samples)]
    for group in layout.groups:
        if group.video_tokens:
            rows[group.sample].append(group.first_chunk + (group.text_tokens > 0))
    width = max(map(len, rows))
    return move(torch.tensor([row + [-1] * (width - len(row)) for row in rows]), layout.device)


def best_chunks(scores: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """Picks the `top_k` best allowed chunks: scores [N, L, M], allowed [L, M] -> int32 [N, L, top_k], -1 if fewer."""
    scores = scores.masked_fill(~allowed, -torch.inf)
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    routes = order[..., :top_k].masked_fill(values[..., :top_k] == -torch.inf, -1).int()
    return torch.nn.functional.pad(routes, (0, top_k - routes.shape[-1]), value=-1)


# Context drop-off and drop-in

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
COUNT_OFF, COUNT_IN, KEY_OFF, KEY_IN = 0, 1, 2, 3  # the independent streams of draws a query has


def hash32(x):
    """Applies a 32-bit avalanche hash (two multiplies, three xor-shifts) to ints or int64 tensors of 32-bit words."""
    x = x & _WORD
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def drop_base(drops: DropKey) -> int | Tensor:
    """Returns the word that (seed, step, layer) contribute to every draw; a tensor where the step is one."""
    word: int | Tensor = 0
    for number in (drops.seed, drops.step, drops.layer):
        word = hash32(word ^ hash32(number + _GOLDEN))
    return word


def query_words(drops: DropKey, num_heads: int, layout: ShotLayout, start: int, end: int) -> Tensor:
    """Returns int64 [N, end - start]: one hashed word for each head and token of a part of the stream."""
    heads = torch.arange(drops.first_head, drops.first_head + num_heads, device=layout.device)
    by_head = hash32(drop_base(drops) ^ hash32(heads + _GOLDEN))
    sample = layout.token_sample[start:end]
    token = torch.arange(start, end, device=layout.device) - layout.sample_cu_seqlens[sample]
    by_sample = hash32(by_head[:, None] ^ hash32(layout.sample_position[sample].long() + _GOLDEN))
    return hash32(by_sample ^ token)


def draw(words: Tensor, stream: int, index: Tensor | int = 0) -> Tensor:
    """Returns a 32-bit draw of a query's stream; `index` (a chunk's index in its sample) broadcasts against `words`."""
    return hash32(hash32(words ^ (stream * _GOLDEN & _WORD)) + index * _GOLDEN)


def unit(word: Tensor) -> Tensor:
    """Returns a uniform fp32 in [0, 1) from the upper 24 bits of a 32-bit draw."""
    return (word >> 8).float() * 2.0**-24


@cache
def poisson_thresholds(rate: float, most: int, device: torch.device) -> Tensor:
    """Returns cumulative Poisson probabilities P(m <= j), j < most: a uniform u draws the number of them up to u. They
    are fp32 and kept on the device, so that no layer copies them, which a CUDA graph could not capture."""
    total, term, out = 0.0, math.exp(-rate), []
    for j in range(most):
        total += term
        out.append(total)
        term *= rate / (j + 1)
    return move(torch.tensor(out, dtype=torch.float32), device)


def apply_drops(
    routes: Tensor, allowed: Tensor, layout: ShotLayout, config: MoCConfig, drops: DropKey, first_token: int
) -> Tensor:
    """Applies drop-off and drop-in to routes [N, L, top_k] of the queries from `first_token` on.

    Drop-off removes floor(p held) of the `held` routes, p ~ U(0, drop_off_max). Drop-in adds min(Poisson(rate),
    drop_in_max) candidates that were not routed. Both choose those with the lowest random keys.
    Returns int32 [N, L, top_k + drop_in_max].
    """
    num_heads, num_queries, _ = routes.shape
    num_chunks = allowed.shape[1]
    last_token = first_token + num_queries
    words = query_words(drops, num_heads, layout, first_token, last_token)
    first_chunk = layout.sample_first_chunk[layout.token_sample[first_token:last_token], None]

    held = (routes >= 0).sum(-1)
    drop_count = (unit(draw(words, COUNT_OFF)) * config.drop_off_max * held).floor().long()
    keys = draw(words[..., None], KEY_OFF, routes.long() - first_chunk).masked_fill(routes < 0, _WORD + 1)
    rank = keys.argsort(dim=-1, stable=True).argsort(dim=-1)
    kept = routes.masked_fill(rank < drop_count[..., None], -1)

    thresholds = poisson_thresholds(config.drop_in_rate, config.drop_in_max, words.device)
    add_count = (unit(draw(words, COUNT_IN))[..., None] >= thresholds).sum(-1)
    chunk = torch.arange(num_chunks, device=routes.device)
    taken = torch.zeros(num_heads, num_queries, num_chunks + 1, dtype=torch.bool, device=routes.device)
    taken.scatter_(-1, routes.long().masked_fill(routes < 0, num_chunks), True)
    free = allowed & ~taken[..., :num_chunks]
    keys = draw(words[..., None], KEY_IN, chunk - first_chunk).masked_fill(~free, _WORD + 1)
    values, order = keys.sort(dim=-1, stable=True)
    width = min(config.drop_in_max, num_chunks)
    slot = torch.arange(width, device=routes.device)
    absent = (values[..., :width] > _WORD) | (slot >= add_count[..., None])
    added = order[..., :width].masked_fill(absent, -1).int()
    added = torch.nn.functional.pad(added, (0, config.drop_in_max - width), value=-1)
    return torch.cat([kept, added], dim=-1)


# Outer loop


@torch.no_grad()
def select_shots(features: Tensor, layout: ShotLayout, n: int) -> Tensor:
    """Finds each shot's `n` most similar earlier shots of its sample, by the dot product of mean token features.

    features: [L, C], any token features of the stream. Returns int64 [S, n] of shots of the pack, best first, -1 where
    there are fewer: those a reduced stream for this shot keeps. Raises ValueError for features of another stream.
    Source: arXiv 2508.21058, appendix I.
    """
    if features.dim() != 2 or len(features) != layout.num_tokens:
        raise ValueError(f"features must be [{layout.num_tokens}, C] for this layout; got {tuple(features.shape)}")
    groups = torch.tensor(layout.shot_groups, device=features.device)
    wide = features if features.dtype == torch.float64 else features.float()
    offsets = layout.group_cu_seqlens.long()
    means = torch.segment_reduce(wide, "mean", offsets=offsets, unsafe=True)[groups]
    sample = layout.group_sample[groups]
    shot = torch.arange(len(groups), device=features.device)
    earlier = (sample[:, None] == sample[None]) & (shot[None] < shot[:, None])
    return best_chunks((means @ means.T)[None], earlier, n)[0].long()
