"""These tests are about steps without a finite loss and gradient: left out, counted, named; no checkpoint holds what is
not finite."""

import json
import logging
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from moc.training import OptimConfig, find_checkpoint, read_metrics
from moc.training.outcome import _by_device
from tests.runs import DROPS, full_at, losses, poisoned, train

SCENES = [f"scene{number / 4}" for number in range(8)]


def tensors(checkpoint, *names):
    files = [path for name in names for path in checkpoint.glob(name)]
    return {f"{path.relative_to(checkpoint)} {key}": x for path in files for key, x in load_file(path).items()}


def everything(checkpoint):
    return tensors(checkpoint, "model/*.safetensors", "ema/*.safetensors", "optimizer*.safetensors")


def checkpoints(folder):
    return sorted((folder / "checkpoints").iterdir())


def skipped(folder):
    return {row["step"]: row["skipped_scenes"] for row in read_metrics(folder) if "skipped_scenes" in row}


@pytest.mark.parametrize("gradient_only", [True, False])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told(cache, tmp_path, caplog, gradient_only):
    with poisoned("scene0.75", gradient_only=gradient_only):
        train(cache, tmp_path, num_steps=8, checkpoint_every=1, keep_checkpoints=9)
    told = skipped(tmp_path)
    assert 0 < len(told) < 8
    stored = checkpoints(tmp_path)
    for step, (before, after) in enumerate(pairwise(stored), start=2):
        for name in ("model/*.safetensors", "optimizer*.safetensors"):
            one, two = tensors(before, name), tensors(after, name)
            changed = [key for key in one if not torch.equal(one[key], two[key])]
            assert bool(changed) == (step not in told)
    for checkpoint in stored:
        assert all(value.isfinite().all() for value in everything(checkpoint).values())
    assert json.loads((stored[-1] / "state.json").read_text())["skipped_steps"] == len(told)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(told)
    for step, message in zip(told, warnings, strict=True):
        assert message.startswith(f"step {step} is skipped")
        assert "scene0.75" in message
    assert all("scene0.75" in names for names in told.values())
    if not gradient_only:  # then the loss itself shows which scene is bad
        assert set(told.values()) == {"scene0.75"}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_goes_on_as_if_skipped_steps_were_not_there(cache, tmp_path):
    """A resumed run counts on and repeats the uninterrupted one."""
    with poisoned("scene0.75"):
        train(cache, tmp_path / "whole", num_steps=8)
        train(cache, tmp_path / "half", num_steps=4)
        resumed = train(cache, tmp_path / "half", num_steps=8, resume=True)
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    assert skipped(tmp_path / "half") == skipped(tmp_path / "whole")
    assert resumed.step_log.skips.total == len(skipped(tmp_path / "whole"))
    one, two = (everything(find_checkpoint(tmp_path / name)) for name in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_skip_the_same_steps(cache, two_processes, tmp_path):
    runs = tmp_path, two_processes / "poisoned"
    with poisoned("scene0.75"):
        train(cache, runs[0], moc=DROPS)
    steps = [{step: set(names.split(", ")) for step, names in skipped(run).items()} for run in runs]
    assert steps[0]
    assert steps[1] == steps[0]
    said = (two_processes / "said.txt").read_text()
    assert [said.count(f"step {step} is skipped") for step in steps[0]] == [1] * len(steps[0])  # by the main process
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=2e-6)


MANY = r"2 steps in a row .* step 4 .*scene.* more than trainer\.max_skipped_steps=1"


def test_too_many_in_a_row_end_the_run_which_then_goes_on_after_them(cache, tmp_path, caplog):
    """The weights are those of the last step that was taken, and its samples are not met again."""
    train(cache, tmp_path, num_steps=2, checkpoint_every=1)
    good = everything(find_checkpoint(tmp_path))
    with pytest.raises(FloatingPointError, match=MANY), poisoned(*SCENES):
        train(cache, tmp_path, num_steps=9, resume=True, log_every=100, max_skipped_steps=1)
    assert "goes on after these steps" in caplog.text
    kept = find_checkpoint(tmp_path)
    assert all(torch.equal(good[name], everything(kept)[name]) for name in good if name.startswith("model"))
    before, after = (json.loads((folder / "state.json").read_text()) for folder in (checkpoints(tmp_path)[-2], kept))
    assert after["step"] > 3
    assert after["data"]["position"] > before["data"]["position"] + 3
    assert train(cache, tmp_path, num_steps=6, resume=True).finished


def test_steps_that_no_checkpoint_passes_over_are_met_again_and_it_is_said(cache, tmp_path, caplog):
    """The disk is full as the step after them is saved."""
    with pytest.raises(FloatingPointError, match=r"2 steps in a row"), poisoned(*SCENES):
        train(cache, tmp_path, num_steps=9, log_every=100, max_skipped_steps=1, save_extras=full_at(3))
    assert find_checkpoint(tmp_path) is None
    assert "cannot be written" in caplog.text
    assert "the same command meets these steps again" in caplog.text


def test_weights_that_may_be_at_fault_are_not_stored(cache, tmp_path, caplog):
    """No shot of the skipped steps has a finite loss: the checkpoint from before stands."""
    train(cache, tmp_path, num_steps=2, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=MANY), poisoned(*SCENES, gradient_only=False):
        train(cache, tmp_path, num_steps=9, resume=True, max_skipped_steps=1)
    assert find_checkpoint(tmp_path).name == "step_0000002"
    assert "the same command meets these steps again" in caplog.text


def test_a_last_step_that_is_not_finite_leaves_finite_weights(cache, tmp_path):
    with poisoned(*SCENES):
        train(cache, tmp_path, num_steps=1)
    assert all(value.isfinite().all() for value in everything(find_checkpoint(tmp_path)).values())


def test_weights_that_overflow_in_the_last_update_are_not_stored(cache, tmp_path):
    """The gradient is finite and the update is not: no loss has seen it yet."""
    with pytest.raises(FloatingPointError, match=r"the weights are not finite after step 1.*lower optim\.lr"):
        train(cache, tmp_path, num_steps=1, optim=OptimConfig(lr=1e39, warmup_steps=0))
    assert find_checkpoint(tmp_path) is None


def test_tensors_of_several_devices_are_looked_at_by_device():
    """States may wait on the host; torch's meta stands for a GPU, and mixes with the host's as little."""
    flags = [torch.tensor(True), torch.ones((), dtype=torch.bool, device="meta"), torch.tensor(False)]
    by_device = {found.device.type: found for found in _by_device(flags)}
    assert by_device.keys() == {"cpu", "meta"}
    assert not by_device["cpu"]
    assert _by_device(iter(())) == []
