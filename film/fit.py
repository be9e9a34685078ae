"""This module tells before anything is sampled whether a film fits into memory, and what would fit."""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from film.estimate import Estimate, in_bytes
from film.plan import FilmPlan
from moc import memory
from moc.counts import count_of
from moc.diffusion import SamplingConfig
from moc.errors import UserError

logger = logging.getLogger(__name__)


def placed(
    plan: FilmPlan, count: Callable[..., Estimate], sampler: SamplingConfig, offload: bool, usable: int
) -> SamplingConfig:
    """Returns the sampler, which keeps keys and values in the host's memory if that is left to us, they fit there, and
    the device's does not suffice. count, usable: as in `check_fits`."""
    there = replace(sampler, offload_cache=True)
    if sampler.offload_cache is None and count(plan, sampler, offload=offload).memory > usable >= _needs(
        plan, count, there, offload
    ):
        return there
    return sampler


def check_fits(
    plan: FilmPlan,
    count: Callable[..., Estimate],
    sampler: SamplingConfig,
    offload: bool,
    usable: int,
    is_sharded: bool = False,
    is_begun: bool = False,
) -> None:
    """Raises UserError where a film surely does not fit, and warns where it may not.

    count: what a plan costs with a sampler and with `offload` (`film.estimate`). usable: bytes of the device that
    this process may take. is_sharded: whether several processes hold the model, which none can then offload. is_begun:
    whether the folder holds the film, so that it takes no settings that its frames would show.
    """
    found = count(plan, sampler, offload=offload)
    asked = f"{plan.script.title}: {count_of(len(plan.filmed), 'shot')}, {count_of(sum(found.shot_tokens), 'token')}"
    if found.memory <= usable:
        return
    ways = list(_hidden_ways(plan, count, sampler, offload, usable, is_sharded))
    if not is_begun:
        ways += _ways(plan, count, sampler, offload, usable)
        ways += [] if ways else _shorter(plan, count, sampler, offload, usable)
    general = f"name another folder for out, and there {memory.SAMPLING}" if is_begun else memory.SAMPLING
    remedy = f"what fits is {', or '.join(ways)}" if ways else general
    least, about, has = map(in_bytes, (found.least, found.memory, usable))
    if found.least > usable:
        raise UserError(f"{asked}, need {least} of memory at least, and there are {has}: {remedy}")
    logger.warning(
        "%s, may need about %s of memory, and there are %s; should it not suffice, finished shots are kept, and %s",
        *(asked, about, has, remedy),
    )


def _needs(plan: FilmPlan, count: Callable[..., Estimate], sampler: SamplingConfig, offload: bool) -> float:
    """Returns bytes of the device by the rough count; where the host's memory does not suffice, more than any device
    has."""
    if sampler.offload_cache is None:
        return min(_needs(plan, count, replace(sampler, offload_cache=there), offload) for there in (False, True))
    found = count(plan, sampler, offload=offload)
    if torch.device(plan.device).type == "cpu":  # the CPU's memory is the host's
        return found.memory + found.host_memory
    return found.memory if found.host_memory <= memory.host_free_bytes() else math.inf


def _hidden_ways(
    plan: FilmPlan,
    count: Callable[..., Estimate],
    sampler: SamplingConfig,
    offload: bool,
    usable: float,
    is_sharded: bool,
) -> Iterator[str]:
    """Yields what fits by the rough count and changes no frame, as a user may ask for it."""
    if not offload and not is_sharded and count(plan, sampler, offload=True).memory <= usable:
        yield "offload=true"
    if sampler.offload_cache is False and _needs(plan, count, replace(sampler, offload_cache=True), offload) <= usable:
        yield "sampler.offload_cache=true"


def _ways(
    plan: FilmPlan, count: Callable[..., Estimate], sampler: SamplingConfig, offload: bool, usable: float
) -> Iterator[str]:
    """Yields what else fits by the rough count: another film."""

    def in_context(num_shots: int | None) -> float:
        return _needs(plan, count, replace(sampler, lag=1.0, context_shots=num_shots), offload)

    def of_first(num_shots: int) -> float:
        return count(plan.first(num_shots), sampler, offload=offload).memory

    contexts = range(1, len(plan.filmed))
    if sampler.lag < 1 and in_context(sampler.context_shots) <= usable:
        yield "sampler=shot_by_shot"
    elif most := bisect_right(contexts, usable, key=in_context):
        yield f"sampler=shot_by_shot sampler.context_shots={contexts[most - 1]}"
    shots = range(next(n for n, index in enumerate(plan.filmed, start=1) if index not in plan.given), len(plan.filmed))
    if most := bisect_right(shots, usable, key=of_first):
        yield "its first shot" if shots[most - 1] == 1 else f"its first {shots[most - 1]} shots"


def _shorter(
    plan: FilmPlan, count: Callable[..., Estimate], sampler: SamplingConfig, offload: bool, usable: float
) -> Iterator[str]:
    """Yields how long the shots that are made may be, for the whole film to fit by the rough count."""
    lengths = {index: plan.shapes[index][1] for index in plan.filmed if index not in plan.given}
    longest = max(lengths, key=lambda index: lengths[index])

    def up_to(most: int) -> float:
        shapes = [
            (channels, min(frames, most) if index in lengths else frames, height, width)
            for index, (channels, frames, height, width) in enumerate(plan.shapes)
        ]
        return _needs(replace(plan, shapes=shapes), count, sampler, offload)

    most = bisect_right(range(1, lengths[longest]), usable, key=up_to)
    # A latent frame less than fits: the last one of a shot may hold few of its frames.
    frames = plan.num_frames[plan.filmed.index(longest)] * (most - 1) / lengths[longest]
    seconds = math.floor(10 * frames / plan.script.fps) / 10
    if seconds > 0:
        yield f"shots of at most {seconds:g} s"
