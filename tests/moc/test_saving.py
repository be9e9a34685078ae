"""These tests are about what a checkpoint's files hold, however they were written: in shards, by several processes, in
a thread."""

import logging
import threading
from contextlib import ExitStack
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from moc.training import find_checkpoint, saving, storage
from moc.training.saving import Saver
from models import load_model
from models.mmdit import MMDiT
from tests.runs import DROPS, full_at, launch, losses, poisoned, train


def tensors(checkpoint, pattern="*/*.safetensors"):
    return {f"{path.parent.name}/{key}": x for path in checkpoint.glob(pattern) for key, x in load_file(path).items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_large_models_are_written_in_shards_that_diffusers_opens(cache, tmp_path, monkeypatch):
    train(cache, tmp_path / "one", num_steps=2)
    monkeypatch.setattr(storage, "SHARD_BYTES", 20_000)
    train(cache, tmp_path / "many", num_steps=2)
    one, many = (find_checkpoint(tmp_path / name) for name in ("one", "many"))
    for pattern in ("model/*.safetensors", "ema/*.safetensors", "optimizer*.safetensors"):
        assert len(list(many.glob(pattern))) > 2
        assert_same(tensors(one, pattern), tensors(many, pattern))
    opened = MMDiT.from_pretrained(many / "model").state_dict()
    assert_same(opened, load_model(one / "model").state_dict())
    train(cache, tmp_path / "one", num_steps=4, resume=True)
    train(cache, tmp_path / "many", num_steps=4, resume=True)
    assert losses(tmp_path / "one") == losses(tmp_path / "many")


def test_an_optimizer_that_an_earlier_version_wrote_is_read(cache, tmp_path):
    """It was written by huggingface_hub, whole, in shards of its own order."""
    train(cache, tmp_path / "whole")
    train(cache, tmp_path / "old", num_steps=2)
    checkpoint = find_checkpoint(tmp_path / "old")
    states = load_file(checkpoint / "optimizer.safetensors")
    (checkpoint / "optimizer.safetensors").unlink()
    (checkpoint / "complete").write_text("")
    pattern = "optimizer{suffix}.safetensors"
    save_torch_state_dict(states, checkpoint, filename_pattern=pattern, max_shard_size=20_000)
    train(cache, tmp_path / "old", resume=True)
    assert losses(tmp_path / "old") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["shard", "replicate"])
def test_a_run_goes_on_on_more_and_on_fewer_processes(cache, tmp_path, axis):
    """The run goes on one process, then four, then two, then one."""
    train(cache, tmp_path / "one", num_steps=8, moc=DROPS)
    moving = tmp_path / "moving"
    train(cache, moving, num_steps=2, moc=DROPS)
    launch(4, cache, moving, "--axis", axis, "--resume", "--steps", 4)
    launch(2, cache, moving, "--axis", axis, "--resume", "--steps", 6)
    train(cache, moving, num_steps=8, moc=DROPS, resume=True)
    assert losses(moving) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    ("handled", "seconds", "warns"),
    [
        ("SIGTERM,SIGINT", 12, True),
        ("SIGTERM,SIGINT", 9, False),
        ("SIGQUIT", 12, False),  # as scripts/launch/torchrun.sh sets it
        ("", 12, False),
    ],
)
def test_a_save_that_a_launcher_may_cut_short_is_told_once(
    cache, tmp_path, monkeypatch, caplog, handled, seconds, warns
):
    """It may where it takes more than half of the 20 seconds, since a step may have to end before it."""
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", handled)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "20")
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=count(0, seconds).__next__))
    train(cache, tmp_path, num_steps=2, checkpoint_every=1)
    assert caplog.text.count(f"a save took {seconds} s, and the launcher kills processes 20 s after a signal") == warns


# In the background


def test_steps_go_on_while_a_checkpoint_is_written(cache, tmp_path):
    """The second step's checkpoint is not finished before the fourth begins, and holds what the second step left."""
    fourth = threading.Event()

    def save_extras(folder):
        assert folder.name != "partial_0000002" or fourth.wait(60)

    def before_step(number):
        if number == 3:
            fourth.set()

    settings = {"num_steps": 5, "checkpoint_every": 2, "keep_checkpoints": 9}
    background, foreground = tmp_path / "background", tmp_path / "foreground"
    train(cache, background, save_in_background=True, save_extras=save_extras, before_step=before_step, **settings)
    train(cache, foreground, **settings)
    for step in (2, 4, 5):
        one, two = (tensors(run / f"checkpoints/step_{step:07d}") for run in (background, foreground))
        assert_same(one, two)
    assert losses(background) == losses(foreground)


def test_a_disk_that_is_full_meanwhile_costs_a_checkpoint(cache, tmp_path, caplog):
    settings = {"num_steps": 3, "checkpoint_every": 1, "save_in_background": True}
    assert train(cache, tmp_path, save_extras=full_at(2), **settings).finished
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000001", "step_0000003"]
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "step_0000002 cannot be written: No space left on device" in warning


def test_another_failure_meanwhile_ends_the_run(cache, tmp_path):
    def save_extras(folder):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        train(cache, tmp_path, checkpoint_every=1, save_in_background=True, save_extras=save_extras)
    assert find_checkpoint(tmp_path) is None


def test_a_run_that_ends_for_its_numbers_waits_for_what_is_being_written(cache, tmp_path, monkeypatch):
    """The save of the second step ends no sooner; from the third on no loss is finite."""
    joined, join = threading.Event(), Saver.join

    def waited_for(saver):
        if saver._thread:
            joined.set()
        join(saver)

    def before_step(number):
        if number == 2:
            stack.enter_context(poisoned(*(f"scene{number / 4}" for number in range(8)), gradient_only=False))

    monkeypatch.setattr(Saver, "join", waited_for)
    settings = {"checkpoint_every": 2, "save_in_background": True, "save_extras": lambda _: joined.wait(60)}
    with ExitStack() as stack, pytest.raises(FloatingPointError, match="2 steps in a row"):
        train(cache, tmp_path, num_steps=9, max_skipped_steps=1, before_step=before_step, **settings)
    assert joined.is_set()
    assert find_checkpoint(tmp_path).name == "step_0000002"


@pytest.mark.slow
def test_two_processes_save_in_the_background_as_one_does_in_the_foreground(cache, tmp_path):
    train(cache, tmp_path / "one", moc=DROPS, checkpoint_every=2)
    launch(2, cache, tmp_path / "two", "--axis", "shard", "--every", 1, "--background")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for step in ("step_0000002", "step_0000004"):
        one, two = (tensors(tmp_path / name / "checkpoints" / step) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
