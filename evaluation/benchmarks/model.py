"""This module measures whole models on one GPU, dense against MoC, side by side in one run."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models.wan
from evaluation.benchmarks.measurements import header, markdown_table, measured_on, write_figure
from evaluation.benchmarks.timing import check_gpu, copy_bytes_per_ms, median_ms
from moc import DropKey, MoCConfig
from moc.batch import Batch, Sample, make_batch
from moc.cost import attention_cost
from moc.diffusion import Flow
from moc.files import write_whole
from moc.kernels import dense
from moc.training.optim import OptimConfig, build_optimizer
from models import Family, ModelConfig, build_model
from models.part import Part
from models.rope import rotary_table, rotate, running_positions

LATENT, TEXT_DIM = (16, 36, 40, 64), 4096  # 36 x 20 x 32 = 23,040 tokens
HEAD_DIM = 128
CONFIG = ModelConfig(family=Family.wan, dim=1536, num_layers=30, num_heads=12, ffn_dim=8960)
ATTENTION = {"dense": MoCConfig(dense=True), "moc": MoCConfig(chunk_tokens=1280, top_k=5)}
SLOW, TOO_SLOW = 2.0, 25.0  # a step that takes this many seconds is slow, or too slow

# Tokens' widths, in units of the model's dim, that a block's pointwise operations read and write at the least.
FORWARD_UNITS = {
    "two modulated norms": 2 * 2, "norms of q and k": 2 * 2, "rotation of q and k": 2 * 2, "two gated sums": 2 * 3,
    "norm before the text": 2, "norm of its q": 2, "sum": 3,
}  # fmt: skip
BACKWARD_UNITS = {
    "two modulated norms": 2 * 3, "norms of q and k": 2 * 3, "rotation of q and k": 2 * 2, "two gated sums": 2 * 3,
    "norm before the text": 3, "norm of its q": 3, "sums of gradients at three forks": 3 * 3,
}  # fmt: skip
FORWARD_FFN_UNITS, BACKWARD_FFN_UNITS = 2, 3  # of the activation, in units of the FFN's width


@dataclass(frozen=True)
class ModelBenchmarkConfig:
    """These settings say what to measure.

    shots: the numbers of shots of a story, one row each.
    output: the path of the files to write, without their endings.
    """

    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    output: str = "docs/benchmarks/model"


def make_story(num_shots: int, shape: tuple[int, ...] = LATENT) -> Batch:
    """Returns one sample of random latents and captions."""
    latents = [torch.randn(shape) for _ in range(num_shots)]
    text = [torch.randn(40, TEXT_DIM) for _ in range(num_shots + 1)]
    spec = models.wan.StreamSpec(patch=(1, 2, 2), text_in_stream=False)
    return make_batch([Sample(latents, text)], spec, ATTENTION["moc"].chunk_tokens).to("cuda")


def measure(function: Callable[[], object]) -> tuple[float, int]:
    """Returns milliseconds and peak bytes of `function`: the median of three, warm; the second of two from SLOW on, and
    the first from TOO_SLOW on (another number of shots may compile once more)."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(function, 1)
    if ms < 1000 * TOO_SLOW:
        ms = median_ms(function, 1)
    if ms < 1000 * SLOW:
        ms = median_ms(function, 3)
    return ms, torch.cuda.max_memory_allocated()


def density(model: nn.Module, batch: Batch, config: MoCConfig) -> float:
    """Returns the share of all pairs that the first layer attends to."""
    routes: dict[int, Tensor] = {}
    sigma = torch.ones(batch.num_shots, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(batch.latents, sigma, batch.text, batch.layout, config, on_routes=routes.setdefault)
    return attention_cost(batch.layout, config, routes.get(0), CONFIG.num_heads, HEAD_DIM).density


def passes(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, config: MoCConfig
) -> dict[str, Callable[[], None]]:
    """Returns a forward and a training step on a batch."""
    flow = Flow()
    levels = flow.draw_levels(batch, seed=0)
    sigma = levels.sigma.cuda()

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            model(batch.latents, sigma, batch.text, batch.layout, config)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            losses = flow.loss(model, batch, levels, config, seed=0, drops=DropKey(seed=0, step=0))
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "training step": step}


