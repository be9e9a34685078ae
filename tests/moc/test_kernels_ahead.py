"""Triton kernels compile for GPUs that are not here, within their shared memory and registers."""

import json
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton brings its assembler to x86 Linux"
)
ROOT = Path(__file__).parents[2]


def compile_kernels(output: Path, *settings: str) -> list[dict]:
    """Returns the rows that the script writes; it fails where a kernel takes too much memory or too many registers."""
    command = [sys.executable, "scripts/compile_kernels.py", f"output={output}", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text())["rows"]


def kernels() -> set[str]:
    """Returns the names of all kernels, by their sources."""
    sources = [*(ROOT / "moc/kernels").glob("triton_*.py"), *(ROOT / "models").glob("*_kernels.py")]
    return {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.MULTILINE)}


def test_every_kernel_compiles_without_a_gpu(tmp_path):
    """They are compiled for one with little shared memory."""
    rows = compile_kernels(tmp_path / "few.json", "gpus=[120]", "kinds=[bf16-64-small-chunks]")
    assert {row["name"] for row in rows} == kernels()
    assert all(row["registers"] > 0 for row in rows)
    assert max(row["shared"] for row in rows) > 0
    assert "| dkv_kernel |" in (tmp_path / "few.md").read_text()


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu_and_dtype(tmp_path):
    rows = compile_kernels(tmp_path / "all.json")
    assert {row["gpu"] for row in rows} == {"80", "86", "89", "90", "100", "103", "120"}
    fp32 = {row["name"] for row in rows if row["kind"].startswith("fp32")}
    assert fp32 >= {"masked_dkv_kernel", "dkv_kernel", "dq_kernel", "route_kernel"}


def test_what_takes_too_much_is_named():
    from moc.kernels.compilation import Compiled, excesses

    fits = Compiled("dq_kernel", warps=4, registers=255, spilled=64, shared=99 << 10)
    assert excesses(fits, (8, 6)) == []
    assert excesses(replace(fits, spilled=72), (8, 6)) == [
        "spills 72 bytes of registers a thread: give it smaller blocks"
    ]
    assert excesses(replace(fits, spilled=72), (9, 0)) == []  # measured to be the fastest nevertheless
    assert excesses(replace(fits, shared=101377), (8, 6)) == ["takes 101377 bytes of shared memory, of 101376"]


def test_threads_parse_kernels_one_after_another(monkeypatch):
    from triton.runtime import jit

    from moc.kernels.compilation import parsed_in_turn

    at_once, most = [], []

    def parse(kernel: object) -> None:
        at_once.append(kernel)
        time.sleep(0.01)
        most.append(len(at_once))
        at_once.pop()

    monkeypatch.setattr(jit.JITFunction, "parse", parse)
    with parsed_in_turn(), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda kernel: jit.JITFunction.parse(kernel), range(8)))
    assert most == [1] * 8
    assert jit.JITFunction.parse is parse
