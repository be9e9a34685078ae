"""This module compiles every Triton kernel for every generation of GPUs, without a GPU, and writes what each takes."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from tqdm import tqdm

import moc
from evaluation.benchmarks.measurements import markdown_table
from moc.errors import UserError
from moc.files import write_whole
from moc.kernels import triton_backend, triton_masked, triton_rows
from moc.kernels.compilation import SHARED_MEMORY, Launch, compiled, excesses, parsed_in_turn, recorded
from models import pointwise
from models.frozen import FP8_CAPABILITY
from models.members import Members
from models.part import Part

GPUS = [f"{major}{minor}" for major, minor in SHARED_MEMORY]
NUM_HEADS = 12
FFN_DIM = 8960  # of Wan2.1-T2V-1.3B, as the number of heads


@dataclass(frozen=True)
class Kind:
    """A kind stands for models whose attention has these sizes; kernels are compiled anew for each kind."""

    dtype: torch.dtype
    head_dim: int
    chunk_tokens: int
    top_k: int


KINDS = {
    "bf16-64": Kind(torch.bfloat16, 64, 1280, 5),
    "bf16-96": Kind(torch.bfloat16, 96, 1280, 5),
    "bf16-128": Kind(torch.bfloat16, 128, 1280, 5),
    "bf16-64-small-chunks": Kind(torch.bfloat16, 64, 160, 20),
    "bf16-128-small-chunks": Kind(torch.bfloat16, 128, 160, 20),
    "fp16-128": Kind(torch.float16, 128, 1280, 5),
    "fp32-64": Kind(torch.float32, 64, 1280, 5),
    "fp32-128": Kind(torch.float32, 128, 1280, 5),
    "fp32-128-small-chunks": Kind(torch.float32, 128, 160, 20),
}


def attention(kind: Kind) -> None:
    """Runs routing with drops, attention and its backward on two shots, as in short samples, then as in long ones, then
    routing by subchunks, and adds up gathered rows."""
    config = moc.MoCConfig(chunk_tokens=kind.chunk_tokens, top_k=kind.top_k)
    for max_tokens in (triton_masked.MAX_TOKENS, 0):
        layout = moc.ShotLayout.build([moc.Shot(5, (2, 4, 4)), moc.Shot(3, (2, 4, 4))], 7, kind.chunk_tokens)
        q, k, v = torch.zeros(3, layout.num_tokens, NUM_HEADS, kind.head_dim, dtype=kind.dtype).requires_grad_()
        # A layout keeps its first answer, so each limit has a layout of its own.
        with patch.object(triton_masked, "MAX_TOKENS", max_tokens):
            routes = triton_backend.route(q, k, layout, config, moc.DropKey(seed=0, step=0))
            triton_backend.attend(q, k, v, routes, layout, config).sum().backward()
    triton_backend.route(q, k, layout, replace(config, descriptor_subchunks=3))
    triton_rows.sum_rows(k.detach(), v.detach(), torch.arange(len(k)), torch.arange(len(k) + 1))


def pointwise_work(kind: Kind) -> None:
    """Runs the functions around attention, as both model families call them, and their backward."""
    num_tokens, dim = 40, NUM_HEADS * kind.head_dim
    members = Members(torch.zeros(num_tokens, dtype=torch.int32), torch.tensor([num_tokens]))
    rows, weight, table = torch.zeros(1, dim), torch.zeros(dim), torch.zeros(num_tokens, kind.head_dim // 2)
    x = torch.zeros(num_tokens, dim, dtype=kind.dtype).requires_grad_()
    heads = x.unflatten(1, (NUM_HEADS, kind.head_dim))
    part = Part(moc.ShotLayout.build([moc.Shot(5, (2, 4, 4))]))
    text, video = (torch.zeros(len(x), 3 * dim, dtype=kind.dtype) for x in (part.text_index, part.video_index))
    bias = torch.zeros(3 * dim)
    gain, angles = weight[: kind.head_dim], torch.zeros(part.num_tokens, kind.head_dim // 2)
    outputs = (
        pointwise.modulate(x, rows, rows, members),
        torch.cat(pointwise.fork(x, rows, rows, members)),
        pointwise.add_gated(x, x, rows, members),
        pointwise.add_gated(x, x, rows, members, weight),
        *pointwise.add_modulate(x, x, rows, rows, rows, members, weight),
        pointwise.gelu(x, weight),
        *pointwise.split(heads[: part.num_tokens], part),
        pointwise.layer_norm(x, weight, weight, 1e-6),
        pointwise.rms_norm(x, weight, 1e-6),
        pointwise.rms_norm(heads, weight[: kind.head_dim], 1e-6),
        pointwise.rotate(heads, (table, table)),
        *pointwise.join(text, video.requires_grad_(), 2 * [(gain, gain)], part, (angles, angles), (bias, bias)),
    )
    for output in outputs:
        output.sum().backward(retain_graph=True)


def rounding(kind: Kind) -> None:
    """Rounds the inputs of linears to fp8, as sampling does."""
    for width, gelu in ((NUM_HEADS * kind.head_dim, False), (FFN_DIM, True)):
        pointwise.rounded(torch.zeros(40, width, dtype=kind.dtype), gelu)


def launches(gpus: list[str], kinds: list[str]) -> Iterator[tuple[str, str, Launch]]:
    """Yields (GPU, kind, launch): a launch of each variant; one that several kinds share goes with the first."""
    for gpu in gpus:
        variants = set()
        for name in kinds:
            capability = int(gpu[:-1]), int(gpu[-1])
            with recorded(capability) as found:
                attention(KINDS[name])
                pointwise_work(KINDS[name])
                if capability >= FP8_CAPABILITY:
                    rounding(KINDS[name])
            for launch in found:
                if launch.variant not in variants:
                    variants.add(launch.variant)
                    yield gpu, name, launch


def write_tables(rows: list[dict], path: Path) -> None:
    """Writes a table for each kind of models: its kernels by GPU."""
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    text = [
        "# What the Triton kernels take",
        f"Compiled ahead by `scripts/compile_kernels.py` with Triton {triton.__version__}, for {NUM_HEADS} heads. Each "
        "cell: registers a thread / KiB of shared memory a program, and bytes of registers spilled, if any. A program "
        "may have " + ", ".join(f"{size >> 10} KiB (sm_{a}{b})" for (a, b), size in SHARED_MEMORY.items()) + ".",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells: dict[str, dict[str, str]] = {}
        for row in rows:
            if row["kind"] == kind:
                spills = f", {row['spilled']} spilled" if row["spilled"] else ""
                cell = f"{row['registers']} / {row['shared'] / 1024:.0f}{spills}"
                by_gpu = cells.setdefault(row["name"], {})
                by_gpu[row["gpu"]] = "; ".join(filter(None, (by_gpu.get(row["gpu"]), cell)))
        lines = [[name, *(by_gpu.get(gpu, "") for gpu in gpus)] for name, by_gpu in cells.items()]
        text += [f"## {kind}", markdown_table(["kernel", *(f"sm_{gpu}" for gpu in gpus)], lines)]
    write_whole(path, ("\n\n".join(text) + "\n").encode())


@dataclass(frozen=True)
class CompileConfig:
    """These settings say what kernels are compiled for.

    gpus: compute capabilities, such as 90.
    kinds: kinds of models, by the type and the width of their heads, such as bf16-128, and the size of their chunks.
    output: the record to write; its tables lie beside it.
    """

    gpus: list[str] = field(default_factory=lambda: list(GPUS))
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    output: str = "docs/benchmarks/kernels_ahead.json"

    def __post_init__(self) -> None:
        for name, known in (("gpus", GPUS), ("kinds", KINDS)):
            if not getattr(self, name) or not set(getattr(self, name)) <= set(known):
                raise UserError(f"{name}={getattr(self, name)} must be some of {', '.join(known)}")


def write_record(config: CompileConfig) -> None:
    """Compiles kernels and writes what they take; raises UserError where one takes too much."""
    output, found = Path(config.output), list(launches(config.gpus, config.kinds))
    with parsed_in_turn(), ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(tqdm(pool.map(lambda row: compiled(row[2]), found), total=len(found), unit="kernel"))
    rows = [{"gpu": gpu, "kind": kind, **asdict(result)} for (gpu, kind, _), result in zip(found, results, strict=True)]
    record = {"triton": triton.__version__, "num_heads": NUM_HEADS, "rows": rows}
    lines = json.dumps(record).replace('{"gpu"', '\n{"gpu"')  # a row a line
    write_whole(output, (lines + "\n").encode())
    write_tables(rows, output.with_suffix(".md"))
    faults = [
        f"{result.name} for sm_{gpu} ({kind}) {excess}"
        for (gpu, kind, launch), result in zip(found, results, strict=True)
        for excess in excesses(result, launch.capability)
    ]
    if faults:
        raise UserError("; ".join(faults))
