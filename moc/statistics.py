"""A few numbers, cheap enough to log, say what routing does: how far it goes, how spread, what it never chooses."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moc.layout import ShotLayout
from moc.move import move
from moc.routes import check_whole

NOISE_LEVELS = 4  # a routing map has this many equal ranges of sigma
MOST_DETAILED = 100  # maps of more shots do not separate layers and noise levels


@dataclass(frozen=True)
class RoutingStatistics:
    """These numbers sum up the routes of a layer. share_by_distance[d]: the share of the routes of shots' queries that
    goes d shots back (negative: forward). Queries of global text stand in no shot, so their routes have no distance.
    entropy: that of the choice of chunks over all queries, as a share of its maximum. unused: the share of video chunks
    that no query chose."""

    share_by_distance: dict[int, float]
    entropy: float
    unused: float


def chunk_counts(routes: Tensor, layout: ShotLayout) -> Tensor:
    """Counts how often the queries of each group chose each chunk: routes int [N, L, K] -> int64 [G, M], over all
    heads. Raises ValueError for routes of a part of the stream."""
    check_whole(routes, layout)
    num_groups, num_chunks = layout.num_groups, layout.num_chunks
    group = layout.token_group.long()[None, :, None]
    chunk = torch.where(routes >= 0, routes.long(), num_chunks)
    cell = (group * (num_chunks + 1) + chunk).flatten()
    counts = torch.zeros(num_groups * (num_chunks + 1), dtype=torch.int64, device=routes.device)
    counts.index_add_(0, cell, torch.ones_like(cell))
    return counts.view(num_groups, num_chunks + 1)[:, :num_chunks]


def shot_counts(routes: Tensor, layout: ShotLayout) -> Tensor:
    """Returns how often the queries of each shot routed to each shot: float64 [S, S], over all heads, with no wait."""
    counts = chunk_counts(routes, layout).double()
    by_group = counts.new_zeros(layout.num_groups, layout.num_groups).index_add_(1, layout.chunk_group, counts)
    shots = move(torch.tensor(layout.shot_groups), routes.device)
    return by_group[shots][:, shots]


class RoutingMap:
    """A map counts how often the queries of each shot route to each other shot while it is being made, by layer and
    noise level (paper, figure 2). What history's queries do in later steps is left out: it repeats itself, or is
    cached.

    counts: float32 [layers, NOISE_LEVELS, S, S], the cleanest level first. Where there are more than MOST_DETAILED
    shots, all layers and levels are counted as one.
    """

    def __init__(self, num_shots: int, sum_over_heads: Callable[[Tensor], Tensor] = lambda counts: counts) -> None:
        """Makes an empty map. `sum_over_heads` adds up the counts of those who have the other heads, where several
        share a stream."""
        self.sum_over_heads = sum_over_heads
        self.is_detailed = num_shots <= MOST_DETAILED
        self.counts = torch.zeros(0, NOISE_LEVELS if self.is_detailed else 1, num_shots, num_shots)

    def observer(
        self, layout: ShotLayout, shots: list[int], making: list[int], sigmas: Sequence[float] | None = None
    ) -> Callable[[int, Tensor], None]:
        """Returns a callback for the model's `on_routes`. shots: the story's indices of the stream's shots. making:
        those of them that are being made. sigmas: the noise level of each of these; None stands for 1."""
        levels = [int(sigma * NOISE_LEVELS) for sigma in sigmas or [1.0] * len(making)]
        last = self.counts.shape[1] - 1
        indices = (making, shots, [shots.index(shot) for shot in making], [min(level, last) for level in levels])
        rows, columns, made, depths = (move(torch.tensor(index), layout.device) for index in indices)

        def observe(layer: int, routes: Tensor) -> None:
            layer = layer if self.is_detailed else 0
            missing = max(0, layer + 1 - len(self.counts))
            counts = self.counts.to(layout.device)
            self.counts = torch.cat([counts, counts.new_zeros(missing, *counts.shape[1:])]) if missing else counts
            found = self.sum_over_heads(shot_counts(routes, layout)[made]).float()
            self.counts[layer][depths[:, None], rows[:, None], columns] += found

        return observe

    def shares(self) -> Tensor:
        """Returns which share of each shot's routes goes to each shot, float64 [S, S] on the CPU: rows sum to 1, or to
        0 without routes."""
        counts = self.counts.sum((0, 1), dtype=torch.float64)
        return (counts / counts.sum(1, keepdim=True).clamp(min=1)).cpu()


def routes_by_distance(counts: Tensor, layout: ShotLayout) -> dict[int, float]:
    """Returns how many routes of shots' queries go how many shots back (negative: forward). counts [G, M]: of
    `chunk_counts`, float64 on the CPU."""
    group_shot = torch.tensor([group.shot for group in layout.groups])
    chunk_shot = torch.tensor([layout.groups[chunk.group].shot for chunk in layout.chunks])
    distance = group_shot[:, None] - chunk_shot
    of_shots = counts * (group_shot >= 0)[:, None]
    return {int(d): float(of_shots[distance == d].sum()) for d in distance[of_shots > 0].unique()}


def routing_statistics(routes: Tensor, layout: ShotLayout) -> RoutingStatistics:
    """Summarizes one layer's routes, int [N, L, K]. Synchronizes with the device once."""
    counts = chunk_counts(routes, layout).cpu().double()
    by_distance = routes_by_distance(counts, layout)
    total = max(1.0, sum(by_distance.values()))
    shares = {distance: number / total for distance, number in by_distance.items()}
    by_chunk = counts.sum(0)[torch.tensor([chunk.kind == "video" for chunk in layout.chunks])]
    p = by_chunk / by_chunk.sum().clamp(min=1)
    entropy = float(torch.special.entr(p).sum()) / max(math.log(len(p)), 1e-9)
    return RoutingStatistics(shares, entropy, float((by_chunk == 0).double().mean()))
