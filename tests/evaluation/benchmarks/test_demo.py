"""These tests are about the benchmark of the demo's verdict: every seed in every environment, and no row lost when it
is stopped."""

import json
import signal

import pytest

from evaluation.benchmarks import demo
from tests.pipeline import command

# This stands in for the demo: seed 1 fails, and a signal at seed 2 stops the benchmark.
DEMO = """
import json, os, signal, sys
from pathlib import Path
said = dict(word.split("=", 1) for word in sys.argv[1:])
if said["seed"] == "1":
    sys.exit(2)
if said["seed"] == "2":
    os.kill(os.getppid(), signal.SIGINT)
folder = Path(said["output"])
folder.mkdir()
(folder / "verdict.json").write_text(json.dumps({"ratio": 0.9, "B": os.environ.get("B"), "said": said}))
"""


@pytest.fixture
def interruptible():
    """Python answers SIGINT, which a shell that runs the tests in the background has it ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def rows_of(tmp_path, monkeypatch, seeds: int) -> list[dict]:
    """Returns the rows that the benchmark wrote of the stand-in, before it ended with an error."""
    script, output = tmp_path / "demo.py", tmp_path / "demo.json"
    script.write_text(DEMO)
    words = ['environments=["","A=1 B=2"]', f"seeds={seeds}", "processes=1", 'arguments=["steps=3"]']
    monkeypatch.setattr(demo, "DEMO", script)
    with pytest.raises(SystemExit) as ended:
        command("scripts/benchmark_demo.py", *words, f"folder={tmp_path / 'demos'}", f"output={output}")
    assert ended.value.code != 0
    return json.loads(output.read_text())["rows"]


def test_a_row_for_each_seed_in_each_environment(tmp_path, monkeypatch):
    rows = rows_of(tmp_path, monkeypatch, seeds=2)
    told = [(row["environment"], row["seed"], row["exit_code"], row.get("B")) for row in rows]
    assert told == [("", 0, 0, None), ("", 1, 2, None), ("A=1 B=2", 0, 0, "2"), ("A=1 B=2", 1, 2, None)]
    assert rows[0]["said"]["output"] != rows[2]["said"]["output"]
    assert rows[0]["said"]["steps"] == "3"


def test_a_stopped_benchmark_keeps_what_it_had(tmp_path, monkeypatch, interruptible):
    rows = rows_of(tmp_path, monkeypatch, seeds=3)
    assert [(row["seed"], row["exit_code"]) for row in rows][:2] == [(0, 0), (1, 2)]
    assert len(list((tmp_path / "demos").glob("*.log"))) < 6  # no further demos were begun
