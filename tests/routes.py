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
    lengths of its query and its mean."""
    means = routing.descriptors(k.double(), layout)
    scores = torch.einsum("lnd,mnd->nlm", q.double(), means)
    off = error * q.double().norm(dim=-1).T[..., None] * means.norm(dim=-1).T[:, None]
    chunks = torch.arange(layout.num_chunks, device=layout.device)
    allowed = is_candidate(layout, config, layout.token_chunk[-len(q) :, None], chunks)
    order = scores.masked_fill(~allowed, -torch.inf).argsort(-1, descending=True)
    low = (scores - off).masked_fill(~allowed, torch.inf).gather(-1, order)
    high = (scores + off).masked_fill(~allowed, -torch.inf).gather(-1, order)
    none = scores.new_full((*scores.shape[:2], 1), torch.inf)
    worst_kept = torch.cat([none, low[..., : config.top_k]], -1).amin(-1)
    best_left = torch.cat([-none, high[..., config.top_k :]], -1).amax(-1)
    return worst_kept > best_left
