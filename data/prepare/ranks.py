"""This module coordinates the processes that prepare together, on one host or many, and reserves their output folder.

They share a folder and talk at a few points only: to wait for each other, and to take the first process's list of
what there is to do, since hosts may see different states of a shared folder. No clock of any host is compared.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from tqdm import tqdm

from data.errors import DataError
from moc import files

Item = TypeVar("Item")
_PATIENCE = timedelta(days=7)  # one process may have hours of film left when another is done


@dataclass(frozen=True)
class Process:
    """This is the running process among those that prepare together. wait: returns when all have called it. first:
    given a list, returns the one that the first process gave."""

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None
    first: Callable[[list[str]], list[str]] = lambda names: names

    def share(self, items: Mapping[str, Item], label: str, done: Container[str] = ()) -> Iterator[Item]:
        """Yields every world_size-th item that is not done, by the first process's list, with progress and an estimate
        of the time left. Raises DataError (other-input) for an item that only the first process has."""
        todo = self.first([name for name in items if name not in done])
        for name in tqdm(todo[self.rank :: self.world_size], desc=label, disable=self.rank != 0, unit="item"):
            if name not in items:
                raise DataError("other-input", name, "is not what every process finds; do all see the same input?")
            yield items[name]


def joined() -> Process:
    """Returns this process of those that torch.distributed has joined, or the only one."""
    if not dist.is_initialized():
        return Process()
    group = dist.new_group(timeout=_PATIENCE, backend="gloo")

    def wait() -> None:
        with _lost_peers():
            dist.barrier(group)

    def first(names: list[str]) -> list[str]:
        box = [names]
        with _lost_peers():
            dist.broadcast_object_list(box, src=0, group=group)
        return box[0]

    return Process(dist.get_rank(), dist.get_world_size(), wait, first)


@contextmanager
def _lost_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DataError(
            "lost-process", "prepare", "another process ended, see what it said; run again to go on"
        ) from error


@contextmanager
def held(output: Path, process: Process) -> Iterator[None]:
    """Holds the output folder for this run alone; the first process does so for all. Raises DataError: output-in-use,
    cannot-write."""
    with ExitStack() as stack:
        try:
            stack.enter_context(files.held(output, holds=process.rank == 0))
        except files.HeldError as error:
            raise DataError(
                "output-in-use", output, "another run is preparing into it; wait for its end, or name another output"
            ) from error
        except OSError as error:
            raise DataError("cannot-write", output, f"{error.strerror}; name a folder that can be written") from error
        yield
