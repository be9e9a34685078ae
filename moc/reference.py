"""MoC attention written for reading: an explicit mask, a softmax, nothing else. Exact, slow, any device, any dtype.

Every fast backend must equal it, in forward and in the gradients of q, k and v.
"""

import torch
from torch import Tensor

from moc.config import DropKey, MoCConfig, OwnAnchor, TextAnchor
from moc.layout import ShotLayout
from moc.routing import route


def anchor_mask(layout: ShotLayout, config: MoCConfig) -> Tensor:
    """bool [L, L]: the keys that every head of a query attends to whatever the routes (for dense: the whole sample)."""
    same_sample = layout.token_sample[:, None] == layout.token_sample
    if config.dense:
        return same_sample
    same_group = layout.token_group[:, None] == layout.token_group
    in_shot = (layout.group_shot[layout.token_group] >= 0)[:, None]
    key_is_text = layout.token_is_text
    key_is_global = layout.group_shot[layout.token_group] < 0

    mask = torch.zeros_like(same_sample)
    if config.own_anchor is OwnAnchor.shot:
        mask |= same_group & in_shot
    elif config.own_anchor is OwnAnchor.chunk:
        mask |= (layout.token_chunk[:, None] == layout.token_chunk) & in_shot
    if config.text_anchor is TextAnchor.all:
        mask |= same_sample & key_is_text
    elif config.text_anchor is TextAnchor.global_and_own:
        mask |= same_sample & key_is_text & (key_is_global | same_group)
    return mask


def attention_mask(routes: Tensor | None, layout: ShotLayout, config: MoCConfig) -> Tensor:
    """bool [N, L, L] (or [1, L, L] without routes): what each query of each head attends to."""
    mask = anchor_mask(layout, config)[None]
    if config.dense or routes is None:
        return mask
    num_heads, num_tokens, _ = routes.shape
    chosen = torch.zeros(num_heads, num_tokens, layout.num_chunks + 1, dtype=torch.bool, device=routes.device)
    chosen.scatter_(-1, routes.long().masked_fill(routes < 0, layout.num_chunks), True)
    return mask | chosen[..., layout.token_chunk.long()]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under mask [N | 1, L, L], in fp32 at least; a query without any key gives zero."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("ind,jnd->nij", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return torch.einsum("nij,jnd->ind", weights, v.to(wide)).to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Attention over anchors and routed chunks together, each key once: q, k, v [L, N, D] -> [L, N, D]."""
    return masked_attention(q, k, v, attention_mask(routes, layout, config))


def moc_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ShotLayout,
    config: MoCConfig,
    routes: Tensor | None = None,
    route_qk: tuple[Tensor, Tensor] | None = None,
    drops: DropKey | None = None,
) -> Tensor:
    """`moc.moc_attention` by the plain reference; arguments and result as there."""
    if routes is None and not config.dense:
        routes = route(*(route_qk or (q, k)), layout, config, drops)
    return attend(q, k, v, routes, layout, config)
