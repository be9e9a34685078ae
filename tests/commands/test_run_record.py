"""A run goes on with the settings it began with; what it was trained with is never written over."""

import importlib.metadata
import json
import logging
import re
import shlex
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from configs.run_record import check_same_run, record_launch, sampling_command
from moc.errors import UserError
from moc.training import Parallel, ParallelConfig, find_checkpoint, read_metrics
from moc.training.integrity import checksums, files_to_seal, seal
from tests import figures, pipeline
from tests.composing import parsed
from tests.pipeline import assert_one_message, command, refusal


@pytest.fixture
def run(trained, tmp_path):
    """Returns a finished run of three steps, to be launched again."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def launch(prepared, run, *settings):
    return ["train.py", *pipeline.train_arguments(prepared, run), *settings]


@pytest.mark.parametrize("setting", ["optim.lr=0.5", "flow.shift=7", "moc.top_k=1", "seed=3", "model.dim=64"])
def test_another_run_under_the_same_name_is_refused(prepared, run, capsys, setting):
    key, value = setting.split("=")
    before = (run / "config.yaml").read_text()
    said = refusal(capsys, *launch(prepared, run, setting, "trainer.num_steps=4"))
    assert_one_message(said, f"{key}={value}", "was ", "name=OTHER", f"allow_changes=[{key}")
    assert (run / "config.yaml").read_text() == before


@pytest.mark.parametrize("setting", ["data.path=b", "optim.betas=[0.8,0.9]", "+optim.args.amsgrad=true"])
def test_what_is_changed_added_or_removed_is_refused(tmp_path, setting):
    """An argument of the optimizer's own is among the settings only where it is given."""
    key = setting.partition("=")[0].lstrip("+")
    without, with_it = (parsed("train", f"output={tmp_path}", "data.path=a", *more) for more in ([], [setting]))
    for before, now in ((without, with_it), (with_it, without)):
        before.run_folder.mkdir(exist_ok=True)
        (before.run_folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(before)))
        with pytest.raises(UserError, match=rf"{key}=.* \(was .*allow_changes=\[{key}\]"):
            check_same_run(now)
        check_same_run(replace(now, allow_changes=[key]))


@pytest.mark.parametrize("text", ["a: : b", "- 1"])
def test_settings_that_cannot_be_read_are_told_in_one_line(tmp_path, text):
    config = parsed("train", f"output={tmp_path}", "data.path=a")
    config.run_folder.mkdir()
    (config.run_folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]*config.yaml (is damaged|must hold)[^\n]*; restore it, or remove it"):
        check_same_run(config)


def test_a_change_allowed_by_name_keeps_the_settings_before(prepared, run):
    command(*launch(prepared, run, "optim.lr=0.001", "allow_changes=[optim.lr]", "trainer.num_steps=4"))
    before, now = (yaml.safe_load((run / name).read_text()) for name in ("config.1.yaml", "config.yaml"))
    assert before["optim"]["lr"] != now["optim"]["lr"] == 0.001
    assert (run / "checkpoints/step_0000004").exists()


def test_settings_that_were_left_are_all_kept(tmp_path):
    parallel = Parallel(ParallelConfig("cpu"))
    for rate in (1e-3, 2e-3, 3e-3):
        record_launch(parsed("train", f"output={tmp_path}", "data.path=a", f"optim.lr={rate}"), parallel, 0)
    names = ("config.1.yaml", "config.2.yaml", "config.yaml")
    kept = [yaml.safe_load((tmp_path / "run" / name).read_text())["optim"]["lr"] for name in names]
    assert kept == [1e-3, 2e-3, 3e-3]


