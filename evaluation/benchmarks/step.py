"""This module measures a whole training step on one GPU: where its time goes, and the
floor that no code goes below."""

import cProfile
import gc
import pstats
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from operator import itemgetter
from pathlib import Path

import torch
from torch import nn

from data.loading.ahead import ahead
from data.loading.parcel import Parcel, unwrap, wrap
from evaluation.benchmarks.measurements import header, markdown_table, measured_on, put_row
from evaluation.benchmarks.timing import check_gpu, copy_bytes_per_ms, matmul_flops_per_ms
from evaluation.benchmarks.training_steps import bare_trainer, dense_kernels
from moc import Execution, MoCConfig
from moc.batch import Batch, Sample, make_batch
from moc.cost import attention_cost
from moc.diffusion import Flow
from moc.files import write_whole
from moc.training import Trainer
from moc.training.parallel import Parallel
from models import ModelConfig, build_model
from models.stream import StreamModel

SHOTS, TEXT_TOKENS, CHANNELS, TEXT_DIM = 4, 16, 64, 128
WARM_UP, STEPS = 4, 30
SIZES = 3  # packs of this many different numbers of scenes take turns
KEY = ("gpu", "model", "tokens", "grid", "execution", "varlen_kernel")
PHASES = ("data", "forward", "backward", "optimizer")

# Kinds of kernels by their names; the first that fits counts.
KINDS = {
    "collectives": "^nccl",
    "attention": "flash|fmha|sdpa|masked_|^(forward|merge|delta|dq|add_dq|gather|dkv)_kernel",
    "routing": "^(means|route|bound|list|select|drop|mark|count|scan|fill)_kernel",
    "norms, modulation, gates, GELU": "^(modulate|add_|join|split|rms_norm|rotate|group_sums|stream_sums|gelu|round_k)",
    "fp32 matmuls": "sgemm|s1688gemm|f32f32_f32f32_f32|f32f32f32_f32|tf32",
    "matmuls": "gemm|nvjet|cutlass|cublas",
    "optimizer, average, norm": "multi_tensor|fused_adam|lpnorm",
    "scatter and gather": "index|gather|scatter|catarray|^sum_rows",
    "sums": "reduce",
    "copies": "memcpy|memset|copy",
    "random numbers": "distribution|normal_",
}

# Tokens' widths that the pointwise operations of one block read and write at the least: two modulated norms, norms and
# rotation of q and k, two gated sums; backward also the sums of gradients at two forks.
FORWARD_WIDTHS, BACKWARD_WIDTHS = 2 * 2 + 2 * 2 + 2 * 2 + 2 * 3, 2 * 3 + 2 * 3 + 2 * 2 + 2 * 3 + 2 * 3
FFN_WIDTHS = 2 + 3  # of the activation, forward and backward, in units of the FFN's width
# Bytes a weight: AdamW 28, the norm of gradients 4, clipping 8, the average 12, the cast to bf16 6, the gradient 4.
WEIGHT_BYTES = 62


