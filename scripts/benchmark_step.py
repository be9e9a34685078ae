"""Where the time of a whole training step goes on one GPU, and how near it comes to its floor.

python scripts/benchmark_step.py [model=base] [tokens=65536] [packs=[[3,4,6],[6,8,12]]] [output=FILE]

A step is the trainer's own: noise, forward and backward under autocast, clipping, AdamW and the moving average, on
packs of scenes of four shots of random latents; packs: token grids of a shot. Each step has a pack of its own, whose
number of shots changes, as in training. Its floor is what no code could spare:

- the FLOPs of its matmuls and of its attended pairs, forward and backward, at the rate of one large bf16 matmul
- the bytes that its pointwise operations, the optimizer and the casts of weights must move, at the speed of a copy

`host` is the time that the host takes to launch a step, `busy` that of the kernels on the GPU.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from configs.command import command
from data.records import write_whole
from moc import Execution, MoCConfig
from moc.batch import Batch, Sample, make_batch
from moc.cost import attention_cost
from moc.diffusion import Flow
from moc.schedule import MoCSchedule
from moc.training import Trainer, TrainerConfig
from moc.training.optim import OptimConfig
from moc.training.parallel import Parallel
from models import ModelConfig, build_model
from scripts.measuring import check_gpu, copy_bytes_per_ms, header, markdown_table, matmul_flops_per_ms

SHOTS, TEXT_TOKENS, CHANNELS, TEXT_DIM = 4, 16, 64, 128
WARM_UP, STEPS = 6, 10

# Tokens' widths that the pointwise operations of one block read and write at the least: two modulated norms, norms and
# rotation of q and k, two gated sums; backward also the sums of gradients at two forks.
FORWARD_WIDTHS, BACKWARD_WIDTHS = 2 * 2 + 2 * 2 + 2 * 2 + 2 * 3, 2 * 3 + 2 * 3 + 2 * 2 + 2 * 3 + 2 * 3
FFN_WIDTHS = 2 + 3  # of the activation, forward and backward, in units of the FFN's width
# Bytes a weight: AdamW 28, the norm of gradients 4, clipping 8, the average 12, the cast to bf16 6, the gradient 4.
WEIGHT_BYTES = 62


@dataclass(frozen=True)
class StepConfig:
    """What to measure.

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


@command("benchmark_step", StepConfig)
def main(config: StepConfig) -> None:
    check_gpu()
    parallel = Parallel()
    model = build_model(config.model, latent_channels=CHANNELS, text_dim=TEXT_DIM)
    model.execution = config.execution
    rates = {"flops": matmul_flops_per_ms(), "bytes": copy_bytes_per_ms()}  # a millisecond
    rows, head = [], header()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            parallel, model, Flow(), config.moc, MoCSchedule(), OptimConfig(), TrainerConfig(), Path(folder), 0,
            lambda _: None,
        )  # fmt: skip
        for grid in config.packs:
            rows.append(measure(trainer, tuple(grid), config, rates))
            print(rows[-1], flush=True)
            write_whole(Path(config.output), (json.dumps({"header": head, "rows": rows}, indent=1) + "\n").encode())
    write_whole(Path(config.output).with_suffix(".md"), table(head, rows).encode())


def make_pack(model: nn.Module, grid: tuple[int, int, int], scenes: int, chunk_tokens: int) -> Batch:
    shape = (CHANNELS, *(size * patch for size, patch in zip(grid, model.stream.patch, strict=True)))

    def sample(position: int) -> Sample:
        text = [torch.randn(TEXT_TOKENS, TEXT_DIM) for _ in range(SHOTS + 1)]
        return Sample([torch.randn(shape) for _ in range(SHOTS)], text, position)

    return make_batch([sample(n) for n in range(scenes)], model.stream, chunk_tokens)


def measure(trainer: Trainer, grid: tuple[int, int, int], config: StepConfig, rates: dict[str, float]) -> dict:
    """A row: the mean step, what the host and the GPU did in it, and its floor."""
    model, moc = trainer.bare_model, trainer.moc
    scene = SHOTS * (grid[0] * grid[1] * grid[2] + TEXT_TOKENS) + TEXT_TOKENS
    scenes = max(2, config.tokens // scene)
    packs = [make_pack(model, grid, scenes - n % 2, moc.chunk_tokens) for n in range(WARM_UP + STEPS)]
    torch.cuda.reset_peak_memory_stats()
    for pack in packs[:WARM_UP]:
        trainer._train_step([pack])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for pack in packs[WARM_UP:]:  # the host runs ahead of the GPU, as in training
        trainer._train_step([pack])
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    with torch.profiler.profile() as profile:
        trainer._train_step([packs[0]])
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    flops, moved = floor(trainer, packs[0])
    return {
        "model": f"dim {config.model.dim}, {config.model.num_layers} layers",
        "grid": list(grid), "scenes": scenes, "tokens": packs[0].layout.num_tokens,
        "step_ms": round(1e3 * taken / STEPS, 1), "host_ms": round(1e3 * launched / STEPS, 1),
        "busy_ms": round(sum(e.self_device_time_total for e in kernels) / 1e3, 1), "launches": len(kernels),
        "floor_matmul_ms": round(flops / rates["flops"], 1),
        "floor_bytes_ms": round(moved / rates["bytes"], 1),
        "matmul_tflops": round(rates["flops"] / 1e9), "copy_gb_per_s": round(rates["bytes"] / 1e6),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip


def floor(trainer: Trainer, pack: Batch) -> tuple[float, float]:
    """FLOPs and bytes of one step, forward and backward."""
    model = trainer.bare_model
    batch = pack.to(trainer.parallel.device)
    layout = batch.layout
    routes: dict[int, torch.Tensor] = {}
    with torch.no_grad(), trainer.parallel.autocast():
        sigma = torch.ones(layout.num_shots, device=layout.device)
        model(batch.latents, sigma, batch.text, layout, trainer.moc, on_routes=routes.setdefault)
    heads, dim, layers = model.config.num_heads, model.config.dim, model.config.num_layers
    cost = attention_cost(layout, trainer.moc, routes[0], heads, dim // heads)
    attention = 3.5 * layers * cost.flops  # backward: five products a pair to the forward's two
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


def table(head: dict, rows: list[dict]) -> str:
    """The record as a Markdown page."""
    versions = ", ".join(f"{name} {head[name]}" for name in ("torch", "cuda", "cudnn", "triton") if head[name])
    lines = []
    for row in rows:
        least = row["floor_matmul_ms"] + row["floor_bytes_ms"]
        grid = "x".join(map(str, row["grid"]))
        lines.append([
            row["model"], f"{row['scenes']} x {SHOTS} x {grid}", row["tokens"], row["step_ms"], row["host_ms"],
            row["busy_ms"], row["launches"], f"{row['floor_matmul_ms']} + {row['floor_bytes_ms']}",
            f"{row['step_ms'] / least:.2f}", f"{row['peak_bytes'] / 2**30:.1f}",
        ])  # fmt: skip
    columns = [
        "model", "pack", "tokens", "step ms", "host ms", "busy ms", "launches", "floor ms, matmuls + bytes",
        "of floor", "peak GiB",
    ]  # fmt: skip
    about = f"{head['gpu']}; {versions}; {head['date']}; commit {head['commit']}. Made by scripts/benchmark_step.py."
    return f"# A whole training step\n\n{about}\n\n{markdown_table(columns, lines)}\n"


if __name__ == "__main__":
    main()
