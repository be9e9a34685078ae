"""These tests are about a Wan model through the commands a user calls; with Mixture of Contexts untrained, by settings
alone."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file

from data.loading.dataset import DataConfig, open_dataset
from models import load_model
from tests import pipeline
from tests.wan_files import REDUCED
from tests.weights import randomized


@pytest.fixture(scope="module")
def release(prepared, tmp_path_factory) -> Path:
    """Returns a diffusers folder as the releases have it, for the latents and text of the tiny world."""
    data = open_dataset(DataConfig(str(prepared)))
    sizes = {"in_channels": data.latent_channels, "out_channels": data.latent_channels, "text_dim": data.text_dim}
    small = {"attention_head_dim": 24, "ffn_dim": 32}
    folder = tmp_path_factory.mktemp("release") / "transformer"
    randomized(diffusers.WanTransformer3DModel(**REDUCED | sizes | small)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense_run(prepared, release) -> Path:
    """Returns a run of two steps on dense attention from the release's weights."""
    paths = (f"data.path={prepared}", f"output={release.parent}", "name=run", "model=wan", f"model.path={release}")
    settings = ("parallel=cpu", "moc=dense", "data.batch_tokens=900", "data.workers=0", "trainer.num_steps=2")
    pipeline.command("train.py", *paths, *settings)
    return release.parent / "run"


def test_a_trained_model_is_diffusers_again(dense_run, release):
    checkpoint = dense_run / "checkpoints/step_0000002"
    theirs = diffusers.WanTransformer3DModel.from_pretrained(checkpoint / "model").state_dict()
    before, ours = load_model(release).state_dict(), load_model(checkpoint, weights="model").state_dict()
    assert theirs.keys() == ours.keys() == before.keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    assert not torch.equal(before["blocks.0.attn1.to_q.weight"], ours["blocks.0.attn1.to_q.weight"])


@pytest.mark.slow
def test_the_recipe_for_a_small_gpu_trains_resumes_and_merges(prepared, release, tmp_path):
    """A base in fp8, swapped blocks, activations and averages on the host are all asked for through the command."""
    small = ("data.batch_tokens=900", "data.workers=0", "moc.chunk_tokens=6", "parallel.device=cpu")
    paths = ("experiment=wan_a14b_high_24gb", f"data.path={prepared}", f"output={tmp_path}", f"model.path={release}")
    settings = (*small, "parallel.swap_blocks=2", "data.drop_to_still=0", "optim.lr=0.1", "optim.warmup_steps=0")
    for name, steps in (("whole", [2]), ("half", [1, 2])):
        for num_steps in steps:
            pipeline.command("train.py", *paths, *settings, f"name={name}", f"trainer.num_steps={num_steps}")
    file = "checkpoints/step_0000002/model/pytorch_lora_weights.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    merged, base = (load_model(path, weights="model").state_dict() for path in (tmp_path / "whole", release))
    assert merged.keys() == base.keys()
    assert {name for name in base if not torch.equal(base[name], merged[name])} >= {"blocks.1.attn2.to_v.weight"}


def test_a_dense_run_is_evaluated_with_moc_untrained(dense_run, release, prepared, tmp_path):
    where = ("data.validation=1", f"data.path={prepared}", "device=cpu", f"output={tmp_path / 'rows.json'}")
    for checkpoint in (dense_run, release):
        pipeline.command("scripts/evaluate.py", f"checkpoint={checkpoint}", *where, "moc.chunk_tokens=6", "moc.top_k=1")
        rows = json.loads((tmp_path / "rows.json").read_text())["losses"]
        dense, moc, own = (row for row in rows if row["clean_history"])
        assert dense["sparsity"] == 0 < moc["sparsity"] < own["sparsity"]
        losses = [list(row["loss"].values()) for row in (dense, moc, own)]
        assert all(len(set(at_level)) == 3 for at_level in zip(*losses, strict=True))


def test_a_pipelines_expert_is_evaluated_at_its_own_noise_levels(release, prepared, tmp_path):
    expert = Path(shutil.copytree(release, tmp_path / "pipeline/transformer_2"))
    (expert.parent / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.5}))
    where = ("data.validation=1", f"data.path={prepared}", "device=cpu", f"output={tmp_path / 'rows.json'}")
    pipeline.command("scripts/evaluate.py", f"checkpoint={expert}", *where, "moc.chunk_tokens=6")
    for row in json.loads((tmp_path / "rows.json").read_text())["losses"]:
        assert [float(level) for level in row["loss"]] == pytest.approx([0.1, 0.25, 0.4, 0.475])


def test_a_dense_run_films_with_moc_untrained(dense_run, tmp_path):
    shots = [{"prompt": "Mia walks.", "seconds": 5 / 12}, {"prompt": "Gus waves.", "seconds": 5 / 12}]
    (tmp_path / "story.yaml").write_text(yaml.safe_dump({"size": [32, 48], "fps": 12, "shots": shots}))
    films = {}
    for name, settings in {"dense": (), "moc": ("moc.dense=false", "moc.chunk_tokens=6", "moc.top_k=1")}.items():
        out = pipeline.sample(dense_run, tmp_path / "story.yaml", tmp_path / name, *settings)
        record = json.loads((out / "metadata.json").read_text())
        assert record["moc"]["dense"] == (name == "dense")
        assert bool(record["routing"][1][0]) == (name == "moc")  # the second shot routed to the first
        films[name] = [load_file(out / f"latents/{number:02d}.safetensors")["latent"] for number in (1, 2)]
    torch.testing.assert_close(films["dense"][0], films["moc"][0], rtol=1e-4, atol=1e-4)  # a first shot has no history
    assert not torch.allclose(films["dense"][1], films["moc"][1], rtol=1e-2, atol=1e-3)
