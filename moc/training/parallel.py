"""How a run is spread over processes: built once, from outside; models are single-device code."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs

from moc.errors import UserError, check_least

PRECISIONS = ("no", "bf16")
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of torch and of MPI


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
            raise UserError(f"parallel.precision={self.precision!r} is not one of {', '.join(PRECISIONS)}")
        check_least(self, "parallel", 1, "accumulation")


def join_processes(cpu: bool = False) -> PartialState:
    """This process among those that `accelerate launch`, torchrun or a plain `python` started.

    Without a GPU the CPU is meant, which accelerate must be told: it overlooks the ranks of a launch otherwise.
    Raises ValueError where accelerate was asked for several processes and started one.
    """
    environment = os.environ.keys()
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment and environment.isdisjoint(_WORLD_SIZES):
        raise UserError(
            "accelerate launch was asked for several processes and started one: it hands them to torch's launcher with "
            "--multi_gpu only; say that, which needs no GPU, and leave --cpu out"
        )
    return PartialState(cpu=cpu or not torch.accelerator.is_available())


def build_accelerator(config: ParallelConfig) -> Accelerator:
    """The processes of this run (data-parallel)."""
    return Accelerator(
        mixed_precision=config.precision,
        cpu=join_processes(config.cpu).device.type == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def resolve_device(name: str) -> torch.device:
    """The device a setting names; "auto" is the GPU where there is one. Raises UserError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except Exception:  # of several types: an unknown name, a torch without CUDA, too large a number
        here = ["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise UserError(
            f"device={name} is none that torch {torch.__version__} finds here; say one of {', '.join(here)}"
        ) from None
    return device


def gather_lists(values: list) -> list:
    """The lists of all processes, one after another, on each of them."""
    if not dist.is_initialized():
        return values
    lists: list = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]
