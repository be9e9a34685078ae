"""These tests are about who computes where and how precisely: one owner, asked by every command."""

import logging
import socket

import pytest
import torch
import yaml
from accelerate import PartialState

from moc.errors import UserError, disk_error
from moc.training import Parallel, ParallelConfig, peers
from models.mmdit import MMDiT
from tests import pipeline
from tests.composing import composed
from tests.pipeline import ROOT

STORY = {"size": [32, 48], "fps": 12, "shots": [{"prompt": "Mia walks.", "seconds": 0.4}]}


@pytest.fixture(autouse=True)
def _alone():
    PartialState._reset_state()


def test_the_cpu_is_what_is_left_and_the_log_says_what_was_taken(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "moc"):
        parallel = Parallel()
    assert (parallel.device, parallel.dtype) == (torch.device("cpu"), torch.float32)
    assert (parallel.rank, parallel.world_size, parallel.is_main) == (0, 1, True)
    assert caplog.messages == ["running on the CPU, precision fp32, 1 process"]
    with parallel.autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_a_precision_that_is_asked_for(caplog):
    with caplog.at_level(logging.INFO, "moc"):
        parallel = Parallel(ParallelConfig("cpu", "bf16"))
    assert "precision bf16" in caplog.text
    with parallel.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"precision='fp8' is not one of auto, fp32, bf16"):
        ParallelConfig(precision="fp8")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match=f"device={name} is none that .* say one of auto, cpu"):
        Parallel(ParallelConfig(name))


def test_experiments_do_not_choose_the_device():
    names = [path.stem for path in (ROOT / "configs/experiment").glob("*.yaml")]
    for name in ("", *names):
        parallel = composed("train", *([f"experiment={name}"] if name else [])).parallel
        assert (parallel.device, parallel.precision) == ("auto", "auto")


def test_what_trains_in_bf16_validates_evaluates_and_samples_in_bf16(prepared, tmp_path, monkeypatch):
    """Every forward pass of the four commands is told the same precision; without a word on the CPU it is fp32."""
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(STORY))
    seen, forward = [], MMDiT.forward

    def spy(self, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MMDiT, "forward", spy)
    data = (f"data.path={prepared}", "data.validation=1", "device=cpu")
    for name, precision in {"fp32": (), "bf16": ("precision=bf16",)}.items():
        of_train = [f"parallel.{setting}" for setting in precision]
        run = pipeline.train(prepared, tmp_path / name, "trainer.num_steps=1", *of_train)
        assert {grad for grad, _ in seen} == {True, False}  # the run both trained and validated
        pipeline.command("scripts/evaluate.py", f"checkpoint={run}", *data, *precision)
        pipeline.sample(run, tmp_path / "story.yaml", tmp_path / f"film_{name}", "device=cpu", *precision)
        assert {autocast for _, autocast in seen} == {name == "bf16"}
        seen.clear()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("data.path=x is wrong"), UserError),
        (OSError(28, "full", "a/file"), OSError),
        (PermissionError(13, "not allowed", "a/file"), PermissionError),
        (ValueError("of a library (os error 28)"), UserError),
        (ValueError("a bug"), RuntimeError),
    ],
)
def test_what_one_process_raises_is_raised_on_all_as_what_it_is(error, kind, monkeypatch):
    parallel, told = Parallel(ParallelConfig("cpu")), []
    monkeypatch.setattr(parallel, "gather", lambda value: told.append(value) or told)
    with pytest.raises(type(error)), parallel.together():
        raise error
    with pytest.raises(kind, match="rank 0") as elsewhere, parallel.together():
        pass
    assert getattr(elsewhere.value, "filename", None) == getattr(error, "filename", None)
    assert type(elsewhere.value) is kind
    assert disk_error(elsewhere.value) == disk_error(error)


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError("[/a/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (torch.distributed.DistNetworkError("the client socket has timed out"), True),
        (RuntimeError("rank 1 failed: TimeoutError('timed out')"), False),
        (RuntimeError("DataLoader timed out after 5 seconds"), False),
        (RuntimeError("/data/gloo/film.mkv: broken pipe"), False),
    ],
)
def test_only_errors_between_the_processes_name_those_that_are_absent(error, broken, monkeypatch):
    parallel = Parallel(ParallelConfig("cpu"))
    monkeypatch.setattr(parallel, "world_size", 2)
    monkeypatch.setattr("moc.training.parallel.silent", lambda _: ["rank 1 on host"])
    with pytest.raises(UserError if broken else RuntimeError) as raised, parallel.naming_absent():
        raise error
    assert ("do not answer: rank 1 on host" in str(raised.value)) == broken


@pytest.mark.parametrize("gone", [ProcessLookupError(), PermissionError(1, "Operation not permitted")])
def test_a_process_whose_id_is_nobodys_or_another_users_is_dead(gone, monkeypatch):
    """Linux uses the ids of processes that ended again, for whichever user comes next."""
    store = torch.distributed.HashStore()
    store.set("moc/process/1", f"{socket.gethostname()} 4242")
    monkeypatch.setattr(peers, "_store", lambda: store)
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)

    def kill(pid, number):
        raise gone

    monkeypatch.setattr("os.kill", kill)
    assert peers.dead_processes() == [f"rank 1 on {socket.gethostname()}"]
    monkeypatch.setattr("os.kill", lambda pid, number: None)
    assert peers.dead_processes() == []
