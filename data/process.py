"""The processes that prepare together, and the output folder they hold."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import filelock
from tqdm import tqdm

from data.errors import DataError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Process:
    """This process among those preparing together. wait: returns when all have come to the same point."""

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None

    def share(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Every world_size-th item, with progress and an estimate of the time left."""
        mine = items[self.rank :: self.world_size]
        yield from tqdm(mine, desc=label, disable=self.rank != 0, unit="item")


class held:
    """The output folder, for this run alone."""

    def __init__(self, output: Path, process: Process) -> None:
        self.output, self.process = output, process

    def __enter__(self) -> None:
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.output / ".lock", timeout=0)
            if self.process.rank == 0:
                self.lock.acquire()
        except filelock.Timeout as error:
            raise DataError("output-in-use", self.output, "another run is preparing into it") from error
        except OSError as error:
            raise DataError("cannot-write", self.output, f"{error.strerror}") from error

    def __exit__(self, *_: object) -> None:
        self.lock.release()
