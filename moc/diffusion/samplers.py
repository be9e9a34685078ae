"""The shots of a story are sampled by steps along the flow, each shot on its own clock.

A shot starts `lag` (in units of a whole denoising) after the one before it. One loop covers three ways of sampling:

    lag 0       joint: all shots share one noise level; earlier shots can bend to later ones
    lag 1       shot by shot: each shot is denoised against finished ones
    between     staggered: nearly joint's cost, nearly extension's memory

A shot that has not started is not in the stream, so nothing depends on it. A finished shot stays in it as history,
noised to `history_sigma` against error accumulation (LCT, arXiv 2503.10589). Shot by shot, and where attention flows
strictly forward, nothing that history computes ever changes: a model that can remember then keeps its keys and values
and computes the new shot alone, with the same result. Where a shot leaves the stream (`context_shots`), those after it
are remembered anew, computed without it: the film comes out as from streams that begin there, and takes the memory of
one such stream, however long the film is.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from moc.batch import StreamSpec
from moc.config import MoCConfig
from moc.diffusion.flow import Flow, Model
from moc.diffusion.reuse import StepReuse
from moc.diffusion.sides import Side, Stream, guided_velocity
from moc.diffusion.solvers import Solver, build_solver
from moc.diffusion.steps import guidance_scales, plan_steps, sigma_table
from moc.diffusion.story import Progress, SamplingConfig, Story, noise_key
from moc.errors import UserError
from moc.statistics import RoutingMap

logger = logging.getLogger(__name__)


@torch.no_grad()
def sample_shots(
    model: Model,
    spec: StreamSpec,
    moc: MoCConfig,
    flow: Flow,
    story: Story,
    config: SamplingConfig,
    on_step: Callable[[Progress], None] | None = None,
    routing_map: RoutingMap | None = None,
    start: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Denoises a story; yields (index, clean latent) of each shot, fp32 [C, T, H, W], as soon as it is finished.

    model: is called as `Flow.loss` calls it; it and the story's text are on one device.
    spec: how the model lays out its stream. moc: what attention attends to. flow: the noise convention and its shift.
    on_step: called after each step, once the shots that it finished are taken. routing_map: collects where the prompt's
        queries route to. start: where an earlier call stood, to go on from as if it had never stopped.
    Shots come in order; given ones are not yielded, nor are those that `start` holds finished.
    Raises FloatingPointError, with shot and step, where a latent is no longer finite, and UserError where the config
    sets `high_noise_guidance_scale` for a single model.
    """
    boundary = getattr(model, "boundary", None)
    if config.high_noise_guidance_scale is not None and boundary is None:
        raise UserError("sampler.high_noise_guidance_scale is for a pair of experts; this model is a single one")
    device = story.text[0].device
    num_shots = len(story.shapes)
    keys = story.noise_keys or [noise_key(config.seed, index) for index in range(num_shots)]
    noise = [_shot_noise(shape, key, device) for shape, key in zip(story.shapes, keys, strict=True)]
    start = start or Progress(0, 0, {})
    known = story.given | start.latents
    latents = [known.get(index, noise[index]).to(device).float() for index in range(num_shots)]
    unknown = [index for index in range(num_shots) if index not in story.given]
    levels, solvers = sigma_table(1, config, flow)[:, 0], dict[int, Solver]()
    remembered = {index: {name: x.to(device) for name, x in own.items()} for index, own in start.remembered.items()}
    reuse = StepReuse(config.step_cache, start.reused, remembered) if config.step_cache else None
    steps = plan_steps(num_shots, story.given, config, flow, story.num_references)
    cuts = story.cuts or [True] * num_shots
    prompt, negative = (Side(model, spec, text, cuts) for text in (story.text, story.negative))
    if config.keeps_history and hasattr(model, "new_cache"):
        for side in (prompt, negative):
            side.keep_history(latents, [step.shots for step in steps], bool(config.offload_cache))

    for number, step in islice(enumerate(steps, start=1), start.step, None):
        now, after, shots, moving = step.now, step.after, step.shots, step.moving
        sigma = torch.where(now == 0, config.history_sigma, now)[shots]
        seen = [
            flow.add_noise(latents[i], noise[i], s) if now[i] == 0 else latents[i]
            for i, s in zip(shots, sigma.tolist(), strict=True)
        ]
        stream = Stream(shots, seen, sigma)
        attention = replace(moc, dense=True) if step.is_dense else moc
        is_high = boundary is not None and float(sigma.max()) >= boundary
        scales = guidance_scales(step, story, config, is_high)
        observe, counts = None, None
        if routing_map:
            counts = routing_map.counts.clone()
            observe = routing_map.observer(prompt.layout(stream, moc), shots, moving, now[moving].tolist())
        way, asked = (step, scales, is_high), {index: latents[index] for index in moving}
        velocity = None if reuse is None else reuse.known(*way, asked)
        is_new = velocity is None
        while velocity is None:
            try:
                velocity = guided_velocity(prompt, negative, stream, attention, scales, observe)
            except torch.OutOfMemoryError:
                if prompt.cache is None:
                    raise
                _keep_elsewhere((prompt, negative), len(shots), config.offload_cache is None)
                if routing_map and counts is not None:
                    routing_map.counts = counts.clone()  # the step is tried again, and counts once
        if reuse and is_new:
            reuse.keep(*way, asked, velocity)
        for index in moving:
            done = step.steps_done[index]
            if index not in solvers:
                solvers[index] = build_solver(config.solver, levels, done, remembered.pop(index, {}))
            latents[index] = solvers[index].step(done, latents[index], velocity[index])
            if index in story.ends:
                end = story.ends[index].to(device).float()
                last = slice(-end.shape[1], None)
                latents[index][:, last] = flow.add_noise(end, noise[index][:, last], float(after[index]))
            if not latents[index].isfinite().all():
                raise _not_finite(f"shot {unknown.index(index) + 1}, step {done + 1} of {config.steps}")
            if after[index] == 0:
                del solvers[index]
        yield from ((index, latents[index]) for index in moving if after[index] == 0)
        if on_step:
            begun = {index: latents[index] for index in range(num_shots) if after[index] < 1}
            kept = {
                index: one.remembered() | (reuse.remembered(index) if reuse else {}) for index, one in solvers.items()
            }
            on_step(Progress(number, len(steps), begun, kept, reuse.reused if reuse else 0))


def _keep_elsewhere(sides: Sequence[Side], num_shots: int, may_move: bool) -> None:
    """Moves what both sides of guidance remember to the host's memory; where it lies there already or must not, has
    them compute their history again from now on."""
    moves = may_move and not sides[0].offloads
    then = "they lie in the host's from now on" if moves else "sampling goes on without, which takes longer"
    logger.warning("keys and values of %d shots do not fit into memory; %s", num_shots, then)
    for side in sides:
        if moves:
            side.remember_anew(offload=True)
        else:
            side.cache = None


def _not_finite(where: str) -> FloatingPointError:
    return FloatingPointError(
        f"{where}: the latent is not finite; weights may hold nan, or values overflow: try precision=fp32, a lower "
        "guidance_scale"
    )


def _shot_noise(shape: tuple[int, ...], key: int, device: torch.device) -> Tensor:
    """Returns the noise of one shot, drawn on the CPU so that a key means the same noise on every device."""
    generator = torch.Generator().manual_seed(key)
    return torch.randn(shape, generator=generator).to(device)
