"""Who computes where and how precisely: one owner, asked by every command."""

import logging

import pytest
import torch
import yaml
from accelerate import PartialState

from moc.errors import UserError
from moc.training import Parallel, ParallelConfig
from models.mmdit import MMDiT
from tests import pipeline
from tests.commands.test_configs import composed
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
    place = (f"data.path={prepared}", "data.validation=1", "device=cpu")
    for name, precision in {"fp32": (), "bf16": ("precision=bf16",)}.items():
        of_train = [f"parallel.{setting}" for setting in precision]
        run = pipeline.train(prepared, tmp_path / name, "trainer.num_steps=1", *of_train)
        assert {grad for grad, _ in seen} == {True, False}  # trained and validated
        pipeline.command("scripts/evaluate.py", f"checkpoint={run}", *place, *precision)
        pipeline.sample(run, tmp_path / "story.yaml", tmp_path / f"film_{name}", "device=cpu", *precision)
        assert {autocast for _, autocast in seen} == {name == "bf16"}
        seen.clear()
