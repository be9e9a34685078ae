"""This module takes one training step on meshes of processes, against the step of one process: losses and gradients
must be the same. And what is saved then comes back.

python -m torch.distributed.run --nproc_per_node 2 -m tests.meshes FOLDER [--device cpu]

FOLDER holds what one process made of each case to check, by `write_expected`.
"""

import os
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moc.batch import Sample, make_batch
from moc.config import MoCConfig
from moc.diffusion import Flow
from moc.schedule import MoCSchedule
from moc.training import (
    OptimConfig,
    Parallel,
    ParallelConfig,
    Trainer,
    TrainerConfig,
    find_checkpoint,
    offload,
    storage,
)
from moc.training.checkpoint import optimizer_states
from moc.training.shards import local, whole
from models import ModelConfig, build_model
from models.frozen import Base, replace_linears
from models.lora import Lora

CHANNELS, TEXT_DIM, HEADS = 4, 8, 4
# Anchors are few and drops many, so that the loss shows which chunks were dropped in and off.
SETTINGS = {
    "mmdit": MoCConfig(chunk_tokens=6, top_k=2, own_anchor="chunk", text_anchor="none", drop_in_rate=1.0),
    "wan": MoCConfig(chunk_tokens=6, top_k=2, own_anchor="chunk", drop_in_rate=1.0, dense_layers=1),
}
BASES = {"mmdit": Base.int8, "wan": Base.fp8}  # the format of the weights under an adapter
LORA = {"mmdit": ["to_qkv", "ffn.0"], "wan": ["to_q", "net.2"]}
# Each mesh has so many processes along its axes; `replicate` takes the others.
MESHES = {
    2: [{}, {"shard": 2}, {"sequence": 2}],
    4: [{"shard": 2}, {"sequence": 2}, {"shard": 2, "sequence": 2}, {"sequence": 4}],
}


@dataclass(frozen=True)
class Case:
    """A case is a model of a family, wholly trained or by an adapter; micro-batches a process; whether blocks are
    recomputed, and whether all attention is dense."""

    family: str
    lora: bool
    accumulation: int
    recomputed: bool
    dense: bool = False

    @property
    def name(self) -> str:
        words = (self.family, "lora" * self.lora, str(self.accumulation), "recomputed" * self.recomputed)
        return "_".join(filter(None, (*words, "dense" * self.dense)))

    def host(self, axes: dict[str, int]) -> dict[str, object]:
        """Returns what of it waits on the host, under a mesh of these axes: weights that are not trained, or
        activations."""
        if self.dense:
            return {"offload_activations": True}
        swaps = self.lora and self.recomputed and not axes
        return {"activation_checkpointing": True, "swap_blocks": 2} if swaps else {}


CASES = [
    Case(f, lora, 2 if lora else 1, not lora or f == "wan") for f, lora in product(("mmdit", "wan"), (False, True))
] + [Case("mmdit", False, 2, False, dense=True), Case("wan", False, 1, True, dense=True)]


def make_model(case: Case) -> nn.Module:
    """Returns a model with random weights throughout: those that begin at zero would hide what comes before them."""
    torch.manual_seed(0)
    extra = {"input_skip": True, "frame_place": True} if case.family == "mmdit" else {}
    config = ModelConfig(case.family, dim=16 * HEADS, num_layers=3, num_heads=HEADS, ffn_dim=40, **extra)
    model = build_model(config, CHANNELS, TEXT_DIM)
    _draw(model)
    if case.lora:
        replace_linears(model, BASES[case.family])
        model.add_lora(Lora(2, LORA[case.family], "", ""))
        _draw(model)
    if case.recomputed:
        model.enable_gradient_checkpointing()
    return model


def _draw(model: nn.Module) -> None:
    """Draws the trained weights of two dimensions or more."""
    for weight in model.parameters():
        if weight.requires_grad and weight.dim() >= 2:
            nn.init.normal_(weight, std=0.7 * weight.shape[-1] ** -0.5)


def make_samples() -> list[Sample]:
    """Returns eight samples of other numbers and sizes of shots: no number of processes divides their tokens."""
    generator = torch.Generator().manual_seed(1)

    def sample(position: int, grids: list[tuple[int, int, int]]) -> Sample:
        latents = [torch.randn(CHANNELS, *grid, generator=generator) for grid in grids]
        text = [torch.randn(3 + position % 2 + index, TEXT_DIM, generator=generator) for index in range(len(grids) + 1)]
        return Sample(latents, text, position)

    return [
        sample(0, [(3, 4, 6), (1, 4, 6), (2, 4, 6)]),
        sample(1, [(2, 6, 6), (3, 2, 6)]),
        sample(2, [(1, 6, 2), (2, 6, 2), (3, 6, 2), (1, 6, 2)]),
        sample(3, [(5, 4, 4)]),
        *(sample(position, [(1, 4, 2), (1, 2, 6)]) for position in range(4, 8)),
    ]


