"""These tests are about evaluation, conversion, sampling and Wan on a GPU, as a user calls them:
pytest -m gpu tests/commands/test_films_gpu.py"""

import json
from collections import defaultdict
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from moc.training import find_checkpoint
from models import load_model
from models.kv_cache import KVCache
from models.stream import StreamModel
from tests import pipeline
from tests.gpu_runs import (
    LAUNCH,
    assert_alike,
    assert_filmed,
    assert_trained,
    compilations,
    launched,
    train,
    two_gpus,
)
from tests.models.test_experts import expert_of
from tests.models.test_export_runs import save_tiny_encoders
from tests.pipeline import command
from tests.wan_files import REDUCED
from tests.weights import randomized

pytestmark = pytest.mark.gpu

SHOTS = [
    {"prompt": "In the meadow, Mia walks.", "seconds": 5 / 12},
    {"prompt": "Mia waves.", "seconds": 0.75, "cut": False},
    {"prompt": "A flower.", "seconds": 0.01},
]
LORA = ("model.lora_rank=2", "model.lora_targets=[to_q,net.2]")


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory) -> Path:
    """Returns a tiny model trained on the GPU, for the commands that need one."""
    return train(prepared, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    """Returns three shots of 5, 9 and 1 frames."""
    file = tmp_path_factory.mktemp("story") / "story.yaml"
    script = {"title": "Mia", "global": "Mia: rabbit.", "size": [32, 48], "fps": 12, "negative": "mud", "shots": SHOTS}
    file.write_text(yaml.safe_dump(script))
    return file


# Evaluation and conversion


def test_evaluating(prepared, run, tmp_path, on_gpu):
    """It is sampled in bf16, as it was trained; fp32 gives nearly the same numbers at the same noise."""
    rows = {}
    for precision in ("bf16", "fp32"):
        file = tmp_path / f"{precision}.json"
        arguments = (f"checkpoint={run}", f"data.path={prepared}", "data.validation=2", f"output={file}")
        with on_gpu(precision):
            command("scripts/evaluate.py", *arguments, *(() if precision == "bf16" else ("precision=fp32",)))
        rows[precision] = json.loads(file.read_text())["losses"]
    assert len(rows["bf16"]) == 6
    for some, others in zip(*rows.values(), strict=True):
        assert some["loss"] == pytest.approx(others["loss"], rel=5e-2)


def test_converting_and_sampling_what_came_of_it(run, story, tmp_path, on_gpu):
    encoders = f"encoders_path={find_checkpoint(run) / 'encoders'}"
    command("scripts/convert_checkpoint.py", f"input={run}", f"output={tmp_path / 'folder'}", "dtype=bfloat16")
    with on_gpu():
        pipeline.sample(tmp_path / "folder", story, tmp_path / "film", encoders)
    assert_filmed(tmp_path / "film")


# Sampling


@pytest.mark.parametrize("sampler", ["joint", "staggered", "shot_by_shot"])
def test_nothing_compiles_after_the_first_steps(run, story, tmp_path, monkeypatch, sampler):
    """Though the shots of a story differ in length, each kind of forward (with history or without, to be remembered or
    not) compiles in its first two alone, with the prompt and without it."""
    forward, calls = StreamModel.forward, defaultdict(list)

    def counted(*args, cache=None, remember=False, **kwargs):
        kind = (bool(cache and cache.num_tokens), remember)
        with compilations() as names:
            out = forward(*args, cache=cache, remember=remember, **kwargs)
        calls[kind].append(names)
        return out

    monkeypatch.setattr(StreamModel, "forward", counted)
    pipeline.sample(run, story, tmp_path / "film", f"sampler={sampler}", "sampler.steps=6")
    assert sum(map(len, calls.values())) > 10
    assert [names for forwards in calls.values() for names in forwards[2:] if names] == []


@pytest.mark.parametrize(
    "settings",
    [
        ("sampler=joint",),
        ("sampler=staggered", "sampler.context_shots=1"),
        ("sampler=shot_by_shot",),
        ("sampler=shot_by_shot", "sampler.cache=false"),
        ("sampler=shot_by_shot", "sampler.context_shots=1", "sampler.offload_cache=true"),
        ("sampler=joint", "moc.dense=true"),
    ],
    ids=" ".join,
)
def test_sampling(run, story, tmp_path, on_gpu, settings):
    with on_gpu():
        pipeline.sample(run, story, tmp_path / "film", *settings)
    assert_filmed(tmp_path / "film")


def test_keys_and_values_that_find_no_memory_lie_in_the_host(run, story, tmp_path, on_gpu, monkeypatch):
    """The film is the same to the bit."""
    pinned, memory = [], KVCache._memory

    def full(cache, like):
        if not cache.offload:
            raise torch.OutOfMemoryError("full")
        taken = memory(cache, like)
        pinned.append(taken.is_pinned())  # asked while the film needs it
        return taken

    for name in ("here", "there"):
        with on_gpu():
            pipeline.sample(run, story, tmp_path / name, "sampler=shot_by_shot")
        monkeypatch.setattr(KVCache, "_memory", full)
    assert pinned
    assert all(pinned)
    here, there = (assert_filmed(tmp_path / name) for name in ("here", "there"))
    assert all(torch.equal(*latents) for latents in zip(here, there, strict=True))


def test_the_gpu_films_what_the_cpu_films(run, story, tmp_path, on_gpu):
    """Films are made at fp32, with finished shots' keys kept and without; bf16 is not far."""
    cpu = pipeline.sample(run, story, tmp_path / "cpu", "device=cpu")
    expected = [load_file(path)["latent"] for path in sorted(cpu.glob("latents/*"))]
    for name, precision, tolerance, settings in (
        ("kept", "fp32", 1e-2, ("precision=fp32",)),
        ("anew", "fp32", 1e-2, ("precision=fp32", "sampler.cache=false")),
        ("bf16", "bf16", 1e-1, ()),
    ):
        with on_gpu(precision):
            pipeline.sample(run, story, tmp_path / name, *settings)
        assert_alike(assert_filmed(tmp_path / name), expected, tolerance)


def test_sampling_with_a_reference_picture(run, story, tmp_path, on_gpu):
    script = yaml.safe_load(story.read_text())
    Image.new("RGB", (96, 64), (0, 200, 0)).save(tmp_path / "ref.png")
    script["shots"][1]["image"] = "ref.png"
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(script))
    with on_gpu():
        pipeline.sample(run, tmp_path / "story.yaml", tmp_path / "film")
    assert_filmed(tmp_path / "film")


