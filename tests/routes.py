"""This module compares routes of two backends, where hardware may round scores differently.

Shape letters: L packed tokens, Lq queries, N heads, D head dim, K routes a query.
"""

import torch
from torch import Tensor

import moc
from moc import routing
from moc.context import is_candidate


def same_chunks(routes: Tensor, expected: Tensor) -> bool:
    """Returns whether two tables [N, Lq, K] hold the same chunks for each query. Where scores are exact, ties
    included."""
    return torch.equal(routes.sort(-1).values, expected.sort(-1).values)


def assert_same_choice(
    routes: Tensor,
    q: Tensor,
    k: Tensor,
    layout: moc.ShotLayout,
    config: moc.MoCConfig,
    drops: moc.DropKey | None = None,
) -> None:
    """`routes` of q [Lq, N, D] and k [L, N, D] are the reference's, for each query whose choice rounding cannot change.

    Such must be nearly all: inputs with many equal scores need exact ones and `same_chunks`.
    """
    clear = clear_choices(q, k, layout, config)
    assert clear.double().mean() > 0.95
    expected = routing.route(q, k, layout, config, drops)
    assert routes.shape == expected.shape
    assert same_chunks(routes[clear], expected[clear])


@torch.no_grad()
def clear_choices(q: Tensor, k: Tensor, layout: moc.ShotLayout, config: moc.MoCConfig, error: float = 1e-5) -> Tensor:
    """Returns bool [N, Lq]: the best `top_k` chunks beat all others though every score be off by `error` times the
    lengths of its query and its mean; of several means, by the most of theirs and what a logarithm's rounding adds."""
    subchunks, head_dim = config.descriptor_subchunks, q.shape[-1]
    means = routing.descriptors(k.double(), layout, subchunks)
    scores = torch.einsum("lnd,mnd->nlm", q.double(), means)
    off = error * q.double().norm(dim=-1).T[..., None] * means.norm(dim=-1).T[:, None]
    if subchunks > 1:
        scores = routing._log_mass(scores, layout, subchunks, head_dim)
        off = off.unflatten(-1, (-1, subchunks)).amax(-1) * head_dim**-0.5 + error * (1 + scores.abs())
    chunks = torch.arange(layout.num_chunks, device=layout.device)
    allowed = is_candidate(layout, config, layout.token_chunk[-len(q) :, None], chunks)
    order = scores.masked_fill(~allowed, -torch.inf).argsort(-1, descending=True)
    low = (scores - off).masked_fill(~allowed, torch.inf).gather(-1, order)
    high = (scores + off).masked_fill(~allowed, -torch.inf).gather(-1, order)
    none = scores.new_full((*scores.shape[:2], 1), torch.inf)
    worst_kept = torch.cat([none, low[..., : config.top_k]], -1).amin(-1)
    best_left = torch.cat([-none, high[..., config.top_k :]], -1).amax(-1)
    return worst_kept > best_left


def with_ties(layout: moc.ShotLayout, subchunks: int, **kind) -> tuple[Tensor, Tensor]:
    """Returns q and k [L, 1, 16], of which many chunks have exactly equal log-sum-exp on any hardware.

    All tokens of a chunk are alike, of three kinds, but in one subchunk alone; the others score so much lower that they
    add nothing. Numbers are whole. Chunks must have `subchunks` tokens or a multiple of them.
    """
    q = torch.randint(-4, 5, (layout.num_tokens, 1, 16))
    kinds = torch.randint(-4, 5, (3, 1, 16))
    q[..., 0], kinds[..., 0] = 8, 0
    k = kinds[torch.randint(3, (layout.num_chunks,))][layout.token_chunk.cpu()]
    lengths = layout.chunk_cu_seqlens.cpu().diff()
    place = torch.cat([torch.arange(length) * subchunks // length for length in lengths.tolist()])
    chosen = torch.randint(subchunks, (layout.num_chunks,))[layout.token_chunk.cpu()]
    k[place != chosen, :, 0] = -64
    return q.to(layout.device, **kind), k.to(layout.device, **kind)
