"""Sampling the shots of a story: Euler steps along the flow, each shot on its own clock.

A shot starts `lag` (in units of a whole denoising) after the one before it. One loop covers three ways of sampling:

    lag 0       joint: all shots share one noise level; earlier shots can bend to later ones
    lag 1       shot by shot: each shot is denoised against finished ones
    between     staggered: nearly joint's cost, nearly extension's memory

A shot that has not started is not in the stream, so nothing depends on it. A finished shot stays in it as history,
noised to `history_sigma` against error accumulation (LCT, arXiv 2503.10589).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from moc.batch import Batch, Sample, StreamSpec, make_batch
from moc.config import MoCConfig
from moc.diffusion.flow import Flow, Model, draw_key
from moc.statistics import RoutingMap


@dataclass(frozen=True)
class SamplingConfig:
    """steps: Euler steps of each shot. guidance_scale: 1 is without guidance. lag: see the module. context_shots: how
    many finished shots the others see at most, the latest ones; 0 is all. seed: of the noise, drawn shot by shot."""

    steps: int = 50
    guidance_scale: float = 5.0
    lag: float = 1.0
    history_sigma: float = 0.05
    context_shots: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps={self.steps} must be at least 1")
        if not 0 <= self.lag <= 1:
            raise ValueError(f"sampler.lag={self.lag} must lie in [0, 1]: 0 is joint, 1 shot by shot")
        if not 0 <= self.history_sigma < 1:
            raise ValueError(f"sampler.history_sigma={self.history_sigma} must lie in [0, 1)")
        if self.context_shots < 0:
            raise ValueError(f"sampler.context_shots={self.context_shots} must be at least 0 (0 is all)")


@dataclass(frozen=True)
class Story:
    """What is to be sampled. shapes: (C, T, H, W) of each shot's latent. text, negative: features [T_i, text_dim] of
    the global caption and of each shot's, to steer to and away from. given: clean latents of shots known already."""

    shapes: list[tuple[int, int, int, int]]
    text: list[Tensor]
    negative: list[Tensor]
    given: dict[int, Tensor] = field(default_factory=dict)


def sigma_table(num_shots: int, config: SamplingConfig, flow: Flow) -> Tensor:
    """Noise level of each shot before each step and after the last: float32 [rows, num_shots], from 1 down to 0."""
    delay = round(config.lag * config.steps) * torch.arange(num_shots)
    row = torch.arange(config.steps + int(delay[-1]) + 1)
    done = ((row[:, None] - delay) / config.steps).clamp(0, 1)
    return flow.shifted(1 - done)


@torch.no_grad()
def sample_shots(
    model: Model,
    spec: StreamSpec,
    moc: MoCConfig,
    flow: Flow,
    story: Story,
    config: SamplingConfig,
    on_step: Callable[[int, int], None] | None = None,
    routing_map: RoutingMap | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Denoises a story; yields (index, clean latent [C, T, H, W]) of each shot as soon as it is finished, in order.

    `on_step(done, total)` reports progress; `routing_map` collects where the prompt's queries routed to.
    """
    device = story.text[0].device
    num_shots = len(story.shapes)
    noise = [_shot_noise(shape, config.seed, index, device) for index, shape in enumerate(story.shapes)]
    latents = [story.given.get(index, noise[index]).to(device) for index in range(num_shots)]
    unknown = [index for index in range(num_shots) if index not in story.given]
    clocks = sigma_table(len(unknown), config, flow)
    table = torch.zeros(len(clocks), num_shots)
    table[:, unknown] = clocks

    for step, (now, after) in enumerate(pairwise(table)):
        moving = [index for index in unknown if after[index] < now[index]]
        stream = _stream(now, moving, config.context_shots)
        sigma = torch.where(now == 0, config.history_sigma, now)[stream]
        seen = [
            flow.add_noise(latents[i], noise[i], s) if now[i] == 0 else latents[i]
            for i, s in zip(stream, sigma.tolist(), strict=True)
        ]
        prompt = _batch(seen, story.text, stream, spec, moc)
        negative = _batch(seen, story.negative, stream, spec, moc) if config.guidance_scale != 1 else None
        observe = routing_map.observer(prompt.layout, stream) if routing_map else None
        velocity = _guided_velocity(model, moc, prompt, negative, sigma, config.guidance_scale, observe)
        for index in moving:
            latents[index] = latents[index] + float(after[index] - now[index]) * velocity[stream.index(index)]
        if on_step:
            on_step(step + 1, len(table) - 1)
        yield from ((index, latents[index]) for index in moving if after[index] == 0)


def _shot_noise(shape: tuple[int, ...], seed: int, index: int, device: torch.device) -> Tensor:
    """Noise of one shot, drawn on the CPU so that a seed means the same story on every device."""
    generator = torch.Generator().manual_seed(draw_key(seed, index))
    return torch.randn(shape, generator=generator).to(device)


def _stream(now: Tensor, moving: list[int], context_shots: int) -> list[int]:
    """The shots of a step's stream: those on the move, and finished ones before them (the latest `context_shots`)."""
    finished = [index for index in range(max(moving)) if now[index] == 0]
    return sorted(moving + finished[-context_shots:])


def _batch(seen: list[Tensor], text: list[Tensor], stream: list[int], spec: StreamSpec, moc: MoCConfig) -> Batch:
    texts = [text[0], *(text[1 + index] for index in stream)]
    return make_batch([Sample(seen, texts)], spec, moc.chunk_tokens).to(seen[0].device)


def _guided_velocity(
    model: Model,
    moc: MoCConfig,
    prompt: Batch,
    negative: Batch | None,
    sigma: Tensor,
    guidance_scale: float,
    on_routes: Callable[[int, Tensor], None] | None,
) -> list[Tensor]:
    """Classifier-free guidance: negative + scale (prompt - negative), in fp32; without a negative, the prompt's."""
    sigma = sigma.to(prompt.layout.device)
    towards = model(prompt.latents, sigma, prompt.text, prompt.layout, moc, on_routes=on_routes)
    if negative is None:
        return [v.float() for v in towards]
    away = model(negative.latents, sigma, negative.text, negative.layout, moc)
    return [torch.lerp(a.float(), t.float(), guidance_scale) for t, a in zip(towards, away, strict=True)]
