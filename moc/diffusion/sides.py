"""Guidance has two sides: the model under the prompt and under the negative one, each with what it remembers there."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moc.batch import Sample, StreamSpec, make_layout, stream_of
from moc.config import MoCConfig
from moc.diffusion.flow import Model, OnRoutes
from moc.diffusion.steps import num_still_remembered
from moc.layout import ShotLayout
from moc.move import move


@dataclass(frozen=True)
class Stream:
    """A stream is the shots of a step's stream: their indices in the story, noisy latents, and noise levels [S]."""

    shots: list[int]
    latents: list[Tensor]
    sigma: Tensor

    def up_to(self, count: int) -> "Stream":
        """Returns its first `count` shots."""
        return Stream(self.shots[:count], self.latents[:count], self.sigma[:count])


class Side:
    """A side of guidance is the model under the prompt or under the negative one, and what it remembers there."""

    def __init__(self, model: Model, spec: StreamSpec, text: list[Tensor], cuts: Sequence[bool]) -> None:
        self.model, self.spec, self.cuts = model, spec, cuts
        self.text = [x.float() for x in text]
        self.cache: Any = None
        self.offloads, self._capacity = False, 0
        self._remembered: list[int] = []
        self._layout: tuple[list[int], ShotLayout] | None = None

    def keep_history(self, latents: list[Tensor], streams: Iterable[Sequence[int]], offload: bool) -> None:
        """Remembers from now on the shots before a stream's last one, as they are first seen there.

        latents: of the story's shots. streams: the shots of each that will come. offload: into the host's memory.
        """
        num_global, shots = stream_of(Sample(latents, self.text), self.spec)
        tokens = [shot.text_tokens + math.prod(shot.grid) for shot in shots]
        self._capacity = num_global + max(sum(tokens[index] for index in stream) for stream in streams)
        self.remember_anew(offload)

    def remember_anew(self, offload: bool) -> None:
        """Forgets all, and remembers it anew when it is seen next. offload: into the host's memory."""
        self.cache = self.model.new_cache(self._capacity, offload)  # type: ignore[attr-defined]
        self._remembered, self.offloads = [], offload

    def velocity(self, stream: Stream, moc: MoCConfig, on_routes: OnRoutes | None = None) -> dict[int, Tensor]:
        """Returns the velocity, in fp32, of each shot of a stream, or of the last where others are remembered."""
        if self.cache is None or not moc.flows_forward:
            return self._run(stream, moc, on_routes=on_routes)
        history = stream.shots[:-1]
        first = num_still_remembered(self._remembered, history)
        if first < len(self._remembered):
            self.cache.keep_first(self.layout(stream, moc).groups[first].end if first else 0)
        for count in range(first, len(history)):  # goes shot by shot, so that a resumed story computes the same bits
            self._run(stream.up_to(count + 1), moc, count, cache=self.cache, remember=True)
        self._remembered = history
        return self._run(stream, moc, len(history), on_routes=on_routes, cache=self.cache)

    def layout(self, stream: Stream, moc: MoCConfig) -> ShotLayout:
        """Returns the layout of a stream, built once for steps of the same shots."""
        if self._layout is None or self._layout[0] != stream.shots:
            sample = Sample(stream.latents, self._texts(stream), cuts=[self.cuts[index] for index in stream.shots])
            layout = make_layout(sample, self.spec, moc.chunk_tokens)
            self._layout = stream.shots, layout.to(stream.latents[0].device)
        return self._layout[1]

    def _texts(self, stream: Stream) -> list[Tensor]:
        return [self.text[0], *(self.text[1 + index] for index in stream.shots)]

    def _run(self, stream: Stream, moc: MoCConfig, first: int = 0, **others: Any) -> dict[int, Tensor]:
        """Runs one forward for the shots of a stream from the `first` on."""
        sigma = move(stream.sigma[first:], stream.latents[0].device)
        layout = self.layout(stream, moc)
        out = self.model(stream.latents[first:], sigma, self._texts(stream), layout, moc, **others)
        return {index: velocity.float() for index, velocity in zip(stream.shots[first:], out, strict=True)}


def guided_velocity(
    sides: Sequence[Side], stream: Stream, moc: MoCConfig, scales: Mapping[int, float], on_routes: OnRoutes | None
) -> dict[int, Tensor]:
    """Returns the velocities of the shots that `scales` has by classifier-free guidance: negative + scale (prompt -
    negative), in fp32, and the prompt's alone at scale 1. sides: the prompt's, and the negative one, which is not asked
    where all scales are 1."""
    prompt, negative = sides
    towards = prompt.velocity(stream, moc, on_routes)
    if all(scale == 1 for scale in scales.values()):
        return towards
    away = negative.velocity(stream, moc)
    return {index: torch.lerp(away[index], towards[index], scale) for index, scale in scales.items()}
