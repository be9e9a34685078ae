"""A command ends well while its loader hangs, or is just taking an item ahead."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from moc.training import find_checkpoint, read_metrics
from moc.training.interruption import NOT_FINISHED, SIGNALS
from tests.pipeline import ROOT, train_arguments

HANGING = """
import pathlib, runpy, sys, time
import data.loading.dataset

read, hung = data.loading.dataset.ShotDataset.sample, pathlib.Path(sys.argv.pop(1))

def sample(self, draw):
    if draw.position >= 60:
        hung.touch()
        time.sleep(3600)
    return read(self, draw)

data.loading.dataset.ShotDataset.sample = sample
sys.path.insert(0, ".")
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@contextmanager
def hanging(prepared: Path, run: Path, *launcher: str) -> Iterator[subprocess.Popen]:
    """Yields a training command in a session of its own, after some steps, when a worker of its loader hangs for
    good."""
    program = run.with_suffix(".py")
    program.write_text(HANGING)
    settings = ("trainer.num_steps=999", "trainer.log_every=1", "trainer.checkpoint_every=0", "data.workers=2")
    command = [sys.executable, *launcher, str(program), str(run) + ".hung", *train_arguments(prepared, run), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not (run.with_suffix(".hung").exists() and len(read_metrics(run)) > 2):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS if n != signal.SIGINT)]
)
def test_a_command_with_a_hanging_worker(prepared, tmp_path, number):
    """The whole process group gets the signal, as from a terminal or a scheduler."""
    run = tmp_path / "run"
    with hanging(prepared, run) as process:
        os.killpg(process.pid, number)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == NOT_FINISHED
        with pytest.raises(ProcessLookupError):  # no worker is left
            os.killpg(process.pid, 0)
    step = json.loads((find_checkpoint(run) / "state.json").read_text())["step"]
    assert step >= 2
    assert said.splitlines()[-1] == f"{number.name}: step {step} of 999 is saved; the same command goes on"
    assert "Traceback" not in said


@pytest.mark.slow
def test_processes_agree_where_to_end(prepared, tmp_path):
    """The launcher hands its signal to both, while a worker of each hangs at another time."""
    run = tmp_path / "run"
    handled = "--signals-to-handle=" + ",".join(n.name for n in SIGNALS)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", handled)
    with hanging(prepared, run, *launcher) as process:
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    step = json.loads((find_checkpoint(run) / "state.json").read_text())["step"]
    assert f"SIGUSR1: step {step} of 999 is saved" in said
    assert len(read_metrics(run)) >= step


@pytest.mark.slow
def test_processes_outlive_no_launcher(prepared, tmp_path):
    """It is killed, and both processes save as if they were told to end."""
    run = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    with hanging(prepared, run, *launcher) as process:
        processes = psutil.Process(process.pid).children()
        assert len(processes) == 2
        process.kill()
        assert psutil.wait_procs(processes, timeout=120)[1] == []
    assert find_checkpoint(run) is not None


LEFT = """
import torch
from data.loading.ahead import ahead

def products():
    x = torch.randn(600, 600)
    while True:
        for _ in range(20):
            x = (x @ x).tanh()
        yield x

items = ahead(products)
next(items)
"""


@pytest.mark.parametrize("more", ["", "raise SystemExit(3)"])
def test_a_program_ends_well_while_an_item_is_taken_ahead(more):
    """The thread is within an operator of torch then, where Python would end it with the whole process."""
    program = [sys.executable, "-c", LEFT + more]
    done = subprocess.run(
        program, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (3 if "3" in more else 0, b"")


@pytest.mark.slow
def test_a_program_waits_until_a_loader_has_found_its_workers_dead():
    """torch looks every five seconds; a thread that is cut off in what follows aborts the whole process."""
    program = """
import time
from data.loading.ahead import ahead

def items():
    yield 1
    time.sleep(6)
    print("found", flush=True)
    yield 2

next(ahead(items))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "found\n")
