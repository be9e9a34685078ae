"""Sampling the shots of a story: Euler steps along the flow, each shot on its own clock.

A shot starts `lag` (in units of a whole denoising) after the one before it. One loop covers three ways of sampling:

    lag 0       joint: all shots share one noise level; earlier shots can bend to later ones
    lag 1       shot by shot: each shot is denoised against finished ones
    between     staggered: nearly joint's cost, nearly extension's memory

A shot that has not started is not in the stream, so nothing depends on it. A finished shot stays in it as history,
noised to `history_sigma` against error accumulation (LCT, arXiv 2503.10589). Shot by shot, and where attention flows
strictly forward, nothing that history computes ever changes: a model that can remember then keeps its keys and values
and computes the new shot alone, with the same result.
"""

import logging
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor

from moc.batch import Sample, StreamSpec, make_layout
from moc.config import MoCConfig
from moc.diffusion.flow import Flow, Model, draw_key
from moc.errors import UserError
from moc.layout import ShotLayout
from moc.move import move
from moc.statistics import RoutingMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingConfig:
    """How shots are sampled.

    steps: Euler steps of each shot.
    dense_steps: in so many first steps of a shot attention is dense.
    guidance_scale: 1 is without guidance.
    high_noise_guidance_scale: that of the high-noise expert of a pair; 0 is the same.
    lag: how long after the one before it a shot starts, in units of a whole denoising; 0 is joint, 1 shot by shot.
    history_sigma: the noise level of finished shots.
    context_shots: how many finished shots the others see at most, the latest ones; 0 is all.
    cache: keep the keys and values of finished shots where the result is the same, as long as memory lasts.
    seed: the seed of the noise, which is drawn shot by shot.
    """

    steps: int = 50
    dense_steps: int = 0
    guidance_scale: float = 5.0
    high_noise_guidance_scale: float = 0.0
    lag: float = 1.0
    history_sigma: float = 0.05
    context_shots: int = 0
    cache: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sampler.steps={self.steps} must be at least 1")
        if not 0 <= self.dense_steps <= self.steps:
            raise UserError(f"sampler.dense_steps={self.dense_steps} must lie in [0, sampler.steps={self.steps}]")
        for name in ("guidance_scale", "high_noise_guidance_scale"):
            if not 0 <= getattr(self, name) < math.inf:  # nan neither
                raise UserError(f"sampler.{name}={getattr(self, name)} must be finite and at least 0")
        if not 0 <= self.lag <= 1:
            raise UserError(f"sampler.lag={self.lag} must lie in [0, 1]: 0 is joint, 1 shot by shot")
        if not 0 <= self.history_sigma < 1:
            raise UserError(f"sampler.history_sigma={self.history_sigma} must lie in [0, 1)")
        if self.context_shots < 0:
            raise UserError(f"sampler.context_shots={self.context_shots} must be at least 0 (0 is all)")

    @property
    def keeps_history(self) -> bool:
        """Whether keys and values of finished shots may be kept, where attention flows strictly forward."""
        return self.cache and self.lag == 1 and not self.context_shots


@dataclass(frozen=True)
class Story:
    """What is to be sampled: one shot or more, of which at least one is not given.

    shapes: (C, T, H, W) of each shot's latent.
    text, negative: features [T_i, text_dim] of the global caption, then of each shot's, to steer to and away from.
    given: clean latents [C, T, H, W] of shots that are known already, by index.
    cuts: whether a true cut begins each shot; empty means cuts everywhere.
    num_references: how many of the first shots, all given, every shot sees, whatever `context_shots` is.
    noise_keys: seed the noise of each shot (`noise_key`); empty keys it by the config's seed and the shot's index.
    Raises ValueError where these do not describe the same shots.
    """

    shapes: list[tuple[int, int, int, int]]
    text: list[Tensor]
    negative: list[Tensor]
    given: dict[int, Tensor] = field(default_factory=dict)
    cuts: Sequence[bool] = ()
    noise_keys: Sequence[int] = ()
    num_references: int = 0

    def __post_init__(self) -> None:
        shots = len(self.shapes)
        if (len(self.text), len(self.negative)) != (shots + 1, shots + 1):
            raise ValueError(
                f"a story of {shots} shots has {len(self.text)} texts and {len(self.negative)} negative ones; it needs "
                "one for the global caption and one for each shot"
            )
        for name, values in (("cuts", self.cuts), ("noise keys", self.noise_keys)):
            if values and len(values) != shots:
                raise ValueError(
                    f"a story of {shots} shots has {len(values)} {name}; it needs one for each shot, or none"
                )
        if not self.given.keys() < set(range(shots)):
            raise ValueError(f"shots {sorted(self.given)} of {shots} are given; at least one must be left to sample")
        if not set(range(self.num_references)) <= self.given.keys():
            raise ValueError(f"the first {self.num_references} shots are references, but not all of them are given")
        for index, latent in self.given.items():
            if tuple(latent.shape) != tuple(self.shapes[index]):
                raise ValueError(f"shot {index} is given as {tuple(latent.shape)}; its shape is {self.shapes[index]}")


