"""This module trains the rows of a benchmark: each is train.py with settings of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from moc.checkout import ROOT


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
