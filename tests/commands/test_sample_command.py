"""These tests are about `sample.py` as a user calls it: what cannot be filmed is one message, and a film's folder holds
one whole film."""

import errno
import json
import resource
import shutil
from pathlib import Path

import av
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from film.folder import PROGRESS
from moc.diffusion.samplers import sample_shots
from moc.files import LOCK
from moc.training.integrity import checksums, files_to_seal, seal
from tests.pipeline import ROOT, assert_one_message, assert_refused, command, prepare, refusal

GOOD = {"size": [32, 48], "fps": 12, "shots": [{"prompt": "A cat.", "seconds": 0.4}]}


@pytest.fixture
def script(tmp_path):
    def write(**changes) -> Path:
        path = tmp_path / "story.yaml"
        path.write_text(yaml.safe_dump(GOOD | changes))
        return path

    return write


# Models


def test_sampling_from_what_is_no_model(capsys, tmp_path, script):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for path in (tmp_path / "nowhere", tmp_path / "other.safetensors"):
        arguments = (f"checkpoint={path}", f"script={script()}", f"out={tmp_path / 'film'}")
        assert_one_message(refusal(capsys, "sample.py", *arguments), path.name)
        assert not (tmp_path / "film").exists()


def test_a_model_of_the_hub_is_fetched_first(capsys, tmp_path, script, trained):
    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    arguments = (f"script={script()}", f"out={tmp_path / 'film'}")
    for wrong in (f"checkpoint={name}", f"checkpoint={name}/transformer", f"checkpoint=https://huggingface.co/{name}"):
        assert_one_message(refusal(capsys, "sample.py", wrong, *arguments), "does not exist", f"hf download {name} ")
    wrong = (f"checkpoint={trained}", f"encoders_path={name}")
    assert_one_message(refusal(capsys, "sample.py", *wrong, *arguments), f"hf download {name} ")
    said = refusal(capsys, "sample.py", f"checkpoint={tmp_path}/run", *arguments)
    assert_one_message(said, "does not exist")
    assert "hf download" not in said


def broken_weights(trained: Path, folder: Path, change) -> Path:
    """Returns the run's model, with one weight changed."""
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
    assert [path.name for path in tmp_path.glob("film/**/*") if path.is_file()] == [LOCK]


def test_weights_of_whole_numbers_are_refused(capsys, tmp_path, trained, script):
    model = broken_weights(trained, tmp_path / "model", lambda weight: (weight * 99).to(torch.int8))
    arguments = (f"checkpoint={model}", f"encoders_path={trained}", f"script={script()}", f"out={tmp_path / 'film'}")
    assert_one_message(refusal(capsys, "sample.py", *arguments), "ffn.0.weight is I8", "not quantized")
    said = refusal(capsys, "sample.py", f"checkpoint={trained}", *arguments[2:], "precision=int8")
    assert_one_message(said, "precision='int8'", "fp32", "bf16")


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
    seal(mixed.parent, checksums(mixed.parent, files_to_seal(mixed.parent)))
    arguments = (f"checkpoint={tmp_path / 'run'}", f"script={script()}", f"out={tmp_path / 'film'}")
    assert_one_message(refusal(capsys, "sample.py", *arguments), "64", "128", "text")
    assert [path.name for path in tmp_path.glob("film/*")] == [LOCK]


# Scripts


