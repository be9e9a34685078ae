"""This module counts from its plan what a film will cost, before anything is sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from film.plan import FilmPlan
from moc import Descriptor, MoCConfig, ShotLayout
from moc.batch import Sample, make_layout
from moc.cost import FLOPS_PER_PAIR
from moc.diffusion import Flow, SamplingConfig, Story, guidance_scales, num_still_remembered, plan_steps
from moc.diffusion.steps import Step
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
        return [
            *rows,
            f"{len(plan.filmed)} shots, {sum(plan.num_frames)} frames, {sum(self.shot_tokens)} tokens",
            f"{self.forwards} forwards of {in_flops(self.flops)} in all "
            f"({self.dense_flops / max(self.flops, 1):.1f}x with dense attention and nothing remembered); "
            f"sparsity {self.sparsity:.0%} at the end",
            f"about {in_bytes(self.memory)} of memory: weights, what is remembered, and a forward or decoding a shot"
            + (f"; {in_bytes(self.host_memory)} of the host's" if self.host_memory else ""),
            f"{about(self.flops / (REACHED * peak))} at half of {gpu}'s peak, which long shots reach; short ones "
            "take longer",
        ]


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
    latents = [torch.empty(shape, device="meta") for shape in plan.shapes]
    stream = _Stream(make_layout(Sample(latents, plan.text), network.stream, moc.chunk_tokens), moc)
    linears = [module.weight for module in network.blocks.modules() if isinstance(module, nn.Linear)]
    num_weights = sum(weight.numel() for weight in linears)
    layers, width = len(network.blocks), network.attention_dim

    def flops(tokens: int, pairs: float) -> float:
        return 2.0 * num_weights * tokens + layers * FLOPS_PER_PAIR * width * pairs

    story = plan.story()
    steps = plan_steps(len(plan.shapes), plan.given, sampler, flow, story.num_references)
    work = _work(steps, story, stream, sampler, len(experts), flops)
    seen = steps[-1].shots
    weights = [sum(weight.nbytes for weight in expert.parameters()) for expert in experts]
    held = (max(weights) if offload else sum(weights)) / (mesh.shard * mesh.sequence)
    block = sum(weight.nbytes for weight in network.blocks.parameters()) / layers
    held -= len(experts) * block * max(0, swap_blocks - 2)
    held += sum(weight.nbytes for weight in codec.parameters())
    token = width * dtype.itemsize / mesh.sequence  # bytes of a token's features; only norms have them in fp32
    kept = 3 if moc.descriptor is Descriptor.pre_rope else 2  # such vectors for each token in a layer of a cache
    layer = kept * (stream.global_tokens + work.most_seen) * token
    caches = len(experts) * work.most_sides * layers
    here = min(2, caches) if sampler.offload_cache else caches  # layers on the device: the one in use, and the next one
    return Estimate(
        shot_tokens=stream.tokens,
        sparsity=1 - stream.pairs(seen, seen, moc.dense) / sum(stream.tokens[shot] for shot in seen) ** 2,
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


def _work(
    steps: Sequence[Step],
    story: Story,
    stream: "_Stream",
    sampler: SamplingConfig,
    num_experts: int,
    flops: Callable[[int, float], float],
) -> _Work:
    """Adds up what the steps compute. flops: those of a forward of so many tokens and of so many pairs in attention."""
    work = _Work()
    remembers = sampler.keeps_history and stream.moc.flows_forward
    remembered: list[list[int]] = [[], []]  # remembered shots on each side of guidance
    for step in steps:
        cached = remembers and not step.is_dense
        computed = step.moving if cached else step.shots
        tokens, total = (sum(stream.tokens[shot] for shot in shots) for shots in (computed, step.shots))
        sides = 1 if set(guidance_scales(step, story, sampler).values()) == {1.0} else 2
        work.forwards += sides
        work.flops += sides * flops(tokens, stream.pairs(computed, step.shots, stream.moc.dense or step.is_dense))
        work.dense_flops += sides * flops(total, total**2)
        for side in range(sides if cached else 0):
            before, remembered[side] = remembered[side], step.shots[:-1]
            for last in range(num_still_remembered(before, remembered[side]), len(remembered[side])):
                shot, pairs = step.shots[last], stream.pairs([step.shots[last]], step.shots[: last + 1], False)
                work.forwards += num_experts
                work.flops += num_experts * flops(stream.tokens[shot], pairs)
        work.most_sides = max(work.most_sides, sides if cached else 0)
        work.most_tokens, work.most_seen = max(work.most_tokens, tokens), max(work.most_seen, total)
        # What is remembered may be computed again, or come from elsewhere, but for one layer's keys and values.
        work.least = max(work.least, LEAST * tokens + 2 * (total - tokens))
    return work


class _Stream:
    """This object counts tokens and chunks of the shots of a story."""

    def __init__(self, layout: ShotLayout, moc: MoCConfig) -> None:
        shots = [layout.groups[index] for index in layout.shot_groups]
        self.moc = moc
        self.global_tokens = layout.groups[0].text_tokens
        self.tokens = [shot.text_tokens + shot.video_tokens for shot in shots]
        self.video_chunks = [
            [chunk.length for chunk in layout.chunks if chunk.group == index and chunk.kind == "video"]
            for index in layout.shot_groups
        ]

    def pairs(self, queries: Sequence[int], shots: Sequence[int], dense: bool) -> float:
        """Counts pairs of a query and a key that it attends to, of the shots `queries` in a stream of `shots`.

        The count is rough where `moc.cost` is exact: there is no layout of each step's stream. A query sees its whole
        shot and top_k chunks of mean length, whatever the anchors and `candidates`; text of other shots is left out.
        """
        if dense:
            return float(sum(self.tokens[shot] for shot in queries) * sum(self.tokens[shot] for shot in shots))
        pairs = 0.0
        for query in queries:
            others = [shot for shot in shots if (shot < query if self.moc.causal else shot != query)]
            chunks = [length for shot in others for length in self.video_chunks[shot]]
            routed = min(self.moc.top_k, len(chunks)) * sum(chunks) / max(1, len(chunks))
            pairs += self.tokens[query] * (self.tokens[query] + routed)
        return pairs
