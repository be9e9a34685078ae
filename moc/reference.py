"""Attention is written for reading here: an explicit mask, a softmax, nothing else. It is exact, slow, for any device
and dtype.

Every fast backend must equal it, in forward and in the gradients of q, k and v.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.config import DropKey, MoCConfig, OwnAnchor, TextAnchor
from moc.execution import Execution
from moc.kept import Kept
from moc.layout import ShotLayout
from moc.routing import route


def anchor_mask(layout: ShotLayout, config: MoCConfig, tokens: slice | Tensor = slice(None)) -> Tensor:
    """Returns bool [L, L]: the keys that all heads of a query attend to whatever the routes (dense: the whole sample).

    `tokens` restricts queries and keys to these of the stream.
    """
    sample, group, chunk = layout.token_sample[tokens], layout.token_group[tokens], layout.token_chunk[tokens]
    key_is_text = layout.token_is_text[tokens]
    key_is_global = layout.group_shot[group] < 0
    in_shot = ~key_is_global[:, None]
    same_sample = sample[:, None] == sample
    same_group = group[:, None] == group
    if config.dense:
        return same_sample

    mask = torch.zeros_like(same_sample)
    if config.own_anchor is OwnAnchor.shot:
        mask |= same_group & in_shot
    elif config.own_anchor is OwnAnchor.chunk:
        mask |= (chunk[:, None] == chunk) & in_shot
    if config.text_anchor is TextAnchor.all:
        mask |= same_sample & key_is_text
    elif config.text_anchor is TextAnchor.global_and_own:
        mask |= same_sample & key_is_text & (key_is_global | same_group)
    return mask


def attention_mask(routes: Tensor | None, layout: ShotLayout, config: MoCConfig, tokens: slice = slice(None)) -> Tensor:
    """Returns bool [N, L, L] (or [1, L, L] without routes): what each query of each head attends to."""
    mask = anchor_mask(layout, config, tokens)[None]
    if config.dense or routes is None:
        return mask
    routes = routes[:, tokens].long()
    num_heads, num_queries, _ = routes.shape
    chosen = torch.zeros(num_heads, num_queries, layout.num_chunks + 1, dtype=torch.bool, device=routes.device)
    chosen.scatter_(-1, routes.masked_fill(routes < 0, layout.num_chunks), True)
    return mask | chosen[..., layout.token_chunk[tokens].long()]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v under mask [N | 1, L, L], in fp32 at least: zero for a query without keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("ind,jnd->nij", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        return torch.einsum("nij,jnd->ind", weights, v.to(wide)).to(q.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, layout: ShotLayout, config: MoCConfig,
    execution: Execution | None = None, kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """Attends to anchors and routed chunks together, each key once: q [Lq, N, D], k, v [L, N, D] -> [Lq, N, D].

    execution, kept: not asked, since there is one way only; the other backends have more.
    """
    missing = len(k) - len(q)
    if missing:  # computes all queries and drops those before q's
        q = F.pad(q, (0, 0, 0, 0, missing, 0))
        routes = None if routes is None else F.pad(routes, (0, 0, missing, 0), value=-1)
        return attend(q, k, v, routes, layout, config)[missing:]
    samples = [slice(start, end) for start, end in layout.sample_ranges]
    return torch.cat([masked_attention(q[s], k[s], v[s], attention_mask(routes, layout, config, s)) for s in samples])


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
    """Computes `moc.moc_attention` by the plain reference. Arguments and result are as there, but nothing is checked,
    and fewer queries than keys are the last ones of the stream."""
    if routes is None and not config.dense:
        routes = route(*(route_qk or (q, k)), layout, config, drops)
    return attend(q, k, v, routes, layout, config)
