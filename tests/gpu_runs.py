"""This module has runs of commands on a GPU, and what tests ask of what came of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moc.training import find_checkpoint, read_metrics
from tests import pipeline

NUM_SHOTS = 3  # the story's number of shots
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def launched(*words: str) -> str:
    """Runs a command in new processes; returns what it said."""
    done = subprocess.run([sys.executable, *words], cwd=pipeline.ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields the names of the Triton kernels that are compiled, or loaded from Triton's cache, meanwhile."""
    from triton import knobs

    names: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: names.append(fn.name)
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before


def train(data: Path, run: Path, *arguments: str) -> Path:
    """Returns three steps of a tiny model where the command itself chooses to."""
    return pipeline.train(data, run, "parallel.device=auto", *arguments)


def assert_trained(run: Path, steps: int) -> None:
    """Every step has a finite loss and gradient, validation as well, and the last step's checkpoint is whole."""
    rows = read_metrics(run)
    numbers = [row for row in rows if "loss" in row]
    assert [row["step"] for row in numbers] == list(range(1, steps + 1))
    validation = [value for row in rows for key, value in row.items() if key.startswith("validation/")]
    assert validation
    assert torch.tensor([*validation, *(row[key] for row in numbers for key in ("loss", "grad_norm"))]).isfinite().all()
    assert find_checkpoint(run).name == f"step_{steps:07d}"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def assert_filmed(film: Path, shots: int = NUM_SHOTS) -> list[torch.Tensor]:
    """Every file is there and the GPU is in the record; returns the latents, which are finite."""
    names = {"video.mp4", "storyboard.png", "routing.png", "metadata.json"}
    numbered = {f"shots/{n:02d}.mp4" for n in range(1, shots + 1)}
    latents = [f"latents/{n:02d}.safetensors" for n in range(1, shots + 1)]
    found = {str(path.relative_to(film)) for path in film.rglob("*") if path.is_file()}
    assert found >= names | numbered | set(latents)
    assert json.loads((film / "metadata.json").read_text())["device"] == torch.cuda.get_device_name()
    tensors = [load_file(film / name)["latent"] for name in latents]
    assert all(latent.isfinite().all() for latent in tensors)
    return tensors


def assert_alike(some: list[torch.Tensor], others: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(some, others, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