@dataclass(frozen=True)
class StepConfig:
    """These settings say what to measure.

    model: the model and its sizes.
    moc: what attention attends to.
    execution: how it is computed.
    tokens: about how many a step has.
    packs: for each row the token grid (frames, height, width) of a shot.
    output: the record to write.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    moc: MoCConfig = field(default_factory=MoCConfig)
    execution: Execution = field(default_factory=Execution)
    tokens: int = 65536
    packs: list[list[int]] = field(default_factory=lambda: [[3, 4, 6], [6, 8, 12]])
    output: str = "docs/benchmarks/step.json"


def write_record(config: StepConfig) -> None:
    """Measures each pack and writes its row."""
    check_gpu()
    parallel = Parallel()
    with parallel.device:
        model = build_model(config.model, latent_channels=CHANNELS, text_dim=TEXT_DIM)
    model.execution = config.execution
    rates = {"flops": matmul_flops_per_ms(), "bytes": copy_bytes_per_ms()}  # a millisecond
    output = Path(config.output)
    trainer = bare_trainer(parallel, model, config.moc, Flow())
    for grid in config.packs:
        row = measure(trainer, (grid[0], grid[1], grid[2]), config, rates)
        rows = put_row(output, row, KEY, header() | {"execution": str(config.execution)})
        write_whole(output.with_suffix(".md"), page(rows).encode())
    print(f"{output} holds all rows")


def make_pack(model: StreamModel, grid: tuple[int, int, int], scenes: int, chunk_tokens: int) -> Parcel:
    """Returns a batch as a worker of the loader sends it."""
    shape = (CHANNELS, *(size * patch for size, patch in zip(grid, model.stream.patch, strict=True)))

    def sample(position: int) -> Sample:
        text = [torch.randn(TEXT_TOKENS, TEXT_DIM).half() for _ in range(SHOTS + 1)]
        return Sample([torch.randn(shape).half() for _ in range(SHOTS)], text, position)

    return wrap(make_batch([sample(n) for n in range(scenes)], model.stream, chunk_tokens).in_stacks())


def arriving(parcels: Iterable[Parcel]) -> Iterator[Batch]:
    """Returns the batches of the parcels by turns, without end, through pinned memory and a thread, as the loader has
    them."""
    pinned = [parcel._replace(flat=parcel.flat.pin_memory()) for parcel in parcels]
    return ahead(lambda: map(unwrap, cycle(pinned)))


def measure(trainer: Trainer, grid: tuple[int, int, int], config: StepConfig, rates: dict[str, float]) -> dict:
    """Returns a row: the mean step, what the host and the GPU did in it, and its floor."""
    model, moc = trainer.bare_model, trainer.moc
    scene = SHOTS * (grid[0] * grid[1] * grid[2] + TEXT_TOKENS) + TEXT_TOKENS
    scenes = max(SIZES, config.tokens // scene)
    parcels = [make_pack(model, grid, scenes - n, moc.chunk_tokens) for n in range(SIZES)]
    _, varlen = dense_kernels(config.model, config.execution, trainer.parallel.device)
    row: dict = {"model": f"dim {config.model.dim}, {config.model.num_layers} layers", "tokens": config.tokens,
                 "grid": list(grid), "scenes": scenes, "pack_tokens": unwrap(parcels[0]).layout.num_tokens,
                 "varlen_kernel": varlen.name}  # fmt: skip

    def add(**values: object) -> None:
        print(", ".join(f"{name} {value}" for name, value in values.items()), flush=True)
        row.update(values)

    print(f"{scenes} scenes of {SHOTS} shots of {grid}", flush=True)
    flops, moved = floor(trainer, unwrap(parcels[0]))
    add(floor_matmul_ms=round(flops / rates["flops"], 1), floor_bytes_ms=round(moved / rates["bytes"], 1),
        matmul_tflops=round(rates["flops"] / 1e9), copy_gb_per_s=round(rates["bytes"] / 1e6))  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    source = arriving(parcels)
    gc.freeze()  # as `Trainer.run` does
    start = time.perf_counter()
    take_steps(trainer, source, WARM_UP)
    add(warm_up_seconds=round(time.perf_counter() - start, 1))
    add(**take_steps(trainer, source, STEPS), peak_bytes=torch.cuda.max_memory_allocated())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        take_steps(trainer, source, 1)
    kernels = [event for event in profile.key_averages() if event.self_device_time_total]
    times = {event.key: event.self_device_time_total / 1e3 for event in kernels}
    launches = sum(event.count for event in kernels)
    add(busy_ms=round(sum(times.values()), 1), launches=launches, kernels_ms=by_kind(times))
    for name, ms in Counter(times).most_common(12):
        print(f"    {ms:7.2f} ms of {name[:100]}", flush=True)
    with cProfile.Profile() as host:
        take_steps(trainer, source, 1)
    pstats.Stats(host).sort_stats("tottime").print_stats(16)
    return row


def take_steps(trainer: Trainer, source: Iterator[Batch], count: int) -> dict[str, float]:
    """Takes steps as `Trainer.run` does; returns milliseconds of one, of the host alone, and of each phase."""
    clock = trainer._clock
    clock.reset()
    start = time.perf_counter()
    for _ in range(count):
        with trainer.parallel.launching():
            trainer._train_step(clock.wait(lambda: [next(source)]) or [])
        trainer._look(None, but=1)  # the host runs ahead of the GPU by a step at most, as in training
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    seconds = clock.read()
    phases = {name: seconds.get(f"{name}_seconds", 0.0) for name in PHASES[1:]}
    phases = {"data": seconds["step_seconds"] - sum(phases.values())} | phases
    found = {"step": seconds["step_seconds"], "host": launched / count} | phases
    return {f"{name}_ms": round(1e3 * value, 1) for name, value in found.items()}


def by_kind(times: dict[str, float]) -> dict[str, float]:
    """Returns milliseconds of each of `KINDS`, the longest first, and of other kernels; times: by the kernel's name."""
    kinds: dict[str, float] = defaultdict(float)
    for name, ms in times.items():
        kinds[next((kind for kind, like in KINDS.items() if re.search(like, name.lower())), "other")] += ms
    return {kind: round(ms, 2) for kind, ms in sorted(kinds.items(), key=itemgetter(1), reverse=True)}


