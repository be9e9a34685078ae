"""Whether a film fits into memory: told before anything is sampled, with what would fit."""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from film.estimate import Estimate
from film.plan import FilmPlan
from moc import memory
from moc.diffusion import SamplingConfig
from moc.errors import UserError

logger = logging.getLogger(__name__)


def check_fits(
    plan: FilmPlan, count: Callable[..., Estimate], sampler: SamplingConfig, offload: bool, room: int
) -> None:
    """Raises UserError where a film surely does not fit, and warns where it may not.

    count: what a plan costs with a sampler and with `offload` (`film.estimate`). room: bytes of the device.
    """
    found = count(plan, sampler, offload=offload)
    asked = f"{plan.script.title}: {len(plan.filmed)} shots, {sum(found.shot_tokens)} tokens"
    if found.memory <= room:
        return
    ways = ", or ".join(_ways(plan, count, sampler, offload, room))
    remedy = f"what fits is {ways}" if ways else memory.SAMPLING
    if found.least > room:
        raise UserError(f"{asked}, need {_gib(found.least)} of memory at least, and there are {_gib(room)}: {remedy}")
    about = f"may need about {_gib(found.memory)} of memory, and there are {_gib(room)}"
    logger.warning("%s, %s; should it not suffice, finished shots are kept, and %s", asked, about, remedy)


def _ways(
    plan: FilmPlan, count: Callable[..., Estimate], sampler: SamplingConfig, offload: bool, room: float
) -> Iterator[str]:
    """Yields what fits by the rough count, as a user may ask for it."""

    def needs(**changes: Any) -> float:
        found, host = count(plan, replace(sampler, **changes), offload=offload), memory.room(torch.device("cpu"))
        return found.memory if found.host_memory <= host else math.inf

    def in_context(offloads: bool, num_shots: int | None = sampler.context_shots) -> float:
        return needs(lag=1.0, offload_cache=offloads, context_shots=num_shots)

    def of_first(num_shots: int) -> float:
        return count(plan.first(num_shots), sampler, offload=offload).memory

    if not offload and count(plan, sampler, offload=True).memory <= room:
        yield "offload=true"
    if not sampler.offload_cache and needs(offload_cache=True) <= room:
        yield "sampler.offload_cache=true"
    contexts = range(1, len(plan.filmed))
    for offloads in (False, True)[sampler.offload_cache :]:
        also = " sampler.offload_cache=true" if offloads and not sampler.offload_cache else ""
        if also and in_context(offloads) == in_context(False):
            break  # nothing is kept
        if sampler.lag < 1 and in_context(offloads) <= room:
            yield f"sampler=shot_by_shot{also}"
            break
        if most := bisect_right(contexts, room, key=partial(in_context, offloads)):
            yield f"sampler=shot_by_shot sampler.context_shots={contexts[most - 1]}{also}"
    shots = range(next(n for n, index in enumerate(plan.filmed, start=1) if index not in plan.given), len(plan.filmed))
    if most := bisect_right(shots, room, key=of_first):
        yield "its first shot" if shots[most - 1] == 1 else f"its first {shots[most - 1]} shots"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
