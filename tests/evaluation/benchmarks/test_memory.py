"""These tests are about the record of an adapter's memory: drawn weights, a row of real steps, and what is kept of
other rows."""

import torch

from evaluation.benchmarks.measurements import read_rows
from evaluation.benchmarks.memory import MemoryConfig, measure, page, settings
from moc import MoCConfig
from moc.training import ParallelConfig
from models import ModelConfig
from models.drawn import draw_adapted
from models.frozen import Base, FrozenLinear, unpacked
from tests.pipeline import command
from tests.wan_files import REDUCED

CONFIG = MemoryConfig(
    model=ModelConfig(
        "wan", dim=128, num_layers=3, num_heads=1, ffn_dim=192,
        lora_rank=2, lora_targets=["to_q", "net.2"], lora_base=Base.fp8,
    ),
    moc=MoCConfig(chunk_tokens=12, top_k=1),
    parallel=ParallelConfig("cpu", activation_checkpointing=True, recompute_sublayers=True, swap_blocks=2),
    shots=3, latent=[16, 2, 4, 6], text_dim=REDUCED["text_dim"],
)  # fmt: skip


def test_weights_are_drawn_in_their_format():
    model = draw_adapted(CONFIG.model, CONFIG.latent[0], CONFIG.text_dim, torch.device("cpu"))
    assert not any(weight.is_meta for weight in model.parameters())
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(frozen) == 3 * 10
    for layer in frozen:
        weight = unpacked(layer.weight, layer.scale, torch.float32)
        assert 0.9 < weight.std() * layer.in_features**0.5 < 1.1
    assert all("lora" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_a_row_holds_steps():
    row = settings(CONFIG) | measure(CONFIG)
    assert (row["tokens"], row["base"], row["swapped"]) == (3 * 12, "fp8", 2)
    assert len(row["loss"]) == 3
    assert all(0 < loss < 100 for loss in row["loss"])
    assert "| 3 x 128 | fp8 | 2 | 2 | recomputed, sublayers | adamw |" in page([row | {"date": "", "commit": "abc"}])


def test_the_command_adds_its_row_to_those_of_other_settings(tmp_path):
    output = tmp_path / "memory.json"
    words = [
        "model.dim=128",
        "model.num_layers=2",
        "model.num_heads=1",
        "model.ffn_dim=64",
        "shots=2",
        "latent=[16,2,4,6]",
        "text_dim=32",
        "moc.chunk_tokens=12",
        "parallel.device=cpu",
        f"output={output}",
    ]
    for swapped in (1, 2, 1):
        command("scripts/benchmark_memory.py", *words, f"parallel.swap_blocks={swapped}")
    rows = read_rows(output)
    assert [row["swapped"] for row in rows] == [2, 1]
    assert all(row["tokens"] == 2 * 12 and row["step_seconds"] > 0 for row in rows)
    assert output.with_suffix(".md").read_text().count("| 2 x 128 | fp8 |") == 2