def floor(trainer: Trainer, pack: Batch) -> tuple[float, float]:
    """Returns FLOPs and bytes of one step, forward and backward."""
    model = trainer.bare_model
    batch = pack.rechunk(trainer.moc.chunk_tokens).to(trainer.parallel.device)
    layout = batch.layout
    routes: dict[int, torch.Tensor] = {}
    with torch.no_grad(), trainer.parallel.autocast():
        sigma = torch.ones(layout.num_shots, device=layout.device)
        model(batch.latents, sigma, batch.text, layout, trainer.moc, on_routes=routes.setdefault)
    heads, dim, layers = model.config.num_heads, model.config.dim, model.config.num_layers
    cost = attention_cost(layout, trainer.moc, routes.get(0), heads, dim // heads)
    attention = 3.5 * layers * cost.flops  # backward takes five products for each pair, forward two
    video, text = len(layout.video_index), len(layout.text_index)
    rows = {"video": video, "text": text}
    matmuls = sum(
        6 * rows["text" if ".text." in name or name == "text_in" else "video"] * module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(word in name for word in ("modulation", "condition", "gain"))
    )
    ffn = model.config.ffn_dim
    widths = (FORWARD_WIDTHS + BACKWARD_WIDTHS) * dim + FFN_WIDTHS * ffn
    pointwise = 2 * layers * (video + text) * widths
    return attention + matmuls, pointwise + WEIGHT_BYTES * sum(p.numel() for p in model.parameters())


def page(rows: list[dict]) -> str:
    """Returns the record as a Markdown page."""
    kinds = dict.fromkeys(kind for row in rows for kind in row["kernels_ms"])
    lines = []
    for row in rows:
        least = row["floor_matmul_ms"] + row["floor_bytes_ms"]
        grid = "x".join(map(str, row["grid"]))
        lines.append([
            row["gpu"], row["model"], f"{row['scenes']} x {SHOTS} x {grid}", row["pack_tokens"],
            row["varlen_kernel"], row["step_ms"],
            row["host_ms"], row["busy_ms"], row["launches"], f"{row['floor_matmul_ms']} + {row['floor_bytes_ms']}",
            f"{row['step_ms'] / least:.2f}", f"{row['peak_bytes'] / 2**30:.1f}",
            *(row[f"{phase}_ms"] for phase in PHASES), str(row["commit"])[:7],
        ])  # fmt: skip
    columns = [
        "GPU", "model", "pack", "tokens", "varlen kernel", "step ms", "host ms", "busy ms", "launches",
        "floor ms, matmuls + bytes", "of floor", "peak GiB", *(f"{phase} ms" for phase in PHASES), "commit",
    ]  # fmt: skip
    shares = [
        [
            row["gpu"],
            row["pack_tokens"],
            row["varlen_kernel"],
            *(row["kernels_ms"].get(kind, "") for kind in kinds),
        ]
        for row in rows
    ]
    about = f"{measured_on(rows)} Made by scripts/benchmark_step.py, which says what the columns are."
    return "\n\n".join([
        "# A whole training step", about, markdown_table(columns, lines),
        "## Kernels of a step, ms", markdown_table(["GPU", "tokens", "varlen kernel", *kinds], shares),
    ]) + "\n"  # fmt: skip
