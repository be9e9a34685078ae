"""This module measures the memory and the time that a training step of an adapter takes."""

import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evaluation.benchmarks.measurements import header, markdown_table, measured_on, put_row
from evaluation.benchmarks.timing import check_gpu
from evaluation.benchmarks.training_steps import bare_trainer, random_film, timed_step
from moc import MoCConfig
from moc.batch import make_batch
from moc.errors import check_above_zero
from moc.files import write_whole
from moc.training import OptimConfig, Parallel, ParallelConfig
from models import ModelConfig
from models.drawn import draw_adapted


@dataclass(frozen=True)
class MemoryConfig:
    """These settings say what to measure.

    model: the model's sizes, its adapter and how the weights under it are kept.
    moc: what attention attends to.
    optim: the optimizer.
    parallel: where weights and activations are kept.
    shots: how many a film has.
    latent: channels, frames, height and width of a shot.
    text_dim: the width of the captions' features.
    limit_gib: how much of the GPU's memory may be used; null is all of it.
    steps: how many are timed, after one that compiles kernels.
    output: the record to write.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    moc: MoCConfig = field(default_factory=MoCConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    shots: int = 4
    latent: list[int] = field(default_factory=lambda: [16, 15, 60, 104])
    text_dim: int = 4096
    limit_gib: float | None = None
    steps: int = 2
    output: str = "docs/benchmarks/memory.json"

    def __post_init__(self) -> None:
        check_above_zero(self, "", "limit_gib", null="all of it")


def write_record(config: MemoryConfig) -> None:
    """Measures one setting and puts its row into the record."""
    check_gpu(config.parallel.device)
    if config.limit_gib:
        check_gpu()
        whole = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(config.limit_gib * 2**30 / whole)
    row = settings(config)
    try:
        row |= measure(config)
    except torch.OutOfMemoryError as error:
        row |= {"problem": str(error).partition(". GPU")[0]}
    print(row)
    output = Path(config.output)
    rows = put_row(output, row, ("gpu", *settings(config)), header())
    write_whole(output.with_suffix(".md"), page(rows).encode())


def settings(config: MemoryConfig) -> dict[str, Any]:
    """Returns what tells a row from the others."""
    model, parallel = config.model, config.parallel
    return {
        "dim": model.dim, "layers": model.num_layers, "base": str(model.lora_base), "rank": model.lora_rank,
        "swapped": parallel.swap_blocks, "recomputed": parallel.activation_checkpointing,
        "sublayers": parallel.recompute_sublayers, "offloaded": parallel.offload_activations,
        "optimizer": config.optim.name + " offloaded" * config.optim.offload,
        "shots": config.shots, "latent": list(config.latent), "limit_gib": config.limit_gib or 0.0,
    }  # fmt: skip


def measure(config: MemoryConfig) -> dict[str, Any]:
    """Returns peaks of memory on the GPU and on the host, and the median step."""
    parallel = Parallel(config.parallel)
    start = time.perf_counter()
    model = draw_adapted(config.model, config.latent[0], config.text_dim, parallel.device, kept="cpu")
    built = time.perf_counter() - start
    config.parallel.set_recomputation(model)
    film, on_gpu = random_film(config.shots, config.latent, config.text_dim), parallel.device.type == "cuda"
    batch = make_batch([film], model.stream, config.moc.chunk_tokens)
    trainer = bare_trainer(parallel, model, config.moc, optim=config.optim)
    if on_gpu:
        torch.cuda.empty_cache()  # frees the memory that drawing the weights took
        torch.cuda.reset_peak_memory_stats()
    times, losses = zip(*[timed_step(trainer, batch) for _ in range(config.steps + 1)], strict=True)
    row = {
        "tokens": batch.layout.num_tokens, "build_seconds": round(built, 1), "first_step_seconds": round(times[0], 2),
        "step_seconds": round(sorted(times[1:])[config.steps // 2], 2), "loss": [round(loss, 4) for loss in losses],
        "trained": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip
    if on_gpu:
        row |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return row


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the record as a Markdown page."""
    lines = [
        [
            f"{row['layers']} x {row['dim']}", row["base"], row["rank"], row["swapped"],
            ", ".join(name for name in ("recomputed", "sublayers", "offloaded") if row[name]), row["optimizer"],
            f"{row['shots']} x {row['latent']}", row.get("tokens", ""), row["limit_gib"] or "",
            row.get("problem") or row["step_seconds"], *(
                f"{row[name] / 2**30:.1f}" if name in row else ""
                for name in ("peak_bytes", "reserved_bytes", "host_bytes")
            ), str(row["commit"])[:7],
        ]
        for row in rows
    ]  # fmt: skip
    columns = [
        "layers x width", "base", "rank", "blocks swapped", "activations", "optimizer", "latents", "tokens",
        "limit GiB", "step s", "peak GiB", "reserved GiB", "host GiB", "commit",
    ]  # fmt: skip
    about = f"{measured_on(rows)} Made by scripts/benchmark_memory.py."
    return f"# Memory of a step of an adapter\n\n{about}\n\n{markdown_table(columns, lines)}\n"
