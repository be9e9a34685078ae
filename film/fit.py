"""Whether a film fits into memory: told before anything is sampled, with what would fit."""

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace

from film.estimate import Estimate
from film.plan import FilmPlan
from moc.diffusion import SamplingConfig
from moc.errors import UserError
from moc.memory import SAMPLING

logger = logging.getLogger(__name__)


def check_fits(
    plan: FilmPlan, count: Callable[..., Estimate], sampler: SamplingConfig, offload: bool, room: int
) -> None:
    """Raises UserError where a film surely does not fit, and warns where it may not.

    count: what a plan costs with a sampler and with `offload` (`film.estimate`). room: bytes of the device.
    """
    found = count(plan, sampler, offload=offload)
    asked = f"{plan.script.title}: {len(plan.filmed)} shots, {sum(found.shot_tokens)} tokens"
    if found.least > room:
        ways = ", or ".join(_ways(plan, count, sampler, offload, room))
        remedy = f"what fits is {ways}" if ways else SAMPLING
        raise UserError(f"{asked}, need {_gib(found.least)} of memory at least, and there are {_gib(room)}: {remedy}")
    if found.memory > room:
        about = f"may need about {_gib(found.memory)} of memory, and there are {_gib(room)}"
        logger.warning("%s, %s; should it not suffice, finished shots are kept", asked, about)


def _ways(
    plan: FilmPlan, count: Callable[..., Estimate], sampler: SamplingConfig, offload: bool, room: float
) -> Iterator[str]:
    """What fits by the rough count, as a user may ask for it."""

    def in_context(num_shots: int) -> float:
        return count(plan, replace(sampler, lag=1.0, context_shots=num_shots), offload=offload).memory

    def of_first(num_shots: int) -> float:
        return count(plan.first(num_shots), sampler, offload=offload).memory

    if not offload and count(plan, sampler, offload=True).memory <= room:
        yield "offload=true"
    contexts = range(1, len(plan.filmed))
    if sampler.lag < 1 and in_context(sampler.context_shots) <= room:
        yield "sampler=shot_by_shot"
    elif most := bisect_right(contexts, room, key=in_context):
        yield f"sampler=shot_by_shot with sampler.context_shots={contexts[most - 1]}"
    shots = range(next(n for n, index in enumerate(plan.filmed, start=1) if index not in plan.given), len(plan.filmed))
    if most := bisect_right(shots, room, key=of_first):
        yield f"its first {shots[most - 1]} shots"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
