"""The record of an adapter's memory: drawn weights, a row of real steps, and what is kept of other rows."""

import json

import torch

from moc import MoCConfig
from moc.training import ParallelConfig
from models import ModelConfig
from models.frozen import Base, FrozenLinear, unpacked
from scripts.benchmark_memory import MemoryConfig, draw_model, earlier_rows, measure, settings, table
from tests.wan_files import REDUCED

CONFIG = MemoryConfig(
    model=ModelConfig(
        "wan", dim=128, num_layers=3, num_heads=1, ffn_dim=192,
        lora_rank=2, lora_targets=["to_q", "net.2"], lora_base=Base.fp8,
    ),
    moc=MoCConfig(chunk_tokens=12, top_k=1),
    parallel=ParallelConfig("cpu", activation_checkpointing=True, recompute_parts=True, swap_blocks=2),
    shots=3, latent=[16, 2, 4, 6], text_dim=REDUCED["text_dim"],
)  # fmt: skip


def test_weights_are_drawn_in_their_format():
    model = draw_model(CONFIG, torch.device("cpu"))
    assert not any(weight.is_meta for weight in model.parameters())
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(frozen) == 3 * 10
    for layer in frozen:
        weight = unpacked(layer.weight, layer.scale, torch.float32)
        assert 0.9 < weight.std() * layer.in_features**0.5 < 1.1
    assert all("lora" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_a_row_holds_steps_and_other_rows_stay(tmp_path):
    row = settings(CONFIG) | measure(CONFIG)
    assert (row["tokens"], row["base"], row["swapped"]) == (3 * 12, "fp8", 2)
    assert len(row["loss"]) == 3
    assert all(0 < loss < 100 for loss in row["loss"])
    assert "| 3 x 128 | fp8 | 2 | 2 | recomputed, parts | adamw |" in table(
        {"gpu": "a GPU", "date": "", "commit": ""}, [row]
    )
    other = row | {"swapped": 0, "problem": "out of memory"}
    head = {"gpu": "a GPU", "commit": "abc", "date": "2026-01-01"}
    file = tmp_path / "memory.json"
    assert earlier_rows(file, head, settings(CONFIG)) == []
    file.write_text(json.dumps({"header": head, "rows": [row, other]}))
    assert earlier_rows(file, head | {"date": "2026-01-02"}, settings(CONFIG)) == [other]
    assert earlier_rows(file, head | {"commit": "abd"}, settings(CONFIG)) == []