def test_a_field_that_an_earlier_version_did_not_have_in_a_list_is_no_change(tmp_path):
    """A stage of the schedule has fields that may be null; a version that lacks one wrote none."""
    config = parsed("train", f"output={tmp_path}", "data.path=a", "schedule=[{step: 0, chunk_tokens: 40}]")
    settings = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    settings["schedule"] = [{"step": 0, "chunk_tokens": 40}]
    config.run_folder.mkdir()
    (config.run_folder / "config.yaml").write_text(yaml.safe_dump(settings))
    check_same_run(config)
    other = parsed("train", f"output={tmp_path}", "data.path=a", "schedule=[{step: 0, chunk_tokens: 40, top_k: 3}]")
    with pytest.raises(UserError, match=r"schedule=\[\{.*'top_k': 3"):
        check_same_run(other)


def test_a_longer_run_and_other_ways_to_compute_it_are_told_and_taken(prepared, run, caplog):
    ways = ["trainer.save_in_background=true", "trainer.cuda_graphs=2", "optim.offload=true"]
    with caplog.at_level(logging.INFO):
        command(*launch(prepared, run, "trainer.num_steps=4", "data.prefetch=2", *ways))
    assert "trainer.num_steps is now 4 (was 3)" in caplog.text
    assert "optim.offload is now True (was False)" in caplog.text
    assert f"python sample.py checkpoint={run} " in caplog.text
    assert (run / "checkpoints/step_0000004").exists()
    assert yaml.safe_load((run / "config.1.yaml").read_text())["trainer"]["num_steps"] == 3


EARLIER = {"backend": "auto", "dense_kernel": "auto", "deterministic": False, "cut_gap": 0.0}


