"""Safetensors files read and written one tensor at a time, so that a checkpoint larger than memory passes through.

What cannot be read is one clear ValueError: a pickle, a truncated file, a folder with two experts, a missing shard.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLES = {".pth", ".pt", ".bin", ".ckpt", ".pkl"}
INDEX = ".safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSource:
    """The tensors of one .safetensors file, or of a folder with one such file or a sharded set and its index."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file_of = {name: file for file in _files(self.path) for name in _open(file).keys()}  # noqa: SIM118
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name in self._file_of:
            self._describe(name)

    def __len__(self) -> int:
        return len(self._file_of)

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype."""
        return _open(self._file_of[name]).get_tensor(name)

    def _describe(self, name: str) -> None:
        piece = _open(self._file_of[name]).get_slice(name)
        self.shapes[name] = tuple(piece.get_shape())
        self.dtypes[name] = DTYPES[piece.get_dtype()]


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}); fetch it again") from None


def _files(path: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint at `path`."""
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle file, which can run code when read; use the safetensors release")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist")
    indexes, files = sorted(path.glob("*" + INDEX)), sorted(path.glob("*.safetensors"))
    if len(indexes) == 1:
        files = [path / name for name in sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path} lacks the shards {missing} that its index names; fetch them")
        return files
    if len(files) == 1:
        return files
    if any(path.glob("*" + suffix) for suffix in PICKLES) and not files:
        raise ValueError(f"{path} holds pickle files only, which can run code when read; use the safetensors release")
    names = [file.name for file in files]
    raise ValueError(
        f"{path} holds {len(files)} safetensors files {names} and no single index: it may mix models, such as "
        "Wan2.2's high and low noise experts; name one file"
    )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends well and is removed when it does not."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(
    file: Path, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> None:
    """Writes one safetensors file, holding one tensor in memory at a time.

    entries: (name, dtype, shape) of every tensor; read(name) returns it, in any dtype. The file appears when whole.
    """
    ordered = sorted(entries, key=lambda entry: (-entry[1].itemsize, entry[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, dtype, shape in ordered:
                tensor = read(name).to(dtype).reshape(shape).contiguous()
                out.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_sharded(
    folder: Path,
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    stem: str = "diffusion_pytorch_model",
    shard_bytes: int = 10 * 1000**3,
) -> None:
    """Writes a folder as diffusers does: one file, or shards of at most `shard_bytes` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, dtype, shape in entries:
        size = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled, total = filled + size, total + size
    if len(shards) == 1:
        write_tensors(folder / f"{stem}.safetensors", shards[0], read)
        return
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write_tensors(folder / file, shard, read)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / (stem + INDEX)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
