"""These tests are about the record of steps on several GPUs: what is still to be measured, and what is written."""

from dataclasses import replace

import pytest

from evaluation.benchmarks.measurements import read_rows
from evaluation.benchmarks.parallel import BenchmarkConfig, add_row, describe, remaining


@pytest.fixture(autouse=True)
def _commit(monkeypatch):
    monkeypatch.setattr("evaluation.benchmarks.measurements.commit", lambda: "abc")


def test_it_goes_on_with_what_is_missing_and_leaves_out_what_cannot_fit(tmp_path):
    config = BenchmarkConfig(shots=[4, 1, 2], longest_dense=2, output=str(tmp_path / "r.json"))
    assert remaining(config, "shard") == [("moc", 1), ("moc", 2), ("moc", 4), ("dense", 1), ("dense", 2)]
    measured = {"tokens": 100, "step_seconds": 2.0, "tokens_per_second": 50, "peak_bytes": 2**30}
    add_row(config, describe(config, "one", "moc", 1) | measured)
    add_row(config, describe(config, "shard", "moc", 1) | measured | {"tokens_per_second": 80})
    add_row(config, describe(config, "shard", "moc", 2) | {"problem": "out of memory"})
    assert remaining(config, "shard") == [("dense", 1), ("dense", 2)]
    assert len(remaining(config, "one")) == 4
    row, failed = (tmp_path / "r.md").read_text().splitlines()[-2:]
    assert row == "| shard | 2 | moc | 1 | 100 | 2.0 | 80 | 1.60 | 1.0 |  |  | abc |"
    assert "| out of memory |" in failed


def test_rows_of_other_settings_and_of_earlier_code_stay_until_they_are_measured_again(tmp_path, monkeypatch):
    config = BenchmarkConfig(output=str(tmp_path / "r.json"), shots=[1, 2])
    other = replace(config, latent=[16, 2, 8, 8])
    add_row(config, describe(config, "one", "moc", 1))
    add_row(config, describe(config, "one", "moc", 2))
    add_row(other, describe(other, "one", "moc", 1))
    assert remaining(other, "one")[0] == ("moc", 2)
    monkeypatch.setattr("evaluation.benchmarks.measurements.commit", lambda: "def")
    assert remaining(config, "one")[0] == ("moc", 1)
    add_row(config, describe(config, "one", "moc", 1))
    rows = read_rows(tmp_path / "r.json")
    assert [(row["latent"][1], row["shots"], row["commit"]) for row in rows] == [
        (36, 2, "abc"), (2, 1, "abc"), (36, 1, "def"),
    ]  # fmt: skip
    page = (tmp_path / "r.md").read_text()
    assert page.count("| mesh |") == 2
    assert "commit abc." in page
    assert "commit def." in page


def test_more_processes_than_before_are_measured_apart(tmp_path):
    config = BenchmarkConfig(output=str(tmp_path / "r.json"), shots=[1])
    add_row(config, describe(config, "sequence", "moc", 1))
    assert ("moc", 1) not in remaining(config, "sequence")
    assert ("moc", 1) in remaining(replace(config, processes=4), "sequence")
