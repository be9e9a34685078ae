"""Here are the project's commands, run as `python SCRIPT key=value ...` would run them, but without a process for
each."""

import runpy
import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from moc.files import LOCK

ROOT = Path(__file__).parents[1]
TINY_MODEL = ("model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.ffn_dim=32")


def command(script: str, *arguments: str) -> None:
    """Runs a script of the checkout; raises SystemExit as it would end."""
    PartialState._reset_state()  # the state belongs to a process, and each command would be one
    before = sys.argv, list(sys.path)
    sys.argv = [str(ROOT / script), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before


def refusal(capsys: pytest.CaptureFixture, script: str, *arguments: str) -> str:
    """Returns what a command that must fail says, on standard error or as its last word."""
    with pytest.raises(SystemExit) as ending:
        command(script, *arguments)
    code = ending.value.code
    assert code not in (0, None)
    said = capsys.readouterr().err
    return code if isinstance(code, str) else said


def assert_one_message(said: str, *words: str) -> None:
    """Checks that what a command said is an error of one line, and holds all `words`."""
    assert said.startswith("error: "), said
    assert "\n" not in said.strip(), said
    for word in words:
        assert word in said, said


def assert_refused(said: str, *words: str) -> None:
    """Checks that what a command said is an error of one line for each of `words`, in some order, which holds it."""
    head, *lines = said.rstrip().splitlines()
    assert head == f"error: {len(words)} are refused:", said
    assert len(lines) == len(words), said
    for word in words:
        assert sum(word in line for line in lines) == 1, said


def make_world(output: Path, *arguments: str) -> Path:
    """Returns four scenes of three shots of five frames, 32 x 48."""
    sizes = ("scenes=4", "size=[32,48]", "frames_per_shot=[5]", "shots=[3]", "workers=1")
    command("scripts/make_storyworld.py", f"output={output}", *sizes, *arguments)
    return output


def prepare(films: Path, output: Path, *arguments: str) -> Path:
    command("scripts/prepare_data.py", f"input={films}", f"output={output}", "size=[32,48]", *arguments)
    return output


def train_arguments(prepared: Path, run: Path) -> list[str]:
    """They train a tiny model for three steps."""
    paths = (f"data.path={prepared}", f"output={run.parent}", f"name={run.name}")
    settings = ("parallel=cpu", "moc=forward", "moc.chunk_tokens=6", "moc.top_k=2", "data.batch_tokens=900")
    length = ("trainer.num_steps=3", "trainer.log_every=1", "data.workers=0", "data.validation=1")
    return [*paths, *TINY_MODEL, *settings, *length]


def train(prepared: Path, run: Path, *arguments: str) -> Path:
    command("train.py", *train_arguments(prepared, run), *arguments)
    return run


def sample(run: Path, script: Path, out: Path, *arguments: str) -> Path:
    command("sample.py", f"checkpoint={run}", f"script={script}", f"out={out}", "sampler.steps=2", *arguments)
    return out


def stamps(folder: Path) -> dict[Path, int]:
    """Returns when each file and folder in a folder was last written. The lock is left out: some versions of filelock
    write it whenever it is taken, and others remove it when it is released."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK}
