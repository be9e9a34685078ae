"""A `Step` of a story says which shots are in its stream, at which noise levels, and which of them move."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from moc.diffusion.flow import Flow
from moc.diffusion.story import SamplingConfig, Story


def sigma_table(num_shots: int, config: SamplingConfig, flow: Flow) -> Tensor:
    """Returns each shot's noise level before each step and after the last: float32 [rows, num_shots], from 1 to 0."""
    delay = round(config.lag * config.steps) * torch.arange(num_shots)
    row = torch.arange(config.steps + int(delay[-1]) + 1)
    done = ((row[:, None] - delay) / config.steps).clamp(0, 1)
    return flow.shifted(1 - done)


@dataclass(frozen=True)
class Step:
    """A step of sampling moves some shots of a stream. now, after: float32 [S], the noise level of each shot of the
    story before and after it. shots: those of the stream. moving: those of them that take the step. steps_done: how
    many steps each of these has taken before it. is_dense: whether attention is dense."""

    now: Tensor
    after: Tensor
    shots: list[int]
    moving: list[int]
    steps_done: dict[int, int]
    is_dense: bool

    def sigma(self, history_sigma: float) -> Tensor:
        """Returns the noise level at which the model is shown each shot of the stream: float32 [n]. history_sigma: that
        of finished shots."""
        return torch.where(self.now == 0, history_sigma, self.now)[self.shots]


def plan_steps(
    num_shots: int, given: Container[int], config: SamplingConfig, flow: Flow, num_references: int = 0
) -> list[Step]:
    """Returns the steps of a story, of which the shots `given` are known; num_references: as in `Story`."""
    unknown = [index for index in range(num_shots) if index not in given]
    clocks = sigma_table(len(unknown), config, flow)
    table = torch.zeros(len(clocks), num_shots)
    table[:, unknown] = clocks
    steps: list[Step] = []
    for (now, after), begun in zip(pairwise(table), (table < 1).cumsum(dim=0), strict=False):
        moving = (after < now).nonzero().flatten().tolist()
        steps_done = dict(zip(moving, begun[moving].tolist(), strict=True))
        is_dense = steps_done[moving[-1]] < config.dense_steps
        shots = _stream(now, moving, config.context_shots, num_references)
        if steps and shots == steps[-1].shots:
            shots = steps[-1].shots  # thousands of steps may see the same hundreds of shots
        steps.append(Step(now, after, shots, moving, steps_done, is_dense))
    return steps


def guidance_scales(step: Step, story: Story, config: SamplingConfig, is_high: bool = False) -> dict[int, float]:
    """Returns the guidance scale of each shot that moves; 1 is without. is_high: of the high-noise expert. A shot's own
    scale counts for both experts."""
    default = (config.high_noise_guidance_scale if is_high else None) or config.usual_scale
    own = story.guidance or [None] * len(story.shapes)
    lowest, highest = config.guidance_interval
    chosen = {index: default if (scale := own[index]) is None else scale for index in step.moving}
    return {index: scale if lowest <= float(step.now[index]) <= highest else 1.0 for index, scale in chosen.items()}


def num_still_remembered(remembered: Sequence[int], history: Sequence[int]) -> int:
    """Returns how many shots of a history are remembered as they are seen in it: its first ones, as far as no shot
    before them has left, since each was computed with all those before it."""
    alike = (a == b for a, b in zip(remembered, history, strict=False))
    return sum(takewhile(bool, alike))


def _stream(now: Tensor, moving: list[int], context_shots: int | None, num_references: int) -> list[int]:
    """Returns the shots of a step's stream: references, the latest finished ones, and those on the move."""
    finished = [index for index in (now == 0).nonzero().flatten().tolist() if num_references <= index < max(moving)]
    seen = finished if context_shots is None else finished[-context_shots:]
    return sorted([*range(num_references), *moving, *seen])
