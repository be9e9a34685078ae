"""The two sides of guidance: the model under the prompt and under the negative one, and what it remembers on each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moc.batch import Sample, StreamSpec, make_layout
from moc.config import MoCConfig
from moc.diffusion.flow import Model
from moc.layout import ShotLayout
from moc.move import move


@dataclass(frozen=True)
class Stream:
    """The shots of a step's stream: their indices in the story, noisy latents, and noise levels [S]."""

    shots: list[int]
    latents: list[Tensor]
    sigma: Tensor

    def up_to(self, count: int) -> "Stream":
        """Its first `count` shots."""
        return Stream(self.shots[:count], self.latents[:count], self.sigma[:count])


class Side:
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
        self, stream: Stream, moc: MoCConfig, on_routes: Callable[[int, Tensor], None] | None = None
    ) -> dict[int, Tensor]:
        """The velocity, in fp32, of each shot of a stream, or of the last alone where the others are remembered."""
        if self.cache is None or not moc.flows_forward:
            return self._run(stream, moc, on_routes=on_routes)
        history = len(stream.shots) - 1
        while self._num_remembered < history:  # shot by shot, so that a resumed story computes the same bits
            first, self._num_remembered = self._num_remembered, self._num_remembered + 1
            self._run(stream.up_to(first + 1), moc, first, cache=self.cache, remember=True)
        return self._run(stream, moc, history, on_routes=on_routes, cache=self.cache)

    def layout(self, stream: Stream, moc: MoCConfig) -> ShotLayout:
        """The layout of a stream, built once for each set of shots."""
        key = tuple(stream.shots)
        if key not in self._layouts:
            sample = Sample(stream.latents, self._texts(stream), cuts=[self.cuts[index] for index in stream.shots])
            layout = make_layout(sample, self.spec, moc.chunk_tokens)
            self._layouts[key] = layout.to(stream.latents[0].device)
        return self._layouts[key]

    def _texts(self, stream: Stream) -> list[Tensor]:
        return [self.text[0], *(self.text[1 + index] for index in stream.shots)]

    def _run(self, stream: Stream, moc: MoCConfig, first: int = 0, **others: Any) -> dict[int, Tensor]:
        """One forward for the shots of a stream from the `first` on."""
        sigma = move(stream.sigma[first:], stream.latents[0].device)
        layout = self.layout(stream, moc)
        out = self.model(stream.latents[first:], sigma, self._texts(stream), layout, moc, **others)
        return {index: velocity.float() for index, velocity in zip(stream.shots[first:], out, strict=True)}


def guided_velocity(
    prompt: Side,
    negative: Side,
    stream: Stream,
    moc: MoCConfig,
    scales: Mapping[int, float],
    on_routes: Callable[[int, Tensor], None] | None,
) -> dict[int, Tensor]:
    """Classifier-free guidance of the shots that `scales` has: negative + scale (prompt - negative), in fp32, and the
    prompt's alone at scale 1. Where all are 1 the negative side is not asked."""
    towards = prompt.velocity(stream, moc, on_routes)
    if all(scale == 1 for scale in scales.values()):
        return towards
    away = negative.velocity(stream, moc)
    return {index: torch.lerp(away[index], towards[index], scale) for index, scale in scales.items()}
