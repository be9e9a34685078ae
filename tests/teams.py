"""This module makes films and evaluates on several meshes of these processes, by the commands that users call:
python -m torch.distributed.run --nproc_per_node 2 -m tests.teams RUN PREPARED SCRIPTS OUT

OUT has a folder for each mesh: a film of each of the scripts, and losses.json.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import torch

from models.kv_cache import KVCache
from tests.pipeline import command

MESHES = {
    "alone": [],
    "sequence": ["parallel.sequence=2"],
    "shard": ["parallel.shard=2"],
    "sequence_full": ["parallel.sequence=2"],  # in this mesh and the next, rank 1 has no memory for keys and values
    "shard_full": ["parallel.shard=2"],
}


def make(run: Path, prepared: Path, scripts: Path, out: Path, *mesh: str) -> None:
    settings = (f"checkpoint={run}", "device=cpu", *mesh)
    command("sample.py", *settings, f"script={scripts}", f"out={out}", "sampler.steps=3", "keep_every=1")
    paths = (f"data.path={prepared}", "data.validation=3", f"output={out / 'losses.json'}")
    command("scripts/evaluate.py", *settings, *paths)


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("full")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run, prepared, scripts, out = map(Path, sys.argv[1:])
    for name, mesh in MESHES.items():
        is_full = name.endswith("full") and os.environ["RANK"] == "1"
        with mock.patch.object(KVCache, "_memory", full if is_full else KVCache._memory):
            make(run, prepared, scripts, out / name, *mesh)
    torch.distributed.destroy_process_group()
