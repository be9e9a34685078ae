"""These tests are about sampling and evaluation by several processes: each film and each loss is that of one
process."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from film.folder import PROGRESS
from film.shooting import Shooting
from tests import teams
from tests.pipeline import ROOT, assert_one_message, refusal

SHOT = {"prompt": "Mia walks.", "seconds": 4 / 12}
STORY = {"size": [32, 48], "fps": 12, "shots": [SHOT, SHOT | {"cut": False}, SHOT]}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for name, shots in {"a": 3, "b": 2, "c": 3}.items():
        story = STORY | {"title": name, "shots": STORY["shots"][:shots]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(story))
    return folder


def launch(*arguments):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *torchrun, "-m", "tests.teams", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]


def stop(shooting, number, latent):
    raise SystemExit("in the middle of a film")


@pytest.mark.slow
def test_two_processes_film_and_evaluate_as_one(prepared, trained, scripts, tmp_path, monkeypatch):
    """Alone they deal scripts and scenes; along an axis of the mesh they make each together, one of them from where one
    process was stopped."""
    one, two = tmp_path / "one", tmp_path / "two"
    teams.make(trained, prepared, scripts, one)
    with monkeypatch.context() as patch:
        patch.setattr(Shooting, "_write_shot", stop)
        with pytest.raises(SystemExit):
            teams.make(trained, prepared, scripts, two / "sequence")
    assert (two / "sequence/a" / PROGRESS).exists()
    launch(trained, prepared, scripts, two)
    for mesh in teams.MESHES:
        for name in ("a", "b", "c"):
            expected, found = one / name, two / mesh / name
            for file in sorted(expected.glob("latents/*.safetensors")):
                torch.testing.assert_close(
                    load_file(found / "latents" / file.name), load_file(file), rtol=1e-4, atol=1e-5
                )
            assert (found / "video.mp4").exists()
            routing = [json.loads((folder / "metadata.json").read_text())["routing"] for folder in (expected, found)]
            torch.testing.assert_close(torch.tensor(routing[1]), torch.tensor(routing[0]))
        rows = [json.loads((folder / "losses.json").read_text())["losses"] for folder in (one, two / mesh)]
        assert len(rows[0]) == 6
        for row, same in zip(*rows, strict=True):
            assert same["loss"] == pytest.approx(row["loss"], rel=1e-5), mesh
            assert same["sparsity"] == pytest.approx(row["sparsity"], rel=1e-5), mesh


def test_a_mesh_that_one_process_does_not_fill(capsys, trained, prepared, scripts, tmp_path):
    for script, settings in {
        "sample.py": (f"script={scripts / 'a.yaml'}", f"out={tmp_path / 'film'}"),
        "scripts/evaluate.py": (f"data.path={prepared}",),
    }.items():
        said = refusal(capsys, script, f"checkpoint={trained}", "device=cpu", "parallel.sequence=2", *settings)
        assert_one_message(said, "sequence=2", "must divide the number of processes, 1")
