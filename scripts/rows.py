"""What benchmarks that train rows side by side share: a training of so many minutes, where it ran, and the record."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from data.records import write_whole
from moc.checkout import commit
from moc.training import Parallel

ROOT = Path(__file__).parents[1]


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


def machine(parallel: Parallel) -> dict:
    """Device, cores, versions, commit and date."""
    return {
        "device": parallel.device_name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def append(output: Path, row: dict, key: Sequence[str]) -> list[dict]:
    """Puts a row into the record, in the place of an earlier one with the same values of `key`, of which one that a row
    lacks is ""; returns all rows."""
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    row = json.loads(json.dumps(row))  # with keys of text, as the earlier ones have
    place = [row.get(name, "") for name in key]
    rows = [other for other in rows if [other.get(name, "") for name in key] != place] + [row]
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"
    write_whole(output, f'{{"rows": {text}}}\n'.encode())
    return rows
