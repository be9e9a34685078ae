"""The record of steps on several GPUs: what is still to be measured, and what is written."""

import json

from scripts.benchmark_parallel import BenchmarkConfig, add_row, describe, remaining


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
    assert row == "| shard | 2 | moc | 1 | 100 | 2.0 | 80 | 1.60 | 1.0 |  |  |"
    assert "| out of memory |" in failed


def test_rows_of_another_measurement_are_not_kept(tmp_path):
    config = BenchmarkConfig(output=str(tmp_path / "r.json"))
    add_row(config, describe(config, "one", "moc", 1))
    other = BenchmarkConfig(output=config.output, latent=[16, 2, 8, 8])
    add_row(other, describe(other, "one", "moc", 2))
    assert [row["shots"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == [2]
