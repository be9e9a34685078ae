"""This module counts what an attention call really attended to: key pairs by kind, FLOPs, sparsity.

The published formula leaves the anchors out (arXiv 2508.21058, section 3.4). They are counted here: keys per query =
own shot + text + routed chunks. All counts are averages over heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moc.config import MoCConfig
from moc.context import is_candidate, is_own_anchor, is_text_anchor, pairs
from moc.layout import ShotLayout
from moc.routes import check_whole, drop_covered

QUERY_CHUNKS = 256  # chunks of queries that are counted at once
FLOPS_PER_PAIR = 4  # multiply by head dim; q k^T and p v take a multiply and an add each


@dataclass(frozen=True)
class Cost:
    """A cost counts the attended (query, key) pairs of one head, and the forward FLOPs of all heads of one layer.

    own: keys of the query's own shot (or chunk). text: text anchors outside of it. routed: keys of routed chunks that
    no anchor covers, each once. routing_flops: of pooling every video key and scoring every query against its
    candidates; 0 where top_k is 0.
    dense: pairs of dense attention, the sum of L^2 over samples. video, video_dense: the same among video tokens alone.
    """

    own: float
    text: float
    routed: float
    dense: float
    video: float
    video_dense: float
    routing_flops: float
    flops_per_pair: float

    @property
    def attended(self) -> float:
        return self.own + self.text + self.routed

    @property
    def density(self) -> float:
        return self.attended / self.dense

    @property
    def sparsity(self) -> float:
        return 1.0 - self.density

    @property
    def video_sparsity(self) -> float:
        return 1.0 - self.video / self.video_dense

    @property
    def flops(self) -> float:
        """Returns the forward FLOPs of attention over the attended pairs, plus those of routing."""
        return self.attended * self.flops_per_pair + self.routing_flops

    @property
    def dense_flops(self) -> float:
        return self.dense * self.flops_per_pair


def attention_cost(layout: ShotLayout, config: MoCConfig, routes: Tensor | None, num_heads: int, head_dim: int) -> Cost:
    """Counts one layer's attention: of a model with dense layers, give `config.at_layer(layer)`.

    routes: int [N, L, K], from `route` (after drops) or the caller's own; None for dense attention or anchors alone.
    Raises ValueError for routes of a part of the stream. It synchronizes with the device, so call it once in a while
    and not in the hot path.
    """
    lengths = layout.chunk_cu_seqlens.diff().double()
    video_lengths = lengths.masked_fill(layout.chunk_is_text, 0)

    def keys(query: Tensor, key: Tensor) -> Tensor:
        """Returns keys that the queries of chunks always attend to, float64 [Q, 3]: of the own shot, of text, of own
        video."""
        pair = pairs(layout, query, key)
        own = pair.same_sample if config.dense else is_own_anchor(pair, config)
        text = is_text_anchor(pair, config) & ~own
        return torch.stack([own.double() @ lengths, text.double() @ lengths, own.double() @ video_lengths], dim=-1)

    own, text, own_video = _by_query_chunk(layout, keys).unbind(-1)
    routed = routed_video = lengths.new_zeros(layout.num_tokens)
    if routes is not None and not config.dense:
        check_whole(routes, layout)
        routes = drop_covered(routes, layout, config)
        routed, routed_video = _routed_keys(routes, lengths), _routed_keys(routes, video_lengths)
    samples = [(end - start, sum(g.video_tokens for g in layout.groups if g.sample == index))
               for index, (start, end) in enumerate(layout.sample_ranges)]  # fmt: skip
    is_video = ~layout.token_is_text
    return Cost(
        own=float(lengths @ own),
        text=float(lengths @ text),
        routed=float(routed.sum()),
        dense=float(sum(length**2 for length, _ in samples)),
        video=float((own_video[layout.token_chunk] + routed_video)[is_video].sum()),
        video_dense=float(sum(video**2 for _, video in samples)),
        routing_flops=float(_routing_flops(layout, config, head_dim) * num_heads),
        flops_per_pair=FLOPS_PER_PAIR * head_dim * num_heads,
    )


def _routing_flops(layout: ShotLayout, config: MoCConfig, head_dim: int) -> int:
    """Returns the FLOPs of one head: scoring a candidate takes a multiply and an add for each dim, pooling an add for
    each dim of a key."""
    if config.dense or not config.top_k:
        return 0
    candidates = _by_query_chunk(layout, lambda query, key: is_candidate(layout, config, query, key).sum(-1))
    scores = int(candidates[layout.token_chunk].sum())
    return (int((~layout.token_is_text).sum()) + 2 * scores * config.descriptor_subchunks) * head_dim


def _by_query_chunk(layout: ShotLayout, count: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Returns `count` of query chunks [Q, 1] and all key chunks [M], for every query chunk. It takes a block of them at
    a time, since a table of all pairs takes gigabytes at 10,000 chunks."""
    chunks = torch.arange(layout.num_chunks, device=layout.device)
    return torch.cat([count(block[:, None], chunks) for block in chunks.split(QUERY_CHUNKS)])


def _routed_keys(routes: Tensor, lengths: Tensor) -> Tensor:
    """Returns the keys of a query's routed chunks, averaged over heads: lengths [M] -> float64 [L]."""
    lengths = torch.cat([lengths, lengths.new_zeros(1)])  # index -1, an empty slot, reads this 0
    return lengths[routes.long()].sum(-1).mean(0)
