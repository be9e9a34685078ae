"""These tests are about a run's folder: it stays below the output, one launch at a time has it, and a kill at any
moment loses nothing."""

import errno
import fcntl
import subprocess
import sys

import pytest

from moc.files import HeldError, OutsideError, held, inside, write_whole
from moc.training import Metrics, TrackerConfig, read_metrics
from tests.pipeline import ROOT, refusal, stamps, train, train_arguments
from tests.runs import make_cache
from tests.runs import train as train_here


@pytest.mark.parametrize("name", ["../esc", "a/../../esc", "/tmp/esc", ".."])
def test_a_name_that_leaves_the_output_is_refused(capsys, tmp_path, prepared, name):
    """It is refused before anything is made, below the output or outside."""
    arguments = [*train_arguments(prepared, tmp_path / "out/run"), f"name={name}"]
    said = refusal(capsys, "train.py", *arguments)
    assert said.startswith(f"error: name='{name}' does not lie within {tmp_path}/out; ")
    assert "\n" not in said.strip()
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_the_output_is_refused(capsys, tmp_path, prepared):
    said = refusal(capsys, "train.py", *train_arguments(prepared, tmp_path / "run"), "name=.")
    assert "is the output folder itself" in said
    assert list(tmp_path.iterdir()) == []


def test_names_that_stay_inside(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/out").symlink_to(tmp_path)
    assert inside(tmp_path / "root", "a/b..c/..d") == tmp_path / "root/a/b..c/..d"
    assert inside(tmp_path / "root", "out/file") == tmp_path / "root/out/file"
    for name in ("out/file", "../root/a", "/etc/passwd", "a/.."):
        with pytest.raises(OutsideError, match="does not lie within"):
            inside(tmp_path / "root", name, follow_links=True)


def test_a_second_launch_is_refused_in_one_line(capsys, tmp_path, prepared):
    run = train(prepared, tmp_path / "run")
    before = stamps(run)
    with held(run):
        said = refusal(capsys, "train.py", *train_arguments(prepared, run), "trainer.num_steps=5")
    assert said == f"error: {run} is in use by another process; wait for it to end, or name another folder"
    assert stamps(run) == before
    train(prepared, run, "trainer.num_steps=5")
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 2, 3, 4, 5]


def test_a_folder_is_held_for_those_who_came_together_until_the_process_ends(tmp_path):
    """The other process is killed while it holds the folder."""
    code = (
        "import sys; from pathlib import Path; from moc.files import held\n"
        "with held(Path(sys.argv[1])):\n"
        "    print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(HeldError), held(tmp_path):
        pass
    with held(tmp_path, holds=False):
        pass  # as the other ranks do, while rank 0 holds it
    other.kill()
    other.communicate()
    with held(tmp_path):
        pass


def test_a_folder_that_is_refused_for_a_moment_is_held(tmp_path, monkeypatch):
    """A busy system may refuse a lock that nobody holds; filelock asks again if it is given the time."""
    refusals, flock = iter([BlockingIOError] * 2), fcntl.flock

    def refusing(file: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and (error := next(refusals, None)):
            raise error(errno.EAGAIN, "held elsewhere")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", refusing)
    with held(tmp_path):
        assert next(refusals, None) is None


def test_what_a_killed_save_of_another_step_left_is_removed(tmp_path):
    cache = make_cache(tmp_path / "cache")
    checkpoints = tmp_path / "run/checkpoints"
    for name in ("partial_0000001", "partial_0000099", "partial_results", "step_9"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "state.json").write_text("{}")
    train_here(cache, tmp_path / "run", num_steps=2)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["partial_results", "step_0000002", "step_9"]


def metrics_of(folder):
    """Returns six rows in a run's folder, resumed after the fourth."""
    first = Metrics(folder, TrackerConfig(), {})
    for step in range(1, 7):
        first.log(step, {"loss": 1.0})
    return (folder / "metrics.jsonl").read_bytes(), lambda: Metrics(folder, TrackerConfig(), {}, first_step=4)


@pytest.mark.parametrize("call", ["write_bytes", "write_text", "replace", "open"])
def test_metrics_outlive_a_kill_at_a_resume(tmp_path, monkeypatch, call):
    """The process is killed at any of the calls that could touch the file: all rows are still there, or just those to
    be kept."""
    before, resume = metrics_of(tmp_path)

    class KillError(BaseException):
        pass

    whole = getattr(type(tmp_path), call)

    def killed(path, *arguments, **others):
        if call != "open":
            if call.startswith("write"):
                whole(path, arguments[0][:30])
            raise KillError
        opened = whole(path, *arguments, **others)
        if arguments and set(arguments[0]) & set("wa+"):
            raise KillError
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), call, killed)
        try:
            resume()
        except KillError:
            assert (tmp_path / "metrics.jsonl").read_bytes() == before
    resume()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_are_lines_that_only_a_line_feed_ends(tmp_path):
    metrics = Metrics(tmp_path, TrackerConfig(), {})
    metrics.path.write_text('{"step": 1, "note": "a\u2028b\x85c"}\n{"step": 2}\n{"st', encoding="utf-8")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_whole_file_replaces_another_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(partial, payload):
        partial.open("wb").write(payload[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, b"new one", durable=True)
    assert path.read_bytes() == b"old"
    write_whole(path, b"new one", durable=True)
    assert path.read_bytes() == b"new one"
    assert list(tmp_path.iterdir()) == [path]
