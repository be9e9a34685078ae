"""These tests are about commands: their help, and for bad input one clear message, a status that is not 0, and nothing
that looks whole."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.media.decode import open_video
from data.storyworld import place_of_caption
from film.folder import FilmFolder
from film.script import load_script
from moc.errors import UserError
from models import build_model
from scripts import demo
from tests.composing import parsed
from tests.pipeline import ROOT, TINY_MODEL, assert_one_message, command, prepare, refusal, train, train_arguments

SCRIPTS = ["train.py", "sample.py"]
SCRIPTS += sorted(f"scripts/{p.name}" for p in (ROOT / "scripts").glob("*.py") if "__main__" in p.read_text())
SLOW = ["scripts/compile_kernels.py"]  # it needs a process of its own, without Triton's interpreter


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SCRIPTS])
def test_help_lists_the_settings(name, capfd):
    if name in SLOW:
        subprocess.run([sys.executable, str(ROOT / name), "--help"], check=True)
    else:
        with pytest.raises(SystemExit) as ending:
            command(name, "--help")
        assert ending.value.code in (0, None)
    said = capfd.readouterr().out
    assert any(key in said for key in ("output", "out:", "folder:"))
    assert len(said.splitlines()) > 5


def test_help_says_what_each_key_is(capfd):
    with pytest.raises(SystemExit):
        command("train.py", "--help")
    said = capfd.readouterr().out
    assert said.startswith("Trains a multi-shot video model: `python train.py experiment=NAME key=value ...`")
    assert "is powered by Hydra" not in said
    assert "\n# the optimizer and its learning rate.\noptim:\n" in said
    assert "\n  # the learning rate after its rise.\n  lr: 9.0e-05\n" in said
    assert "step: the first step of the stage." in said.partition("\nschedule:")[0].replace("\n# ", " ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
@pytest.mark.parametrize("name", ["attention", "model", "step"])
def test_a_benchmark_of_a_gpu_says_that_there_is_none(tmp_path, capsys, name):
    said = refusal(capsys, f"scripts/benchmark_{name}.py", f"output={tmp_path / 'out'}")
    assert_one_message(said, "GPU")
    assert not list(tmp_path.iterdir())


def test_the_suites_of_a_benchmark_are_known(capsys):
    assert_one_message(refusal(capsys, "scripts/benchmark_attention.py", "suites=[shots,shot]"), "suites", "chunks")


def test_a_process_ends_as_it_should(tmp_path):
    """This is the one test that pays for a process: it looks at the status, at standard error without a traceback, and
    that no file is left behind."""
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
    assert "model=huge" in said
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


def test_the_demo_s_verdict_is_of_the_levels_that_tell():
    sigmas, linear = [0.2, 0.5, 0.8, 0.95], [0.2, 0.16, 0.1, 0.05]
    ratio = demo.ratio_to_line(sigmas, [0.19, 0.152, 0.095, 0.5], linear)
    assert ratio == pytest.approx(0.95)
    assert demo.ratio_to_line(sigmas, [0.22, 0.176, 0.11, 0.01], linear) == pytest.approx(1.1)


def test_the_demo_is_larger_where_there_is_a_gpu(monkeypatch):
    config = parsed("demo", "output=o")
    for gpus, scale in (([], config.small), (["cuda:0"], config.large)):
        monkeypatch.setattr(demo, "visible_gpus", lambda gpus=gpus: gpus)
        assert config.chosen() == scale
        assert parsed("demo", "output=o", "scale=small").chosen() == config.small
    with pytest.raises(UserError, match="scale=huge"):
        parsed("demo", "scale=huge")


@pytest.mark.parametrize("scale", [pytest.param("small", marks=pytest.mark.slow), "large"])
def test_the_demo_s_stages_fit_each_other(scale, tmp_path):
    """All but the first run with their own sizes of frames, shots and codec, a tiny model and one step. A film as
    long as the script's comes out, of the size of the world's. The first films by itself what its model was trained
    to film."""
    config = parsed("demo", f"output={tmp_path}", f"scale={scale}", "scenes=2", "steps=1", "workers=1")
    extra = [
        ["device=cpu", "sampler.steps=1"],
        [],
        ["device=cpu"],
        [*TINY_MODEL, "parallel=cpu", "data.batch_tokens=3000", "data.validation=1", "data.workers=0"],
        ["device=cpu", "sampler.steps=1"],
    ]
    for stage, arguments in zip(demo.plan(config), extra, strict=True):
        command(stage.arguments[0], *stage.arguments[1:], *arguments)
    script = load_script(ROOT / config.chosen().script)
    film = open_video(tmp_path / "film/video.mp4")
    frames = json.loads((tmp_path / "world/truth.jsonl").read_text().splitlines()[0])["shots"][0]["end"]
    assert script.size == tuple(config.chosen().size) == (film.height, film.width)
    assert film.num_frames == frames * len(script.shots)
    shown = FilmFolder(tmp_path / "friends")
    assert shown.is_finished
    assert shown.read_metadata()["routing"][1][0] == 1  # the map shows a route
    settings = " ".join(config.chosen().world)
    assert all(place_of_caption(shot.prompt) in settings for shot in script.shots)


def test_the_large_demo_s_training_is_of_its_world():
    """A chunk is one latent frame of its films, and a step holds ten scenes at least."""
    config = parsed("demo", "output=o")
    train = parsed("train", "experiment=storyworld_large")
    frame = config.large.size[0] * config.large.size[1] // 16**2
    assert train.moc.chunk_tokens == frame
    assert train.data.batch_tokens >= 10 * 6 * 4 * frame
    assert train.parallel.device == "auto"
    model = build_model(train.model, latent_channels=32, text_dim=128)
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 50e6


def test_the_demo_ends_with_the_stage_that_failed(capfd):
    stages = [demo.Stage("one", 60, ["-c", "print('did one')"]), demo.Stage("two", 60, ["-c", "raise SystemExit(3)"])]
    with pytest.raises(ValueError, match=r"failed.*SystemExit"):
        demo.run([*stages, demo.Stage("three", 60, ["-c", "print('did three')"])], threads=1)
    said = capfd.readouterr().out
    assert "[1/3] one (about 3.0 minutes left)" in said
    assert "did one" in said
    assert "did three" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_told_to_end_ends_its_stage_and_what_that_started(tmp_path, number):
    """The stage starts a process that would hold its standard output open for an hour, and so this test."""
    stage = "import subprocess; subprocess.run(['sleep', '3600'])"
    stage = f"from pathlib import Path; Path({str(tmp_path / 'begun')!r}).touch(); {stage}"
    code = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom scripts import demo\n"
    code += f"with demo.raised_signals():\n    demo.run([demo.Stage('one', 60, ['-c', {stage!r}])], threads=1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode in (128 + number, -number)


# Checkpoints


def test_resuming_from_another_model(capsys, tmp_path, trained, prepared):
    shutil.copytree(trained, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    arguments = (f"data.path={prepared}", f"output={tmp_path}", "name=run", "parallel=cpu", "data.workers=0")
    other = ("model.dim=48", *TINY_MODEL[1:], "trainer.num_steps=9")
    from_it = f"resume={tmp_path}/run"
    assert_one_message(refusal(capsys, "train.py", *arguments, *other, from_it), "another model", "dim=32, not 48")
    assert_one_message(refusal(capsys, "train.py", *arguments, *TINY_MODEL, "seed=4", from_it), "seed=0, not 4")
    assert_one_message(refusal(capsys, "train.py", *arguments, f"resume={tmp_path}/no"), "resume=", "no complete")
    assert sorted(tmp_path.rglob("*")) == before


def test_starting_anew_over_an_older_run(capsys, tmp_path, trained, prepared):
    shutil.copytree(trained, tmp_path / "run")
    arguments = train_arguments(prepared, tmp_path / "run")
    said = refusal(capsys, "train.py", *arguments, "resume=none")
    assert_one_message(said.splitlines()[-1], "step_0000003", "set another name")
    assert (tmp_path / "run/metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()


def test_a_run_that_diverges_leaves_no_checkpoint(capsys, tmp_path, prepared):
    with pytest.raises(SystemExit) as ending:
        train(prepared, tmp_path / "run", "optim.lr=1e30", "optim.warmup_steps=0", "trainer.checkpoint_every=1")
    assert_one_message(str(ending.value.code), "the loss is", "lower optim.lr")
    capsys.readouterr()
    # A checkpoint may have been saved before the loss was known.
    assert {path.name for path in tmp_path.glob("run/checkpoints/*")} <= {"step_0000001"}
