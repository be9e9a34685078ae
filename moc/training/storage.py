"""Sharded tensors go to and from safetensors files through torch.distributed.checkpoint, which plans the rows that each
process writes and reads. The files are those that one process alone would write.

torch's own HuggingFaceStorageWriter has each process write a file of its own, to be merged when all are there; here
each writes its rows to where they belong in the merged file at once. Nothing is gathered and nothing is pickled.
"""

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moc.errors import UserError
from moc.training.tensor_files import Entry, deal_to_files, file_header, num_bytes

SHARD_BYTES = 5 * 1000**3
_PAGE = 4096  # bytes; a header fills whole pages, so that two hosts never write one page of a network file


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], stem: str, group: Any = None) -> None:
    """Writes whole tensors to `folder`, which exists: STEM.safetensors, or shards with an index.

    group: the processes that write them together, each its own rows, or its share of what all of them hold alike; they
    must see one folder. None is this process alone. Raises on all of them what any of them raises.
    """
    if tensors:
        _run(dcp.save, dict(tensors), storage_writer=_Writer(folder, stem), process_group=group, no_dist=group is None)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors with the values that have their names in the safetensors files of a folder; each process reads its
    own rows alone. Raises SafetensorError where a file is none."""
    if tensors:
        _run(dcp.load, dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of tensors in the host's memory; each process copies what it holds."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    copies = stager.stage(dict(tensors))
    stager.close()
    return copies  # type: ignore[return-value]


def _run(action: Any, *arguments: Any, **settings: Any) -> None:
    """Runs an action of torch.distributed.checkpoint and raises the first error of any process as it is, not wrapped in
    torch's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            action(*arguments, **settings)
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


@dataclass(frozen=True)
class _Start:
    """This says where the values of a tensor begin: a file and a byte of it."""

    file: Path
    first: int


class _Writer(dcp.StorageWriter):
    """This writer writes rows where they belong in safetensors files, which the first process makes, as large as they
    will be."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        entries = {item.index.fqn: _entry(item) for plan in plans for item in plan.items}
        starts_of: dict[str, _Start] = {}
        for file, dealt in deal_to_files(self._folder, entries.values(), self._stem, SHARD_BYTES).items():
            header, starts = file_header(dealt, _PAGE)
            with file.open("wb") as out:
                out.truncate(len(header) + sum(map(num_bytes, dealt)))
                out.write(header)
                out.flush()
                os.fsync(out.fileno())
            starts_of |= {name: _Start(file, first) for name, first in starts.items()}
        return [replace(plan, storage_data=starts_of) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with ExitStack() as stack:
            files: dict[Path, BinaryIO] = {}
            for item in plan.items:
                start = plan.storage_data[item.index.fqn]
                if start.file not in files:
                    files[start.file] = stack.enter_context(_opened(start.file))
                rows = planner.resolve_data(item)
                assert isinstance(rows, Tensor)
                files[start.file].seek(start.first + _offset(item))
                values = rows.detach().to("cpu").contiguous().flatten().view(torch.uint8)
                files[start.file].write(memoryview(values.numpy()))  # type: ignore[arg-type]
                results.append(WriteResult(item.index, len(values), start))
            for out in files.values():
                out.flush()
                os.fsync(out.fileno())
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass  # the files describe themselves, so there is no metadata to write

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _entry(item: WriteItem) -> Entry:
    assert item.tensor_data
    return item.index.fqn, item.tensor_data.properties.dtype, tuple(item.tensor_data.size)


def _offset(item: WriteItem) -> int:
    """Returns the bytes of a tensor before the rows of an item. FSDP2 shards tensors over their first dimension."""
    assert item.tensor_data
    data = item.tensor_data
    if list(data.chunk.sizes[1:]) != list(data.size[1:]):
        raise NotImplementedError(f"{item.index.fqn} is sharded over another dimension than its first")
    first = data.chunk.offsets[0] if len(data.size) else 0
    return first * num_bytes((item.index.fqn, data.properties.dtype, tuple(data.size[1:])))


def _opened(file: Path) -> BinaryIO:
    """Returns a file that is there, for writing alone: what other processes write meanwhile is not read, nor written
    again."""
    try:
        return os.fdopen(os.open(file, os.O_WRONLY), "wb")
    except FileNotFoundError:
        raise UserError(
            f"{file} was made by the first process and is not seen by another: the run's folder must lie in a file "
            "system that all hosts share; set output"
        ) from None
