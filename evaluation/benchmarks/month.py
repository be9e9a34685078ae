"""This module plans a long run on paper, by count and by the rows of `evaluation.benchmarks.parallel`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from evaluation.benchmarks.measurements import markdown_table, read_rows
from evaluation.benchmarks.parallel import SETUP
from moc.cost import FLOPS_PER_PAIR
from moc.errors import UserError, check_least
from moc.files import write_whole
from models import ModelConfig, build_model

MONTH = 30 * 86400  # seconds
GPUS_A_HOST = 8
STATE_BYTES = 20  # for each parameter in fp32: the weight, its average, its gradient and two states of AdamW
SAVED_BYTES = 16  # the same without the gradient
HEAD = [
    "sequence x shard x replicate", "films a step", "states GiB", "gathered GiB", "activations GiB", "sum GiB", "fits",
    "step s", "of it weights s", "steps a month", "tokens a month, 1e9", "days for all steps",
]  # fmt: skip

REPORT = """# A month's run on paper

{gpus} GPUs of {gpu_gib:.0f} GiB, {params:.1f} B parameters, all of them trained, films of {shots} shots and
{tokens:,} tokens. Made by scripts/plan_month.py from the rows of {measured} ({gpu}, commit
{commit}). **No such run was made**: all of this is counted.

{table}

Checkpoints of the first mesh: {saved:,.0f} GB each, one every {checkpoint_every} steps or {hours:.1f} hours. A host
has {a_host:.0f} GB of it and writes them in {writing:.0f} s, in the background if its memory holds them.
{on_disk:.1f} TB lie on the disk while one is written beside {keep_checkpoints}; {written:.0f} TB are written in a
month, and read once more for their checksums.

What is assumed:

- **Speed.** A GPU does {speed:.0f} TFLOP/s of the model's FLOPs (linears and attended pairs, forward and backward,
  recomputation not counted), as measured with the smaller model on one GPU; wider matrices should not be slower.
- **Sequence.** Two GPUs along it lost {loss:.0f} %, measured. More of them are to lose as much more as the share of
  tokens that is sent grows ({loss_of_eight:.0f} % of eight). They are in one host, over NVLink, as measured.
- **Weights** are gathered in fp32 for forward and for backward, and gradients scattered, or averaged over replicas, in
  fp32, at {network_gb:.0f} GB/s a GPU between hosts, with nothing hidden behind computation: an upper bound. Within
  one host all of this is taken for free.
- **Memory.** {state_bytes} bytes a parameter over sequence x shard, two blocks gathered, and activations of a
  recomputed step as measured, by token, layer and width. It fits where a tenth is left over.
- **Checkpoints** are {saved_bytes} bytes a parameter, written by all hosts at {disk_gb:g} GB/s each.
- Data is never waited for, and no host fails. A failure costs at most the steps since the last checkpoint, and the
  start.
"""


@dataclass(frozen=True)
class PlanConfig:
    """These settings describe the run to plan.

    model: the model's sizes; everything in it is trained.
    gpus: how many there are, eight to a host.
    gpu_gib: the memory of one.
    shots: how many a film has, each as long as those that were measured.
    meshes: pairs of parallel.sequence and parallel.shard; what is left over replicates.
    network_gb: gigabytes a second that a GPU sends and receives between hosts.
    disk_gb: gigabytes a second that a host writes.
    num_steps: steps of the whole run.
    checkpoint_every: steps between two checkpoints.
    keep_checkpoints: how many of the newest stay.
    measured: the rows of `benchmark_parallel.py`.
    output: the table to write.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    gpus: int = 64
    gpu_gib: float = 80.0
    shots: int = 8
    meshes: list[list[int]] = field(default_factory=lambda: [[8, 1], [8, 8], [4, 16], [2, 32]])
    network_gb: float = 50.0
    disk_gb: float = 2.0
    num_steps: int = 100_000
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    measured: str = "docs/benchmarks/parallel.json"
    output: str = "docs/benchmarks/month.md"

    def __post_init__(self) -> None:
        check_least(self, "", 1, "gpus", "shots", "num_steps", "checkpoint_every", "keep_checkpoints")
        for mesh in self.meshes:
            if len(mesh) != 2 or min(mesh) < 1 or self.gpus % (mesh[0] * mesh[1]):
                raise UserError(f"meshes: {mesh} must be two numbers whose product divides gpus={self.gpus}")


@dataclass(frozen=True)
class Size:
    """This counts a model's parameters. params: all of them. linears: those of the blocks' linear layers."""

    params: int
    linears: int
    dim: int
    layers: int

    @classmethod
    def of(cls, config: ModelConfig, latent_channels: int = 16, text_dim: int = 4096) -> "Size":
        with init_empty_weights():
            model = build_model(config, latent_channels, text_dim)
        linears = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
        params = sum(weight.numel() for weight in model.parameters())
        return cls(params, sum(layer.weight.numel() for layer in linears), config.dim, config.num_layers)

    def flops(self, shots: int, shot_tokens: int, moc: dict[str, Any]) -> float:
        """Counts a step with a film of so many shots: linears and attended pairs, forward and backward. Drops are left
        out, and the first shot has no routes."""
        tokens = shots * shot_tokens
        routed = min(moc["top_k"] * moc["chunk_tokens"], shot_tokens) * (shots - 1) / shots
        pairs = tokens * (shot_tokens + routed)
        return 3 * (2 * self.linears * tokens + FLOPS_PER_PAIR * self.dim * self.layers * pairs)


