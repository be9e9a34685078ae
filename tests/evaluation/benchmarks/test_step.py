"""These tests are about the record of a whole step: the command itself on a small model, with the GPU played, and kinds
of kernels."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from evaluation.benchmarks import step
from evaluation.benchmarks.measurements import read_rows
from evaluation.benchmarks.step import KINDS, by_kind
from tests.pipeline import ROOT, command


def test_kernels_are_told_by_kind():
    names = {
        "masked_dkv_kernel": "attention", "forward_kernel": "attention", "fill_kernel": "routing",
        "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096>)": "collectives",
        "modulate_backward_kernel": "norms, modulation, gates, GELU",
        "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x128x8": "fp32 matmuls",
        "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n": "fp32 matmuls",
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT": "matmuls",
        "void at::native::vectorized_gather_kernel<16, long>": "scatter and gather",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer, average, norm",
        "void at::native::reduce_kernel<128, 4>": "sums", "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::distribution_elementwise_grid_stride_kernel<float, normal_": "random numbers",
        "void at::native::vectorized_elementwise_kernel<4, GeluBackward>": "other",
    }  # fmt: skip
    assert {name: next(iter(by_kind({name: 1.0}))) for name in names} == names
    assert set(names.values()) == {*KINDS, "other"}
    assert by_kind({"nvjet_a": 1.25, "nvjet_b": 2.0, "Memset": 5.0}) == {"copies": 5.0, "matmuls": 3.25}


def test_every_kernel_of_ours_has_a_kind():
    files = [*(ROOT / "moc/kernels").glob("*.py"), *(ROOT / "models").glob("*.py")]
    names = [name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)]
    assert len(names) > 30
    assert not [name for name in names if "other" in by_kind({name: 1.0})]


def test_each_pack_gives_a_row_and_a_row_replaces_its_like(tmp_path, monkeypatch, capsys):
    """It runs on the CPU, whose rates are made up."""
    for name, value in (("check_gpu", None), ("matmul_flops_per_ms", 1e9), ("copy_bytes_per_ms", 1e7)):
        monkeypatch.setattr(step, name, lambda value=value: value)
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 2**30)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(step, "STEPS", 2)
    kernel, host = (
        SimpleNamespace(key=key, self_device_time_total=us, count=2) for key, us in (("nvjet", 3000), ("", 0))
    )
    profile = SimpleNamespace(key_averages=lambda: [kernel, host])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext(profile))
    output = tmp_path / "step.json"
    words = ["model=debug", "tokens=200", "moc.chunk_tokens=4", "moc.top_k=1", f"output={output}"]
    for packs in ("[[1,2,2],[1,2,3]]", "[[1,2,2]]"):
        command("scripts/benchmark_step.py", *words, f"packs={packs}")
    rows = read_rows(output)
    assert [row["grid"] for row in rows] == [[1, 2, 3], [1, 2, 2]]
    for row in rows:
        phases = [row[f"{phase}_ms"] for phase in step.PHASES]
        assert all(ms > 0 for ms in phases[1:])
        assert sum(phases) <= row["step_ms"] + 0.5
        assert row["floor_matmul_ms"] >= 0
        assert (row["busy_ms"], row["launches"], row["kernels_ms"]) == (3.0, 2, {"matmuls": 3.0})
    assert output.with_suffix(".md").read_text().count("| 1.0 |") == 2
    assert "forward_ms" in capsys.readouterr().out
