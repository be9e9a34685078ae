"""These tests are about the record of the README's commands on a GPU: what is run, and what is written of it."""

import json
import re
from pathlib import Path

import pytest

from configs.command import parse
from configs.overrides import readable
from evaluation.benchmarks import commands
from evaluation.benchmarks.commands import Job, page, plan, run
from tests.composing import COMMANDS, CONFIGS, composed, schema_of
from tests.pipeline import command
from tests.test_pages import PAGES, commands_of

HEAD = {"gpu": "a GPU", "gpus": 2, "torch": "2", "cuda": "13", "cudnn": 9, "triton": "3", "commit": "c", "date": "d"}
NAMES = {f"{module.replace('.', '/')}.py": name for name, (module, _) in COMMANDS.items()}


def script_of(job: Job) -> int:
    return next(index for index, argument in enumerate(job.arguments) if argument.endswith(".py"))


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_every_command_is_one_that_its_script_takes(tmp_path, num_gpus):
    jobs = plan(tmp_path, num_gpus)
    assert ("train base, all GPUs" in jobs) == (num_gpus == 2)
    for job in jobs.values():
        script = script_of(job)
        name, settings = NAMES[job.arguments[script]], job.arguments[script + 1 :]
        schema = schema_of(name)
        assert isinstance(parse(composed(name, *[readable(setting, CONFIGS) for setting in settings]), schema), schema)


def test_what_a_command_reads_is_made_by_one_before_it(tmp_path):
    """The checkout holds the rest, or the benchmark itself writes it."""
    jobs = plan(tmp_path, 2)

    def made_before(name: str) -> list[Path]:
        own = [path for path in [jobs[name].makes] if path]
        return own + [path for need in jobs[name].needs for path in made_before(need)]

    for name, job in jobs.items():
        assert list(jobs).index(name) > max([-1, *(list(jobs).index(need) for need in job.needs)])
        own = {tmp_path / "release", tmp_path / "story.yaml", tmp_path / "report.html", tmp_path / "r.json"}
        there = own | set(made_before(name))
        for path in re.findall(rf"{re.escape(str(tmp_path))}[\w./]*", " ".join(job.arguments)):
            if Path(path) != tmp_path / "runs":
                assert any(Path(path).is_relative_to(made) for made in there), (name, path)


def test_every_script_that_the_pages_run_is_timed(tmp_path):
    timed = {job.arguments[script_of(job)] for job in plan(tmp_path, 2).values()}
    said = {script for page in PAGES for script, _ in commands_of(page)}
    others = {"scripts/app.py", "scripts/plan_month.py"}  # a server, and a script that needs no GPU
    assert {s for s in said if not s.startswith(("scripts/benchmark_", "scripts/draw_"))} - timed == others


def test_a_row_tells_how_a_command_ended_and_the_log_what_it_said(tmp_path):
    row = run(["-c", "import sys; print('hello'); sys.exit(3)"], tmp_path / "logs/x.log")
    assert row["exit_code"] == 3
    assert row["seconds"] >= 0
    assert (tmp_path / "logs/x.log").read_text() == "hello\n"


def call(tmp_path, *settings: str) -> tuple[str | int | None, list[tuple[str, int]]]:
    """Runs the command; returns its exit status and, in order, the (name, exit code) of all rows of the record."""
    output = tmp_path / "r.json"
    status: str | int | None = 0
    try:
        command("scripts/benchmark_commands.py", f"folder={tmp_path / 'made'}", f"output={output}", *settings)
    except SystemExit as ending:
        status = ending.code
    return status, [(row["name"], row["exit_code"]) for row in json.loads(output.read_text())["rows"]]


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> dict[str, Job]:
    """Commands that end at once, in place of the real ones."""
    file = tmp_path / "made/c/file"
    jobs = {
        "writes": Job(["-c", f"open({str(file)!r}, 'a').write('x')"], (), file),
        "reads": Job(["-c", f"assert open({str(file)!r}).read() == 'x'"], ("writes",)),
        "bad": Job(["-c", "raise SystemExit(2)"]),
        "after bad": Job(["-c", "pass"], ("bad",)),
        "good": Job(["-c", "pass"]),
    }
    monkeypatch.setattr(commands, "plan", lambda *_: jobs)
    monkeypatch.setattr(commands, "header", lambda: dict(HEAD))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: HEAD["gpus"])
    return jobs


def test_the_record_and_its_table(fakes, tmp_path):
    rows = [("writes", 0), ("reads", 0), ("bad", 2), ("good", 0)]
    assert call(tmp_path) == (1, rows)
    page = (tmp_path / "r.md").read_text()
    assert "a GPU" in page
    assert "commit c" in page
    assert [line.split("|")[1].strip() for line in page.splitlines()[-4:]] == [name for name, _ in rows]


def test_a_command_needs_no_more_than_what_it_reads(fakes, tmp_path):
    assert call(tmp_path, "only=[reads]") == (0, [("writes", 0), ("reads", 0)])
    assert call(tmp_path, "only=[good]")[1] == [("writes", 0), ("reads", 0), ("good", 0)]


def test_a_second_call_goes_on_where_the_first_one_was_ended(fakes, tmp_path, monkeypatch):
    call(tmp_path)
    done = [name for name in fakes if name not in ("bad", "after bad")]
    fakes |= {name: Job(["-c", "raise SystemExit(3)"]) for name in done}
    fakes["bad"] = Job(["-c", "pass"])
    assert call(tmp_path) == (0, [*((name, 0) for name in done), ("bad", 0), ("after bad", 0)])
    # On another commit all jobs run again.
    monkeypatch.setattr(commands, "header", lambda: HEAD | {"commit": "d"})
    status, rows = call(tmp_path)
    assert (status, dict(rows)["good"], dict(rows)["after bad"]) == (1, 3, 0)


def test_a_table_shortens_paths_to_the_folder():
    rows = [HEAD | {"name": "n", "seconds": 2.4, "exit_code": 0, "command": ["train.py", "output=/some/where/runs"]}]
    assert "| n | 2 a GPU | 2 | 0 | c | `python train.py output=runs` |" in page(rows, Path("/some/where"))


def test_without_a_gpu_nothing_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds none here"):
        command("scripts/benchmark_commands.py", f"folder={tmp_path / 'made'}")
    assert not (tmp_path / "made").exists()
