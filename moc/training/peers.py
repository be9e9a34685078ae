"""The processes of a command know of each other through the key-value store in which they met: where each of them is,
and whether it ends knowingly or is dead."""

import os
import socket
import time
from typing import Any

import torch.distributed as dist


def sign_in() -> None:
    """Tells the others where this process is."""
    _store().set(f"moc/process/{dist.get_rank()}", f"{socket.gethostname()} {os.getpid()}")


def take_leave() -> None:
    """Tells the others that this process ends and knows why, so that none of them takes it for dead."""
    _store().set(f"moc/leaves/{dist.get_rank()}", "")


def silent(seconds: float) -> list[str]:
    """Takes leave; returns the processes that have not done so after some seconds, such as "rank 1 on host"."""
    take_leave()
    time.sleep(seconds)
    return [f"rank {rank} on {host}" for rank, (host, _) in _processes().items() if not _leaves(rank)]


def dead_processes() -> list[str]:
    """Takes leave; returns the processes of this host that ended without doing so. There are none before the processes
    have met, and after they have parted."""
    if not dist.is_initialized():
        return []
    try:
        take_leave()
        beside = {rank: at for rank, at in _processes().items() if at[0] == socket.gethostname()}
        return [f"rank {rank} on {host}" for rank, (host, pid) in beside.items() if not (_leaves(rank) or _lives(pid))]
    except dist.DistError:  # the store was the launcher's, which is dead
        return []


def _processes() -> dict[int, tuple[str, int]]:
    """Returns host and process id of each process that has signed in, by its rank."""
    signed = [rank for rank in range(dist.get_world_size()) if _store().check([f"moc/process/{rank}"])]
    places = {rank: _store().get(f"moc/process/{rank}").decode().split() for rank in signed}
    return {rank: (host, int(pid)) for rank, (host, pid) in places.items()}


def _leaves(rank: int) -> bool:
    return _store().check([f"moc/leaves/{rank}"])


def _lives(pid: int) -> bool:
    """Returns whether a process of this command still runs. If another user's process has its id, it has ended."""
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _store() -> Any:
    """Returns the store, which outlives any of the processes."""
    return dist.distributed_c10d._get_default_store()
