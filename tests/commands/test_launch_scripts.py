"""These tests are about scripts/launch: what they start and how they end, with torchrun and Slurm played by small
scripts."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moc.training.interruption import MARKER, NOT_FINISHED, leave_unfinished
from tests.composing import parsed
from tests.pipeline import ROOT

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
        return subprocess.Popen(
            [script, *arguments], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(script: Path, *arguments: str, **variables: str) -> tuple[int, str]:
        process = start(script, *arguments, **variables)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    program.start, program.run = start, run
    return program


def copied(tmp_path: Path) -> Path:
    """Returns torchrun.sh in a checkout without a .venv, whose torchrun it would take first."""
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
    for option in ("--nnodes 2", "--nproc-per-node gpu", "--rdzv-endpoint host0:29500", "--rdzv-id 7"):
        assert option in said
    assert said.strip().endswith("--signals-to-handle SIGQUIT train.py experiment=storyworld name=a b")


@pytest.mark.parametrize(("unfinished", "status"), [(True, NOT_FINISHED), (False, 1)])
def test_an_unfinished_run_has_its_own_status(play, tmp_path, unfinished, status):
    """The status is kept though torchrun's is 1 for every failure."""
    play("torchrun", f"{f'touch ${MARKER};' if unfinished else ''} exit 1")
    assert play.run(copied(tmp_path))[0] == status


RANK = """
import os, signal, time
heard = []
print("starts", flush=True)
time.sleep(0.5)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: heard.append(number))
while not heard:
    time.sleep(0.05)
time.sleep(1.5)
open(os.environ["MOC_UNFINISHED"], "w").close()
print("saved", flush=True)
"""


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_comes_to_the_processes_alone_though_they_still_start(play, tmp_path, name):
    """Slurm sends it to the script and, by some of its settings, to torchrun too, which would leave at the second."""
    (tmp_path / "rank.py").write_text(RANK)
    for missing in ("ps", "pgrep", "pkill"):  # small containers lack these
        play(missing, "exit 127")
    play("torchrun", f"{sys.executable} {tmp_path}/rank.py & wait $!; exit 1")
    process = play.start(copied(tmp_path))
    assert process.stdout.readline() == "starts\n"
    os.killpg(process.pid, getattr(signal, f"SIG{name}"))
    os.killpg(process.pid, getattr(signal, f"SIG{name}"))
    assert process.communicate(timeout=30)[0] == "saved\n"
    assert process.returncode == NOT_FINISHED


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [
        (NOT_FINISHED, "RUNNING", True),
        (NOT_FINISHED, "COMPLETING", False),  # scancel ended the job
        (0, "RUNNING", False),
        (1, "RUNNING", False),
    ],
)
def test_slurm_puts_an_unfinished_run_into_the_queue_again(play, status, state, requeued):
    play("squeue", f"echo {state}")
    play("scontrol", 'if [ "$1" = show ]; then echo host0; echo host1; else echo "scontrol $@"; fi')
    play("srun", f'echo "$HEAD $PORT $NODES $PROCESSES $RUN_ID $@"; exit {status}')
    slurm = {"SLURM_JOB_NODELIST": "host[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42"}
    slurm |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(ROOT)}
    ended, said = play.run(LAUNCH / "slurm.sh", "experiment=storyworld", **slurm)
    assert f"host0 20042 2 8 42 --kill-on-bad-exit=0 {LAUNCH}/torchrun.sh experiment=storyworld" in said
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
