"""This module measures training steps on several GPUs of a host, dense and MoC, along each axis of the mesh."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from evaluation.benchmarks.measurements import header, markdown_table, measured_on, put_row, read_rows
from evaluation.benchmarks.step import by_kind
from evaluation.benchmarks.timing import check_gpu
from evaluation.benchmarks.training_steps import bare_trainer, dense_kernels, random_film, timed_step
from moc import Execution, MoCConfig
from moc.batch import Batch, make_batch
from moc.errors import UserError
from moc.files import write_whole
from moc.training import Parallel, ParallelConfig, Trainer
from moc.training.parallel import gather_lists
from models import ModelConfig, build_model
from models.drawn import draw_adapted

AXES: dict[str, dict[str, int]] = {"one": {}, "data": {}, "shard": {"shard": 0}, "sequence": {"sequence": 0}}
IMPLEMENTATIONS = ("moc", "dense")
SETUP = ("gpu", "model", "moc", "latent", "recomputed", "kernel")  # rows are compared where these are equal
KEY = (*SETUP, "mesh", "processes", "impl", "shots")
LONG = 20.0  # seconds; of steps that take longer only one is measured


@dataclass(frozen=True)
class BenchmarkConfig:
    """These settings say what to measure.

    model: the model and its sizes.
    moc: what attention attends to.
    execution: how it is computed.
    parallel: device and precision; each mesh sets its own axes.
    processes: how many the meshes other than `one` have, each on a GPU of its own.
    meshes: names of the meshes.
    shots: the numbers of shots in a stream.
    latent: channels, frames, height and width of a shot; Wan's patch makes 23,040 tokens of the default.
    text_dim: the width of the captions' features.
    longest_dense: the most shots of a dense step.
    steps: how many the median is of.
    output: the record to write.
    mesh: set by this command itself, for the processes of one mesh; else null.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    moc: MoCConfig = field(default_factory=MoCConfig)
    execution: Execution = field(default_factory=Execution)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    processes: int = 2
    meshes: list[str] = field(default_factory=lambda: list(AXES))
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    latent: list[int] = field(default_factory=lambda: [16, 36, 40, 64])
    text_dim: int = 4096
    longest_dense: int = 8
    steps: int = 3
    output: str = "docs/benchmarks/parallel.json"
    mesh: str | None = None

    def __post_init__(self) -> None:
        unknown = set(self.meshes) - AXES.keys()
        if unknown or self.processes < 2:
            raise UserError(
                f"meshes={self.meshes} must be of {', '.join(AXES)}, and processes={self.processes} at least 2"
            )


def write_record(config: BenchmarkConfig) -> None:
    """Measures what the record lacks on each mesh, in processes of its own, or, as one of these, on theirs."""
    if config.mesh:
        measure_mesh(config, config.mesh)
        return
    check_gpu(config.parallel.device)
    for mesh in config.meshes:
        while cases := remaining(config, mesh):
            launch(mesh, config)
            if remaining(config, mesh) == cases:  # the processes ended without adding a row
                add_row(config, describe(config, mesh, *cases[0]) | {"problem": "ended, see the messages"})
    print(f"{config.output} holds all rows")


def remaining(config: BenchmarkConfig, mesh: str) -> list[tuple[str, int]]:
    """Returns what this code has still to measure on a mesh: implementations and numbers of shots. What is longer than
    a film that failed is not."""
    same = {name: value for name, value in head(config).items() if name != "date"} | processes_of(config, mesh)
    rows = [row for row in read_rows(Path(config.output)) if same.items() <= row.items()]
    done = {(row["impl"], row["shots"]) for row in rows}
    failed = {row["impl"]: row["shots"] for row in rows if "problem" in row}
    most = {impl: failed.get(impl, max(config.shots)) for impl in IMPLEMENTATIONS}
    most["dense"] = min(most["dense"], config.longest_dense)
    wanted = [(impl, shots) for impl in IMPLEMENTATIONS for shots in sorted(config.shots) if shots <= most[impl]]
    return [case for case in wanted if case not in done]


def launch(mesh: str, config: BenchmarkConfig) -> None:
    """Runs this command again as the processes of a mesh."""
    count = 1 if mesh == "one" else config.processes
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if config.parallel.device == "cpu" else {})
    subprocess.run([sys.executable, "-m", *torchrun, *sys.argv, f"mesh={mesh}"], env=environment, check=False)


def measure_mesh(config: BenchmarkConfig, mesh: str) -> None:
    """Measures what remains on this mesh; ends at the first film that does not fit."""
    start = time.perf_counter()
    axes: dict[str, Any] = dict.fromkeys(AXES[mesh], config.processes)
    parallel = Parallel(replace(config.parallel, **axes))
    widths = config.latent[0], config.text_dim
    if config.model.lora_rank:
        torch.manual_seed(0)  # all processes hold one model
        model = draw_adapted(config.model, *widths, parallel.device)
    else:
        with parallel.device:
            model = build_model(config.model, *widths)
    model.execution = config.execution
    config.parallel.set_recomputation(model)
    trainer = bare_trainer(parallel, model, config.moc)
    tell(parallel, "the model is ready", time.perf_counter() - start)
    for impl, shots in parallel.of_main(lambda: remaining(config, mesh)):
        trainer.moc = replace(config.moc, dense=impl == "dense")
        film = random_film(shots, config.latent, config.text_dim, parallel.data_rank)
        batch = make_batch([film], model.stream, config.moc.chunk_tokens)
        row = describe(config, mesh, impl, shots) | {"tokens": batch.layout.num_tokens * parallel.data_ranks}
        try:
            row |= measure(trainer, batch, config.steps)
        except torch.OutOfMemoryError:
            row |= {"problem": "out of memory"}
        if parallel.is_main:
            add_row(config, row)
        if "problem" in row:
            return  # a failed step leaves tensors in memory, so this process ends
    parallel.close()