@dataclass(frozen=True)
class Progress:
    """How far a story is sampled: enough to go on from there. step: steps done of `num_steps`. latents: of every shot
    that has begun, noisy or finished, and of given ones; fp32 [C, T, H, W], by index."""

    step: int
    num_steps: int
    latents: dict[int, Tensor]


def noise_key(seed: int, number: int) -> int:
    """The seed of the noise of shot `number` in a story of `seed`."""
    return draw_key(seed, number)


def sigma_table(num_shots: int, config: SamplingConfig, flow: Flow) -> Tensor:
    """Noise level of each shot before each step and after the last: float32 [rows, num_shots], from 1 down to 0."""
    delay = round(config.lag * config.steps) * torch.arange(num_shots)
    row = torch.arange(config.steps + int(delay[-1]) + 1)
    done = ((row[:, None] - delay) / config.steps).clamp(0, 1)
    return flow.shifted(1 - done)


@dataclass(frozen=True)
class Step:
    """One step of sampling. now, after: float32 [S], the noise level of each shot of the story before it and after it.
    shots: those of the stream. moving: those of them that take the step. steps_done: by each shot before it. is_dense:
    whether attention is."""

    now: Tensor
    after: Tensor
    shots: list[int]
    moving: list[int]
    steps_done: list[int]
    is_dense: bool


def plan_steps(
    num_shots: int, given: Container[int], config: SamplingConfig, flow: Flow, num_references: int = 0
) -> list[Step]:
    """The steps of a story, of which the shots `given` are known; num_references: as in `Story`."""
    unknown = [index for index in range(num_shots) if index not in given]
    clocks = sigma_table(len(unknown), config, flow)
    table = torch.zeros(len(clocks), num_shots)
    table[:, unknown] = clocks
    steps = []
    for number, (now, after) in enumerate(pairwise(table)):
        moving = [index for index in unknown if after[index] < now[index]]
        steps_done = (table[: number + 1] < 1).sum(dim=0).tolist()
        is_dense = steps_done[moving[-1]] < config.dense_steps
        shots = _stream(now, moving, config.context_shots, num_references)
        steps.append(Step(now, after, shots, moving, steps_done, is_dense))
    return steps


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
    if config.high_noise_guidance_scale and boundary is None:
        raise UserError("sampler.high_noise_guidance_scale is for a pair of experts; this model is a single one")
    device = story.text[0].device
    num_shots = len(story.shapes)
    keys = story.noise_keys or [noise_key(config.seed, index) for index in range(num_shots)]
    noise = [_shot_noise(shape, key, device) for shape, key in zip(story.shapes, keys, strict=True)]
    known = story.given | (start.latents if start else {})
    latents = [known.get(index, noise[index]).to(device).float() for index in range(num_shots)]
    unknown = [index for index in range(num_shots) if index not in story.given]
    steps = plan_steps(num_shots, story.given, config, flow, story.num_references)
    keeps_history = config.keeps_history and hasattr(model, "new_cache")
    cuts = story.cuts or [True] * num_shots
    prompt, negative = (_Side(model, spec, text, cuts, keeps_history) for text in (story.text, story.negative))

    for number, step in islice(enumerate(steps, start=1), start.step if start else 0, None):
        now, after, shots, moving = step.now, step.after, step.shots, step.moving
        sigma = torch.where(now == 0, config.history_sigma, now)[shots]
        seen = [
            flow.add_noise(latents[i], noise[i], s) if now[i] == 0 else latents[i]
            for i, s in zip(shots, sigma.tolist(), strict=True)
        ]
        stream = _Stream(shots, seen, sigma)
        attention = replace(moc, dense=True) if step.is_dense else moc
        is_high = boundary is not None and float(sigma.max()) >= boundary
        scale = (is_high and config.high_noise_guidance_scale) or config.guidance_scale
        observe = routing_map.observer(prompt.layout(stream, moc), shots, moving) if routing_map else None
        velocity = None
        try:
            velocity = _guided_velocity(prompt, negative, stream, attention, scale, observe)
        except torch.OutOfMemoryError:
            if prompt.cache is None:
                raise
            logger.warning("keys and values of %d shots do not fit into memory; sampling goes on without", len(shots))
            prompt.cache = negative.cache = None
        if velocity is None:  # not in the handler, which holds on to what filled the memory
            velocity = _guided_velocity(prompt, negative, stream, attention, scale, observe)
        for index in moving:
            latents[index] = latents[index] + float(after[index] - now[index]) * velocity[index]
            if not latents[index].isfinite().all():
                place = f"shot {unknown.index(index) + 1}, step {step.steps_done[index] + 1} of {config.steps}"
                raise FloatingPointError(
                    f"{place}: the latent is not finite; weights may hold nan, or values overflow: try precision=fp32, "
                    "a lower guidance_scale"
                )
        yield from ((index, latents[index]) for index in moving if after[index] == 0)
        if on_step:
            begun = {index: latents[index] for index in range(num_shots) if after[index] < 1}
            on_step(Progress(number, len(steps), begun))


