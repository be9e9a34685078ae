"""This module keeps records of measurements: JSON of rows, each with where it was measured, and tables and plots of
them."""

import io
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from matplotlib.figure import Figure

from moc.checkout import commit
from moc.files import write_whole
from moc.kernels import dense
from moc.training import Parallel

VERSIONS = ("torch", "cuda", "cudnn", "triton", "fa4", "fa3")


def read_rows(output: Path) -> list[dict]:
    """Returns the rows of a record, each with what the record's header says of all of them; none where there is no
    record."""
    if not output.exists():
        return []
    record = json.loads(output.read_text())
    return [record.get("header", {}) | row for row in record["rows"]]


def put_row(
    output: Path, row: Mapping[str, Any], key: Sequence[str], header: Mapping[str, Any] = MappingProxyType({})
) -> list[dict]:
    """Puts a row into the record, in the place of an earlier one of its key; returns all rows, as `read_rows` does.

    row: what was measured. header: where, when and with what; the record's header holds what is the same for all rows,
    and each row what is its own. key: the names, in row or header, that tell rows apart; one that a row lacks is "".
    """
    new = json.loads(json.dumps({**header, **row}))  # keys become texts and tuples lists, as in earlier rows
    rows = [other for other in read_rows(output) if _key(other, key) != _key(new, key)] + [new]
    shared = {name: new[name] for name in header if all(other.get(name, "") == new[name] for other in rows)}
    lines = ",\n".join(json.dumps({k: v for k, v in other.items() if k not in shared}) for other in rows)
    write_whole(output, f'{{"header": {json.dumps(shared)},\n"rows": [\n{lines}\n]}}\n'.encode())
    return rows


def _key(row: Mapping[str, Any], key: Sequence[str]) -> list[Any]:
    return [row.get(name, "") for name in key]


def header() -> dict:
    """Returns GPU, versions, commit and date of a measurement; None stands for what is not there."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": import_module("triton").__version__ if find_spec("triton") else None,
        "fa4": version("flash-attn-4") if dense.is_installed("fa4") else None,
        "fa3": "installed" if dense.is_installed("fa3") else None,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def machine(parallel: Parallel) -> dict:
    """Returns device, cores, versions, commit and date."""
    return {
        "device": parallel.device_name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def cpu_name() -> str:
    """Returns the processor's model, and whether it has AVX-512."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return model + (", AVX-512" if any("avx512f" in line for line in lines) else "")


def measured_on(rows: Iterable[Mapping[str, Any]]) -> str:
    """Says where rows were measured, when and with what: one sentence for each machine and commit."""
    return " ".join(dict.fromkeys(_origin(row) for row in rows))


def _origin(row: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {row[name]}" for name in VERSIONS if row.get(name))
    device = row.get("gpu") or row.get("device") or "CPU"
    return f"{device}; {versions}; {row['date']}; commit {row['commit']}."


def write_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Writes a plot as a whole PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    write_whole(path, picture.getvalue())


def markdown_table(head: list[str], lines: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table of cells as they print."""
    rows: list[Sequence[object]] = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
