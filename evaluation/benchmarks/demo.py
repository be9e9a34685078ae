"""This module measures how far the demo is from failing: demos of several seeds and environments, on the CPU."""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch

from data.records import write_whole
from evaluation.benchmarks.measurements import cpu_name
from moc.checkout import ROOT, commit
from moc.errors import UserError, check_least

DEMO = ROOT / "scripts/demo.py"


@dataclass(frozen=True)
class DemoSeedsConfig:
    """These settings say which demos to run.

    folder: where the demos go.
    output: the record to write.
    seeds: how many demos run in each environment.
    processes: demos at a time, one thread each.
    environments: variables for every seed, such as "ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2"; "" adds none.
    arguments: settings of scripts/demo.py, such as steps=500.
    """

    folder: str = "outputs/demo_seeds"
    output: str = "docs/benchmarks/demo.json"
    seeds: int = 8
    processes: int = 8
    environments: list[str] = field(default_factory=lambda: [""])
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_least(self, "", 1, "seeds", "processes")
        for word in " ".join(self.environments).split():
            if "=" not in word:
                raise UserError(f"environments has {word!r}; say NAME=VALUE, several of them with spaces between")


def write_record(config: DemoSeedsConfig) -> int:
    """Runs the demos and writes a row as soon as one is done; returns how many failed."""
    folder = Path(config.folder).resolve()
    folder.mkdir(parents=True)  # fails where the folder exists, so no demo is written over
    header = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "processes": config.processes,
        "arguments": config.arguments,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    rows: list[dict] = []
    with ThreadPoolExecutor(config.processes) as pool:
        demos = [
            pool.submit(run, seed, variables, folder / f"{index}_{seed}", config)
            for (index, variables), seed in product(enumerate(config.environments), range(config.seeds))
        ]
        try:
            for demo in as_completed(demos):
                rows.append(demo.result())
                print(json.dumps(rows[-1]), flush=True)
                record = {"header": header, "rows": sorted(rows, key=lambda row: (row["environment"], row["seed"]))}
                write_whole(Path(config.output), (json.dumps(record, indent=1) + "\n").encode())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    failed = sum(row["exit_code"] != 0 for row in rows)
    print(f"{len(rows)} demos, {failed} failed; loss over the line's from {min(ratios, default=float('nan')):.3f} "
          f"to {max(ratios, default=float('nan')):.3f}")  # fmt: skip
    return failed


def run(seed: int, variables: str, output: Path, config: DemoSeedsConfig) -> dict:
    """Runs one demo without a GPU, in an environment with `variables`, NAME=VALUE words; returns what it found."""
    words = dict(word.split("=", 1) for word in variables.split())
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | words
    arguments = [f"output={output}", f"seed={seed}", *config.arguments]
    if config.processes > 1:
        arguments.append("workers=1")
    with output.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            [sys.executable, str(DEMO), *arguments],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    verdict = output / "verdict.json"
    found = json.loads(verdict.read_text()) if verdict.exists() else {"log": str(output.with_suffix(".log"))}
    return {"seed": seed, "environment": variables, "exit_code": done.returncode} | found
