"""These tests are about the commands as users launch them: in processes of their own, several of them, killed in
between."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from data.cache.writer import read_stored
from data.loading.dataset import DataConfig, open_dataset
from data.records import digest
from moc.errors import UserError
from moc.files import held
from moc.training import read_metrics
from moc.training.interruption import MARKER
from moc.training.processes import join_processes
from tests import pipeline
from tests.films import write_numbered
from tests.preparing import film_folder, scene, scenes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return film_folder(tmp_path)


def command(folder, *launcher, **changes):
    script = ROOT / "scripts" / "prepare_data.py"
    overrides = {"input": folder, "output": folder / "out", "detector": "adaptive", "size": "[64,160]"} | changes
    return [*launcher, str(script), *(f"{key}={value}" for key, value in overrides.items())]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def two_processes():
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    return [accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def stored(out):
    """Returns number of each scene of the cache, and the times each was encoded, by the picture that encoding
    leaves."""
    (cache,) = (out / "cache").iterdir()
    keys = [scene["key"] for stored in read_stored(cache) for scene in stored["scenes"]]
    pictures = {key: out / "thumbnails" / f"{digest({'key': key, 'shot': 0})}.jpg" for key in keys}
    return Counter(keys), {key: path.stat().st_mtime_ns for key, path in pictures.items()}


def assert_same_cache(one, two):
    a, b = (open_dataset(DataConfig(path=str(path))) for path in (one, two))
    assert [(s.id, s.latent_checksums, s.text_keys) for _, s in a.items] == [
        (s.id, s.latent_checksums, s.text_keys) for _, s in b.items
    ]


@pytest.mark.slow
def test_accelerate_launches_two_processes_that_share_the_work(folder):
    scenes(folder, *(scene(f"s{n}", (n, n + 9)) for n in range(0, 50, 5)))
    subprocess.run(command(folder, *two_processes()), check=True, env=environment(), timeout=300)
    shares = [stored["scenes"] for stored in read_stored(next((folder / "out" / "cache").iterdir()))]
    assert [len(share) for share in shares] == [5, 5]
    subprocess.run(command(folder, sys.executable, output=folder / "one"), check=True, env=environment(), timeout=300)
    assert_same_cache(folder / "one", folder / "out")


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_the_next_launch_goes_on(folder):
    """The second process is killed without warning while both encode: what either had stored is not made again."""
    scenes(folder, *(scene(f"s{n}-{m}", (n, n + 9 + 4 * m)) for n in range(40) for m in range(3)))
    launch = subprocess.Popen(command(folder, *two_processes()), env=environment())
    while launch.poll() is None and len(list(folder.glob("out/cache/*/scene-1-*.json"))) < 10:
        time.sleep(0.01)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(launch.pid).children(recursive=True)}
    ranks["1"].kill()
    assert launch.wait(timeout=120) != 0
    assert not list(folder.glob("out/cache/*/complete"))
    before, times = stored(folder / "out")
    assert 10 <= len(before) < 120
    subprocess.run(command(folder, *two_processes()), check=True, env=environment(), timeout=300)
    after, times_after = stored(folder / "out")
    assert times.items() <= times_after.items()  # no file was encoded again
    assert len(after) == after.total() == 120
    assert {path.name for path in folder.glob("out/cache/*/*.safetensors")} == {
        f"shard-{rank}-00000.safetensors" for rank in range(2)
    }
    subprocess.run(command(folder, sys.executable, output=folder / "one"), check=True, env=environment(), timeout=300)
    assert_same_cache(folder / "one", folder / "out")


@pytest.mark.slow
def test_accelerate_trains_in_two_processes_as_in_one(prepared, tmp_path):
    one = pipeline.train(prepared, tmp_path / "one", "parallel.accumulation=2")
    arguments = pipeline.train_arguments(prepared, tmp_path / "two")
    train = [*two_processes(), str(ROOT / "train.py"), *arguments, "parallel=auto"]
    subprocess.run(train, check=True, env=environment(), timeout=300)
    losses = [[row["loss"] for row in read_metrics(run) if "loss" in row] for run in (one, tmp_path / "two")]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_a_tracker_that_does_not_start_is_told_by_both_processes(prepared, tmp_path):
    """The one that makes no tracker does not wait in vain for the other."""
    pytest.importorskip("wandb")
    outside = {key: value for key, value in environment().items() if not key.startswith(("WANDB_", "NETRC"))}
    arguments = [*pipeline.train_arguments(prepared, tmp_path / "run"), "tracking.tracker=wandb", "parallel=auto"]
    done = subprocess.run(
        [*two_processes(), str(ROOT / "train.py"), *arguments],
        env=outside | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("tracking.tracker=wandb: Weights & Biases does not start") == 2
    assert "waited in vain" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["no checkpoint", "in use"])
def test_a_run_that_cannot_start_is_no_unfinished_one(prepared, tmp_path, wrong):
    """The launcher tells the other process to end, which says why the main one failed; a scheduler that takes it for
    unfinished would start it again for ever."""
    arguments = [*pipeline.train_arguments(prepared, tmp_path / "run"), "parallel=auto"]
    if wrong == "no checkpoint":
        arguments.append(f"resume={tmp_path}")
    said = {"no checkpoint": "holds no complete checkpoint", "in use": "is in use by another process"}[wrong]
    with held(tmp_path / "run", holds=wrong == "in use"):
        done = subprocess.run(
            [*two_processes(), str(ROOT / "train.py"), *arguments],
            env=environment() | {MARKER: str(tmp_path / "unfinished")},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count(said) == 2
    assert not (tmp_path / "unfinished").exists()


# The process of rank `dies` ends while the model is built, without a word or by an error of its own; the other ones are
# busy until the launcher tells them to end, or find that it does not answer.
DYING = """
import os, pathlib, runpy, signal, sys, time
import models

