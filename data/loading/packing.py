"""This module packs a run's samples into optimizer steps by a token budget, and each step into micro-batches for the
ranks.

A step is a run of consecutive positions that fits the budget, whatever the number of ranks, so N ranks train on
exactly what one would; the step's samples are then dealt to ranks x accumulation bins of nearly equal tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from data.errors import DataError
from data.loading.order import Draw


@dataclass(frozen=True)
class Step:
    """A step is the samples at positions [start, end) of the run, with their draws."""

    start: int
    end: int
    draws: tuple[Draw, ...]
    tokens: tuple[int, ...]


def plan_steps(
    draw_at: Callable[[int], Draw], tokens_of: Callable[[Draw], int], batch_tokens: int, start: int
) -> Iterator[Step]:
    """Yields steps from position `start` on, endless: positions are taken in order while they fit `batch_tokens`."""
    draws: list[Draw] = []
    tokens: list[int] = []
    for position in count(start):
        draw = draw_at(position)
        size = tokens_of(draw)
        if draws and sum(tokens) + size > batch_tokens:
            yield Step(position - len(draws), position, tuple(draws), tuple(tokens))
            draws, tokens = [], []
        draws.append(draw)
        tokens.append(size)


def deal(step: Step, bins: int) -> list[list[Draw]]:
    """Splits a step into `bins` non-empty lists of nearly equal tokens: largest first, to the lightest bin."""
    order = sorted(range(len(step.draws)), key=lambda i: (-step.tokens[i], i))
    loads = [0] * bins
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        lightest = min(range(bins), key=lambda b: (loads[b], len(dealt[b])))
        loads[lightest] += step.tokens[i]
        dealt[lightest].append(i)
    return [[step.draws[i] for i in sorted(indices)] for indices in dealt]


def check_budget(largest: int, scene_id: str, batch_tokens: int, bins: int) -> None:
    """Raises DataError unless every step is sure to hold a sample for each of rank x accumulation bins."""
    if largest > batch_tokens:
        raise DataError(
            "batch-too-small",
            "data.batch_tokens",
            f"scene {scene_id!r} has {largest} tokens, over the budget of {batch_tokens}; raise the budget, or "
            "prepare smaller or shorter shots",
        )
    if batch_tokens // largest < bins:
        raise DataError(
            "batch-too-small",
            "data.batch_tokens",
            f"{batch_tokens} tokens hold only {batch_tokens // largest} samples of {largest} (scene {scene_id!r}), "
            f"but ranks x accumulation is {bins}; raise the budget to {bins * largest} or use fewer",
        )
