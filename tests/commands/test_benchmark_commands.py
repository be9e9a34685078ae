"""The record of the README's commands on a GPU: what is run, and what is written of it."""

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from configs.command import parse, store_defaults
from configs.schema import SampleConfig, TrainConfig
from scripts import benchmark_commands
from scripts.benchmark_commands import plan, run, table
from tests.pipeline import ROOT

HEAD = {"gpu": "a GPU", "gpus": 2, "torch": "2", "cuda": "13", "cudnn": 9, "triton": "3", "commit": "c", "date": "d"}
SCHEMAS = {"train.py": ("train", TrainConfig), "sample.py": ("sample", SampleConfig)}


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_every_command_is_one_that_its_script_takes(tmp_path, num_gpus):
    commands = plan(tmp_path, num_gpus)
    assert ("train base, all GPUs" in commands) == (num_gpus == 2)
    for arguments in commands.values():
        script = next(index for index, argument in enumerate(arguments) if argument.endswith(".py"))
        assert (ROOT / arguments[script]).is_file()
        if arguments[script] in SCHEMAS:
            name, schema = SCHEMAS[arguments[script]]
            store_defaults(name, schema)
            with initialize_config_dir(str(ROOT / "configs"), version_base=None):
                assert isinstance(parse(compose(name, arguments[script + 1 :]), schema), schema)


def test_a_row_tells_how_a_command_ended_and_the_log_what_it_said(tmp_path):
    row = run(["-c", "import sys; print('hello'); sys.exit(3)"], tmp_path / "logs/x.log")
    assert row["exit_code"] == 3
    assert row["seconds"] >= 0
    assert (tmp_path / "logs/x.log").read_text() == "hello\n"


def test_the_record_and_its_table(tmp_path, monkeypatch):
    """Through the command, with two commands that end at once in place of the real ones."""
    fakes = {"good": ["-c", "print(1)"], "bad": ["-c", "raise SystemExit(2)"]}
    monkeypatch.setattr(benchmark_commands, "plan", lambda *_: fakes)
    monkeypatch.setattr(benchmark_commands, "header", lambda: dict(HEAD))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    output = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["x", f"folder={tmp_path / 'made'}", f"output={output}"])
    with pytest.raises(SystemExit) as ending:
        benchmark_commands.main()
    assert ending.value.code == 1
    assert [(r["name"], r["exit_code"]) for r in json.loads(output.read_text())["rows"]] == [("good", 0), ("bad", 2)]
    page = output.with_suffix(".md").read_text()
    assert "a GPU" in page
    assert "commit c" in page
    assert [line.split("|")[1].strip() for line in page.splitlines()[-2:]] == ["good", "bad"]


def test_a_table_shortens_paths_to_the_folder():
    rows = [HEAD | {"name": "n", "seconds": 2.4, "exit_code": 0, "command": ["train.py", "output=/some/where/runs"]}]
    assert "| n | 2 | 2 | 0 | c | `python train.py output=runs` |" in table(rows, Path("/some/where"))


def test_without_a_gpu_nothing_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["x", f"folder={tmp_path / 'made'}"])
    with pytest.raises(SystemExit, match="torch finds none here"):
        benchmark_commands.main()
    assert not (tmp_path / "made").exists()
