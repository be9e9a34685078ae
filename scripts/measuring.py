"""Holds what benchmarks share: a warm median of device times, where a row is measured, and a training of so many
minutes."""

import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from configs.command import CONFIGS
from moc.checkout import commit
from moc.diffusion import SamplingConfig
from moc.errors import UserError
from moc.kernels import dense
from moc.training import Parallel

ROOT = Path(__file__).parents[1]


def check_gpu() -> None:
    """Raises UserError where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise UserError("this is to be timed on a CUDA GPU, and torch finds none here; run it where there is one")


def median_ms(function: Callable[[], object], repeats: int, warm_up: float = 0.4) -> float:
    """Returns the median time of `function` on the device, after `warm_up` seconds of it unless repeats is 1: the GPU's
    power limit shows only after some tenths of a second."""
    end_of_warm_up = time.monotonic() + (warm_up if repeats > 1 else 0)
    while time.monotonic() < end_of_warm_up:
        function()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bytes_per_ms() -> float:
    """Returns bytes read and written a millisecond by a copy of 4 GB."""
    source = torch.empty(1 << 31, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), 10)


def matmul_flops_per_ms(size: int = 8192) -> float:
    """Returns FLOPs a millisecond of one square bf16 matmul."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, 20)


def header() -> dict:
    """Returns GPU, versions, commit and date of a measurement; None stands for what is not there."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": import_module("triton").__version__ if find_spec("triton") else None,
        "fa4": version("flash-attn-4") if dense.is_installed("fa4") else None,
        "fa3": "installed" if dense.is_installed("fa3") else None,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def machine(parallel: Parallel) -> dict:
    """Returns device, cores, versions, commit and date."""
    return {
        "device": parallel.device_name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def lag_of(way: str) -> float:
    """Returns the lag that `sampler=WAY` sets (configs/sampler/WAY.yaml)."""
    changed: dict[str, Any] = yaml.safe_load((CONFIGS / "sampler" / f"{way}.yaml").read_text())
    return changed.get("lag", SamplingConfig.lag)


def train_for(minutes: float, words: list[str], log: Path) -> float:
    """Runs train.py with settings `words` for so many minutes at most, or goes on with it; returns the minutes taken.

    A run that is not finished has saved a checkpoint by then. What it prints goes to the end of `log`.
    """
    start = time.monotonic()
    with log.open("a") as output:
        job = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=output, stderr=output)
        try:
            job.wait(minutes * 60)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGTERM)  # it saves a checkpoint
            job.wait()
        finally:
            job.kill()
    return (time.monotonic() - start) / 60
