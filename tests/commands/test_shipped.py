"""The configurations that ship do what their heads, the paper and the releases say."""

import re
from itertools import islice
from pathlib import Path

import pytest
import torch

from configs.command import parse
from data.cache.writer import EncodedScene
from data.loading.dataset import open_dataset
from data.loading.loader import build_loader, held_out
from evaluation import demo
from film.script import load_script
from moc import Shot, ShotLayout, StreamSpec
from moc.schedule import MoCSchedule
from models import build_model
from tests.caches import scene, write_cache
from tests.composing import CONFIGS, REQUIRED, composed, parsed, schema_of


@pytest.mark.parametrize("path", sorted((CONFIGS / "scripts").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_scripts_that_ship_are_good(path):
    script = load_script(path)
    assert len(script.shots) >= 4


@pytest.mark.parametrize("scale", ["small", "large"])
def test_the_demos_stages_are_commands_that_parse(tmp_path, scale):
    names = {"scripts/make_storyworld.py": "storyworld", "scripts/prepare_data.py": "prepare"}
    stages = demo.plan(parsed("demo", f"output={tmp_path}", f"scale={scale}"))
    assert len(stages) >= 4
    for stage in stages:
        script, *overrides = stage.arguments
        name = names.get(script, Path(script).stem)
        assert isinstance(parse(composed(name, *overrides), schema_of(name)), schema_of(name))


def test_some_shots_are_trained_on_as_stills(tmp_path):
    """This is as in LCT; the demo's training alone leaves it out."""
    cache = write_cache(tmp_path, [scene(number, shots=2, frames=3) for number in range(4)])
    for choice, rate in (("model=base", 0.1), ("experiment=wan_a14b_low", 0.1), ("experiment=storyworld", 0)):
        config = parsed("train", choice, f"data.path={cache}", "data.workers=0", "data.validation=0").data
        steps = islice(build_loader(config, StreamSpec(), chunk_tokens=6), 10)
        frames = [latent.shape[1] for step in steps for batch in step for latent in batch.latents]
        assert len(frames) > 300
        assert frames.count(1) / len(frames) == pytest.approx(rate, abs=0.03)


def test_scenes_of_any_size_are_evaluated(tmp_path):
    """One of them alone is more than a training step of the default size."""
    shape = (3, 9, 64, 64)
    scenes = [EncodedScene(str(n), str(n), "single", [torch.zeros(shape)], [[torch.zeros(1, 8)] * 2]) for n in range(2)]
    cache = write_cache(tmp_path, scenes)
    config = parsed("evaluate", f"data.path={cache}", "data.validation=1").data
    (batch,) = held_out(open_dataset(config), config.validation, StreamSpec(), chunk_tokens=6)
    assert batch.layout.num_tokens > parsed("train").data.batch_tokens


@pytest.mark.parametrize("name", ["wan", "holocine"])
def test_wans_configurations_take_the_releases_512_tokens(name):
    chosen = f"encoders={name}"
    assert parsed("prepare", chosen, *REQUIRED[chosen]).encoders.text.max_tokens == 512


EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_head_of_an_experiment_has_a_command_that_composes(path):
    head = path.read_text().split("defaults:")[0].replace("\\\n#", " ")
    commands = re.findall(r"train\.py (.+)", head)
    assert any(f"experiment={path.stem}" in command for command in commands)
    for command in commands:
        arguments = re.findall(r"[\w.]+=[^\s,;)]+", command)
        assert parsed("train", *arguments).name
    if path.stem.startswith(("wan", "single", "multi")):
        assert "ardware" in head
        assert "not measured" in head


def test_the_papers_models_have_the_papers_attention():
    single, multi = (parsed("train", f"experiment={name}", "data.path=p") for name in ("single_shot", "multi_shot"))
    assert (single.moc.chunk_tokens, single.moc.top_k, single.moc.causal) == (256, 3, False)
    assert str(single.moc.own_anchor) == "chunk"
    assert [MoCSchedule(multi.schedule).at(step, multi.moc).chunk_tokens for step in (0, 5000, 10_000, 15_000)] == [
        10240, 5120, 2560, 1280
    ]  # fmt: skip
    assert (multi.moc.top_k, multi.moc.causal, multi.optim.lr, multi.trainer.num_steps) == (5, True, 9e-5, 20_000)
    layout = ShotLayout.build([Shot(0, (25, 30, 30))] * 8)
    assert layout.num_tokens == 180_000


def test_the_two_experts_share_the_noise_levels():
    low, high = (parsed("train", f"experiment=wan_a14b_{name}") for name in ("low", "high"))
    levels = [low.flow.sigma_min, low.flow.sigma_max, high.flow.sigma_min, high.flow.sigma_max]
    assert levels == [0.0, 0.875, 0.875, 1.0]
    assert (low.model.path, low.model.lora_targets) == (f"{high.model.path}_2", high.model.lora_targets)


@pytest.mark.parametrize(("size", "millions"), [("small", 15), ("base", 300), ("3b", 3000)])
def test_models_have_the_sizes_that_their_files_say(size, millions):
    """It is built with the latents of Wan's VAE and the text features of UMT5."""
    config = parsed("train", f"model={size}").model
    with torch.device("meta"):
        model = build_model(config, latent_channels=16, text_dim=4096)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.1)
