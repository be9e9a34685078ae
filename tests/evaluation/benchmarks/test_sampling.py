"""These tests are about the record of whole films: what is timed of each stream, and what a film is then said to
take."""

import pytest
import torch

from evaluation.benchmarks.measurements import read_rows
from evaluation.benchmarks.sampling import SamplingBenchmarkConfig, Taken, summary
from moc.errors import UserError
from models import Family, ModelConfig
from models.drawn import draw_model
from models.frozen import Base
from tests.pipeline import command


def test_a_film_is_one_first_step_and_so_many_usual_ones_of_each_stream():
    streams = {(0,): 10, (0, 1): 20, (0, 1, 2): 1}
    taken = {
        (0,): Taken([9.0, 1.0, 3.0], [8.0, 0.5, 2.5], peak=5),
        (0, 1): Taken([7.0], [7.0], peak=9),
        (0, 1, 2): Taken([4.0, 6.0], [2.0, 5.0], peak=7),
    }
    row = summary(streams, taken)
    assert row["film_seconds"] == (9 + 9 * 2) + 20 * 7 + 4
    assert (row["step_seconds"], row["film_steps"], row["timed_steps"], row["peak_bytes"]) == (6, 31, 6, 9)
    assert row["outside"] == round(1 - (3 + 7 + 5) / (4 + 7 + 6), 4)


def test_names_that_are_none_are_refused():
    for wrong in ({"films": ["long"]}, {"impls": ["fast"]}, {"modes": ["backwards"]}):
        with pytest.raises(UserError, match="choose among"):
            SamplingBenchmarkConfig(**wrong)


def test_the_command_times_each_stream_and_replaces_rows_of_its_like(tmp_path):
    output = tmp_path / "sampling.json"
    sizes = ["model.dim=32", "model.num_layers=1", "model.num_heads=1", "model.ffn_dim=32", "text_dim=8", "vae_dim=8"]
    words = [*sizes, "parallel.device=cpu", "films=[tiny]", "sampler.steps=20", f"output={output}"]
    command("scripts/benchmark_sampling.py", *words, "timed=2")
    command("scripts/benchmark_sampling.py", *words, "timed=1", "modes=[extend,extend_offload]")
    bounded = ["impls=[moc]", "modes=[extend_offload]", "sampler.context_shots=1"]
    command("scripts/benchmark_sampling.py", *words, "timed=1", *bounded)
    *rest, last = read_rows(output)
    assert (last["mode"], last["context_shots"], last["history"]) == ("extend_offload", 1, "kept")
    rows = {(row["impl"], row["mode"]): row for row in rest}
    assert len(rows) == len(rest) == 5 + 3 + 1
    assert {mode for impl, mode in rows if impl == "dense"} == {"staggered", "joint", "extend"}
    kept = {mode for (_, mode), row in rows.items() if row.get("history") == "kept"}
    assert kept == {"extend", "extend_offload"}
    steps = {mode: (row["timed_steps"], row["film_steps"]) for (_, mode), row in rows.items()}
    assert steps == {
        "staggered": (6, 2 * 6 + 20), "joint": (2, 20), "extend": (3, 60), "extend_uncached": (6, 60),
        "extend_offload": (3, 60), "decode": (1, 3),
    }  # fmt: skip
    page = output.with_suffix(".md").read_text()
    assert page.count("| 32 x 1 | tiny | 36 |") == len(rows) + 1


def test_a_model_whose_blocks_are_swapped_films(tmp_path):
    output = tmp_path / "sampling.json"
    sizes = ["model=wan_14b", "model.dim=32", "model.num_layers=4", "model.num_heads=1", "model.ffn_dim=32"]
    words = [*sizes, "text_dim=8", "vae_dim=8", "parallel.device=cpu", "films=[tiny]", "timed=1", f"output={output}"]
    for weights in ("null", "fp8"):
        command(
            "scripts/benchmark_sampling.py", *words, f"weights={weights}", "swap_blocks=3", "impls=[moc]",
            "modes=[extend_uncached,extend_offload,decode]",
        )  # fmt: skip
    rows = [row for row in read_rows(output) if row["mode"] != "decode"]
    assert {row["weights"] for row in rows} == {"3 blocks swapped", "fp8, 3 blocks swapped"}
    assert all(row["step_seconds"] >= 0 and "error" not in row for row in rows)


def test_a_drawn_model_has_its_weights_in_the_formats_asked_for():
    config, device = ModelConfig(family=Family.wan, dim=32, num_layers=2, num_heads=1, ffn_dim=32), torch.device("cpu")
    for base, dtype in ((Base.fp32, torch.bfloat16), (Base.fp8, torch.uint8)):
        model = draw_model(config, 16, 8, device, "cpu", base, torch.bfloat16)
        assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"cpu"}
        assert all(weight.float().isfinite().all() for weight in model.parameters())
        linears = [module for module in model.blocks.modules() if isinstance(module, torch.nn.Linear)]
        assert {linear.weight.dtype for linear in linears} == {dtype}
        assert {weight.dtype for weight in model.parameters()} == {dtype, torch.bfloat16, torch.float32}
