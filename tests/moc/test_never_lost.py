"""A run outlives a full disk, names what hangs and what is out of the ordinary, and keeps the checkpoints it is to."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moc.diffusion import Flow
from moc.training import Metrics, TrackerConfig, read_metrics
from moc.training import checkpoint as ckpt
from moc.training.outcome import Outcome, Spikes, Totals
from tests.runs import full_at, launched, losses, train


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# A full disk


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(cache, tmp_path, caplog):
    settings = {"num_steps": 3, "checkpoint_every": 1}
    assert train(cache, tmp_path / "run", save_extras=full_at(2), **settings).finished
    assert checkpoints(tmp_path / "run") == ["step_0000001", "step_0000003"]
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "step_0000002 cannot be written: No space left on device" in warning
    assert "the run goes on" in warning
    train(cache, tmp_path / "whole", **settings)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_last_checkpoint_must_be_written(cache, tmp_path):
    with pytest.raises(ckpt.DiskError, match=r"step_0000002 cannot be written: No space.*make room and start again"):
        train(cache, tmp_path, num_steps=2, checkpoint_every=1, save_extras=full_at(2))
    assert checkpoints(tmp_path) == ["step_0000001"]


def test_a_full_disk_of_the_main_process_stops_no_other(two_processes):
    assert checkpoints(two_processes / "full") == ["step_0000001", "step_0000003", "step_0000004"]


@pytest.mark.parametrize("damaged", [b"\0\0\0\0\n", b'{"loss": 3.0}\n', b"\xff\n", b"[1]\n"])
def test_a_damaged_line_of_metrics_costs_that_line(tmp_path, caplog, damaged):
    """A power failure may leave blocks of zeros where a line had been written."""
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    first, second = (json.dumps(row).encode() + b"\n" for row in rows)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(first + damaged + second)
    Metrics(tmp_path, TrackerConfig(), {}, first_step=2)
    assert caplog.messages == [f"{file}:2 is not as it was written, and is left out"]
    assert file.read_bytes() == first + second


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path, monkeypatch, caplog):
    metrics = Metrics(tmp_path, TrackerConfig(), {})
    metrics.log(1, {"loss": 1.0})
    opened = type(metrics.path).open

    class Full:
        """This is a file on a disk with room for three more bytes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, payload):
            return self.file.write(payload[:3])

    with monkeypatch.context() as patch:
        patch.setattr(type(metrics.path), "open", lambda *arguments, **others: Full(opened(*arguments, **others)))
        metrics.log(2, {"loss": 2.0})
    assert f"metrics.jsonl does not take a line: {os.strerror(errno.ENOSPC)}" in caplog.text
    metrics.log(3, {"loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


# Processes


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_25_times_has_the_losses_of_one_that_was_not(cache, tmp_path, ranks):
    """It is killed at random moments, during saves in the foreground and in the background too."""
    command = [sys.executable, "-m", "tests.kills", str(cache), str(tmp_path), str(ranks), "25"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["kills"] == 25
    assert told["in a save"] > 2


def test_a_full_disk_costs_a_tracker_and_not_the_run(tmp_path, caplog):
    """TensorBoard's thread has ended on the full disk; what it met is raised at every later call."""

    class Full:
        def log(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = log

    metrics = Metrics(tmp_path, TrackerConfig(), {})
    metrics._tracker = Full()
    metrics.log(1, {"loss": 1.0})
    metrics.log(2, {"loss": 0.5})
    metrics.close()
    assert caplog.messages == ["the tracker takes no more numbers: No space left on device; the run goes on without it"]
    assert losses(tmp_path) == [1.0, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hung", "killed"])
def test_a_process_that_hangs_or_is_killed_ends_the_job_and_is_named(cache, tmp_path, how):
    """One that hangs is stopped, as by a debugger: it neither answers nor ends. Where one is killed, the launcher tells
    the other one to end, which names it all the same."""
    done = launched(2, cache, tmp_path, f"--{how}", 1)
    assert done.returncode != 0
    assert "those that do not answer: rank 1 on " in done.stderr
    assert "parallel.timeout=3 seconds" in done.stderr


# Which checkpoints stay


def test_the_newest_checkpoints_stay_and_some_for_good(cache, tmp_path):
    train(cache, tmp_path, num_steps=7, checkpoint_every=1, keep_checkpoints=2, keep_every=3)
    assert checkpoints(tmp_path) == ["step_0000003", "step_0000006", "step_0000007"]


# Spikes


class Steps(Outcome):
    """This is the outcome of a step of which the totals alone matter."""

    def __init__(self, step):
        self.step = step

    def worst_scenes(self):
        return ["scene"]


def told(losses_, norms=None):
    """Returns the indices of the steps that are told."""
    spikes, norms = Spikes(tells=False), norms or [1.0] * len(losses_)
    return [i for i, pair in enumerate(zip(losses_, norms, strict=True)) if spikes.add(Steps(i), Totals(*pair, 1))]


def test_what_is_a_spike():
    generator = torch.Generator().manual_seed(0)
    usual = (0.1 + 0.05 * torch.rand(200, generator=generator)).tolist()
    assert told(usual) == []
    assert told([*usual[:120], 1.0, *usual[120:]]) == [120]
    assert told(usual, [*[1.0] * 99, 80.0, *[1.0] * 100]) == [99]
    assert told([5.0 / step for step in range(1, 100)]) == []  # a falling loss has no spikes
    assert told([0.1, 9.0, 0.1]) == []  # too few losses to know the usual one
    assert 200 in told([*usual, *[1.0] * 200])
    assert len(told([*usual, *[1.0] * 200])) < 30  # a new level becomes the usual one


def test_a_spike_is_told_with_its_scenes(cache, tmp_path, monkeypatch, caplog):
    healthy = Flow.loss

    def loss(self, model, batch, *others, **more):
        by_shot = healthy(self, model, batch, *others, **more)
        scale = [
            100.0 if name == "scene0.75" else 1.0
            for name, (_, n) in zip(batch.ids, batch.layout.samples, strict=True)
            for _ in n
        ]
        return by_shot * torch.tensor(scale)

    monkeypatch.setattr(Spikes, "WARM_UP", 1)
    monkeypatch.setattr(Flow, "loss", loss)
    train(cache, tmp_path, num_steps=8)
    rows = [row for row in read_metrics(tmp_path) if "spike_scenes" in row]
    assert rows
    assert all(row["spike_scenes"].split(", ")[0] == "scene0.75" for row in rows)
    assert f"step {rows[0]['step']} is a spike (loss " in caplog.text