BAD_SCRIPTS = [
    ({"shots": []}, ["shots", "no shot"]),
    ({"shots": [{"prompt": "A cat.", "seconds": 0}]}, ["shots[0].seconds", "0 is not a positive number"]),
    ({"size": [30, 48]}, ["size", "30x48", "multiple of 8"]),
    ({"size": [40, 48]}, ["5, 6", "divisible"]),
    ({"shot": 3}, ["unknown field 'shot'"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD_SCRIPTS)
def test_scripts_that_cannot_be_filmed(capsys, tmp_path, trained, script, changes, words):
    arguments = (f"checkpoint={trained}", f"script={script(**changes)}", f"out={tmp_path / 'film'}")
    assert_one_message(refusal(capsys, "sample.py", *arguments), *words)
    assert not list(tmp_path.glob("film/*"))


@pytest.mark.parametrize("settings", [["size=[63,96]"], ["size=[40,48]"], ["size=[63,96]", "dry_run=true"]])
def test_a_size_that_cannot_be_filmed_is_refused_first_and_alone(capsys, caplog, tmp_path, trained, script, settings):
    """That the model was never trained on it would only distract."""
    assert_one_message(refusal(capsys, "sample.py", *sample_arguments(trained, script(), tmp_path), *settings), "size")
    assert "never trained" not in caplog.text


def test_a_batch_names_all_scripts_that_cannot_be_filmed(capsys, caplog, tmp_path, trained, monkeypatch):
    """It names them before anything is encoded; what is found when they are encoded, before a film is begun."""
    changes = {"empty": {"shots": []}, "good": {}, "odd": {"size": [30, 48]}, "typed": {"shot": 3}}
    (tmp_path / "batch").mkdir()
    for name, change in changes.items():
        (tmp_path / f"batch/{name}.yaml").write_text(yaml.safe_dump(GOOD | change))
    arguments = sample_arguments(trained, tmp_path / "batch", tmp_path / "films")
    with monkeypatch.context() as patch:
        patch.setattr("film.filmmaker.plan_film", lambda *_: pytest.fail("a script was encoded"))
        said = refusal(capsys, "sample.py", *arguments)
    words = ("empty.yaml shots: there is no shot", "odd.yaml: size: 30x48 is not", "typed.yaml shot: unknown field")
    assert_refused(said, *words)
    assert "good.yaml" not in said
    (tmp_path / "batch/picture.png").write_bytes(b"no picture")
    unreadable = {"shots": [GOOD["shots"][0] | {"image": "picture.png"}]}
    for name in ("empty", "odd"):
        (tmp_path / f"batch/{name}.yaml").write_text(yaml.safe_dump(GOOD | unreadable))
    (tmp_path / "batch/typed.yaml").unlink()
    assert_refused(refusal(capsys, "sample.py", *arguments), "films/empty: ", "films/odd: ")
    assert not list(tmp_path.glob("films/*"))


def test_a_dry_run_tells_what_all_others_cost_and_names_the_bad(capsys, tmp_path, trained):
    """A script may fail when it is read and when it is encoded."""
    unreadable = {"shots": [GOOD["shots"][0] | {"image": "picture.png"}]}
    changes = {"a": unreadable, "b": {"title": "A walk"}, "c": {"shots": []}, "d": unreadable, "e": {"title": "A run"}}
    (tmp_path / "batch").mkdir()
    (tmp_path / "batch/picture.png").write_bytes(b"no picture")
    for name, change in changes.items():
        (tmp_path / f"batch/{name}.yaml").write_text(yaml.safe_dump(GOOD | change))
    arguments = sample_arguments(trained, tmp_path / "batch", tmp_path / "films")
    with pytest.raises(SystemExit) as ending:
        command("sample.py", *arguments, "dry_run=true")
    assert_refused(str(ending.value), "c.yaml shots: there is no shot", "films/a: ", "films/d: ")
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith(str(tmp_path))] == [
        f"{tmp_path / 'films/b'}: A walk",
        f"{tmp_path / 'films/e'}: A run",
    ]
    assert told.count("1 shot, 5 frames") == 2
    assert not list(tmp_path.glob("films/*"))


def sample_arguments(trained: Path, story: Path, out: Path) -> list[str]:
    return [f"checkpoint={trained}", f"script={story}", f"out={out}", "sampler.steps=1"]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {LOCK}


@pytest.mark.parametrize("name", ["metadata.json", "shots/02.mp4", "latents/02.safetensors"])
def test_a_film_is_not_written_over(capsys, tmp_path, trained, script, name):
    """A film that was not finished is not replaced either: its later shots would stand beside the new film's
    metadata."""
    (tmp_path / "film" / name).parent.mkdir(parents=True)
    (tmp_path / "film" / name).write_text("{}")
    arguments = sample_arguments(trained, script(), tmp_path / "film")
    assert_one_message(refusal(capsys, "sample.py", *arguments), "film", name, "another folder")
    assert names(tmp_path / "film") == {name}


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


ODD = [
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{RABBIT}", "\N{HEBREW LETTER ALEF}\N{RIGHT-TO-LEFT OVERRIDE}x", "$x^{2",
    "100% %s %(a)s", "{} {0} {{x}} ${HOME}", "C:\\dir \\n", "\"q\" 'q' </script><b>b</b> & <!--",
    "--> 00:00:01,000 --> 00:00:02,000", "[SHOT CUT] [character] #", "long " * 599 + "end",
]  # fmt: skip


def test_any_text_may_stand_in_any_field(tmp_path, trained):
    """It comes back as it was, and neither the page nor the subtitles take it for their own."""
    shots = [{"prompt": text, "seconds": 0.1, "cut": bool(number % 2)} for number, text in enumerate(ODD)]
    told = {"title": " ".join(ODD[:-1]), "global": "\n".join(ODD), "negative": ODD[4]}
    (tmp_path / "story.json").write_text(json.dumps(told | {"size": [32, 48], "fps": 10, "shots": shots}))
    film = tmp_path / "film"
    command("sample.py", *sample_arguments(trained, tmp_path / "story.json", film), "video.subtitles=true")
    record = json.loads((film / "metadata.json").read_text())["script"]
    assert [shot["prompt"] for shot in record["shots"]] == ODD
    assert {name: record[name] for name in told} == told
    assert {"storyboard.png", "routing.png", "video.srt", "video.vtt"} <= names(film)
    for name in ("video.srt", "video.vtt"):
        with av.open(str(film / name)) as subtitles:
            assert sum(packet.size > 0 for packet in subtitles.demux()) == len(ODD)
    assert "<b>b</b>" not in (film / "index.html").read_text()


def test_a_picture_that_fails_costs_itself_alone(capsys, tmp_path, trained, script, monkeypatch, caplog):
    """The command ends well, the metadata were written before, and a line names what is missing."""
    there = []

    def failing(path, *_):
        there.append(names(path.parent))
        raise RuntimeError("no font")

    monkeypatch.setattr("film.presentation.draw_storyboard", failing)
    command("sample.py", *sample_arguments(trained, script(), tmp_path / "film"))
    film = {"latents/01.safetensors", "shots/01.mp4", "video.mp4", "routing.safetensors", "metadata.json"}
    assert there == [film | {".progress.safetensors"}]
    assert names(tmp_path / "film") == film | {"routing.png", "index.html"}
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
    assert_one_message(said, ".progress.safetensors", "File too large")
    assert names(tmp_path / "film") == set()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left"]),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
            ["a film of 2 shots does not fit", "Tried to allocate 2.00 GiB)", "sampler=shot_by_shot"],
        ),
    ],
    ids=["disk", "memory"],
)
def test_sampling_that_dies_keeps_what_is_finished(capsys, tmp_path, trained, script, monkeypatch, error, words):
    """The disk, or the GPU's memory, is full at the second shot: the first one's latents and video stay; no film, no
    metadata."""

    def dying(*arguments, **others):
        shots = sample_shots(*arguments, **others)
        yield next(shots)
        next(shots)
        raise error

    monkeypatch.setattr("film.filmmaker.sample_shots", dying)
    story = script(shots=[{"prompt": "A cat.", "seconds": 0.4}] * 2)
    arguments = (f"checkpoint={trained}", f"script={story}", f"out={tmp_path / 'film'}", "sampler.steps=2")
    assert_one_message(refusal(capsys, "sample.py", *arguments), *words)
    assert names(tmp_path / "film") == {"latents/01.safetensors", "shots/01.mp4", PROGRESS}
    monkeypatch.undo()
    command("sample.py", *arguments)
    assert names(tmp_path / "film") >= {"latents/02.safetensors", "shots/02.mp4", "video.mp4", "metadata.json"}


@pytest.mark.parametrize(
    ("name", "script", "frames"),
    [("recall_moc", "recall", 5), pytest.param("described", "described", 17, marks=pytest.mark.slow)],
)
def test_the_checkpoints_of_the_repository_film_their_story(name, script, frames, tmp_path):
    kept, story = ROOT / "docs/checkpoints" / name, ROOT / f"configs/scripts/{script}.yaml"
    arguments = (f"checkpoint={kept}", f"script={story}", f"out={tmp_path / 'film'}", "device=cpu")
    command("sample.py", *arguments, "sampler.steps=1", "sampler.guidance_scale=1")
    record = json.loads((tmp_path / "film/metadata.json").read_text())
    assert record["num_frames"] == 8 * frames
    assert record["moc"]["dense"] is False