def make_trainer(case: Case, parallel: Parallel, folder: Path) -> Trainer:
    flow = Flow(dense_attention=0.0 if case.lora else 0.5)
    moc = replace(SETTINGS[case.family], dense=case.dense)
    return Trainer(
        parallel, make_model(case), flow, moc, MoCSchedule(), OptimConfig(clip_norm=0.5),
        TrainerConfig(save_in_background=case.lora), folder, 0, save_extras=lambda _: None,
    )  # fmt: skip


def step(case: Case, trainer: Trainer) -> dict[str, Tensor]:
    """Takes a step. Returns the loss, the gradient's norm before clipping, and whole gradients by name as the optimizer
    is given them."""
    model, parallel, samples = trainer.bare_model, trainer.parallel, make_samples()
    bins = parallel.data_ranks * case.accumulation
    packs = [samples[n::bins] for n in range(parallel.data_rank, bins, parallel.data_ranks)]
    batches = [make_batch(pack, model.stream, trainer.moc.chunk_tokens) for pack in packs]
    found: dict[str, Tensor] = {}

    def capture(*_: object) -> None:
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                found[name] = whole(weight.grad).cpu().clone()

    trainer.optimizer.register_step_pre_hook(capture)
    assert trainer._train_step(batches)
    totals = trainer._look(None)
    assert not totals.skipped
    return found | {"loss": torch.tensor(totals.loss), "grad_norm": torch.tensor(totals.grad_norm)}


def state(trainer: Trainer) -> list[Tensor]:
    """Returns what this process holds of the weights, their averages and the optimizer's states, on the CPU: blocks
    that are swapped lie on the GPU after a step, and wait on the host before one."""
    states = optimizer_states(trainer.bare_model, trainer.optimizer)
    tensors = (trainer.bare_model.state_dict(), trainer.ema.averages, states)
    return [local(tensor).cpu().clone() for by_name in tensors for _, tensor in sorted(by_name.items())]


def write_expected(folder: Path, device: str, cases: list[Case]) -> None:
    """Writes what one process makes of each case."""
    for case in cases:
        trainer = make_trainer(case, Parallel(ParallelConfig(device, "fp32")), folder)
        save_file(step(case, trainer), folder / f"{case.name}.safetensors")


def check(folder: Path, device: str) -> None:
    """Raises AssertionError where a mesh of these processes makes other losses or gradients, where a save gathers what
    is sharded, or where what a checkpoint gives back is not what was saved. Files are small, and so are many."""
    storage.SHARD_BYTES, offload._LEAST = 8000, 1
    cases = [case for case in CASES if (folder / f"{case.name}.safetensors").exists()]
    assert cases
    for axes, case in product(MESHES[int(os.environ["WORLD_SIZE"])], cases):
        parallel = Parallel(ParallelConfig(device, "fp32", **axes, **case.host(axes)))
        what = f"{case.name} on {axes}"
        run = folder / what
        trainer = make_trainer(case, parallel, run)
        assert_alike(step(case, trainer), load_file(folder / f"{case.name}.safetensors"), what)
        with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("a save gathers nothing")):
            trainer.save({"position": 0})
            trainer._saver.join()
        resumed = make_trainer(case, parallel, run)
        resumed.resume(find_checkpoint(run))
        assert len(state(resumed)) == len(state(trainer)), what
        assert all(map(torch.equal, state(resumed), state(trainer))), f"{what}: the checkpoint holds something else"


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), what
    size = torch.stack([x.norm() for name, x in expected.items() if name not in ("loss", "grad_norm")]).norm()
    for name, value in expected.items():
        least = 1e-3 * size if value.dim() else 0  # a nearly zero gradient is compared with this size
        wrong = float((found[name] - value).norm() / max(value.norm(), least))
        assert wrong < 1e-4, f"{what}: {name} differs by {wrong:.1e} of its size"


def launch(processes: int, folder: Path, device: str) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *torchrun, "-m", "tests.meshes", str(folder), "--device", device]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {})
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    check(asked.folder, asked.device)
    torch.distributed.destroy_process_group()