class Measured:
    """This is what the measured rows say of a GPU: flops, a second; loss, the share two GPUs along `sequence` lose;
    shot tokens; bytes of activations for a token, a layer and a number of the model's width. They are those of the
    longest film on one GPU and on two. Raises UserError where there is none."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        moc = [row for row in rows if row["impl"] == "moc" and "problem" not in row]
        ones = [row for row in moc if row["mesh"] == "one"]
        twos = [row for row in moc if (row["mesh"], row["processes"]) == ("sequence", 2)]
        same = (*SETUP, "shots")
        pairs = [(one, two) for one in ones for two in twos if all(one[name] == two[name] for name in same)]
        if not pairs:
            raise UserError(
                "no MoC step is measured both on one GPU and on two by sequence; benchmark_parallel.py does"
            )
        one, two = max(pairs, key=lambda pair: pair[0]["shots"])
        self.moc, self.gpu, self.commit, sizes, shots = (
            two[name] for name in ("moc", "gpu", "commit", "model", "shots")
        )
        dim, layers, heads, ffn_dim = (int(sizes[name]) for name in ("dim", "num_layers", "num_heads", "ffn_dim"))
        size = Size.of(ModelConfig(sizes["family"], dim=dim, num_layers=layers, num_heads=heads, ffn_dim=ffn_dim))
        self.shot_tokens = one["tokens"] // shots
        self.flops = size.flops(shots, self.shot_tokens, self.moc) / one["step_seconds"]
        self.loss = 1 - one["step_seconds"] / two["step_seconds"] / 2
        activations = one["peak_bytes"] - STATE_BYTES * size.params
        self.activation_bytes = activations / (one["tokens"] * size.dim * size.layers)

    def efficiency(self, sequence: int) -> float:
        """Returns the share of their speed that GPUs have along `sequence`: what is lost grows as the share of tokens
        sent."""
        return 1 - self.loss * (1 - 1 / sequence) / (1 - 1 / 2)


def plan(config: PlanConfig, measured: Measured, size: Size, sequence: int, shard: int) -> dict[str, float]:
    """Returns the numbers of one mesh. Raises UserError where `sequence` does not divide the heads."""
    if config.model.num_heads % sequence:
        raise UserError(f"meshes: sequence={sequence} must divide the model's {config.model.num_heads} heads")
    films, tokens = config.gpus // sequence, config.shots * measured.shot_tokens
    held = sequence * shard
    gathered = 2 * 4 * size.params / size.layers  # two gathered blocks: the one in use and the next one
    activations = measured.activation_bytes * tokens * size.dim * size.layers / sequence
    flops = size.flops(config.shots, measured.shot_tokens, measured.moc) / sequence
    computing = flops / measured.flops / measured.efficiency(sequence)
    # Weights are gathered for forward and for backward and gradients scattered once, across hosts if several hold
    # them; gradients are also averaged over replicas.
    gathered_bytes = 3 * 4 * size.params * (1 - 1 / held) if held > GPUS_A_HOST else 0
    averaged_bytes = 2 * 4 * size.params / held if config.gpus > max(held, GPUS_A_HOST) else 0
    weights = (gathered_bytes + averaged_bytes) / (config.network_gb * 1e9)
    return {
        "films": films,
        "states": STATE_BYTES * size.params / held / 2**30,
        "gathered": gathered / 2**30,
        "activations": activations / 2**30,
        "step": computing + weights,
        "weights": weights,
        "tokens": films * tokens,
    }


def line(config: PlanConfig, mesh: list[int], values: dict[str, float]) -> list[object]:
    """Returns the cells of a mesh in the table."""
    memory = [values[name] for name in ("states", "gathered", "activations")]
    steps = MONTH / values["step"]
    return [
        f"{mesh[0]} x {mesh[1]} x {config.gpus // (mesh[0] * mesh[1])}", values["films"],
        *(f"{gib:.1f}" for gib in [*memory, sum(memory)]), "yes" if sum(memory) < 0.9 * config.gpu_gib else "no",
        f"{values['step']:.1f}", f"{values['weights']:.1f}", f"{steps:,.0f}", f"{steps * values['tokens'] / 1e9:.0f}",
        f"{config.num_steps * values['step'] / 86400:.1f}",
    ]  # fmt: skip


def report(config: PlanConfig, rows: list[dict[str, Any]]) -> str:
    """Returns the table, and what it assumes. rows: those of `benchmark_parallel.py`."""
    measured, size = Measured(rows), Size.of(config.model)
    values = [plan(config, measured, size, *mesh) for mesh in config.meshes]
    saved, every = SAVED_BYTES * size.params, config.checkpoint_every * values[0]["step"]
    a_host = saved / max(1, config.gpus // GPUS_A_HOST)
    return REPORT.format(
        **vars(config),
        params=size.params / 1e9,
        tokens=config.shots * measured.shot_tokens,
        gpu=measured.gpu,
        commit=measured.commit,
        table=markdown_table(HEAD, [line(config, *pair) for pair in zip(config.meshes, values, strict=True)]),
        saved=saved / 1e9,
        hours=every / 3600,
        a_host=a_host / 1e9,
        writing=a_host / config.disk_gb / 1e9,
        on_disk=(config.keep_checkpoints + 1) * saved / 1e12,
        written=saved * MONTH / every / 1e12,
        speed=measured.flops / 1e12,
        loss=100 * measured.loss,
        loss_of_eight=100 * (1 - measured.efficiency(8)),
        state_bytes=STATE_BYTES,
        saved_bytes=SAVED_BYTES,
    )


def write_plan(config: PlanConfig) -> None:
    """Writes the table and prints it."""
    text = report(config, read_rows(Path(config.measured)))
    write_whole(Path(config.output), text.encode())
    print(text)
