"""Commands: their help, and for bad input one clear message, a status that is not 0, and nothing that looks whole."""

import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data.video import write_video
from moc.diffusion.samplers import sample_shots
from scripts import demo
from tests.pipeline import ROOT, TINY_MODEL, command, prepare, refusal, train, train_arguments

SCRIPTS = ["train.py", "sample.py"]
SCRIPTS += sorted(f"scripts/{p.name}" for p in (ROOT / "scripts").glob("*.py") if "__main__" in p.read_text())
GOOD = {"size": [32, 48], "fps": 12, "shots": [{"prompt": "A cat.", "seconds": 0.4}]}


@pytest.fixture
def films(tmp_path):
    """A folder with one short film."""
    pictures = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), np.uint8)
    write_video(tmp_path / "films/a.mp4", pictures, 12)
    return tmp_path / "films"


@pytest.fixture
def script(tmp_path):
    def write(**changes) -> Path:
        path = tmp_path / "story.yaml"
        path.write_text(yaml.safe_dump(GOOD | changes))
        return path

    return write


def assert_one_message(said: str, *parts: str) -> None:
    assert said.startswith("error: "), said
    assert "\n" not in said.strip(), said
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_the_settings(name, capsys):
    with pytest.raises(SystemExit) as ending:
        command(name, "--help")
    assert ending.value.code in (0, None)
    said = capsys.readouterr().out
    assert "output" in said or "out:" in said
    assert len(said.splitlines()) > 5


def test_a_process_ends_as_it_should(tmp_path):
    """The one test that pays for a process: status, standard error without a traceback, no file left behind."""
    arguments = [sys.executable, str(ROOT / "scripts/example_film.py"), "output="]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert_one_message(result.stderr, "output")
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


# Settings


def test_an_unknown_key_is_named(capsys):
    assert "trainer.num_step" in refusal(capsys, "train.py", "trainer.num_step=5")
    assert_one_message(refusal(capsys, "train.py", "+trainer.num_step=5"), "trainer.num_step")


def test_an_unknown_option_is_named_with_the_known(capsys):
    said = refusal(capsys, "train.py", "model=huge")
    assert "model/huge" in said
    assert "debug" in said


def test_a_wrong_type_is_named(capsys):
    assert_one_message(refusal(capsys, "train.py", "trainer.num_steps=many"), "trainer.num_steps", "'many'")
    assert_one_message(refusal(capsys, "scripts/prepare_data.py", "input=a", "output=b", "fps=fast"), "fps", "'fast'")


# Data


@pytest.mark.parametrize("path", ["", "nowhere", "empty"])
def test_training_without_data(capsys, tmp_path, path):
    (tmp_path / "empty").mkdir()
    where = f"data.path={tmp_path / path}" if path else "data.path="
    said = refusal(capsys, "train.py", where, f"output={tmp_path / 'out'}", "parallel=cpu")
    assert_one_message(said, path or "data.path", "prepare" if path else "set")
    assert not (tmp_path / "out").exists()


