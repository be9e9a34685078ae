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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from moc.batch import StreamSpec
from moc.config import MoCConfig
from moc.counts import count_of
from moc.diffusion.flow import Flow, Model
from moc.diffusion.reuse import StepReuse
from moc.diffusion.sides import Side, Stream, guided_velocity
from moc.diffusion.solvers import Solver, build_solver
from moc.diffusion.steps import Step, guidance_scales, plan_steps, sigma_table
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
    start, num_shots = start or Progress(0, 0, {}), len(story.shapes)
    shots = _Shots(story, config, flow, start)
    reuse = StepReuse(config.step_cache, start.reused, shots.remembered) if config.step_cache else None
    steps = plan_steps(num_shots, story.given, config, flow, story.num_references)
    sides = [Side(model, spec, text, story.cuts or [True] * num_shots) for text in (story.text, story.negative)]
    if config.keeps_history and hasattr(model, "new_cache"):
        for side in sides:
            side.keep_history(shots.latents, [step.shots for step in steps], bool(config.offload_cache))

    for number, step in islice(enumerate(steps, start=1), start.step, None):
        stream = shots.stream(step)
        is_high = boundary is not None and float(stream.sigma.max()) >= boundary
        scales = guidance_scales(step, story, config, is_high)
        way, asked = (step, scales, is_high), {index: shots.latents[index] for index in step.moving}
        velocity = reuse.known(*way, asked) if reuse else None
        if velocity is None:
            velocity = _ask(sides, stream, step, moc, scales, routing_map, may_move=config.offload_cache is None)
            if reuse:
                reuse.keep(*way, asked, velocity)
        shots.move(step, velocity)
        yield from ((index, shots.latents[index]) for index in step.moving if step.after[index] == 0)
        if on_step:
            on_step(shots.progress(step, number, len(steps), reuse))


class _Shots:
    """These are the shots of a story while they are sampled.

    latents: fp32 [C, T, H, W] of each, its noise where it has not begun. remembered: what is remembered of the steps
    before the first one, by shot and name.
    """

    def __init__(self, story: Story, config: SamplingConfig, flow: Flow, start: Progress) -> None:
        self.story, self.config, self.flow, device = story, config, flow, story.text[0].device
        keys = story.noise_keys or [noise_key(config.seed, index) for index in range(len(story.shapes))]
        self.noise = [_shot_noise(shape, key, device) for shape, key in zip(story.shapes, keys, strict=True)]
        known = story.given | start.latents
        self.latents = [known.get(index, noise).to(device).float() for index, noise in enumerate(self.noise)]
        remembered = start.remembered.items()
        self.remembered = {index: {name: x.to(device) for name, x in own.items()} for index, own in remembered}
        self._levels, self._solvers = sigma_table(1, config, flow)[:, 0], dict[int, Solver]()

    def stream(self, step: Step) -> Stream:
        """Returns what the model is shown: finished shots are history, a little noised."""
        sigma = step.sigma(self.config.history_sigma)
        seen = [
            self.flow.add_noise(self.latents[i], self.noise[i], s) if step.now[i] == 0 else self.latents[i]
            for i, s in zip(step.shots, sigma.tolist(), strict=True)
        ]
        return Stream(step.shots, seen, sigma)

    def move(self, step: Step, velocity: Mapping[int, Tensor]) -> None:
        """Moves the step's shots along their velocities. Raises FloatingPointError where one is no longer finite."""
        for index in step.moving:
            done = step.steps_done[index]
            if index not in self._solvers:
                remembered = self.remembered.pop(index, {})
                self._solvers[index] = build_solver(self.config.solver, self._levels, done, remembered)
            latent = self._solvers[index].step(done, self.latents[index], velocity[index])
            if index in self.story.ends:
                end = self.story.ends[index].to(latent.device).float()
                last = slice(-end.shape[1], None)
                latent[:, last] = self.flow.add_noise(end, self.noise[index][:, last], float(step.after[index]))
            if not latent.isfinite().all():
                number = sum(other not in self.story.given for other in range(index + 1))
                raise _not_finite(f"shot {number}, step {done + 1} of {self.config.steps}")
            self.latents[index] = latent
            if step.after[index] == 0:
                del self._solvers[index]

    def progress(self, step: Step, number: int, num_steps: int, reuse: StepReuse | None) -> Progress:
        """Returns where sampling stands after a step, the `number`-th."""
        begun = {index: latent for index, latent in enumerate(self.latents) if step.after[index] < 1}
        kept = {
            index: one.remembered() | (reuse.remembered(index) if reuse else {}) for index, one in self._solvers.items()
        }
        return Progress(number, num_steps, begun, kept, reuse.reused if reuse else 0)


def _ask(
    sides: Sequence[Side],
    stream: Stream,
    step: Step,
    moc: MoCConfig,
    scales: Mapping[int, float],
    routing_map: RoutingMap | None,
    may_move: bool,
) -> dict[int, Tensor]:
    """Asks the model for the velocities of a step; again, where what is remembered does not fit into memory."""
    attention = replace(moc, dense=True) if step.is_dense else moc
    observe, counts = None, None
    if routing_map:
        layout, counts = sides[0].layout(stream, moc), routing_map.counts.clone()
        observe = routing_map.observer(layout, step.shots, step.moving, step.now[step.moving].tolist())
    while True:
        try:
            return guided_velocity(sides, stream, attention, scales, observe)
        except torch.OutOfMemoryError:
            if sides[0].cache is None:
                raise
            _keep_elsewhere(sides, len(step.shots), may_move)
            if routing_map and counts is not None:
                routing_map.counts = counts.clone()  # the step is tried again and must count once


def _keep_elsewhere(sides: Sequence[Side], num_shots: int, may_move: bool) -> None:
    """Moves what both sides of guidance remember to the host's memory; where it lies there already or must not, has
    them compute their history again from now on."""
    moves = may_move and not sides[0].offloads
    then = "they lie in the host's from now on" if moves else "sampling goes on without, which takes longer"
    logger.warning("keys and values of %s do not fit into memory; %s", count_of(num_shots, "shot"), then)
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