def measure(trainer: Trainer, batch: Batch, most: int) -> dict[str, Any]:
    """Returns the median step, memory, and what share of a step the device is at collectives, waiting included."""
    parallel = trainer.parallel
    on_gpu = parallel.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first, _ = timed_step(trainer, batch)  # may compile kernels
    tell(parallel, "the first step is done", first)
    times = [timed_step(trainer, batch)[0]]
    times += [timed_step(trainer, batch)[0] for _ in range(most - 1 if times[0] < LONG else 0)]
    seconds = sorted(times)[len(times) // 2]
    values: dict[str, Any] = {"step_seconds": round(seconds, 4), "steps": len(times)}
    values["tokens_per_second"] = round(batch.layout.num_tokens * parallel.data_ranks / seconds)
    if not on_gpu:
        return values
    values["peak_bytes"] = max(gather_lists([torch.cuda.max_memory_allocated()]))
    if parallel.world_size > 1 and seconds < LONG:
        values |= shares(trainer, batch)
    return values


def tell(parallel: Parallel, what: str, seconds: float) -> None:
    """Prints, on the first process, how long something took."""
    if parallel.is_main:
        print(f"{what}: {seconds:.1f} s", flush=True)


def shares(trainer: Trainer, batch: Batch) -> dict[str, Any]:
    """Returns the shares of a step that the device spends in the exchanges around attention and in all collectives, and
    the milliseconds of each kind of kernels. Those of the weights run beside the computation, so that their share is
    not what they cost."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds, _ = timed_step(trainer, batch)
    names = {event.key.lower(): event.self_device_time_total / 1e6 for event in profile.key_averages()}
    exchange = sum(time for name, time in names.items() if "nccl" in name and "sendrecv" in name)
    collective = sum(time for name, time in names.items() if "nccldevkernel" in name)
    found = {"exchange_share": round(exchange / seconds, 4), "collective_share": round(collective / seconds, 4)}
    return found | {"kernels_ms": by_kind({name: 1e3 * time for name, time in names.items()})}


def processes_of(config: BenchmarkConfig, mesh: str) -> dict[str, Any]:
    """Returns the part of a row that says which processes take its steps."""
    return {"mesh": mesh, "processes": 1 if mesh == "one" else config.processes}


def describe(config: BenchmarkConfig, mesh: str, impl: str, shots: int) -> dict[str, Any]:
    """Returns the part of a row that says what is measured."""
    return processes_of(config, mesh) | {"impl": impl, "shots": shots}


def head(config: BenchmarkConfig) -> dict[str, Any]:
    """Returns where and what is measured."""
    sizes = {name: asdict(config.model)[name] for name in ("family", "dim", "num_layers", "num_heads", "ffn_dim")}
    if config.model.lora_rank:  # an adapter's rank, and the format of the weights under it
        sizes |= {"lora_rank": config.model.lora_rank, "lora_base": config.model.lora_base}
    model = {name: str(value) for name, value in sizes.items()}
    measured: dict[str, Any] = {"latent": list(config.latent), "kernel": dense_kernel(config)}
    parallel = config.parallel
    measured["recomputed"] = "all but attention" if parallel.keep_attention else parallel.activation_checkpointing
    return header() | {"model": model, "moc": config.moc.to_dict()} | measured


def dense_kernel(config: BenchmarkConfig) -> str:
    """Returns the name of the kernel of dense attention, which MoC's own shots take as well."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return dense_kernels(config.model, config.execution, device)[0].name


def add_row(config: BenchmarkConfig, row: dict[str, Any]) -> None:
    """Prints a row, and writes the record and its page with it."""
    print(row, flush=True)
    output = Path(config.output)
    write_whole(output.with_suffix(".md"), page(put_row(output, row, KEY, head(config))).encode())


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the record as a Markdown page, with a table of each setup."""
    setups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        setups.setdefault(json.dumps([row[name] for name in SETUP]), []).append(row)
    about = f"{measured_on(rows)} Made by scripts/benchmark_parallel.py, which says what the columns are."
    return "\n\n".join(["# A training step on several GPUs", about, *map(table, setups.values())]) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of one setup."""
    one = {(row["impl"], row["shots"]): row.get("tokens_per_second") for row in rows if row["mesh"] == "one"}
    lines = []
    for row in rows:
        base, speed = one.get((row["impl"], row["shots"])), row.get("tokens_per_second")
        lines.append([
            row["mesh"], row["processes"], row["impl"], row["shots"], row.get("tokens", ""),
            row.get("step_seconds", row.get("problem")), speed or "",
            f"{speed / base:.2f}" if speed and base else "",
            f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else "",
            *(f"{row[name]:.1%}" if name in row else "" for name in ("exchange_share", "collective_share")),
            str(row["commit"])[:7],
        ])  # fmt: skip
    columns = [
        "mesh", "processes", "attention", "shots", "tokens a step", "step s", "tokens/s", "of one", "peak GiB",
        "exchange", "collectives", "commit",
    ]  # fmt: skip
    sizes = ", ".join(f"{name} {value}" for name, value in rows[0]["model"].items())
    about = f"{rows[0]['gpu']}, {sizes}; shots of latents {rows[0]['latent']}; dense kernel {rows[0]['kernel']}"
    about += f"; blocks recomputed: {rows[0]['recomputed']}"
    return f"{about}:\n\n{markdown_table(columns, lines)}"
