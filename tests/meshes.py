"""One training step on meshes of processes, against the step of one process: losses and gradients must be the same.

python -m torch.distributed.run --nproc_per_node 2 -m tests.meshes FOLDER [--device cpu]

FOLDER holds what one process made of each case (`CASES`), by `write_expected`.
"""

import os
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moc.batch import Batch, Sample, make_batch
from moc.config import MoCConfig
from moc.diffusion import Flow
from moc.schedule import MoCSchedule
from moc.training import OptimConfig, Parallel, ParallelConfig, Trainer, TrainerConfig
from moc.training.shards import whole
from models import ModelConfig, build_model
from models.lora import Lora

CHANNELS, TEXT_DIM, HEADS = 4, 8, 4
# Few anchors and many drops, so that what a query loses or gains by chance tells in the loss.
SETTINGS = {
    "mmdit": MoCConfig(chunk_tokens=6, top_k=2, own_anchor="chunk", text_anchor="none", drop_in_rate=1.0),
    "wan": MoCConfig(chunk_tokens=6, top_k=2, own_anchor="chunk", drop_in_rate=1.0, dense_layers=1),
}
LORA = {"mmdit": ["to_qkv", "ffn.0"], "wan": ["to_q", "net.2"]}
# What the processes of a mesh are along each axis; `replicate` takes what is left over.
MESHES = {
    2: [{}, {"shard": 2}, {"sequence": 2}],
    4: [{"shard": 2}, {"sequence": 2}, {"shard": 2, "sequence": 2}, {"sequence": 4}],
}


@dataclass(frozen=True)
class Case:
    """A model of a family, wholly trained or by an adapter; micro-batches a process; whether blocks are recomputed."""

    family: str
    lora: bool
    accumulation: int
    recomputed: bool

    @property
    def name(self) -> str:
        return f"{self.family}{'_lora' * self.lora}_{self.accumulation}{'_recomputed' * self.recomputed}"


CASES = [Case(f, lora, 2 if lora else 1, not lora) for f, lora in product(("mmdit", "wan"), (False, True))]


def make_model(case: Case) -> nn.Module:
    """Random weights throughout: those that begin at zero would hide what comes before them."""
    torch.manual_seed(0)
    extra = {"input_skip": True, "frame_place": True} if case.family == "mmdit" else {}
    config = ModelConfig(case.family, dim=16 * HEADS, num_layers=3, num_heads=HEADS, ffn_dim=40, **extra)
    model = build_model(config, CHANNELS, TEXT_DIM)
    if case.lora:
        model.add_lora(Lora(2, LORA[case.family], "", ""))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.7 * weight.shape[-1] ** -0.5)
    if case.recomputed:
        model.enable_gradient_checkpointing()
    return model


def make_samples() -> list[Sample]:
    """Eight samples of other numbers and sizes of shots: no number of processes divides their tokens."""
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


def step(case: Case, parallel: Parallel) -> dict[str, Tensor]:
    """The loss, the gradient's norm before clipping, and whole gradients by name as the optimizer is given them."""
    model, samples = make_model(case), make_samples()
    settings = SETTINGS[case.family]
    bins = parallel.data_ranks * case.accumulation
    packs = [samples[n::bins] for n in range(parallel.data_rank, bins, parallel.data_ranks)]
    batches: list[Batch] = [make_batch(pack, model.stream, settings.chunk_tokens) for pack in packs]
    found: dict[str, Tensor] = {}
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            parallel, model, Flow(), settings, MoCSchedule(), OptimConfig(clip_norm=0.5), TrainerConfig(),
            Path(folder), 0, save_extras=lambda _: None,
        )  # fmt: skip

        def capture(*_: object) -> None:
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    found[name] = whole(weight.grad).cpu().clone()

        trainer.optimizer.register_step_pre_hook(capture)
        assert trainer._train_step(batches)
        totals = trainer._look(None)
    assert not totals.skipped
    return found | {"loss": torch.tensor(totals.loss), "grad_norm": torch.tensor(totals.grad_norm)}


def write_expected(folder: Path, device: str) -> None:
    """What one process makes of each case."""
    for case in CASES:
        save_file(step(case, Parallel(ParallelConfig(device, "fp32"))), folder / f"{case.name}.safetensors")


def check(folder: Path, device: str) -> None:
    """Raises AssertionError where a mesh of these processes makes other losses or gradients."""
    for axes, case in product(MESHES[int(os.environ["WORLD_SIZE"])], CASES):
        found = step(case, Parallel(ParallelConfig(device, "fp32", **axes)))
        expected = load_file(folder / f"{case.name}.safetensors")
        assert found.keys() == expected.keys()
        size = torch.stack([x.norm() for name, x in expected.items() if name not in ("loss", "grad_norm")]).norm()
        for name, value in expected.items():
            least = 1e-3 * size if value.dim() else 0  # a gradient that is all but zero counts as so large
            wrong = float((found[name] - value).norm() / max(value.norm(), least))
            assert wrong < 1e-4, f"{case.name} on {axes}: {name} differs by {wrong:.1e} of its size"


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