build, done = models.build_model, pathlib.Path(sys.argv[1])
dies, how, busy = sys.argv[2:5]

def build_model(*arguments):
    if os.environ["RANK"] == dies:
        while not done.exists():
            time.sleep(0.02)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError("this host is too small")
    done.touch()
    for _ in range(6000 if busy == "busy" else 0):
        time.sleep(0.02)
    return build(*arguments)

models.build_model = build_model
sys.path.insert(0, ".")
sys.argv[:5] = ["train.py"]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "how", "busy"),
    [("1", "killed", "busy"), ("1", "fails", "idle"), ("0", "killed", "idle"), ("0", "fails", "busy")],
)
def test_a_process_that_dies_before_the_first_step_is_named(prepared, tmp_path, dies, how, busy):
    """A scheduler that takes its job for unfinished would start it again for ever."""
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    arguments = [*pipeline.train_arguments(prepared, tmp_path / "run"), "parallel=auto"]
    done = subprocess.run(
        [*two_processes(), str(program), str(tmp_path / "done"), dies, how, busy, *arguments],
        cwd=ROOT, env=environment() | {MARKER: str(tmp_path / "unfinished"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"rank {dies} on " in line
    assert f"rank {1 - int(dies)}" not in line
    assert "no step was taken" not in done.stderr
    assert not (tmp_path / "unfinished").exists()


def test_a_launch_that_started_one_process_of_several_is_refused(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` sets these two, and starts one process."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"started one: .* --multi_gpu"):
        join_processes(cpu=True, timeout=600)


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(folder):
    """It is killed without warning while it scans its fourth film; the next run scans only what is left."""
    for n in range(8):
        write_numbered(folder / f"{n}.mkv", 400)
    process = subprocess.Popen(command(folder, sys.executable), env=environment())
    scans = folder / "out" / "scans"
    while len(list(scans.glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in scans.glob("*.json")}
    assert 3 <= len(finished) < 9
    assert not list(folder.glob("out/cache/*/complete"))
    subprocess.run(command(folder, sys.executable), check=True, env=environment(), timeout=300)
    assert all(path.stat().st_mtime_ns == made for path, made in finished.items())
    assert len(open_dataset(DataConfig(path=str(folder / "out"))).items) >= 9


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line(folder):
    empty = folder / "empty"
    empty.mkdir()
    for changes, message in [
        ({"input": empty}, "holds no manifest.jsonl and no video"),
        ({"size": "[60,160]"}, "multiples of the codec's"),
        ({"fps": "fast"}, "fps"),
        ({"decoder": "vlc"}, "decoder must be one of"),
    ]:
        done = subprocess.run(
            command(folder, sys.executable, **changes), env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr
