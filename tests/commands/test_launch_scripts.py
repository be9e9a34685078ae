"""scripts/launch: what they start and how they end, with torchrun and Slurm played by small scripts; the preflight."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from moc.training.interruption import MARKER, NOT_FINISHED, leave_unfinished
from tests import pipeline
from tests.commands.test_configs import parsed
from tests.moc.test_damage import largest_file
from tests.pipeline import ROOT, command

LAUNCH = ROOT / "scripts/launch"


@pytest.fixture
def play(tmp_path):
    """Has a program be played by a script; returns how a launch script then runs."""
    programs = tmp_path / "programs"
    programs.mkdir()

    def program(name: str, script: str) -> None:
        (programs / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (programs / name).chmod(0o755)

    def start(script: Path, *arguments: str, **variables: str) -> subprocess.Popen:
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path)} | variables
        return subprocess.Popen([script, *arguments], env=environment, stdout=subprocess.PIPE, text=True)

    def run(script: Path, *arguments: str, **variables: str) -> tuple[int, str]:
        process = start(script, *arguments, **variables)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    program.start, program.run = start, run
    return program


def copied(tmp_path: Path) -> Path:
    """torchrun.sh in a checkout without a .venv, whose torchrun it would take first."""
    script = tmp_path / "checkout/scripts/launch/torchrun.sh"
    script.parent.mkdir(parents=True)
    script.write_text((LAUNCH / "torchrun.sh").read_text())
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_the_shell_reads_them(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_torchrun_is_told_of_the_hosts_and_the_signals(play, tmp_path):
    play("torchrun", 'echo "$@"')
    status, said = play.run(copied(tmp_path), "experiment=storyworld", "name=a b", NODES="2", HEAD="host0", RUN_ID="7")
    assert status == 0
    for part in ("--nnodes 2", "--nproc-per-node gpu", "--rdzv-endpoint host0:29500", "--rdzv-id 7"):
        assert part in said
    assert said.strip().endswith("--signals-to-handle SIGTERM,SIGINT,SIGUSR1 train.py experiment=storyworld name=a b")


@pytest.mark.parametrize(("unfinished", "status"), [(True, NOT_FINISHED), (False, 1)])
def test_an_unfinished_run_has_its_own_status(play, tmp_path, unfinished, status):
    """Though torchrun's is 1 for every failure."""
    play("torchrun", f"{f'touch ${MARKER};' if unfinished else ''} exit 1")
    assert play.run(copied(tmp_path))[0] == status


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_is_handed_on_and_waited_for(play, tmp_path, name):
    play(
        "torchrun",
        f"trap 'sleep 0.5; touch ${MARKER}; echo told; exit 1' {name}; echo ready; while :; do sleep 0.1; done",
    )
    process = play.start(copied(tmp_path))
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert process.communicate(timeout=30)[0] == "told\n"
    assert process.returncode == NOT_FINISHED


@pytest.mark.parametrize(("status", "requeued"), [(NOT_FINISHED, True), (0, False), (1, False)])
def test_slurm_puts_an_unfinished_run_into_the_queue_again(play, status, requeued):
    play("scontrol", 'if [ "$1" = show ]; then echo host0; echo host1; else echo "scontrol $@"; fi')
    play("srun", f'echo "$HEAD $NODES $PROCESSES $RUN_ID $@"; exit {status}')
    slurm = {"SLURM_JOB_NODELIST": "host[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42"}
    slurm |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(ROOT)}
    ended, said = play.run(LAUNCH / "slurm.sh", "experiment=storyworld", **slurm)
    assert f"host0 2 8 42 --kill-on-bad-exit=0 {LAUNCH}/torchrun.sh experiment=storyworld" in said
    assert ("scontrol requeue 42" in said) == requeued
    assert ended == (0 if requeued else status)


def test_the_rented_hosts_run_the_same_script():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [NOT_FINISHED]
    script, *arguments = task["run"].strip().splitlines()[-1].split()
    assert (ROOT / script).is_file()
    assert arguments == ["output=/outputs", "$TRAIN"]


def test_every_key_of_their_examples_is_a_setting():
    examples = [
        text
        for path in LAUNCH.iterdir()
        for text in re.findall(r"(?:TRAIN=\"|TRAIN: |\.sh )((?:\w+=\S+ ?)+)", path.read_text())
    ]
    assert len(examples) >= 4
    for example in examples:
        arguments = [word.strip('"') for word in example.replace("experiment=NAME", "experiment=storyworld").split()]
        parsed("train", *arguments)


