"""This module measures how much of dense attention routes keep: the softmax mass that a query would spend on the video
of other shots, and the share of it that lies on the chunks it routes to.

Shape letters: L packed tokens, N heads, D head dim, M chunks, K routes, Q queries that are asked about.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import moc
from moc import MoCConfig, ShotLayout
from models.part import Table
from models.rope import rotate
from models.stream import Attend


@dataclass
class Mass:
    """These are sums over queries, fp32 [N] each, by layer. elsewhere: mass on other shots' video. kept: its share on
    the routed chunks. best: its share on as many chunks, those that hold most of it. queries: how many there are."""

    elsewhere: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    best: dict[int, Tensor] = field(default_factory=dict)
    queries: int = 0

    def add(self, layer: int, elsewhere: Tensor, kept: Tensor, best: Tensor) -> None:
        """Adds a layer's masses, [N, Q] each."""
        for sums, values in ((self.elsewhere, elsewhere), (self.kept, kept), (self.best, best)):
            sums[layer] = sums.get(layer, 0) + values.sum(1).cpu()
        self.queries += elsewhere.shape[1] if layer == 0 else 0

    def table(self) -> dict[str, list[list[float]]]:
        """Gives by layer and head the mass that lies elsewhere, and the shares of it kept and, at best, to be kept."""
        layers = sorted(self.kept)
        elsewhere = torch.stack([self.elsewhere[layer] for layer in layers])
        shares = {
            name: torch.stack([sums[layer] for layer in layers]) / elsewhere.clamp(min=1e-9)
            for name, sums in (("kept", self.kept), ("best", self.best))
        }
        values = {"elsewhere": elsewhere / max(1, self.queries)} | shares
        return {name: [[round(x, 3) for x in row] for row in of.tolist()] for name, of in values.items()}


@contextmanager
def watched(model: Any, layout: ShotLayout, queries: Tensor, config: MoCConfig, mass: Mass) -> Iterator[None]:
    """Adds to `mass` what dense attention would do in the forwards meanwhile, for the tokens `queries`, and what of it
    lies on the chunks that `config` routes to."""

    def watch(layer: int) -> Callable[[nn.Module, tuple], tuple]:
        def measure(q: Tensor, k: Tensor) -> None:
            with torch.autocast(q.device.type, enabled=False):
                _measure(layer, q, k, layout, queries, config, mass)

        return lambda block, args: (*args[:-1], _Watched(args[-1], measure))

    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            hooks.enter_context(block.register_forward_pre_hook(watch(layer)))
        yield


class _Watched:
    """This is the attention of one layer, which tells `measure` of its q and k as it uses them."""

    def __init__(self, attend: Attend, measure: Callable[[Tensor, Tensor], None]) -> None:
        self.attend, self.measure = attend, measure

    @property
    def table(self) -> Table | None:
        return self.attend.table

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rotated: bool = False) -> Tensor:
        table = self.attend.stream.table
        self.measure(*((q, k) if rotated else (rotate(q, table), rotate(k, table))))
        return self.attend(q, k, v, rotated)


def _measure(
    layer: int, q: Tensor, k: Tensor, layout: ShotLayout, queries: Tensor, config: MoCConfig, mass: Mass
) -> None:
    routes = moc.route(q, k, layout, config)[:, queries].long()  # [N, Q, K]
    logits = torch.einsum("qnd,lnd->nql", q[queries].float(), k.float()) * q.shape[-1] ** -0.5
    foreign = layout.token_sample[queries][:, None] != layout.token_sample
    weights = logits.masked_fill(foreign, -torch.inf).softmax(-1)
    chunks = torch.zeros(*weights.shape[:2], layout.num_chunks + 1, device=weights.device)
    chunks.scatter_add_(2, layout.token_chunk.long().expand_as(weights), weights)
    own = layout.chunk_group == layout.token_group[queries][:, None]
    chunks[..., :-1].masked_fill_(own | layout.chunk_is_text, 0)  # the last column is for empty slots
    kept = chunks.gather(2, routes.masked_fill(routes < 0, layout.num_chunks)).sum(2)
    best = chunks.topk(min(routes.shape[2], layout.num_chunks), dim=2).values.sum(2)
    mass.add(layer, chunks.sum(2), kept, best)