def _shot_noise(shape: tuple[int, ...], key: int, device: torch.device) -> Tensor:
    """Noise of one shot, drawn on the CPU so that a key means the same noise on every device."""
    generator = torch.Generator().manual_seed(key)
    return torch.randn(shape, generator=generator).to(device)


def _stream(now: Tensor, moving: list[int], context_shots: int, num_references: int) -> list[int]:
    """The shots of a step's stream: references, finished ones before those on the move (the latest `context_shots`),
    and these."""
    finished = [index for index in range(num_references, max(moving)) if now[index] == 0]
    return sorted([*range(num_references), *moving, *finished[-context_shots:]])


@dataclass(frozen=True)
class _Stream:
    """The shots of a step's stream: their indices in the story, noisy latents, and noise levels [S]."""

    shots: list[int]
    latents: list[Tensor]
    sigma: Tensor

    def up_to(self, count: int) -> "_Stream":
        """Its first `count` shots."""
        return _Stream(self.shots[:count], self.latents[:count], self.sigma[:count])


class _Side:
    """One side of guidance: the model under the prompt or under the negative one, and what it remembers there.

    keeps_history: whether the shots before a stream's last one may be remembered, once, as they are first seen there.
    """

    def __init__(
        self, model: Model, spec: StreamSpec, text: list[Tensor], cuts: Sequence[bool], keeps_history: bool
    ) -> None:
        self.model, self.spec, self.cuts = model, spec, cuts
        self.text = [x.float() for x in text]
        self.cache = model.new_cache() if keeps_history else None  # type: ignore[attr-defined]
        self._num_remembered = 0
        self._layouts: dict[tuple[int, ...], ShotLayout] = {}

    def velocity(
        self, stream: _Stream, moc: MoCConfig, on_routes: Callable[[int, Tensor], None] | None = None
    ) -> dict[int, Tensor]:
        """The velocity, in fp32, of each shot of a stream, or of the last alone where the others are remembered."""
        if self.cache is None or not moc.flows_forward:
            return self._run(stream, moc, on_routes=on_routes)
        history = len(stream.shots) - 1
        while self._num_remembered < history:  # shot by shot, so that a resumed story computes the same bits
            first, self._num_remembered = self._num_remembered, self._num_remembered + 1
            self._run(stream.up_to(first + 1), moc, first, cache=self.cache, remember=True)
        return self._run(stream, moc, history, on_routes=on_routes, cache=self.cache)

    def layout(self, stream: _Stream, moc: MoCConfig) -> ShotLayout:
        """The layout of a stream, built once for each set of shots."""
        key = tuple(stream.shots)
        if key not in self._layouts:
            sample = Sample(stream.latents, self._texts(stream), cuts=[self.cuts[index] for index in stream.shots])
            layout = make_layout(sample, self.spec, moc.chunk_tokens)
            self._layouts[key] = layout.to(stream.latents[0].device)
        return self._layouts[key]

    def _texts(self, stream: _Stream) -> list[Tensor]:
        return [self.text[0], *(self.text[1 + index] for index in stream.shots)]

    def _run(self, stream: _Stream, moc: MoCConfig, first: int = 0, **others: Any) -> dict[int, Tensor]:
        """One forward for the shots of a stream from the `first` on."""
        sigma = move(stream.sigma[first:], stream.latents[0].device)
        layout = self.layout(stream, moc)
        out = self.model(stream.latents[first:], sigma, self._texts(stream), layout, moc, **others)
        return {index: velocity.float() for index, velocity in zip(stream.shots[first:], out, strict=True)}


def _guided_velocity(
    prompt: _Side,
    negative: _Side,
    stream: _Stream,
    moc: MoCConfig,
    guidance_scale: float,
    on_routes: Callable[[int, Tensor], None] | None,
) -> dict[int, Tensor]:
    """Classifier-free guidance: negative + scale (prompt - negative), in fp32; the prompt's alone at scale 1."""
    towards = prompt.velocity(stream, moc, on_routes)
    if guidance_scale == 1:
        return towards
    away = negative.velocity(stream, moc)
    return {index: torch.lerp(away[index], towards[index], guidance_scale) for index in towards}