def test_a_marker_is_made_where_a_run_is_not_finished(monkeypatch, tmp_path):
    monkeypatch.setenv(MARKER, str(tmp_path / "marker"))
    with pytest.raises(SystemExit) as ending:
        leave_unfinished()
    assert ending.value.code == NOT_FINISHED
    assert (tmp_path / "marker").exists()


# The preflight


def preflight(capsys, prepared, run, *settings):
    """Its status, and its lines by the name of the check."""
    with pytest.raises(SystemExit) as ending:
        command("train.py", *pipeline.train_arguments(prepared, run), "preflight=true", *settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok ", "FAIL "))]
    return int(ending.value.code), {line.split()[1]: line for line in lines}


def test_a_preflight_tells_what_a_run_takes_and_leaves_nothing(capsys, prepared, tmp_path):
    status, lines = preflight(capsys, prepared, tmp_path / "run", "trainer.num_steps=1000")
    assert (status, list(lines)) == (0, ["processes", "data", "checkpoint", "trial"])
    assert all(line.startswith("ok ") for line in lines.values())
    assert "4 of 4 scenes" in lines["data"]
    assert "none; the run begins" in lines["checkpoint"]
    assert re.search(r"a step takes \d+\.\d+ s .* steps 1 to 1000 will take \d+\.\d+ days", lines["trial"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_every_start_looks_first_and_says_so_in_one_line(capsys, caplog, prepared, tmp_path, monkeypatch):
    run = pipeline.train(prepared, tmp_path / "run")
    pipeline.train(prepared, run, "trainer.num_steps=5")
    first, second = (message for message in caplog.messages if message.startswith("ready: "))
    assert "and they reach each other; 4 of 4 scenes read; their checksums fit; weights, averages, gradients" in first
    assert re.search(r"a checkpoint takes 0\.0\d of \d+ GB free; it starts at step 1 of 3$", first)
    assert re.search(r"it starts at step 4 of 5, about \d\.\d\d days$", second)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    arguments = pipeline.train_arguments(prepared, tmp_path / "another")
    said = pipeline.refusal(capsys, "train.py", *arguments)
    pipeline.assert_one_message(said, "has 0.00 GB free, and a checkpoint takes", "make room")
    assert not (tmp_path / "another" / "metrics.jsonl").exists()


def test_a_preflight_of_a_run_to_go_on(capsys, prepared, trained, tmp_path):
    run = pipeline.train(prepared, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, lines = preflight(capsys, prepared, run, "trainer.num_steps=50")
    assert status == 0
    assert "step_0000003 is whole; the run goes on from step 3" in lines["checkpoint"]
    assert "steps 4 to 50 will take" in lines["trial"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    status, lines = preflight(capsys, prepared, run, "flow.shift=9")
    assert status == 1
    assert lines["checkpoint"].startswith("FAIL")
    assert "flow.shift=9" in lines["checkpoint"]


def test_a_preflight_finds_a_damaged_shard_and_a_full_disk(capsys, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "prepared")
    shard = next((tmp_path / "prepared").rglob("*.safetensors"))
    good = shard.read_bytes()
    half = len(good) // 2
    shard.unlink()  # whoever still reads the file keeps it
    shard.write_bytes(good[:half] + bytes(64) + good[half + 64 :])
    status, lines = preflight(capsys, tmp_path / "prepared", tmp_path / "run")
    assert status == 1
    assert lines["data"].startswith("FAIL")
    assert "checksum" in lines["data"]
    shard.unlink()
    shard.write_bytes(good)
    with largest_file(20_000):
        status, lines = preflight(capsys, tmp_path / "prepared", tmp_path / "run")
    assert status == 1
    assert lines["data"].startswith("ok")
    assert lines["trial"].startswith("FAIL")
    assert "cannot be written: File too large" in lines["trial"]


def test_a_preflight_counts_the_checkpoints_that_the_disk_must_hold(capsys, prepared, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    status, lines = preflight(capsys, prepared, tmp_path / "run", "trainer.keep_checkpoints=100")
    assert status == 1
    assert "101 checkpoints of" in lines["trial"]
    assert "lower trainer.keep_checkpoints" in lines["trial"]