def compile_all(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Runs every pass on three short streams: what is compiled is then compiled for any length."""
    for frames in (4, 5, 7):
        batch = make_story(2, (LATENT[0], frames, *LATENT[2:]))
        for config in ATTENTION.values():
            for function in passes(model, optimizer, batch, config).values():
                function()


def model_rows(model: nn.Module, optimizer: torch.optim.Optimizer, num_shots: int) -> list[dict]:
    """Measures forward and training step at one length, for each kind of attention."""
    batch, rows = make_story(num_shots), []
    for impl, config in ATTENTION.items():
        attended = round(density(model, batch, config), 4)
        for name, function in passes(model, optimizer, batch, config).items():
            ms, peak = measure(function)
            rows.append({
                "impl": impl, "shots": num_shots, "tokens": batch.layout.num_tokens, "pass": name, "ms": round(ms, 1),
                "peak_bytes": peak, "density": attended,
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


class _NoAttention(torch.autograd.Function):
    """This function stands in for attention at no cost: it returns v (or zeros), and gives its gradient to q, k and
    v."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.text_shape = None if k.shape == q.shape else k.shape
        return (q if ctx.text_shape else v).view_as(q)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = grad if ctx.text_shape is None else grad.new_zeros(ctx.text_shape)
        return grad, keys, keys


def block_row(model: Any, num_shots: int) -> dict:
    """Returns one block without its attention, forward and forward plus backward, against its floor."""
    layout = make_story(num_shots).layout
    block = model.blocks[0]
    dim, length = CONFIG.dim, layout.num_tokens
    table = rotary_table(running_positions(layout), HEAD_DIM)
    x = torch.randn(length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    context = torch.randn(512, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    time = torch.randn(len(layout.groups), 6, dim, device="cuda", requires_grad=True)
    direction = torch.randn_like(x)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _NoAttention.apply(rotate(q, table), rotate(k, table), v)

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return block(x, context, time, Part(layout).video_members, None, attend)

    leaves = [x, context, time, *block.parameters()]
    with mock.patch.object(models.wan.packed, "attend", lambda q, k, v, _: _NoAttention.apply(q, k, v)):
        with torch.no_grad():
            forward_ms = median_ms(forward, 5)
        both_ms = median_ms(lambda: torch.autograd.grad(forward(), leaves, direction, allow_unused=True), 5)

    linears = {module: 512 if "to_k" in name or "to_v" in name else length
               for name, module in block.attn2.named_modules() if isinstance(module, nn.Linear)}  # fmt: skip
    linears |= {m: length for layer in (block.attn1, block.ffn) for m in layer.modules() if isinstance(m, nn.Linear)}
    matmuls = [_matmul_ms(linear, rows) for linear, rows in linears.items()]
    copy_speed = copy_bytes_per_ms()
    forward_units = sum(FORWARD_UNITS.values()) + FORWARD_FFN_UNITS * CONFIG.ffn_dim / dim
    backward_units = sum(BACKWARD_UNITS.values()) + BACKWARD_FFN_UNITS * CONFIG.ffn_dim / dim
    unit_ms = 2 * length * dim / copy_speed
    floor = sum(f for f, _ in matmuls) + forward_units * unit_ms
    both_floor = floor + sum(b for _, b in matmuls) + backward_units * unit_ms
    return {
        "shots": num_shots, "tokens": length,
        "forward_ms": round(forward_ms, 2), "forward_floor_ms": round(floor, 2),
        "both_ms": round(both_ms, 2), "both_floor_ms": round(both_floor, 2),
        "matmul_forward_ms": round(sum(f for f, _ in matmuls), 2),
        "matmul_backward_ms": round(sum(b for _, b in matmuls), 2),
        "copy_gb_per_s": round(copy_speed / 1e6),
    }  # fmt: skip


def _matmul_ms(linear: nn.Linear, rows: int) -> tuple[float, float]:
    """Returns a linear's matmuls alone, in bf16: forward, and the two of its backward."""
    weight, bias = linear.weight.bfloat16(), linear.bias.bfloat16()
    x = torch.randn(rows, linear.in_features, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(rows, linear.out_features, device="cuda", dtype=torch.bfloat16)
    backward = median_ms(lambda: grad @ weight, 5, 0.1) + median_ms(lambda: grad.T @ x, 5, 0.1)
    return median_ms(lambda: F.linear(x, weight, bias), 5, 0.1), backward


def write_report(record: dict, output: Path) -> str:
    """Writes OUTPUT.json, OUTPUT.md and OUTPUT.png; returns the tables."""
    write_whole(output.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())
    head, rows = record["header"], record["rows"]
    dense_ms = {(r["shots"], r["pass"]): r["ms"] for r in rows if r["impl"] == "dense"}
    lines = [
        [r["shots"], r["tokens"], r["pass"], r["impl"], f"{r['ms'] / 1000:.2f}", f"{r['peak_bytes'] / 2**30:.1f}",
         f"{r['density']:.3f}", f"{dense_ms[r['shots'], r['pass']] / r['ms']:.2f}"]
        for r in rows
    ]  # fmt: skip
    blocks = [
        [b["shots"], b["tokens"], b["forward_ms"], b["forward_floor_ms"],
         f"{b['forward_ms'] / b['forward_floor_ms']:.2f}",
         b["both_ms"], b["both_floor_ms"], f"{b['both_ms'] / b['both_floor_ms']:.2f}"]
        for b in record["blocks"]
    ]  # fmt: skip
    text = "\n\n".join([
        "# Whole-model benchmark",
        f"{measured_on([head])} The shape of Wan2.1-T2V-1.3B, random weights "
        f"in fp32 under bf16 autocast; dense kernel {head['dense_kernel']}; MoC: 5 chunks of 1,280 tokens. The "
        "training step has loss, backward with activation checkpointing, clipping and AdamW. Peaks are of all memory "
        "allocated, weights and optimizer states included.",
        markdown_table(
            ["shots", "tokens", "pass", "attention", "s", "peak GiB", "density", "x over dense"], lines
        ),
        "## A block without its attention\n\nAgainst its matmuls, timed apart, plus the bytes of its pointwise "
        "operations at copy speed.",
        markdown_table(
            ["shots", "tokens", "forward ms", "floor ms", "ratio", "forward + backward ms", "floor ms", "ratio"], blocks
        ),
    ]) + "\n"  # fmt: skip
    write_whole(output.with_suffix(".md"), text.encode())
    _plot(record, output.with_suffix(".png"))
    return text


def _plot(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for impl in ATTENTION:
        for name, style in (("forward", "--"), ("training step", "-")):
            line = sorted((r["shots"], r["ms"] / 1e3) for r in record["rows"] if (r["impl"], r["pass"]) == (impl, name))
            label, color = f"{impl}, {name}", {"dense": "tab:gray", "moc": "tab:blue"}[impl]
            axes.plot(*zip(*line, strict=True), marker="o", label=label, linestyle=style, color=color)
    title = f"1.3B shape on one {record['header']['gpu']}"
    axes.set(xlabel="shots of 23k tokens", ylabel="seconds", yscale="log", title=title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    write_figure(figure, path, dpi=120)


def write_record(config: ModelBenchmarkConfig) -> None:
    """Measures each number of shots and writes the record, tables and plot."""
    check_gpu()
    output = Path(config.output)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = build_model(CONFIG, latent_channels=LATENT[0], text_dim=TEXT_DIM)
    model.enable_gradient_checkpointing()
    model.train()
    optimizer = build_optimizer(model, OptimConfig())
    kernel = dense.choose(torch.empty(1, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)).name
    record: dict = {"header": header() | {"dense_kernel": kernel}, "rows": [], "blocks": []}
    compile_all(model, optimizer)
    for shots in config.shots:
        record["rows"] += model_rows(model, optimizer, shots)
        record["blocks"].append(block_row(model, shots))
        print(record["blocks"][-1], flush=True)
        tables = write_report(record, output)
    print(tables)
