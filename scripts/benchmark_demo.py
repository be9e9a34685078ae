"""How far the demo's verdict is from failing: demos of several seeds and environments, beside each other on the CPU.

python scripts/benchmark_demo.py [seeds=N] [processes=N] [settings=[...]] [folder=DIR] [output=FILE]

Writes a row for each demo: its verdict, the seconds of its stages, its environment. Exit status 1 where one failed.
"""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from configs.command import command
from data.records import write_whole

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class DemoSeedsConfig:
    """See configs/benchmark_demo.yaml."""

    folder: str = "outputs/demo_seeds"
    output: str = "docs/benchmarks/demo.json"
    seeds: int = 8
    processes: int = 8
    settings: list[str] = field(default_factory=lambda: [""])


@command("benchmark_demo", DemoSeedsConfig)
def main(config: DemoSeedsConfig) -> None:
    folder = Path(config.folder).resolve()
    folder.mkdir(parents=True)  # a demo is never written over

    def row(seed: int) -> dict:
        setting = config.settings[seed % len(config.settings)]
        done = run(seed, setting, folder / str(seed))
        print(f"seed {seed} {setting}: {done}", flush=True)
        return {"seed": seed, "setting": setting} | done

    with ThreadPoolExecutor(config.processes) as pool:
        rows = list(pool.map(row, range(config.seeds)))
    header = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_whole(Path(config.output), (json.dumps({"header": header, "rows": rows}, indent=1) + "\n").encode())
    if any(row["exit_code"] for row in rows):
        sys.exit(1)


def run(seed: int, setting: str, output: Path) -> dict:
    """Runs one demo without a GPU, in an environment with NAME=VALUE words of `setting`; returns what it found."""
    words = dict(word.split("=", 1) for word in setting.split())
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | words
    with output.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "scripts/demo.py", f"output={output}", f"seed={seed}"],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    verdict = output / "verdict.json"
    return {"exit_code": done.returncode} | (json.loads(verdict.read_text()) if verdict.exists() else {})


def cpu_name() -> str:
    """The processor's model, and whether it has AVX-512."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return model + (", AVX-512" if any("avx512f" in line for line in lines) else "")


if __name__ == "__main__":
    main()
