"""What an attention call really attended to: key pairs by part, FLOPs, sparsity.

Counts follow DESIGN and correct the published formula, which leaves the anchors out (arXiv 2508.21058, section 3.4):
keys per query = own shot + text + routed chunks. All counts are averages over heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moc.config import MoCConfig, OwnAnchor, TextAnchor
from moc.layout import ShotLayout
from moc.routes import check_whole, drop_covered
from moc.routing import candidate_range

FLOPS_PER_PAIR = 4  # times head dim: q k^T and p v, a multiply and an add each


@dataclass(frozen=True)
class Cost:
    """Attended (query, key) pairs of one head, and the forward FLOPs of all heads of one layer.

    own: keys of the query's own shot (or chunk). text: text anchors outside of it. routed: keys of routed chunks that
    no anchor covers, each once. routing_flops: every video key pooled, every query scored against its candidates; 0
    where top_k is.
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
        """Forward FLOPs: attention over the attended pairs, plus routing."""
        return self.attended * self.flops_per_pair + self.routing_flops

    @property
    def dense_flops(self) -> float:
        return self.dense * self.flops_per_pair


def attention_cost(layout: ShotLayout, config: MoCConfig, routes: Tensor | None, num_heads: int, head_dim: int) -> Cost:
    """Counts one layer's attention: of a model with dense layers, give `config.at_layer(layer)`.

    routes: int [N, L, K], from `route` (after drops) or the caller's own; None for dense attention or anchors alone.
    Raises ValueError for routes of a part of the stream.
    Synchronizes with the device: a thing to call once in a while, not in the hot path.
    """
    own, text = _own_keys(layout, config), _text_keys(layout, config)
    routed = routed_video = torch.zeros_like(own)
    if routes is not None and not config.dense:
        check_whole(routes, layout)
        routes = drop_covered(routes, layout, config)
        lengths = _lengths(layout.chunk_cu_seqlens)
        routed = _routed_keys(routes, lengths)
        routed_video = _routed_keys(routes, lengths.masked_fill(layout.chunk_is_text, 0))
    samples = [(end - start, sum(g.video_tokens for g in layout.groups if g.sample == index))
               for index, (start, end) in enumerate(layout.sample_ranges)]  # fmt: skip
    is_video = ~layout.token_is_text
    own_video = (own - _own_text(layout, config))[is_video]
    return Cost(
        own=float(own.sum()),
        text=float(text.sum()),
        routed=float(routed.sum()),
        dense=float(sum(length**2 for length, _ in samples)),
        video=float((own_video + routed_video[is_video]).sum()),
        video_dense=float(sum(video**2 for _, video in samples)),
        routing_flops=float(_routing_flops(layout, config, head_dim) * num_heads),
        flops_per_pair=FLOPS_PER_PAIR * head_dim * num_heads,
    )


def _routing_flops(layout: ShotLayout, config: MoCConfig, head_dim: int) -> int:
    """FLOPs of one head: scoring a candidate takes a multiply and an add for each dim, pooling an add for each dim of a
    key."""
    if config.dense or not config.top_k:
        return 0
    bounds = candidate_range(layout, config)
    video_chunks = torch.nn.functional.pad((~layout.chunk_is_text).cumsum(0), (1, 0))  # before each chunk
    first, last, skip_first, skip_last = (
        video_chunks[bound.long()] for bound in (bounds.first, bounds.last, bounds.skip_first, bounds.skip_last)
    )
    scores = int((last - first - (skip_last - skip_first)).sum())
    return (int((~layout.token_is_text).sum()) + 2 * scores) * head_dim


def _lengths(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.diff().double()


def _text_by_group(layout: ShotLayout) -> Tensor:
    tokens = [group.text_tokens for group in layout.groups]
    return torch.tensor(tokens, dtype=torch.float64, device=layout.device)


def _own_keys(layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Keys a query has by its own anchor (dense: its sample), text included. float64 [L]."""
    if config.dense:
        return _lengths(layout.sample_cu_seqlens)[layout.token_sample]
    if config.own_anchor is OwnAnchor.none:
        return torch.zeros(layout.num_tokens, dtype=torch.float64, device=layout.device)
    by_chunk = config.own_anchor is OwnAnchor.chunk
    index, cu_seqlens = (
        (layout.token_chunk, layout.chunk_cu_seqlens) if by_chunk else (layout.token_group, layout.group_cu_seqlens)
    )
    is_global = layout.group_shot[layout.token_group] < 0
    return _lengths(cu_seqlens)[index].masked_fill(is_global, 0)


def _own_text(layout: ShotLayout, config: MoCConfig) -> Tensor:
    """How many of `_own_keys` are text, float64 [L]."""
    own = _own_keys(layout, config)
    if config.dense:
        by_sample = torch.zeros(layout.num_samples, dtype=torch.float64, device=layout.device)
        return by_sample.index_add(0, layout.group_sample, _text_by_group(layout))[layout.token_sample]
    if config.own_anchor is OwnAnchor.shot:
        return _text_by_group(layout)[layout.token_group].masked_fill(own == 0, 0)
    return own * layout.token_is_text


def _text_keys(layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Text anchors of a query outside its own anchor. float64 [L]."""
    if config.dense or config.text_anchor is TextAnchor.none:
        return torch.zeros(layout.num_tokens, dtype=torch.float64, device=layout.device)
    text = _text_by_group(layout)
    is_global = layout.group_shot < 0
    by_sample = torch.zeros(layout.num_samples, dtype=torch.float64, device=layout.device)
    if config.text_anchor is TextAnchor.all:
        anchors = by_sample.index_add(0, layout.group_sample, text)[layout.token_sample]
    else:
        global_text = by_sample.index_add(0, layout.group_sample, text * is_global)
        own_text = (text * ~is_global)[layout.token_group]
        anchors = global_text[layout.token_sample] + own_text
    return anchors - _own_text(layout, config)


def _routed_keys(routes: Tensor, lengths: Tensor) -> Tensor:
    """Keys of a query's routed chunks, averaged over heads: lengths [M] -> float64 [L]."""
    lengths = torch.cat([lengths, lengths.new_zeros(1)])  # -1, an empty slot, has none
    return lengths[routes.long()].sum(-1).mean(0)
