"""These tests are about two noise experts: found on disk, loaded as one model to the sampler, taking turns in
memory."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moc import MoCConfig, Sample, make_batch
from moc.errors import UserError
from moc.training import Parallel, ParallelConfig
from moc.training.integrity import checksums, files_to_seal, seal
from models import Experts, load_denoiser, load_model, move_model
from models.checkpoints.contents import Contents
from models.wan import WanTransformer3DModel
from tests.pipeline import command, refusal, sample
from tests.wan_files import reduced_wan, save_original

TEXT = "condition_embedder.text_embedder.linear_1.weight"


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, Path]:
    """Returns the same two models as a diffusers pipeline, as the release's folder, and as HoloCine's files."""
    folders = {name: tmp_path / name for name in ("diffusers", "release", "files")}
    folders["files"].mkdir()
    for name, folder, noise in (
        ("transformer", "high_noise_model", "high"),
        ("transformer_2", "low_noise_model", "low"),
    ):
        model = reduced_wan()
        with torch.no_grad():
            model.get_parameter(TEXT).fill_(1.0 if noise == "high" else 2.0)
        model.save_pretrained(folders["diffusers"] / name)
        model.save_pretrained(folders["release"] / folder)
        save_original(model, folders["files"] / f"full_{noise}_noise.safetensors")
    return folders


def marks(model: Experts) -> list[float]:
    return [expert.get_parameter(TEXT)[0, 0].item() for expert in (model.high, model.low)]


@pytest.mark.parametrize("form", ["diffusers", "release", "files"])
def test_a_folder_of_two_loads_as_one(experts, form):
    model = load_denoiser(experts[form])
    assert isinstance(model, Experts)
    assert marks(model) == [1.0, 2.0]
    assert model.boundary == 0.875
    with pytest.raises(UserError, match=r"holds two noise experts, .*: name the path of one"):
        load_model(experts[form])


def test_the_boundary_is_the_pipelines_and_stays_with_what_leaves_it(experts, tmp_path):
    index = experts["diffusers"] / "model_index.json"
    index.write_text(json.dumps({"boundary_ratio": 0.9}))
    assert load_denoiser(experts["diffusers"]).boundary == 0.9
    experts_of = Contents(experts["diffusers"]).experts
    runs = tmp_path / "high", tmp_path / "low"
    for expert, run, levels in zip(experts_of, runs, ((0.9, 1.0), (0.0, 0.9)), strict=True):
        command("scripts/convert_checkpoint.py", f"input={expert}", f"output={run}", "form=checkpoint", "shift=8")
        assert Contents(run).own_flow == replace(Contents(expert).own_flow, shift=8)
        assert (Contents(run).own_flow.sigma_min, Contents(run).own_flow.sigma_max) == levels
    model = load_denoiser(*runs)
    assert (model.boundary, marks(model)) == (0.9, [1.0, 2.0])
    for high, low in (runs, experts_of):
        with pytest.raises(UserError, match=rf"{low} is for noise levels from 0\.0 on, {high} from 0\.9: the high"):
            load_denoiser(low, high)
    for ratio in ("0.9", 1.5):
        index.write_text(json.dumps({"boundary_ratio": ratio}))
        with pytest.raises(UserError, match=f"model_index.json: boundary_ratio={ratio!r} must be a number betwe"):
            load_denoiser(experts["diffusers"])


def test_two_in_folders_of_their_own(experts):
    high, low = Contents(experts["files"]).experts
    flow, tune = (shutil.copy(p, p.parents[1] / f"{n}.safetensors") for p, n in ((high, "flow"), (low, "tune")))
    assert marks(load_denoiser(tune, flow)) == [2.0, 1.0]  # the names do not tell which is which
    with pytest.raises(UserError, match="holds two experts; with low_noise_checkpoint="):
        load_denoiser(experts["files"], low)
    for path in (high, low):
        shutil.copy(path, path.with_name(path.name.replace("full", "sparse")))
    with pytest.raises(UserError, match=r"several pairs .*'full_high_noise.safetensors', 'sparse_high"):
        load_denoiser(experts["files"])


def test_one_model_twice_and_names_that_are_swapped_are_refused(experts):
    high, low = Contents(experts["files"]).experts
    link = low.with_name("link.safetensors")
    link.symlink_to(high)
    for other in (high, link):
        with pytest.raises(UserError, match="are one model; name the high-noise expert and the low-noise one"):
            load_denoiser(high, other)
    folders = [Contents(experts[form]).experts for form in ("diffusers", "release")]
    for first, second in ((low, high), *((b, a) for a, b in folders)):
        with pytest.raises(
            ValueError, match=f"{first} is named as the low-noise expert and {second} as the high-noise"
        ):
            load_denoiser(first, second)
        assert marks(load_denoiser(second, first)) == [1.0, 2.0]


def test_one_model_stays_one(experts, tmp_path):
    shutil.rmtree(experts["diffusers"] / "transformer_2")
    (experts["files"] / "full_low_noise.safetensors").unlink()
    for path in (experts["diffusers"], experts["files"], experts["release"] / "low_noise_model"):
        assert Contents(path).experts is None
        assert isinstance(load_denoiser(path), WanTransformer3DModel)
    with pytest.raises(UserError, match="offload=true is for a pair"):
        move_model(load_denoiser(experts["files"]), Parallel(ParallelConfig("cpu")), offload=True)


def test_weights_are_halved_and_norms_are_not(experts):
    model = load_denoiser(experts["diffusers"], dtype=torch.bfloat16)
    for expert in (model.high, model.low):
        assert expert.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert expert.blocks[0].attn1.norm_q.weight.dtype == torch.float32


def run(model, sigma: float, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(model.high.config.in_channels, 1, 4, 4, generator=generator)]
    text = [torch.randn(2, model.high.config.text_dim, generator=generator) for _ in range(2)]
    batch = make_batch([Sample(latents, text)], model.stream, 4).to(device)
    levels = torch.tensor([sigma], device=device)
    return model(batch.latents, levels, batch.text, batch.layout, MoCConfig(chunk_tokens=4))[0].cpu()


@torch.no_grad()
def test_experts_that_take_turns_are_the_same(experts):
    plain, turns = (
        load_denoiser(experts["files"]),
        move_model(load_denoiser(experts["files"]), Parallel(ParallelConfig("cpu")), True),
    )
    for sigma in (0.9, 0.5, 0.95):
        assert torch.equal(run(plain, sigma), run(turns, sigma))
    assert turns.low._hf_hook.prev_module_hook.model is turns.high  # calling one moves the other off the device
    assert turns.high._hf_hook.prev_module_hook.model is turns.low


@torch.no_grad()
def test_the_high_noise_expert_begins_at_the_boundary(experts):
    model, called = load_denoiser(experts["files"]), []
    for name in ("high", "low"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: called.append(name))
    for sigma in (1.0, 0.875, 0.874):
        run(model, sigma)
    assert called == ["high", "high", "low"]


@pytest.mark.gpu
@torch.no_grad()
def test_one_expert_at_a_time_is_on_the_gpu(experts):
    plain = load_denoiser(experts["files"])
    model = move_model(load_denoiser(experts["files"]), Parallel(ParallelConfig("cuda")), offload=True)
    for sigma, there, away in ((0.9, "high", "low"), (0.5, "low", "high"), (0.9, "high", "low")):
        torch.testing.assert_close(run(model, sigma, "cuda"), run(plain, sigma), rtol=1e-3, atol=1e-3)
        assert next(getattr(model, there).parameters()).is_cuda
        assert not next(getattr(model, away).parameters()).is_cuda


# Through the command


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "story.json"
    shots = [{"prompt": "A cat.", "seconds": 0.4}, {"prompt": "A dog.", "seconds": 0.4}]
    path.write_text(json.dumps({"size": [32, 48], "fps": 12, "shots": shots}))
    return path


def expert_of(trained: Path, folder: Path, **flow) -> Path:
    """Returns a copy of a trained run that says it saw some of the noise levels."""
    shutil.copytree(trained, folder)
    (state,) = folder.glob("checkpoints/*/state.json")
    record = json.loads(state.read_text())
    record["flow"] |= flow
    state.write_text(json.dumps(record))
    seal(state.parent, checksums(state.parent, files_to_seal(state.parent)))
    return folder


def test_two_trained_experts_film_together(trained, script, tmp_path, capsys):
    """With the same weights they film what one model films, whichever of them is asked."""
    high = expert_of(trained, tmp_path / "high", sigma_min=0.6)
    low = expert_of(trained, tmp_path / "low", sigma_max=0.6)
    one = sample(trained, script, tmp_path / "one")
    two = sample(high, script, tmp_path / "two", f"low_noise_checkpoint={low}", "offload=true", "device=cpu")
    for path in sorted(one.glob("latents/*")):
        a, b = (load_file(folder / "latents" / path.name)["latent"] for folder in (one, two))
        torch.testing.assert_close(a, b)
    assert json.loads((two / "metadata.json").read_text())["config"]["low_noise_checkpoint"] == str(low)

    capsys.readouterr()
    arguments = (f"checkpoint={low}", f"low_noise_checkpoint={high}", f"script={script}", f"out={tmp_path / 'no'}")
    said = refusal(capsys, "sample.py", *arguments)
    assert f"{low}/checkpoints/step_0000003 is for noise levels from 0.0 on" in said
    assert "the high-noise expert is checkpoint" in said
    assert "fp64" in refusal(capsys, "sample.py", *arguments, "precision=fp64")
