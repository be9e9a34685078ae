"""This module times work on a GPU: warm medians, and the rates of copies and matmuls, which floors are told by."""

import statistics
import time
from collections.abc import Callable

import torch

from moc.errors import UserError


def check_gpu(device: str = "auto") -> None:
    """Raises UserError where there is no GPU to measure. device: the setting's value; "cpu" tries a benchmark on small
    sizes, without a GPU."""
    if device != "cpu" and not torch.cuda.is_available():
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


def matmul_flops_per_ms() -> float:
    """Returns FLOPs a millisecond of one large square bf16 matmul."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, 20)
