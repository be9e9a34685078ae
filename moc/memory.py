"""This module tells how much memory there is, and what training and sampling say where it is full."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from moc.batch import Batch
from moc.errors import UserError

STEP = (
    "lower data.batch_tokens, raise parallel.accumulation, which deals a step's tokens to more micro-batches, set "
    "parallel.activation_checkpointing=true and parallel.offload_activations=true, under an adapter set "
    "model.lora_base=fp8 and parallel.swap_blocks, or spread weights or films over several processes: parallel.shard, "
    "parallel.sequence"
)
VALIDATION = "hold out shorter scenes, or none: data.validation=0"
SAMPLING = (
    "take sampler=shot_by_shot or sampler=staggered, with a smaller sampler.context_shots, which hold fewer shots at "
    "once, sampler.offload_cache=true where moc=forward keeps their keys and values, offload=true where one process "
    "holds two experts, swap_blocks=N, which keeps so many blocks in the host's memory, or "
    "a script of shorter shots or a smaller size"
)

_CONTAINER = Path("/sys/fs/cgroup")  # the kernel shows a container its own limits here
_FULL_HOST = "can't allocate memory"  # torch's words where the host refuses, in a plain RuntimeError


def peak_gib(device: torch.device) -> dict[str, float]:
    """Returns the most memory that tensors of this process took on a GPU; nothing is known of a CPU."""
    return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def usable_bytes(device: torch.device) -> int:
    """Returns bytes that this process has or can still get on a device. On a CPU that is all of the memory, since what
    is lent to files and to others is not lost, or what a container may have of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, _number("", _CONTAINER / "memory.max"))
    except (OSError, ValueError):
        return memory  # no Linux, no container, or one without a limit


def host_free_bytes() -> int:
    """Returns bytes of the host's memory, or of its container's, that each process started here can still take."""
    left = usable_bytes(torch.device("cpu"))
    try:
        left = min(left, 1024 * _number("MemAvailable: +", "/proc/meminfo"))
        # What a container took of files' contents comes back; what is its own (anon) does not.
        left = min(left, _number("", _CONTAINER / "memory.max") - _number("anon ", _CONTAINER / "memory.stat"))
    except (OSError, ValueError):
        pass  # no Linux, no container, or one without a limit
    return left // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _number(after: str, file: str | Path) -> int:
    """Returns the number that a line of a file of the kernel begins with, after what the expression `after` matches.
    Raises ValueError where no line does."""
    found = re.search(rf"^{after}(\d+)", Path(file).read_text(), re.MULTILINE)
    if not found:
        raise ValueError(f"{file} has no line of {after!r} and a number")
    return int(found[1])


@contextmanager
def enough_for(what: str, remedy: str, batches: Sequence[Batch] = ()) -> Iterator[None]:
    """Raises UserError, with the tokens of the batches, where what is done meanwhile fills the memory."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _FULL_HOST not in str(error):
            raise
        raise UserError(f"{what}{_size(batches)} does not fit into {_filled(str(error))}: {remedy}") from error


def _size(batches: Sequence[Batch]) -> str:
    tokens = [batch.layout.num_tokens for batch in batches]
    return f" of {sum(tokens)} tokens, the most in one batch {max(tokens)}," if tokens else ""


def _filled(error: str) -> str:
    """Returns which memory is full and what torch says of it."""
    reason = error.partition(". GPU")[0].rstrip(".")
    return f"memory ({reason[reason.index(_FULL_HOST) :]})" if _FULL_HOST in reason else f"the GPU's memory ({reason})"