@pytest.mark.parametrize("settings", [(), ("offload=true",), ("offload=true", "sampler=joint")], ids=" ".join)
def test_two_experts_film_together(run, story, tmp_path, on_gpu, settings):
    """With the same weights they film what one model films."""
    high = expert_of(run, tmp_path / "high", sigma_min=0.6)
    low = expert_of(run, tmp_path / "low", sigma_max=0.6)
    one = pipeline.sample(run, story, tmp_path / "one", *settings[1:])
    with on_gpu():
        pipeline.sample(high, story, tmp_path / "two", f"low_noise_checkpoint={low}", *settings)
    assert_alike(assert_filmed(tmp_path / "two"), assert_filmed(one), 1e-2)


@two_gpus
@pytest.mark.parametrize("axis", ["sequence", "shard"])
def test_two_gpus_film_as_one(run, story, tmp_path, axis):
    one = pipeline.sample(run, story, tmp_path / "one", "precision=fp32")
    paths = (f"checkpoint={run}", f"script={story}", f"out={tmp_path / 'two'}")
    launched(*LAUNCH, "sample.py", *paths, "sampler.steps=2", "precision=fp32", f"parallel.{axis}=2")
    assert_alike(assert_filmed(tmp_path / "two"), assert_filmed(one), 1e-2)


# Wan


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """Returns a diffusers pipeline with a reduced Wan transformer, VAE and UMT5 of diffusers' own."""
    folder = tmp_path_factory.mktemp("release")
    randomized(diffusers.WanTransformer3DModel(**REDUCED)).save_pretrained(folder / "transformer")
    save_tiny_encoders(folder)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return folder


@pytest.fixture(scope="module")
def wan_prepared(world, release) -> Path:
    """Returns the world through Wan's VAE and UMT5."""
    encoders = ("encoders=wan", f"encoders.codec.path={release / 'vae'}", f"encoders.text.path={release}")
    return pipeline.prepare(world, release / "prepared", *encoders)


def wan_arguments(release: Path) -> list[str]:
    """They train from its transformer; the sizes of the tiny model do not count."""
    return ["model=wan", f"model.path={release / 'transformer'}", "moc.chunk_tokens=6"]


@pytest.mark.parametrize("adapter", [(), LORA], ids=["whole", "LoRA"])
def test_wan_is_trained_resumed_evaluated_and_sampled(wan_prepared, release, story, tmp_path, on_gpu, adapter):
    run = tmp_path / "run"
    for steps in (2, 3):
        with on_gpu():
            train(wan_prepared, run, *wan_arguments(release), *adapter, f"trainer.num_steps={steps}")
        assert_trained(run, steps)
    before, after = load_model(release / "transformer").state_dict(), load_model(run, weights="model").state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())
    with on_gpu():
        arguments = (f"data.path={wan_prepared}", "data.validation=1", f"output={tmp_path / 'rows.json'}")
        command("scripts/evaluate.py", f"checkpoint={run}", *arguments)
    values = [
        value for row in json.loads((tmp_path / "rows.json").read_text())["losses"] for value in row["loss"].values()
    ]
    assert torch.tensor(values).isfinite().all()
    with on_gpu():
        pipeline.sample(run, story, tmp_path / "film")
    assert_filmed(tmp_path / "film")


def test_a_wan_pipeline_is_sampled_as_it_is(release, story, tmp_path, on_gpu):
    with on_gpu():
        pipeline.sample(release, story, tmp_path / "film", "moc.dense=true", "sampler=joint")
    assert_filmed(tmp_path / "film")
