"""These tests are about conversion into a run's folder: what goes beside the weights, and the command."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from accelerate import init_empty_weights
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from moc import MoCConfig
from moc.diffusion import Flow
from moc.errors import UserError
from moc.training.checkpoint import check_same_model, find_checkpoint
from models import EncodersConfig, ModelConfig, build_encoders, build_model, load_encoders, load_model, save_model
from models.checkpoints.contents import Contents
from models.checkpoints.export import Beside, Form, convert
from models.checkpoints.names import COMFYUI_PREFIX, to_original_name
from models.checkpoints.opening import load_checkpoint, open_checkpoint
from models.earlier import cut_gap
from models.encoders.pair import find_encoders, read_encoders
from models.wan import WanTransformer3DModel
from tests import pipeline
from tests.wan_files import same, save_hole, save_original


@pytest.fixture
def release(reduced_folder: Path, tmp_path: Path) -> Path:
    """Returns a diffusers pipeline of Wan, as it is published."""
    shutil.copytree(reduced_folder, tmp_path / "release/transformer")
    save_tiny_encoders(tmp_path / "release")
    (tmp_path / "release/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5)
    scheduler.save_pretrained(tmp_path / "release/scheduler")
    return tmp_path / "release"


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """Returns a script of one short shot."""
    file = tmp_path / "story.yaml"
    file.write_text(yaml.safe_dump({"size": [32, 48], "fps": 12, "shots": [{"prompt": "Mia.", "seconds": 0.4}]}))
    return file


def save_tiny_encoders(folder: Path) -> None:
    """Saves encoders as a diffusers pipeline of Wan holds them."""
    diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1).save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=16, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁cat", -1.0)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer")


def as_run(source: Path, output: Path, **settings) -> Path:
    """Converts `source` into a run's folder; returns its only checkpoint."""
    convert(open_checkpoint(source), output, form=Form.checkpoint, beside=Beside(**settings))
    (step,) = (output / "checkpoints").iterdir()
    return step


