"""A month's run on paper follows from the measured rows."""

from dataclasses import replace

import pytest

from evaluation.benchmarks.measurements import read_rows
from evaluation.benchmarks.month import Measured, PlanConfig, Size, plan, report
from models import ModelConfig
from tests.pipeline import ROOT, command, refusal


def measured_rows():
    return read_rows(ROOT / "docs/benchmarks/parallel.json")


def test_the_table_is_that_of_the_measured_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command("scripts/plan_month.py", f"output={tmp_path / 'month.md'}")
    assert (tmp_path / "month.md").read_text() == (ROOT / "docs/benchmarks/month.md").read_text()


def test_the_measured_step_comes_out_again():
    """The same model on one GPU and on two has the step time, and about the memory, that were measured."""
    known = next(row for row in measured_rows() if row["mesh"] == "one")
    sizes = known["model"]
    numbers = {name: int(value) for name, value in sizes.items() if name != "family"}
    model, measured = ModelConfig(sizes["family"], **numbers), Measured(measured_rows())
    config, size = PlanConfig(model, gpus=2, meshes=[[2, 1]]), Size.of(model)
    two = plan(config, measured, size, 2, 1)
    one = plan(replace(config, gpus=1, meshes=[[1, 1]]), measured, size, 1, 1)
    alike = {"impl": "moc", "model": sizes, "kernel": known["kernel"]}
    same = [row for row in measured_rows() if alike.items() <= row.items()]
    rows = {(row["mesh"], row["shots"]): row for row in same}
    assert one["step"] == pytest.approx(rows["one", 8]["step_seconds"])
    assert two["step"] == pytest.approx(rows["sequence", 8]["step_seconds"])
    held = two["states"] + two["gathered"] + two["activations"]
    assert held == pytest.approx(rows["sequence", 8]["peak_bytes"] / 2**30, rel=0.1)


def test_a_mesh_that_gpus_or_heads_do_not_allow(capsys):
    assert "must be two numbers whose product divides gpus=64" in refusal(
        capsys, "scripts/plan_month.py", "meshes=[[8,3]]"
    )
    assert "sequence=16 must divide the model's 40 heads" in refusal(capsys, "scripts/plan_month.py", "meshes=[[16,4]]")


def test_what_does_not_fit_is_said():
    config = PlanConfig(ModelConfig("wan", dim=5120, num_layers=40, num_heads=40, ffn_dim=13824), meshes=[[2, 32]])
    (row,) = [line for line in report(config, measured_rows()).splitlines() if line.startswith("| 2 x 32")]
    assert "| no |" in row
