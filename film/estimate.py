"""This module counts from its plan what a film will cost, before anything is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from film.plan import FilmPlan
from moc import Descriptor, MoCConfig
from moc.batch import Sample, stream_of
from moc.cost import FLOPS_PER_PAIR
from moc.counts import count_of
from moc.diffusion import Flow, SamplingConfig, Story, guidance_scales, num_still_remembered, plan_steps
from moc.diffusion.steps import Step
from moc.expected_cost import GLOBAL_TEXT, ExpectedCosts
from moc.training import MeshConfig
from moc.training.clock import about
from models.encoders.codec import Codec

WIDE = 16  # a block holds about this many tensors of the tokens' features at once
REACHED = 0.5  # films of long shots reach this share of a GPU's peak, by this count (docs/benchmarks/sampling.md)
LEAST = 4  # every block holds at least the tokens and their queries, keys and values


@dataclass(frozen=True)
class Estimate:
    """An estimate tells what a film costs.

    shot_tokens: how many each shot of the stream has, its text included.
    sparsity: that of attention in the last step's stream, if each query has as many routes as it can.
    forwards: calls of the model, those that remember finished shots included.
    flops, dense_flops: those of all forwards, with this attention and with a dense one that remembers nothing.
    memory: bytes of the weights, of keys and values that are kept and of a forward, or of decoding a shot where that
        takes more, roughly, on each device.
    host_memory: bytes of keys and values that are kept in the host's memory instead.
    least: bytes without which no film can be made: those of the weights and of a forward that keeps nothing.
    """

    shot_tokens: list[int]
    sparsity: float
    forwards: int
    flops: float
    dense_flops: float
    memory: float
    host_memory: float
    least: float

    def lines(self, plan: FilmPlan, peak: float, gpu: str = "the GPU") -> list[str]:
        """Returns a table for the user. peak: FLOPs a second of the GPU, or GPUs, that would compute."""
        rows = ["shot  begins      frames  seconds   latent frames  tokens"]
        for number, index in enumerate(plan.filmed, start=1):
            shot, frames = plan.script.shots[number - 1], plan.num_frames[number - 1]
            seconds = frames / plan.script.fps
            rows.append(
                f"{number:<4}  {shot.beginning:<10}  {frames:<6}  {seconds:<8.2f}  {plan.shapes[index][1]:<13}  "
                f"{self.shot_tokens[index]}"
            )
        made = sum(index not in plan.given for index in plan.filmed)
        of_which = f", of which {made} {'is' if made == 1 else 'are'} made" if made < len(plan.filmed) else ""
        return [
            *rows,
            f"{count_of(len(plan.filmed), 'shot')}{of_which}, {_length(plan)}, "
            f"{count_of(sum(self.shot_tokens), 'token')}",
            f"{count_of(self.forwards, 'forward')} of {in_flops(self.flops)} in all "
            f"({self.dense_flops / max(self.flops, 1):.1f}x with dense attention and nothing remembered); "
            f"sparsity {self.sparsity:.0%} at the end",
            f"about {in_bytes(self.memory)} of memory: weights, what is remembered, and a forward or decoding a shot"
            + (f"; {in_bytes(self.host_memory)} of the host's" if self.host_memory else ""),
            f"{about(self.flops / (REACHED * peak))} at half of {gpu}'s peak, which long shots reach; short ones "
            "take longer",
        ]


def _length(plan: FilmPlan) -> str:
    """Says how long a film is, and how long its script asks it to be where that is another length by over a frame."""
    frames, fps, asked = sum(plan.num_frames), plan.script.fps, sum(shot.seconds for shot in plan.script.shots)
    said = f"{count_of(frames, 'frame')}, {frames / fps:.2f} s"
    if abs(frames - asked * fps) <= 1:
        return said
    return f"{said} (the script says {asked:.2f} s; each shot is rounded by itself)"


def in_bytes(size: float) -> str:
    """Returns bytes in words, to three digits or to a whole GiB."""
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    size /= unit
    return f"{size:.3g} {name}" if size < 1000 else f"{size:,.0f} {name}"


def in_flops(count: float) -> str:
    """Returns a number of FLOPs in words, in GFLOP, TFLOP or PFLOP, to three digits."""
    unit, name = next((unit for unit in ((1e15, "PFLOP"), (1e12, "TFLOP")) if count >= unit[0]), (1e9, "GFLOP"))
    return f"{count / unit:.3g} {name}"


def estimate(
    plan: FilmPlan,
    sampler: SamplingConfig,
    model: Any,
    moc: MoCConfig,
    flow: Flow,
    codec: Codec,
    mesh: MeshConfig | None = None,
    swap_blocks: int = 0,
    offload: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """Returns the cost of a film. model: a `StreamModel`, or two experts, of which one is called at a time; with
    `offload` only that one is on the device. codec: decodes the film, on the same device. mesh: how processes share the
    model. swap_blocks: so many blocks of each expert wait in the host's memory, but for two. dtype: that of its forward
    passes."""
    experts = [model.high, model.low] if hasattr(model, "high") else [model]
    network, mesh = experts[0], mesh or MeshConfig()
    story = plan.story()
    sides = [_Forwards(network, plan, text, moc) for text in (story.text, story.negative)]
    steps = plan_steps(len(plan.shapes), plan.given, sampler, flow, story.num_references)
    work = _work(steps, story, sides, sampler, moc, model)
    prompt, width, layers = sides[0], network.attention_dim, len(network.blocks)
    weights = [sum(weight.nbytes for weight in expert.parameters()) for expert in experts]
    held = (max(weights) if offload else sum(weights)) / (mesh.shard * mesh.sequence)
    block = sum(weight.nbytes for weight in network.blocks.parameters()) / layers
    held -= len(experts) * block * max(0, swap_blocks - 2)
    held += sum(weight.nbytes for weight in codec.parameters())
    token = width * dtype.itemsize / mesh.sequence  # bytes of a token's features; only norms have them in fp32
    kept = 3 if moc.descriptor is Descriptor.pre_rope else 2  # such vectors for each token in a layer of a cache
    layer = kept * work.most_seen * token
    caches = len(experts) * work.most_sides * layers
    here = min(2, caches) if sampler.offload_cache else caches  # layers on the device: the one in use, and the next one
    return Estimate(
        shot_tokens=[prompt.costs.tokens([shot]) for shot in range(len(plan.shapes))],
        sparsity=prompt.sparsity(steps[-1].shots),
        forwards=work.forwards,
        flops=work.flops,
        dense_flops=work.dense_flops,
        memory=held + here * layer + max(WIDE * work.most_tokens * token, codec.decoding_bytes(*plan.script.size)),
        host_memory=caches * layer if sampler.offload_cache else 0.0,
        least=held + work.least * token,
    )


@dataclass
class _Work:
    """This object adds up the steps of a film. most_tokens, most_seen: computed by a forward, and seen by it.
    most_sides: sides of guidance that remember. least: features that no step can do without, in tokens. The others: as
    in `Estimate`."""

    forwards: int = 0
    flops: float = 0.0
    dense_flops: float = 0.0
    most_tokens: int = 0
    most_seen: int = 0
    most_sides: int = 0
    least: int = 0


class _Forwards:
    """This object counts forwards of a model on one side of guidance, with the features `text` of its prompts."""

    def __init__(self, network: Any, plan: FilmPlan, text: list[torch.Tensor], moc: MoCConfig) -> None:
        latents = [torch.empty(shape, device="meta") for shape in plan.shapes]
        self.costs = ExpectedCosts(*stream_of(Sample(latents, text), network.stream), moc)
        linears = [module.weight for module in network.blocks.modules() if isinstance(module, nn.Linear)]
        self.flops_per_token = 2.0 * sum(weight.numel() for weight in linears)
        self.width, self.num_layers = network.attention_dim, len(network.blocks)
        self.num_dense = min(moc.dense_layers, self.num_layers)
        self.score_flops = 2 * moc.descriptor_subchunks * self.width
        self.tokens, self.flops = cache(self.costs.tokens), cache(self._flops)  # many steps see the same shots

    def _flops(self, queries: tuple[int, ...], shots: tuple[int, ...], dense: bool) -> float:
        """Returns the FLOPs of the queries of some shots in the stream of `shots`."""
        cost, num_routed = self.costs.of(queries, shots, dense), self.num_layers - self.num_dense
        pairs = self.num_dense * cost.dense + num_routed * cost.pairs
        attention = FLOPS_PER_PAIR * self.width * pairs + self.score_flops * num_routed * cost.scores
        return self.flops_per_token * self.tokens(queries) + attention

    def sparsity(self, shots: Sequence[int]) -> float:
        """Returns the mean sparsity of the layers in the stream of `shots`."""
        cost = self.costs.of([GLOBAL_TEXT, *shots], shots)
        return (1 - self.num_dense / self.num_layers) * (1 - cost.pairs / cost.dense)


def _work(
    steps: Sequence[Step],
    story: Story,
    sides: Sequence[_Forwards],
    sampler: SamplingConfig,
    moc: MoCConfig,
    model: Any,
) -> _Work:
    """Adds up what the steps compute. sides: those of guidance, the prompt's first."""
    work, boundary, num_experts = _Work(), getattr(model, "boundary", None), 2 if hasattr(model, "high") else 1
    remembers = sampler.keeps_history and moc.flows_forward
    remembered: list[list[int]] = [[], []]  # remembered shots on each side of guidance
    for step in steps:
        cached, shots = remembers and not step.is_dense, tuple(step.shots)
        whole = (GLOBAL_TEXT, *shots)
        computed = whole if len(shots) == 1 or not cached else shots[-1:]
        is_high = boundary is not None and float(step.sigma(sampler.history_sigma).max()) >= boundary
        guided = set(guidance_scales(step, story, sampler, is_high).values()) != {1.0}
        asked = sides if guided else sides[:1]
        for number, side in enumerate(asked):
            work.forwards += 1
            work.flops += side.flops(computed, shots, step.is_dense)
            work.dense_flops += side.flops(whole, shots, True)
            if not cached:
                continue
            before, remembered[number] = remembered[number], step.shots[:-1]
            first = num_still_remembered(before, remembered[number])
            new = shots[first:-1]
            if new:  # attention flows forward, so that they see in this stream what they see in one without later shots
                work.forwards += num_experts * len(new)
                work.flops += num_experts * side.flops(new if first else (GLOBAL_TEXT, *new), shots, False)
        work.most_sides = max(work.most_sides, len(asked) if cached else 0)
        tokens, total = sides[0].tokens(computed), sides[0].tokens(whole)
        work.most_tokens, work.most_seen = max(work.most_tokens, tokens), max(work.most_seen, total)
        # What is remembered may be computed again, or come from elsewhere, but for one layer's keys and values.
        work.least = max(work.least, LEAST * tokens + 2 * (total - tokens))
    return work
