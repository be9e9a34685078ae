"""Evaluation: rivals at the same noise, with equal noise and with clean history."""

import json

import pytest
import torch

from moc import MoCConfig, Sample, Shot, ShotLayout, make_batch
from moc.diffusion import Flow, NoiseLevels
from moc.training import Validator
from models.mmdit import MMDiT
from tests import pipeline
from tests.caches import CHANNELS, TEXT_DIM


def test_clean_history_leaves_one_noisy_target_a_sample():
    shots = [Shot(2, (1, 2, 2))] * 3
    layout = ShotLayout.pack([ShotLayout.build(shots), ShotLayout.build(shots[:1])])
    levels = NoiseLevels.after_clean_history(0.8, layout)
    assert levels.sigma.tolist() == pytest.approx([0.0, 0.0, 0.8, 0.8])
    assert levels.is_target.tolist() == [False, False, True, True]


def test_dense_layers_count_as_dense():
    """Without routed chunks all layers that route have one sparsity; the mean over layers falls with each dense one."""
    model = MMDiT(CHANNELS, TEXT_DIM, dim=32, num_layers=4, num_heads=2, ffn_dim=32)
    latents = [torch.randn(CHANNELS, 1, 2, 2) for _ in range(3)]
    text = [torch.randn(2, TEXT_DIM) for _ in range(4)]
    batch = make_batch([Sample(latents, text)], model.stream, 4)
    validator = Validator([batch], Flow())

    def routing(dense_layers: int) -> dict[str, float]:
        config = MoCConfig(chunk_tokens=4, top_k=0, text_anchor="none", dense_layers=dense_layers)
        return validator.routing(model, config, torch.device("cpu"))

    none, some, most, every = (routing(count) for count in (0, 1, 3, 4))
    assert 0.5 < none["sparsity"] < 1
    assert some["sparsity"] == pytest.approx(none["sparsity"] * 3 / 4)
    assert most["flops_of_dense"] == pytest.approx((3 + none["flops_of_dense"]) / 4)
    assert every == {"sparsity": 0, "flops_of_dense": 1}


def test_rivals_are_measured_at_the_same_noise(trained, prepared, tmp_path, capsys):
    rows_file = tmp_path / "rows.json"
    arguments = (f"checkpoint={trained}", f"data.path={prepared}", "data.validation=1", "device=cpu")
    pipeline.command("scripts/evaluate.py", *arguments, f"output={rows_file}")
    rows = json.loads(rows_file.read_text())
    assert [(row["attention"], row["clean_history"]) for row in rows] == [
        (name, history) for history in (False, True) for name in ("dense", "MoC", "own shot only")
    ]
    assert "own shot only" in capsys.readouterr().out
    by_name = {row["attention"]: row for row in rows if row["clean_history"]}
    assert by_name["dense"]["sparsity"] == 0
    assert 0 < by_name["MoC"]["sparsity"] < by_name["own shot only"]["sparsity"] < 1
    assert all(torch.tensor(list(row["loss"].values())).isfinite().all() for row in rows)
    # The same command again gives the same numbers: noise is keyed, not drawn.
    pipeline.command("scripts/evaluate.py", *arguments, f"output={rows_file}")
    assert json.loads(rows_file.read_text()) == rows