def test_preparing_a_missing_or_empty_folder(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, reason in (("nowhere", "no such folder"), ("empty", "no manifest.jsonl and no video")):
        arguments = (f"input={tmp_path / name}", f"output={tmp_path / 'out'}")
        assert_one_message(refusal(capsys, "scripts/prepare_data.py", *arguments), name, reason)
        assert not (tmp_path / "out").exists()


def assert_nothing_to_train_on(prepared: Path, capsys) -> None:
    assert not list(prepared.rglob("complete"))
    said = refusal(capsys, "train.py", f"data.path={prepared}", "parallel=cpu", f"output={prepared.parent / 'runs'}")
    assert_one_message(said, str(prepared), "no finished cache")


def test_preparing_only_unreadable_films(capsys, tmp_path, films):
    (films / "a.mp4").write_bytes(b"not a film at all" * 99)
    arguments = (f"input={films}", f"output={tmp_path / 'out'}", "size=[32,48]", "detector=adaptive")
    assert_one_message(refusal(capsys, "scripts/prepare_data.py", *arguments), "nothing usable", "report.json")
    problems = json.loads((tmp_path / "out/report.json").read_text())["problems"]
    assert any("a.mp4" in problem["where"] for problem in problems)
    assert_nothing_to_train_on(tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("shots", "reason"),
    [
        ([(0, 12), (10, 20)], "10 is before the end 12"),
        ([(0, 10), (10, 21)], "20 frames"),
        ([(0, 10), (20, 15)], "start"),
    ],
)
def test_shots_that_cannot_be(capsys, tmp_path, films, shots, reason):
    spans = [{"start": start, "end": end, "caption": "x"} for start, end in shots]
    scene = {"id": "a", "video": "a.mp4", "caption": "x", "fps": 12, "shots": spans}
    (films / "manifest.jsonl").write_text(json.dumps(scene) + "\n")
    arguments = (f"input={films}", f"output={tmp_path / 'out'}", "size=[32,48]", "strict=true")
    assert_one_message(refusal(capsys, "scripts/prepare_data.py", *arguments), "shots[1]", reason)
    assert_nothing_to_train_on(tmp_path / "out", capsys)


def test_a_size_the_codec_cannot_take(capsys, tmp_path, films):
    arguments = (f"input={films}", f"output={tmp_path / 'out'}", "size=[30,48]")
    assert_one_message(refusal(capsys, "scripts/prepare_data.py", *arguments), "30x48", "multiples of")
    assert not (tmp_path / "out/cache").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_size_the_model_cannot_take(capsys, tmp_path, films, workers):
    """Latents of 5 x 6 do not divide into tokens of 2 x 2."""
    prepared = prepare(films, tmp_path / "out", "size=[40,48]", "detector=adaptive")
    arguments = (f"data.path={prepared}", f"output={tmp_path / 'runs'}", "parallel=cpu", f"data.workers={workers}")
    assert_one_message(refusal(capsys, "train.py", *arguments, *TINY_MODEL), "5, 6", "divisible")
    assert not list(tmp_path.rglob("step_*"))


def test_a_budget_no_scene_fits(capsys, tmp_path, prepared):
    arguments = (f"data.path={prepared}", f"output={tmp_path / 'runs'}", "parallel=cpu", "data.batch_tokens=10")
    assert_one_message(refusal(capsys, "train.py", *arguments, *TINY_MODEL), "data.batch_tokens", "raise the budget")


# The demo


def test_the_demo_does_not_write_over_another(capsys, tmp_path):
    assert_one_message(refusal(capsys, "scripts/demo.py", f"output={tmp_path}"), f"output={tmp_path}", "another")


def test_the_demo_ends_with_the_stage_that_failed(capfd):
    stages = [demo.Stage("one", 60, ["-c", "print('did one')"]), demo.Stage("two", 60, ["-c", "raise SystemExit(3)"])]
    with pytest.raises(ValueError, match=r"failed.*SystemExit"):
        demo.run([*stages, demo.Stage("three", 60, ["-c", "print('did three')"])], threads=1)
    said = capfd.readouterr().out
    assert "[1/3] one (about 3.0 minutes left)" in said
    assert "did one" in said
    assert "did three" not in said


# Checkpoints


def test_resuming_from_another_model(capsys, tmp_path, trained, prepared):
    shutil.copytree(trained, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    arguments = (f"data.path={prepared}", f"output={tmp_path}", "name=run", "parallel=cpu", "data.workers=0")
    other = ("model.dim=48", *TINY_MODEL[1:], "trainer.num_steps=9")
    assert_one_message(refusal(capsys, "train.py", *arguments, *other), "another model", "dim=32, not 48")
    assert_one_message(refusal(capsys, "train.py", *arguments, *TINY_MODEL, "seed=4"), "seed=0, not 4")
    assert_one_message(refusal(capsys, "train.py", *arguments, f"resume={tmp_path}/no"), "resume=", "no complete")
    assert sorted(tmp_path.rglob("*")) == before


def test_starting_anew_over_an_older_run(capsys, tmp_path, trained, prepared):
    shutil.copytree(trained, tmp_path / "run")
    arguments = train_arguments(prepared, tmp_path / "run")
    said = refusal(capsys, "train.py", *arguments, "resume=none")
    assert_one_message(said.splitlines()[-1], "step_0000003", "set another name")
    assert (tmp_path / "run/metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()


def test_sampling_from_what_is_no_model(capsys, tmp_path, script):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for path in (tmp_path / "nowhere", tmp_path / "other.safetensors"):
        arguments = (f"checkpoint={path}", f"script={script()}", f"out={tmp_path / 'film'}")
        assert_one_message(refusal(capsys, "sample.py", *arguments), path.name)
        assert not (tmp_path / "film").exists()


def test_a_model_of_the_hub_is_fetched_first(capsys, tmp_path, script, trained):
    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    arguments = (f"script={script()}", f"out={tmp_path / 'film'}")
    for wrong in (f"checkpoint={name}", f"checkpoint=https://huggingface.co/{name}"):
        assert_one_message(refusal(capsys, "sample.py", wrong, *arguments), "does not exist", f"hf download {name} ")
    wrong = (f"checkpoint={trained}", f"encoders_path={name}")
    assert_one_message(refusal(capsys, "sample.py", *wrong, *arguments), f"hf download {name} ")
    said = refusal(capsys, "sample.py", f"checkpoint={tmp_path}/run", *arguments)
    assert_one_message(said, "does not exist")
    assert "hf download" not in said


def broken_weights(trained: Path, folder: Path, change) -> Path:
    """The run's model, with one weight changed."""
    shutil.copytree(trained / "checkpoints/step_0000003/ema", folder)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in sorted(weights) if name.endswith("ffn.0.weight"))
    save_file(weights | {name: change(weights[name])}, file)
    return folder


def test_weights_that_are_not_finite_make_no_film(capsys, tmp_path, trained, script):
    model = broken_weights(trained, tmp_path / "model", lambda weight: weight * torch.nan)
    arguments = (f"checkpoint={model}", f"encoders_path={trained}", f"script={script()}", f"out={tmp_path / 'film'}")
    said = refusal(capsys, "sample.py", *arguments, "sampler.steps=2")
    assert_one_message(said.splitlines()[-1], "shot 1, step 1 of 2", "not finite")
    assert not [path for path in tmp_path.glob("film/**/*") if path.is_file()]


def test_weights_of_whole_numbers_are_refused(capsys, tmp_path, trained, script):
    model = broken_weights(trained, tmp_path / "model", lambda weight: (weight * 99).to(torch.int8))
    arguments = (f"checkpoint={model}", f"encoders_path={trained}", f"script={script()}", f"out={tmp_path / 'film'}")
    assert_one_message(refusal(capsys, "sample.py", *arguments), "ffn.0.weight is I8", "not quantized")
    said = refusal(capsys, "sample.py", f"checkpoint={trained}", *arguments[2:], "dtype=int8")
    assert_one_message(said, "dtype='int8'", "fp32, bf16")


@pytest.mark.parametrize("scale", ["nan", "inf", "-1"])
def test_a_guidance_scale_that_means_nothing(capsys, tmp_path, trained, script, scale):
    arguments = (f"checkpoint={trained}", f"script={script()}", f"out={tmp_path / 'film'}")
    said = refusal(capsys, "sample.py", *arguments, f"sampler.guidance_scale={scale}")
    assert_one_message(said, "sampler.guidance_scale", "finite")


def test_a_checkpoint_with_the_encoders_of_another_model(capsys, tmp_path, trained, script, films):
    other = prepare(films, tmp_path / "out", "detector=adaptive", "encoders.text.dim=64")
    shutil.copytree(trained, tmp_path / "run")
    mixed = tmp_path / "run/checkpoints/step_0000003/encoders"
    shutil.rmtree(mixed)
    shutil.copytree(next(other.glob("cache/*/encoders")), mixed)
    arguments = (f"checkpoint={tmp_path / 'run'}", f"script={script()}", f"out={tmp_path / 'film'}")
    assert_one_message(refusal(capsys, "sample.py", *arguments), "64", "128", "text")
    assert not list(tmp_path.glob("film/*"))


# Scripts


BAD_SCRIPTS = [
    ({"shots": []}, ["shots", "no shot"]),
    ({"shots": [{"prompt": "A cat.", "seconds": 0}]}, ["shots[0].seconds", "0 is not a positive number"]),
    ({"size": [30, 48]}, ["size", "30x48", "multiple of 8"]),
    ({"size": [40, 48]}, ["5, 6", "divisible"]),
    ({"shot": 3}, ["unknown field 'shot'"]),
]


@pytest.mark.parametrize(("changes", "parts"), BAD_SCRIPTS)
def test_scripts_that_cannot_be_filmed(capsys, tmp_path, trained, script, changes, parts):
    arguments = (f"checkpoint={trained}", f"script={script(**changes)}", f"out={tmp_path / 'film'}")
    assert_one_message(refusal(capsys, "sample.py", *arguments), *parts)
    assert not list(tmp_path.glob("film/*"))


def sample_arguments(trained: Path, story: Path, out: Path) -> list[str]:
    return [f"checkpoint={trained}", f"script={story}", f"out={out}", "sampler.steps=1"]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", ["metadata.json", "shots/02.mp4", "latents/02.safetensors"])
def test_a_film_is_not_written_over(capsys, tmp_path, trained, script, part):
    """Nor is one that was not finished: its later shots would stand beside the new film's metadata."""
    (tmp_path / "film" / part).parent.mkdir(parents=True)
    (tmp_path / "film" / part).write_text("{}")
    arguments = sample_arguments(trained, script(), tmp_path / "film")
    assert_one_message(refusal(capsys, "sample.py", *arguments), "film", part, "another folder")
    assert names(tmp_path / "film") == {part}


def test_any_prompt_is_drawn(tmp_path, trained, recwarn):
    """A dollar is no formula; JSON writes an emoji in two halves, and tabs may indent it."""
    prompt = "A \N{RABBIT} for $5_{ or $6."
    story = {"title": r"$\frac{$", "size": [32, 48], "shots": [{"prompt": prompt, "seconds": 0.4}]}
    (tmp_path / "story.json").write_text(json.dumps(story, indent="\t"))
    command("sample.py", *sample_arguments(trained, tmp_path / "story.json", tmp_path / "film"))
    assert names(tmp_path / "film") >= {"storyboard.png", "routing.png", "metadata.json"}
    record = json.loads((tmp_path / "film/metadata.json").read_text())
    assert record["script"]["shots"][0]["prompt"] == prompt
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_picture_that_fails_costs_itself_alone(capsys, tmp_path, trained, script, monkeypatch, caplog):
    """The command ends well, the metadata were written before, and a line names what is missing."""
    there = []

    def failing(path, *_):
        there.append(names(path.parent))
        raise RuntimeError("no font")

    monkeypatch.setattr("data.storyboard.draw_storyboard", failing)
    command("sample.py", *sample_arguments(trained, script(), tmp_path / "film"))
    assert there == [{"latents/01.safetensors", "shots/01.mp4", "video.mp4", "metadata.json"}]
    assert names(tmp_path / "film") == {*there[0], "routing.png"}
    assert [record.getMessage().partition(": ")[0] for record in caplog.records if record.levelname == "WARNING"] == [
        f"{tmp_path / 'film/storyboard.png'} is left out, the film is whole (RuntimeError"
    ]
    assert "storyboard" not in capsys.readouterr().out


def test_a_disk_that_is_full(capsys, tmp_path, trained, script):
    """A limit on the size of files stands for the full disk; it is a real error of the file system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        said = refusal(capsys, "sample.py", *sample_arguments(trained, script(), tmp_path / "film"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_message(said, "latents/01.safetensors", "File too large")
    assert names(tmp_path / "film") == set()


def test_sampling_that_dies_keeps_what_is_finished(capsys, tmp_path, trained, script, monkeypatch):
    """The disk is full at the second shot: the first one's latents and video stay; no film, no metadata."""

    def dying(*arguments, **others):
        yield next(sample_shots(*arguments, **others))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moc.diffusion.sample_shots", dying)
    story = script(shots=[{"prompt": "A cat.", "seconds": 0.4}] * 2)
    arguments = (f"checkpoint={trained}", f"script={story}", f"out={tmp_path / 'film'}", "sampler.steps=2")
    assert_one_message(refusal(capsys, "sample.py", *arguments), "No space left")
    assert names(tmp_path / "film") == {"latents/01.safetensors", "shots/01.mp4"}


def test_a_run_that_diverges_leaves_no_checkpoint(capsys, tmp_path, prepared):
    with pytest.raises(SystemExit) as ending:
        train(prepared, tmp_path / "run", "optim.lr=1e30", "optim.warmup_steps=0", "trainer.checkpoint_every=1")
    assert_one_message(str(ending.value.code), "the loss is", "lower optim.lr")
    capsys.readouterr()
    assert {path.name for path in tmp_path.glob("run/checkpoints/*")} <= {"step_0000001"}  # before it was known