def test_a_public_file_becomes_a_run(reduced, reduced_file: Path, tmp_path: Path) -> None:
    step = as_run(reduced_file, tmp_path / "run", moc={"top_k": 2, "causal": False}, shift=5.0)
    assert step == find_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoints/step_0000000"
    assert sorted(str(p.relative_to(step)) for p in step.rglob("*")) == [
        *("complete", "model", "model/config.json", "model/diffusion_pytorch_model.safetensors", "model/moc.json"),
        "state.json",
    ]
    assert same(load_model(tmp_path / "run"), reduced.state_dict())
    assert (Contents(step).moc, Contents(step).flow) == (MoCConfig(top_k=2, causal=False), Flow(shift=5.0))
    # Settings that are not given come from the input.
    again = as_run(tmp_path / "run", tmp_path / "again", moc={"top_k": 4})
    assert (Contents(again).moc, Contents(again).flow) == (MoCConfig(top_k=4, causal=False), Flow(shift=5.0))
    convert(open_checkpoint(tmp_path / "run"), tmp_path / "folder", beside=Beside({"top_k": 3}))
    assert MoCConfig.load(tmp_path / "folder") == MoCConfig(top_k=3, causal=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_byte_identical(reduced, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = copy.deepcopy(reduced).to(dtype)
    weights.save_pretrained(tmp_path / "diffusers")
    paths = {
        Form.diffusers: tmp_path / "diffusers",
        Form.original: save_original(weights, tmp_path / "original.safetensors"),
        Form.checkpoint: tmp_path / "run",
    }
    as_run(paths[Form.diffusers], paths[Form.checkpoint])
    contents = weights.state_dict()
    for start in paths:
        for end in paths:
            output = tmp_path / f"{start}_{end}{paths[end].suffix}"
            convert(open_checkpoint(paths[start]), output, form=end, shard_bytes=300_000)
            found = open_checkpoint(output)
            assert found.stored.keys() == contents.keys()
            for name, weight in contents.items():
                assert found.read(name).dtype == dtype
                assert torch.equal(found.read(name).view(torch.uint8), weight.view(torch.uint8)), (start, end, name)
    files = [tmp_path / f"{start}_original.safetensors" for start in paths]
    assert len({file.read_bytes() for file in files}) == 1


def test_encoders_come_along_or_are_named(reduced_folder: Path, release: Path, tmp_path: Path, monkeypatch) -> None:
    made = tmp_path / "made"
    build_encoders(EncodersConfig(), ["cat"]).save(made)
    step = as_run(reduced_folder, tmp_path / "run", encoders_path=str(made))
    assert load_encoders(step / "encoders").text.fingerprint == load_encoders(made).text.fingerprint
    opened = Contents.sound(tmp_path / "run")
    assert load_encoders(opened).text.fingerprint == load_encoders(tmp_path / "run").text.fingerprint
    assert Contents.sound(opened) is Contents.at(opened) is opened
    step = as_run(tmp_path / "run", tmp_path / "copy")
    assert (step / "encoders/encoders.json").read_text() == (made / "encoders.json").read_text()

    for number, (source, settings) in enumerate(
        ((release, {}), (release / "transformer", {}), (reduced_folder, {"encoders_path": str(release)}))
    ):
        step = as_run(source, tmp_path / f"from_{number}", **settings)
        loaded = load_encoders(step / "encoders")
        assert (loaded.codec.latent_channels, loaded.text.text_dim, loaded.config.text.form) == (16, 24, "joined")
        assert [path.name for path in (step / "encoders").iterdir()] == ["encoders.json"]  # named by path, not copied
    monkeypatch.chdir(release.parent)
    step = as_run(Path(release.name), tmp_path / "of_relative")
    monkeypatch.chdir("/")
    assert read_encoders(step / "encoders") == read_encoders(release)
    shutil.rmtree(release / "tokenizer")
    assert find_encoders(release) is None
    with pytest.raises(UserError, match=r"holds no encoders: neither encoders\.json, .* nor vae, text_encoder, "):
        as_run(reduced_folder, tmp_path / "none", encoders_path=str(reduced_folder))
    with pytest.raises(UserError, match="nowhere does not exist; name a run"):
        as_run(reduced_folder, tmp_path / "none", encoders_path=str(tmp_path / "nowhere"))
    assert not list(tmp_path.glob("none*"))


@pytest.mark.parametrize("settings", [(), ("encoders_path={release}",)])
def test_a_pipeline_is_sampled_as_it_is(release: Path, story: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    arguments = [setting.format(release=release) for setting in settings]
    MoCConfig(chunk_tokens=6, top_k=1).save(release / "transformer")
    film = pipeline.sample(release, story, tmp_path / "film", *arguments)
    assert (film / "video.mp4").is_file()
    record = json.loads((film / "metadata.json").read_text())
    assert (record["flow"]["shift"], record["moc"]["chunk_tokens"], record["moc"]["top_k"]) == (5, 6, 1)


@pytest.mark.parametrize("name", ["transformer", "transformer_2", "low_noise_model", "model", "."])
def test_attention_settings_are_found_beside_the_weights(reduced_folder: Path, name: str, tmp_path: Path) -> None:
    """They are found by all who ask, whichever folder is named."""
    whole = tmp_path / "whole"
    shutil.copytree(reduced_folder, whole / name)
    if name == "model":
        (whole / "complete").write_text("")  # a training checkpoint has this file
    MoCConfig(top_k=2).save(whole / name)
    for path in (whole, whole / name):
        assert Contents(path).moc == open_checkpoint(path).moc == MoCConfig(top_k=2)


def test_the_gap_at_cuts_is_the_models_wherever_it_is_written(reduced_folder: Path, tmp_path: Path) -> None:
    """It is kept in config.json, where 0 is left out; earlier versions kept it in moc.json."""
    public = (reduced_folder / "config.json").read_text()
    shutil.copytree(reduced_folder, tmp_path / "earlier")
    (tmp_path / "earlier/moc.json").write_text('{"top_k": 2, "cut_gap": 2.0}')
    assert [cut_gap({}, folder) for folder in (tmp_path / "earlier", reduced_folder, None)] == [2, 0, 0]
    assert cut_gap({"cut_gap": 3.0}, tmp_path / "earlier") == 3
    assert load_model(reduced_folder).config.cut_gap == 0
    earlier = load_model(tmp_path / "earlier")
    assert earlier.config.cut_gap == 2
    save_model(earlier, tmp_path / "now", open_checkpoint(tmp_path / "earlier").moc)
    assert "cut_gap" not in (tmp_path / "now/moc.json").read_text()
    assert load_model(tmp_path / "now").config.cut_gap == 2
    check_same_model(tmp_path / "earlier", earlier)  # the run would resume
    check_same_model(tmp_path / "now", earlier)
    for folder in ("earlier", "now"):
        with pytest.raises(UserError, match=r"another model: cut_gap=2.0, not 0.0"):
            check_same_model(tmp_path / folder, load_model(reduced_folder))
    config = ModelConfig(family="wan", path=str(tmp_path / "now"), cut_gap=0)
    save_model(build_model(config, 16, 24), tmp_path / "none", MoCConfig())
    assert json.loads((tmp_path / "none/config.json").read_text()) == json.loads(public)
    assert build_model(replace(config, cut_gap=None), 16, 24).config.cut_gap == 2


def test_the_schedulers_shift_comes_along(release: Path, tmp_path: Path) -> None:
    for number, (source, settings, shift) in enumerate(
        ((release, {}, 5), (release / "transformer", {}, 5), (release, {"shift": 8.0}, 8))
    ):
        assert Contents(as_run(source, tmp_path / f"run_{number}", **settings)).flow == Flow(shift=shift)
    file = release / "scheduler/scheduler_config.json"
    diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(release / "scheduler")
    assert Contents(release).flow == Flow(shift=7.0)
    for text, message in (
        ('{"flow_shift": "5"}', "flow shift '5' must be a number above 0"),
        ("{", "is damaged or no"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"scheduler_config.json.*{message}"):
            _ = Contents(release).flow


def test_holocines_file_becomes_a_run_as_it_was_trained(
    reduced_file, release, story, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(release)
    paths = ("encoders.codec.path=vae", "encoders.text.path=.")
    arguments = (f"input={reduced_file}", f"output={tmp_path}/run", "form=checkpoint", "moc=holocine", "shift=5")
    pipeline.command("scripts/convert_checkpoint.py", *arguments, "encoders=holocine", *paths)
    encoders = read_encoders(tmp_path / "run")
    assert (encoders.codec.continuous, encoders.text.form) == (True, "holocine")
    monkeypatch.chdir("/")
    contents = Contents(tmp_path / "run")
    moc, flow = contents.moc, contents.flow
    assert (moc.dense, moc.causal, moc.text_anchor, flow.shift) == (True, False, "global_and_own", 5)
    assert (pipeline.sample(tmp_path / "run", story, tmp_path / "film") / "video.mp4").is_file()

    arguments = (arguments[0], f"output={tmp_path}/no", "form=checkpoint")
    paths = (f"encoders.codec.path={release}/vae", f"encoders.text.path={release}")
    for settings, message in (
        (("encoders=wan", "encoders.codec.path=nowhere", paths[1]), "encoders.codec.path='nowhere' must be wan and a"),
        (("encoders=embedded",), "encoders.codec.kind=lapped, encoders.codec.path=null must be wan and a folder"),
        (("encoders=wan", *paths, f"encoders_path={release}"), "exclude each other; leave one out"),
        (("encoders=wan",), "encoders.codec.path and encoders.text.path are not set"),
    ):
        assert message in pipeline.refusal(capsys, "scripts/convert_checkpoint.py", *arguments, *settings)
    assert not list(tmp_path.glob("no*"))


def test_a_form_that_cannot_hold_what_is_asked(reduced_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(reduced_folder)
    for output, form, beside, message in (
        ("a.safetensors", Form.auto, Beside(moc={"top_k": 3}), "form=original has no place for moc; use form=checkpo"),
        ("a", Form.auto, Beside(shift=3, encoders_path="x"), "form=diffusers has no place for shift, encoders_path"),
        ("a", Form.original, Beside(), "does not fit form=original"),
        ("a.safetensors", Form.checkpoint, Beside(), "does not fit form=checkpoint"),
        ("a", Form.checkpoint, Beside(moc={"top": 3}), r"unknown MoC settings \['top'\]"),
        ("a", Form.checkpoint, Beside(shift=-1), r"flow\.shift=-1 must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            convert(checkpoint, tmp_path / output, form=form, beside=beside)
        assert not list(tmp_path.glob("a*"))


def test_a_failed_conversion_leaves_no_run(
    reduced_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("models.checkpoints.export.write_state", full)
    with pytest.raises(OSError, match="No space left"):
        as_run(reduced_folder, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


# The command


SMALL = "Wan2.1-T2V-1.3B: 1.419 B parameters in 825 tensors, bfloat16, float32"


@pytest.mark.parametrize(
    ("sizes", "form", "said"),
    [
        ((12, 8960, 30, 16), "original", SMALL),
        ((12, 8960, 30, 16), "comfyui", SMALL),
        ((12, 8960, 30, 16), "diffusers", SMALL),
        (
            *((40, 13824, 40, 16), "original"),
            "Wan2.1-T2V-14B, an expert of Wan2.2-T2V-A14B, or HoloCine (same shapes): 14.288 B parameters in 1095 "
            "tensors, bfloat16, float32",
        ),
        ((24, 14336, 30, 48), "diffusers", "Wan2.2-TI2V-5B: 5.000 B parameters in 825 tensors, bfloat16, float32"),
    ],
    ids=["1.3B-original", "1.3B-comfyui", "1.3B-diffusers", "14B-original", "5B-diffusers"],
)
def test_the_command_knows_the_public_models(sizes: tuple[int, ...], form: str, said: str, tmp_path, capsys) -> None:
    """They are read by header alone: the files have the real names and shapes, and a hole for the values."""
    with init_empty_weights():
        model = WanTransformer3DModel(
            **dict(zip(("num_attention_heads", "ffn_dim", "num_layers", "in_channels"), sizes, strict=True)),
            out_channels=sizes[-1],
        )
    renamed = {
        "original": to_original_name,
        "comfyui": lambda name: COMFYUI_PREFIX + to_original_name(name),
        "diffusers": str,
    }[form]
    header, end = {}, 0
    for name, weight in model.state_dict().items():
        dtype, size = ("F32", 4) if name.endswith("scale_shift_table") else ("BF16", 2)
        start, end = end, end + size * weight.numel()
        header[renamed(name)] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [start, end]}
    file = save_hole(tmp_path / "wan.safetensors", header, end)
    pipeline.command("scripts/convert_checkpoint.py", f"input={file}")
    assert capsys.readouterr().out == f"{file}: {said}, {form} names\n"


def test_the_command_says_what_a_file_is_and_converts_it(reduced_file: Path, tmp_path: Path, capsys) -> None:
    script = "scripts/convert_checkpoint.py"
    pipeline.command(script, f"input={reduced_file}", f"output={tmp_path}/out/folder", "dtype=bfloat16")
    assert "a Wan model: 0.6 M parameters in 69 tensors, float32, original names" in capsys.readouterr().out
    assert load_checkpoint(open_checkpoint(tmp_path / "out/folder"), None).dtype == torch.bfloat16
    said = pipeline.refusal(capsys, script, "input=nowhere.safetensors", f"output={tmp_path}/x")
    pipeline.assert_one_message(said, "nowhere.safetensors does not exist; name a run's folder")


def test_a_converted_run_is_sampled_evaluated_and_trained_from(
    trained, prepared, story, tmp_path: Path, capsys
) -> None:
    """A model's bare folder, as it might be published, becomes a run that every command takes."""
    script, published, run = "scripts/convert_checkpoint.py", tmp_path / "published", tmp_path / "run"
    pipeline.command(script, f"input={trained}", f"output={published}")
    encoders = find_checkpoint(trained) / "encoders"
    beside = (f"encoders_path={encoders}", "moc.top_k=1", "shift=2")
    pipeline.command(script, f"input={published}", f"output={run}", "form=checkpoint", *beside)
    contents = Contents(find_checkpoint(run))
    moc, flow = contents.moc, contents.flow
    assert (moc.top_k, moc.chunk_tokens, flow.shift) == (1, 6, 2)

    assert (pipeline.sample(run, story, tmp_path / "film") / "video.mp4").is_file()
    arguments = (f"data.path={prepared}", "data.validation=1", "device=cpu")
    pipeline.command("scripts/evaluate.py", f"checkpoint={run}", *arguments)
    assert "MoC" in capsys.readouterr().out
    length = ("trainer.num_steps=1", "optim.lr=1e-30", "trainer.ema_decay=0")
    tuned = pipeline.train(prepared, tmp_path / "tuned", f"model.path={run}", *length)
    assert same(load_model(tuned, weights="model"), load_model(published).state_dict())
    for how in ((tmp_path / "again", f"resume={run}"), (run,)):
        said = pipeline.refusal(capsys, "train.py", *pipeline.train_arguments(prepared, how[0]), *how[1:])
        assert "converted weights and nothing of a run to resume" in said.splitlines()[-1]
        assert f"model.path={find_checkpoint(run)}" in said
    said = pipeline.refusal(capsys, "train.py", *pipeline.train_arguments(prepared, run), "resume=none")
    assert "step_0000000" in said.splitlines()[-1]