def as_earlier(run):
    """Writes the run as versions wrote it in which attention's settings held how it is computed, and the gap at cuts,
    and sub-chunks, sublayers and rates were called parts."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config.pop("execution") == {name: EARLIER[name] for name in ("backend", "dense_kernel", "deterministic")}
    assert config["model"].pop("cut_gap") is None
    config["moc"] |= EARLIER | {"descriptor_parts": config["moc"].pop("descriptor_subchunks")}
    config["optim"]["parts"] = config["optim"].pop("rates")
    config["parallel"]["recompute_parts"] = config["parallel"].pop("recompute_sublayers")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for file in run.glob("checkpoints/*/*/moc.json"):
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | EARLIER | {"descriptor_parts": settings.pop("descriptor_subchunks")}))
    for checkpoint in run.glob("checkpoints/*"):
        seal(checkpoint, checksums(checkpoint, files_to_seal(checkpoint)))


def test_a_run_of_an_earlier_version_goes_on(prepared, run):
    as_earlier(run)
    command(
        *launch(prepared, run, "trainer.num_steps=4", "execution.backend=reference", "execution.deterministic=true")
    )
    assert (run / "checkpoints/step_0000004").exists()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["execution"] == {"backend": "reference", "dense_kernel": "auto", "deterministic": True}
    assert not EARLIER.keys() & config["moc"].keys()


def test_an_earlier_runs_settings_are_still_its_own(prepared, run, capsys):
    as_earlier(run)
    file = run / "config.yaml"
    settings = file.read_text().replace("cut_gap: 0.0", "cut_gap: 2.0").replace("parts: 1", "parts: 3")
    file.write_text(settings.replace("parts: []", "parts: [{match: to_qkv, factor: 0.5}]"))
    assert_one_message(
        refusal(capsys, *launch(prepared, run)),
        "model.cut_gap=None (was 2.0)",
        "moc.descriptor_subchunks=1 (was 3)",
        "optim.rates=[] (was [{'match': 'to_qkv', 'factor': 0.5}])",
    )


@pytest.mark.parametrize(
    ("key", "now"),
    [
        ("moc.backend", "execution.backend"),
        ("+moc.dense_kernel", "execution.dense_kernel"),
        ("moc.deterministic", "execution.deterministic"),
        ("moc.cut_gap", "model.cut_gap"),
        ("moc.descriptor_parts", "moc.descriptor_subchunks"),
        ("optim.parts", "optim.rates"),
        ("parallel.recompute_parts", "parallel.recompute_sublayers"),
    ],
)
def test_a_key_that_is_called_otherwise_now_is_told(prepared, run, capsys, key, now):
    said = refusal(capsys, *launch(prepared, run, f"{key}=1"))
    assert_one_message(said, f"{key.lstrip('+')} is called {now} now")


def test_a_finished_run_says_so(prepared, run, caplog):
    for _ in range(2):  # the first launch only notes that the copied run has moved
        with caplog.at_level(logging.INFO):
            command(*launch(prepared, run))
    assert f"{run} is already finished: step 3 of 3" in caplog.text
    assert not (run / "config.2.yaml").exists()


def test_a_run_that_began_from_another_one_goes_on_by_the_same_command(prepared, run, tmp_path, capsys):
    """A scheduler starts it again as it was."""
    begun = launch(prepared, tmp_path / "new", f"resume={run}")
    command(*begun, "trainer.num_steps=5")
    command(*begun, "trainer.num_steps=6")
    launches = (tmp_path / "new/launches.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in launches] == [3, 5]
    assert find_checkpoint(tmp_path / "new").name == "step_0000006"
    assert_one_message(refusal(capsys, *begun, "trainer.num_steps=7", "optim.lr=0.5"), "optim.lr=0.5", "was 9e-05")
    inside = f"resume={tmp_path}/new/checkpoints/step_0000005"
    said = refusal(capsys, *launch(prepared, tmp_path / "new", inside, "trainer.num_steps=7"))
    assert_one_message(said, "checkpoints past step 5 (step_0000006)", "resume=auto")


def test_a_process_beside_the_main_one_repeats_nothing(prepared, run, monkeypatch, caplog):
    """Of many processes each would."""
    monkeypatch.setattr(Parallel, "is_main", False)
    monkeypatch.setattr(Parallel, "of_main", lambda self, make: run / "checkpoints/step_0000003")
    with caplog.at_level(logging.INFO):
        command(*launch(prepared, run, "trainer.log_every=3"))
    assert caplog.messages == []


def test_the_jobs_of_a_sweep_are_runs_of_their_own(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Hydra writes notes on the sweep into this folder
    command("train.py", *pipeline.train_arguments(prepared, tmp_path / "run"), "-m", "optim.lr=1e-3,1e-4")
    for number, rate in enumerate((1e-3, 1e-4)):
        folder = tmp_path / f"run-{number}"
        assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == rate
        assert [row["step"] for row in read_metrics(folder) if "loss" in row] == [1, 2, 3]
    assert not (tmp_path / "run").exists()


def test_a_change_is_allowed_by_the_name_of_a_setting(prepared, run, capsys):
    said = refusal(capsys, *launch(prepared, run, "allow_changes=[optim.lrr,optim]", "trainer.num_steps=4"))
    assert_one_message(said, "allow_changes=['optim.lrr'] names no setting")


def test_the_command_that_films_with_a_run_can_be_pasted():
    said = shlex.split(sampling_command(Path("my runs/猫 [1]")))
    assert said == ["python", "sample.py", "checkpoint=my runs/猫 [1]", "script=FILE", "out=DIR"]


def test_every_launch_is_recorded(prepared, run):
    """The line holds its command, code, versions and hosts; the lines of earlier launches stay."""
    with figures.drawn():
        command(*launch(prepared, run, "trainer.num_steps=4"))
    first, second = (json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 3)
    assert second["command"].split()[0].endswith("train.py")
    assert "trainer.num_steps=4" in second["command"].split()
    assert second["hosts"] == {socket.gethostname(): 1}
    assert second["device"] == "the CPU"
    assert second["versions"]["torch"] == importlib.metadata.version("torch")
    assert second["commit"] is None or re.fullmatch("[0-9a-f]{40}", second["commit"])
    assert (run / "curves.png").exists()
