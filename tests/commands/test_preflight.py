"""These tests are about whether a run can start, and what it will take: before each start, and by `train.py
preflight=true`."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from configs.preflight import _held_bytes
from moc import memory
from moc.errors import UserError
from moc.training import OptimConfig, Trainer
from moc.training.ema import EMA
from moc.training.optim import build_optimizer
from tests import pipeline
from tests.moc.test_damage import largest_file
from tests.pipeline import command


def preflight(capsys, prepared, run, *settings):
    """Returns its status, and its lines by the name of the check."""
    status = 0
    try:
        command("train.py", *pipeline.train_arguments(prepared, run), "preflight=true", *settings)
    except SystemExit as ending:
        status = int(ending.code)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok ", "FAIL "))]
    return status, {line.split()[1]: line for line in lines}


def test_a_preflight_tells_what_a_run_takes_and_leaves_nothing(capsys, prepared, tmp_path):
    status, lines = preflight(capsys, prepared, tmp_path / "run", "trainer.num_steps=1000")
    assert (status, list(lines)) == (0, ["processes", "data", "checkpoint", "trial"])
    assert all(line.startswith("ok ") for line in lines.values())
    assert "4 of 4 scenes" in lines["data"]
    assert "none; the run begins" in lines["checkpoint"]
    assert re.search(r"a step takes \d+\.\d+ s .* steps 1 to 1000 will take about \d+ (s|minutes)$", lines["trial"])
    assert pipeline.stamps(tmp_path / "run") == {}


def test_every_start_looks_first_and_says_so_in_one_line(capsys, caplog, prepared, tmp_path, monkeypatch):
    run = pipeline.train(prepared, tmp_path / "run")
    pipeline.train(prepared, run, "trainer.num_steps=5")
    first, second = (message for message in caplog.messages if message.startswith("ready: "))
    assert "ready: one process on " in first
    assert "with the CPU; 4 of 4 scenes read; their checksums fit; weights, averages, gradients" in first
    assert re.search(r"a checkpoint takes at least 0\.0\d of \d+ GB free; it starts at step 1 of 3$", first)
    assert re.search(r"it starts at step 4 of 5, (about \d s|less than a second)$", second)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    arguments = pipeline.train_arguments(prepared, tmp_path / "another")
    said = pipeline.refusal(capsys, "train.py", *arguments)
    pipeline.assert_one_message(said, "has 0.00 GB free, and a checkpoint takes", "make room")
    assert not (tmp_path / "another" / "metrics.jsonl").exists()


@pytest.mark.parametrize("free", ["host_free_bytes", "usable_bytes"])
def test_a_model_that_memory_cannot_hold_is_refused_in_one_line(capsys, prepared, tmp_path, monkeypatch, free):
    """The first is asked before the model is built, the second when all that it needs is known."""
    monkeypatch.setattr(memory, free, lambda *_: 100_000)
    said = pipeline.refusal(capsys, "train.py", *pipeline.train_arguments(prepared, tmp_path / "run"))
    pipeline.assert_one_message(said, "weights, averages, gradients and states take at least 0.00", "a smaller model")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_finished_run_starts_nothing_and_is_not_looked_at(caplog, prepared, tmp_path, monkeypatch):
    run = pipeline.train(prepared, tmp_path / "run")
    caplog.clear()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    pipeline.train(prepared, run)
    assert "is already finished" in caplog.text
    assert "ready: " not in caplog.text


def test_scenes_that_are_encoded_as_they_are_read(capsys, caplog, tmp_path):
    """A preflight reads them; a start, which is to take a second or two, does not, and says so."""
    prepared = pipeline.prepare(pipeline.make_world(tmp_path / "films"), tmp_path / "prepared", "online=true")
    status, lines = preflight(capsys, prepared, tmp_path / "run")
    assert status == 0
    assert "4 of 4 scenes read" in lines["data"]
    caplog.clear()
    pipeline.train(prepared, tmp_path / "run", "trainer.num_steps=1", "data.validation=0")
    (ready,) = (message for message in caplog.messages if message.startswith("ready: "))
    assert "none of 4 scenes read: all come from a remote store or are encoded" in ready


@pytest.mark.parametrize(
    ("optim", "on_device"),
    [
        (OptimConfig(args={"fused": False}), 5),
        (OptimConfig(args={"fused": False}, offload=True), 3),
        (OptimConfig("torch.optim.SGD"), 3),
    ],
)
def test_states_are_counted_where_they_lie(optim, on_device):
    """The count is in copies of the weights, beside which a gradient and an average lie; torch's meta stands for a
    GPU."""
    model = torch.nn.Linear(64, 8, bias=False, device="meta")
    parallel = SimpleNamespace(device=torch.device("meta"))
    trainer = SimpleNamespace(
        parallel=parallel, bare_model=model, ema=EMA(model, 0.9), optimizer=build_optimizer(model, optim)
    )
    assert _held_bytes(trainer) == on_device * 64 * 8 * 4


def test_a_trial_says_what_it_does_before_it_does_it(capsys, caplog, prepared, tmp_path, monkeypatch):
    """A large model takes minutes on a CPU; here it is not even built."""

    def refuse(*_):
        raise UserError("there is no such model")

    monkeypatch.setattr("models.build_model", refuse)
    status, lines = preflight(capsys, prepared, tmp_path / "run", "data.batch_tokens=1200")
    assert (status, lines["trial"]) == (1, "FAIL  trial       there is no such model")
    assert caplog.messages[-1] == "trial: 3 steps of up to 1,200 tokens, and a save; on a CPU this may take long"


def test_a_trial_that_was_killed_is_not_in_the_way(capsys, prepared, tmp_path):
    """Nothing has removed its folder."""
    pipeline.train(prepared, tmp_path / "run/.trial")
    status, lines = preflight(capsys, prepared, tmp_path / "run")
    assert (status, lines["trial"][:3]) == (0, "ok ")
    assert pipeline.stamps(tmp_path / "run") == {}


def test_a_preflight_of_a_run_to_go_on(capsys, prepared, trained, tmp_path):
    run = pipeline.train(prepared, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, lines = preflight(capsys, prepared, run, "trainer.num_steps=50")
    assert status == 0
    assert "step_0000003 is whole; the run goes on from step 3" in lines["checkpoint"]
    assert "steps 4 to 50 will take" in lines["trial"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    status, lines = preflight(capsys, prepared, run, "flow.shift=9")
    assert status == 1
    assert lines["checkpoint"].startswith("FAIL")
    assert "flow.shift=9" in lines["checkpoint"]


def test_a_preflight_of_a_finished_run_tries_nothing(capsys, prepared, tmp_path):
    run = pipeline.train(prepared, tmp_path / "run")
    status, lines = preflight(capsys, prepared, run)
    assert status == 0
    assert "the run is already finished: step 3 of 3" in lines["checkpoint"]
    assert lines["trial"] == "ok    trial       none; no step is left"


@pytest.mark.parametrize(
    ("setting", "check", "said"),
    [
        ("resume=nowhere", "checkpoint", "resume=nowhere holds no complete checkpoint"),
        ("data.validation=4", "trial", "data.validation=4: what is held out of 4 scenes leaves none to train"),
        ("data.validation=2 data.held_out=[scene_000001]", "trial", "2 is more than the 1 scene"),
    ],
)
def test_a_preflight_refuses_what_the_run_would_refuse(capsys, prepared, tmp_path, setting, check, said):
    status, lines = preflight(capsys, prepared, tmp_path / "run", *setting.split())
    assert status == 1
    assert lines[check].startswith("FAIL")
    assert said in lines[check]


def test_a_trial_neither_validates_nor_samples(capsys, prepared, tmp_path, monkeypatch):
    for name in ("_validate", "_draw_samples"):
        monkeypatch.setattr(Trainer, name, pytest.fail)
    status, _ = preflight(capsys, prepared, tmp_path / "run", "trainer.sample_every=1", "trainer.validate_every=1")
    assert status == 0


def test_a_preflight_finds_a_damaged_shard_and_a_full_disk(capsys, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "prepared")
    shard = next((tmp_path / "prepared").rglob("*.safetensors"))
    good = shard.read_bytes()
    half = len(good) // 2
    shard.unlink()  # a process that has the file open keeps it
    shard.write_bytes(good[:half] + bytes(64) + good[half + 64 :])
    status, lines = preflight(capsys, tmp_path / "prepared", tmp_path / "run")
    assert status == 1
    assert lines["data"].startswith("FAIL")
    assert "checksum" in lines["data"]
    shard.unlink()
    shard.write_bytes(good)
    with largest_file(20_000):
        status, lines = preflight(capsys, tmp_path / "prepared", tmp_path / "run")
    assert status == 1
    assert lines["data"].startswith("ok")
    assert lines["trial"].startswith("FAIL")
    assert "cannot be written: File too large" in lines["trial"]


def test_a_preflight_counts_the_checkpoints_that_the_disk_must_hold(capsys, prepared, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    status, lines = preflight(capsys, prepared, tmp_path / "run", "trainer.keep_checkpoints=100")
    assert status == 1
    assert "101 checkpoints of" in lines["trial"]
    assert "lower trainer.keep_checkpoints" in lines["trial"]
