"""These tests are about trackers besides `metrics.jsonl`, and the picture of a run's curves."""

import sys
from types import SimpleNamespace

import pytest

from moc.errors import UserError
from moc.training import Metrics, TrackerConfig, read_metrics
from moc.training.curves import PANELS, draw_curves
from tests.runs import train


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Weights & Biases without an account."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))


def test_wandb_needs_no_account_offline(tmp_path, offline):
    metrics = Metrics(tmp_path, TrackerConfig(tracker="wandb-offline"), {"lr": 1.0})
    metrics.log(1, {"loss": 2.0})
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_resumed_run_is_one_run_in_wandb(tmp_path, monkeypatch):
    """This holds also with the steps that a killed run does again."""
    started, logged = [], []
    run = SimpleNamespace(log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: None)
    fake = SimpleNamespace(init=lambda **settings: started.append(settings) or run, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first_step in (0, 2):
        metrics = Metrics(tmp_path, TrackerConfig("wandb"), {}, first_step)
        metrics.log(first_step + 1, {"loss": 1.0})
        metrics.close()
    assert started[0]["id"] == started[1]["id"]
    assert {settings["resume"] for settings in started} == {"allow"}
    assert {settings["mode"] for settings in started} == {"online"}
    assert [row["step"] for row in logged] == [1, 3]
    (tmp_path / "other").mkdir()
    Metrics(tmp_path / "other", TrackerConfig("wandb"), {})
    assert started[2]["id"] != started[0]["id"]


def test_wandb_that_does_not_start_is_one_message(tmp_path, monkeypatch):
    class RefusedError(Exception):
        pass

    def refuse(**_):
        raise RefusedError("no key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, Error=RefusedError))
    with pytest.raises(UserError, match=r"does not start \(no key\).*wandb-offline"):
        Metrics(tmp_path, TrackerConfig("wandb"), {})


def test_tensorboard_has_the_numbers_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step in (0, 2):
        metrics = Metrics(tmp_path, TrackerConfig("tensorboard"), {}, first_step)
        for step in range(first_step + 1, first_step + 5):
            metrics.log(step, {"loss": first_step + step / 2, "skipped_scenes": "a, b"})
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(x.step, x.value) for x in events.Scalars("loss")] == [(1, 0.5), (2, 1), (3, 3.5), (4, 4), (5, 4.5), (6, 5)]


def test_tensorboard_names_the_package_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"tracking\.tracker=tensorboard needs .*: pip install tensorboard"):
        Metrics(tmp_path, TrackerConfig("tensorboard"), {})


def test_an_unknown_tracker_is_refused():
    with pytest.raises(
        UserError, match=r"tracking\.tracker='mlflow' is not one of none, wandb, wandb-offline, tensorboard"
    ):
        TrackerConfig(tracker="mlflow")


def test_the_curves_are_drawn(cache, tmp_path, monkeypatch):
    """Each panel but that of several sources shows a curve of a real run."""
    train(cache, tmp_path, num_steps=2, validation=1)
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, *_, label, **__: drawn.append(label))
    draw_curves(tmp_path, read_metrics(tmp_path))
    assert {"loss", "grad_norm", "density", "loss/shot_1", "routes/back_1", "validation/loss_0.5"} <= set(drawn)
    assert all(any(name.startswith(start) for name in drawn for start in starts) for starts in PANELS.values())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_that_cannot_be_drawn_are_a_warning(tmp_path, monkeypatch, caplog):
    draw_curves(tmp_path / "none\0", [{"step": 1, "loss": 1.0}])
    assert "curves.png is left out" in caplog.text
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draw_curves(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
