"""These tests are about commands: their help, and for bad input one clear message, a status that is not 0, and nothing
that looks whole."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
@pytest.mark.parametrize("name", ["attention", "memory", "model", "parallel", "sampling", "step"])
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
    assert_one_message(said, path or "data.path", "prepare" if path else "empty")
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


# Checkpoints


def test_resuming_from_another_model(capsys, tmp_path, trained, prepared):
    shutil.copytree(trained, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    arguments = (f"data.path={prepared}", f"output={tmp_path}", "name=run", "parallel=cpu", "data.workers=0")
    other = ("model.dim=48", *TINY_MODEL[1:], "trainer.num_steps=9")
    from_it = f"resume={tmp_path}/run"
    assert_one_message(refusal(capsys, "train.py", *arguments, *other, from_it), "another model", "dim=32, not 48")
    assert_one_message(refusal(capsys, "train.py", *arguments, *TINY_MODEL, "seed=4", from_it), "seed=0, not 4")
    assert sorted(tmp_path.rglob("*")) == before
    said = refusal(capsys, "train.py", *arguments, "name=new", f"resume={tmp_path}/no")
    assert_one_message(said, "resume=", "no complete")


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
