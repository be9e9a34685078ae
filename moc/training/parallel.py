"""How a run is spread over processes: built once, from outside; models are single-device code."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class ParallelConfig:
    """precision: of the forward pass ("no" is fp32). accumulation: micro-batches a step on each process.
    activation_checkpointing: recompute blocks in backward; routes are kept. cpu: train on the CPU even beside a GPU."""

    precision: str = "bf16"
    accumulation: int = 1
    activation_checkpointing: bool = False
    cpu: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"parallel.precision={self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.accumulation < 1:
            raise ValueError(f"parallel.accumulation={self.accumulation} must be at least 1")


def build_accelerator(config: ParallelConfig) -> Accelerator:
    """The processes of this run, as `accelerate launch` or a plain `python` started them (data-parallel)."""
    return Accelerator(
        mixed_precision=config.precision,
        cpu=config.cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def resolve_device(name: str) -> torch.device:
    """The device a setting names; "auto" is the GPU where there is one."""
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
