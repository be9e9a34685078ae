"""Forward and backward of a micro-batch run kernel by kernel or as a CUDA graph.

A graph launches at once what takes the host longer to launch, kernel by kernel, than a GPU takes to compute where the
model is small. It serves one kind of micro-batch: a stream (texts and shots of the same lengths) under the same MoC
settings. The first of a kind compiles its kernels and makes the stream's tables, the second is captured, later ones are
copied to where the graph reads. Gradients add to those that are there, as in any backward. Graphs compute in the same
memory, since one is replayed after another; those of settings that the schedule has left are dropped.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moc.batch import Batch, shapes
from moc.config import DropKey, MoCConfig
from moc.diffusion.flow import Flow, Noised, NoiseLevels
from moc.errors import UserError
from moc.layout import ShotLayout
from moc.training.parallel import Parallel
from moc.training.survey import Survey


@dataclass(frozen=True)
class Inputs:
    """Inputs are what forward and backward of one micro-batch read, on the device.

    weights [S]: that of each shot's loss in the sum that is minimized. step: int64 [], from 0 on.
    """

    noised: Noised
    weights: Tensor
    step: Tensor

    def like(self, layout: ShotLayout) -> "Inputs":
        """Returns memory for the inputs of such micro-batches. layout: of the same stream, its tables made."""
        latents, targets, sigma, text, _ = self.noised
        lists = ([x.clone() for x in tensors] for tensors in (latents, targets, text))
        own_latents, own_targets, own_text = lists
        noised = Noised(own_latents, own_targets, sigma.clone(), own_text, layout.copied())
        return Inputs(noised, self.weights.clone(), self.step.clone())

    def copy_(self, other: "Inputs") -> None:
        torch._foreach_copy_(self._floats(), other._floats())
        self.step.copy_(other.step)
        self.noised.layout.sample_position.copy_(other.noised.layout.sample_position)

    def _floats(self) -> list[Tensor]:
        latents, targets, sigma, text, _ = self.noised
        return [*latents, *targets, *text, sigma, self.weights]


class Passes:
    """`Passes` runs the forward and backward passes of a run; graphs: how many kinds of micro-batches have one kept.
    Raises UserError where graphs are asked for and cannot be."""

    def __init__(self, parallel: Parallel, model: nn.Module, flow: Flow, seed: int, graphs: int) -> None:
        if graphs and (parallel.world_size > 1 or parallel.offloads or getattr(model, "gradient_checkpointing", False)):
            raise UserError(
                f"trainer.cuda_graphs={graphs} is for one process whose GPU keeps all activations; set it to 0"
            )
        self._parallel, self._model, self._flow, self._seed = parallel, model, flow, seed
        self._most = graphs if parallel.device.type == "cuda" else 0
        self._moc: MoCConfig | None = None  # the settings that all kept kinds were made with
        self._kinds: list[_Kind] = []
        self._pool: Any = None  # the memory pool that their graphs share

    def __call__(
        self, batch: Batch, levels: NoiseLevels, scale: Tensor, step: int, moc: MoCConfig, survey: Survey | None,
        begin: Callable[[str], None],
    ) -> Tensor:  # fmt: skip
        """Adds the gradients of the target shots' losses times `scale`; returns the losses, fp32 [S], 0 for others.

        batch: on the device. survey: told of the routes, if there is one. begin: told of each phase as it begins.
        """
        is_target = self._parallel.put(levels.is_target)
        kind = self._kind(batch, moc, survey) if self._most else None
        if kind:
            begin("forward_and_backward")
            return self._replay(kind, batch, levels, is_target * scale, step, moc) * is_target
        begin("forward")
        watched, drops = survey.forward(batch.layout) if survey else nullcontext(), DropKey(self._seed, step)
        with self._parallel.autocast(), self._parallel.saving, watched as on_routes:
            losses = self._flow.loss(self._model, batch, levels, moc, self._seed, drops, on_routes)
        begin("backward")
        (losses * is_target * scale).sum().backward()
        return losses.detach() * is_target

    def _replay(
        self, kind: "_Kind", batch: Batch, levels: NoiseLevels, weights: Tensor, step: int, moc: MoCConfig
    ) -> Tensor:
        noised = self._flow.noised(batch, levels, self._seed)
        inputs = Inputs(noised, weights, self._parallel.put(torch.tensor(step)))
        if not kind.graph:
            kind.graph = _Graph(lambda own: self._captured(own, moc), inputs.like(kind.layout), self._pool)
        return kind.graph(inputs)

    def _captured(self, inputs: Inputs, moc: MoCConfig) -> Tensor:
        with self._parallel.autocast():
            losses = self._flow.errors(self._model, inputs.noised, moc, DropKey(self._seed, inputs.step))
        (losses * inputs.weights).sum().backward()
        return losses.detach()

    def _kind(self, batch: Batch, moc: MoCConfig, survey: Survey | None) -> "_Kind | None":
        """Returns the kind of such a micro-batch, where it is to have a graph: it is not surveyed, and not the first of
        its kind."""
        if moc != self._moc:
            self._moc, self._kinds, self._pool = moc, [], torch.cuda.graph_pool_handle()
        if survey:
            return None
        layout, texts = batch.layout, shapes(batch.text)  # a layout says nothing of text outside its stream
        for kind in self._kinds:
            if kind.layout.is_stream_of(layout.samples, layout.chunk_tokens) and kind.texts == texts:
                return kind
        if len(self._kinds) < self._most:
            self._kinds.append(_Kind(layout, texts))
        return None


@dataclass
class _Kind:
    layout: ShotLayout
    texts: list[torch.Size]
    graph: "_Graph | None" = None


class _Graph:
    """A graph replays what `run` does with `inputs`. Its losses last until another graph of the pool is replayed."""

    def __init__(self, run: Callable[[Inputs], Tensor], inputs: Inputs, pool: Any) -> None:
        self._inputs, self._graph = inputs, torch.cuda.CUDAGraph()
        # A loader's thread may pin memory meanwhile, which the mode "global" takes for an error of the capture.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._losses = run(self._inputs)

    def __call__(self, inputs: Inputs) -> Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._losses
