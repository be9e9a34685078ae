"""This module says where tensors lie in safetensors files. That is known before a value is written, so that a file is
never held in memory and several processes may write their own rows of one."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

INDEX = ".safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Entry = tuple[str, torch.dtype, tuple[int, ...]]  # name, dtype and shape of a tensor to write


def num_bytes(entry: Entry) -> int:
    """Returns the size of a tensor's values."""
    _, dtype, shape = entry
    return dtype.itemsize * torch.Size(shape).numel()


def file_header(entries: Iterable[Entry], multiple: int = 8) -> tuple[bytes, dict[str, int]]:
    """Returns the bytes that a file of these tensors begins with, and the byte of the file at which each tensor begins,
    in the order of those. multiple: the header's length is one of this number."""
    ordered = sorted(entries, key=lambda entry: (-entry[1].itemsize, entry[0]))
    description: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, dtype, shape in ordered:
        starts[name], end = end, end + num_bytes((name, dtype, shape))
        description[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(description, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + start for name, start in starts.items()}


def deal_to_files(folder: Path, entries: Iterable[Entry], stem: str, shard_bytes: int) -> dict[Path, list[Entry]]:
    """Returns the tensors of each file of a folder, as diffusers deals them: one file, or shards of at most
    `shard_bytes` where no tensor is larger. Writes the index of shards."""
    by_name = {entry[0]: entry for entry in entries}
    plan = split_state_dict_into_shards_factory(
        by_name, get_storage_size=num_bytes, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=shard_bytes
    )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / (stem + INDEX)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {folder / file: [by_name[name] for name in names] for file, names in plan.filename_to_tensors.items()}
