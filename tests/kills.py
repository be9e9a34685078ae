"""This module kills training without warning at random moments, saves included, and lets it go on:
python -m tests.kills CACHE FOLDER RANKS KILLS

Everything is imported once: each launch is a fork of this process, which itself never computes.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from moc.training import find_checkpoint
from tests.runs import DROPS, losses, train

STEPS = 10


class Launch:
    """A launch is the processes of a run, or of what is left of it, which saves after every step."""

    def __init__(self, ranks: int, cache: Path, folder: Path, background: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self._steps, told = os.pipe()  # a byte for each step that the first process begins
        self.processes = []
        for rank in range(ranks):
            process = os.fork()
            if not process:
                _work(rank, ranks, address, told, cache, folder, background)
            self.processes.append(process)
        os.close(told)

    def wait_for_a_step(self) -> None:
        os.read(self._steps, 1)

    def end(self) -> bool:
        """Returns whether all processes end well."""
        os.close(self._steps)
        statuses = [os.waitpid(process, 0)[1] for process in self.processes]
        return not any(statuses)

    def kill(self) -> bool:
        """Ends the processes one after another; returns whether any was still at work."""
        for process in random.sample(self.processes, len(self.processes)):
            os.kill(process, signal.SIGKILL)
            time.sleep(0.01)
        return not self.end()


def _work(
    rank: int, ranks: int, address: dict[str, str], told: int, cache: Path, folder: Path, background: bool
) -> None:
    status = 1
    try:
        if ranks > 1:
            os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
            os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        torch.set_num_threads(1)
        resume = find_checkpoint(folder) is not None
        settings = {"checkpoint_every": 1, "save_in_background": background, "axes": {"shard": ranks}}
        first = rank == 0
        train(cache, folder, STEPS, resume, moc=DROPS, before_step=lambda _: first and os.write(told, b"."), **settings)
        status = 0
    finally:
        os._exit(status)  # ends at once, without closing what belongs to the parent


def main(cache: Path, folder: Path, ranks: int, kills: int) -> dict[str, int]:
    """Raises AssertionError where a run that was killed has other losses than one that was not."""
    whole = Launch(ranks, cache, folder / "whole", background=False)
    whole.wait_for_a_step()
    started = time.monotonic()
    assert whole.end()
    duration, expected = time.monotonic() - started, losses(folder / "whole")
    assert len(expected) == STEPS
    told = {"kills": 0, "in a save": 0, "runs": 0}
    while told["kills"] < kills:
        told["runs"] += 1
        run, background = folder / f"run_{told['runs']}", bool(told["runs"] % 2)
        working = True
        while working and told["kills"] < kills:
            launch = Launch(ranks, cache, run, background)
            if random.random() < 0.9:  # the other launches are killed while they start
                launch.wait_for_a_step()
            time.sleep(random.uniform(0, duration / 3))
            working = launch.kill()
            told["kills"] += working
            told["in a save"] += working and bool(list(run.glob("checkpoints/partial_*")))
        assert Launch(ranks, cache, run, background).end()
        assert losses(run) == expected, f"{run}: {losses(run)} instead of {expected}"
    return told


if __name__ == "__main__":
    random.seed(0)
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
