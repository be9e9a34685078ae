"""These tests are about samples of a held-out scene while a model trains: drawn at their steps, from one noise, no
trace left in the run."""

import errno
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data.loading.dataset import DataConfig, open_dataset
from film import samples
from moc import MoCConfig
from moc.diffusion import Flow
from moc.training import Parallel, ParallelConfig, read_metrics
from tests import figures, pipeline
from tests.caches import scene, write_cache
from tests.pipeline import assert_one_message, refusal


def losses(run):
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def test_samples_are_drawn_at_their_steps_and_change_nothing(prepared, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "SAMPLING", replace(samples.SAMPLING, steps=4))
    with figures.drawn():
        run = pipeline.train(prepared, tmp_path / "run", "trainer.sample_every=2", "data.validation=1")
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == ["step_0000002.png", "step_0000002_routing.png"]
    assert losses(run) == losses(trained)
    whole = (run / "samples/step_0000002.png").read_bytes()
    assert Image.open(run / "samples/step_0000002.png").height > 3 * 100  # a row for each of three shots
    again = pipeline.train(prepared, tmp_path / "again", "trainer.sample_every=1")
    assert (again / "samples/step_0000002.png").read_bytes() == whole
    assert (again / "samples/step_0000003.png").read_bytes() != whole


def test_a_sample_is_of_the_first_scene_held_out_or_of_all(tmp_path):
    dataset = open_dataset(DataConfig(str(write_cache(tmp_path, [scene(number) for number in range(6)]))))
    (held_out,) = dataset.split(1).held_out
    assert held_out
    for validation, item in ((1, held_out), (0, 0)):
        told, null = samples._scene(dataset, validation)
        assert told.id == null.id == dataset.items[item][1].id
        assert not torch.equal(told.text[0], null.text[0])


def test_samples_need_prepared_data(tmp_path, capsys):
    run = (f"output={tmp_path}", "name=run", "parallel=cpu", "trainer.num_steps=1")
    said = refusal(capsys, "train.py", "experiment=recall", *run, "trainer.sample_every=1")
    assert_one_message(said, "trainer.sample_every needs prepared data; set it to 0 with data.recall")


@pytest.mark.parametrize("is_main", [True, False])
def test_the_main_process_says_that_no_sample_is_drawn(prepared, tmp_path, monkeypatch, caplog, is_main):
    def broken(*_, **__):
        raise FloatingPointError("shot 1")

    monkeypatch.setattr("film.samples.sample_shots", broken)
    monkeypatch.setattr(Parallel, "is_main", is_main)
    parallel = Parallel(ParallelConfig("cpu"))
    draw = samples.scene_drawer(open_dataset(DataConfig(str(prepared))), DataConfig(), Flow(), tmp_path, parallel)
    draw(SimpleNamespace(stream=None), MoCConfig(), 7, lambda: False)
    assert caplog.text.count("no sample is drawn at step 7: shot 1") == is_main


def test_a_sample_that_cannot_be_drawn_costs_itself_alone(prepared, trained, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(samples, "SAMPLING", replace(samples.SAMPLING, steps=1))
    monkeypatch.setattr("film.samples.draw_storyboard", full)
    run = pipeline.train(prepared, tmp_path / "run", "trainer.sample_every=2")
    assert losses(run) == losses(trained)
    assert "no sample is drawn at step 2 (OSError: [Errno 28] No space left on device)" in caplog.text
