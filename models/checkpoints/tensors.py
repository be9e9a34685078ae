"""Safetensors files are read and written one tensor at a time, so a checkpoint larger than memory passes through.

What cannot be read raises one clear UserError: a pickle, a cut file, a folder with two experts, a missing shard.
"""

import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moc.errors import UserError
from moc.files import PARTIAL
from moc.training.checkpoint import read_index, remedy
from moc.training.tensor_files import DTYPES, INDEX, Entry, deal_to_files, file_header, num_bytes

PICKLES = {".pth", ".pt", ".bin", ".ckpt", ".pkl"}
SAFE = "use the safetensors release"
# Weights are floats: whole numbers are those of a quantized release, which mean nothing without its scales.
WEIGHT_DTYPES = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
Shapes = Mapping[str, tuple[int, ...]]


class TensorSource:
    """A source reads the tensors of one .safetensors file, or of a folder with one such file or a sharded set and its
    index.

    Tensors are read, not mapped: a file larger than memory may not be mapped as torch does it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._located: dict[str, tuple[Path, int]] = {}  # each tensor's file, and first byte within it
        files, index = _files(self.path)
        for file in files:
            self._describe(file)
        if index is not None:
            self._check_index(index)

    def __len__(self) -> int:
        return len(self._located)

    def names(self) -> list[str]:
        return sorted(self._located)

    def header(self) -> dict[str, str]:
        """Returns what the makers of the files say in their headers."""
        said: dict[str, str] = {}
        for file in sorted({file for file, _ in self._located.values()}):
            said |= _open(file).metadata() or {}
        return said

    def read(self, name: str) -> Tensor:
        """Returns one tensor, on the CPU, in the file's dtype."""
        return self._values(name, 0, torch.Size(self.shapes[name]).numel()).reshape(self.shapes[name])

    def sample(self, name: str, most: int) -> Tensor:
        """Returns at most `most` values from the middle of a tensor, flat: one short read, whatever its size."""
        size = torch.Size(self.shapes[name]).numel()
        count = min(most, size)
        return self._values(name, (size - count) // 2, count)

    def _values(self, name: str, first: int, count: int) -> Tensor:
        file, start = self._located[name]
        dtype = self.dtypes[name]
        num_bytes = count * dtype.itemsize
        data = np.fromfile(file, np.uint8, count=num_bytes, offset=start + first * dtype.itemsize)
        if len(data) != num_bytes:
            raise UserError(f"{file} has become shorter than when it was opened; {remedy(file)}")
        return torch.from_numpy(data).view(dtype)

    def _describe(self, file: Path) -> None:
        with _open(file) as source, file.open("rb") as raw:
            start = 8 + struct.unpack("<Q", raw.read(8))[0]
            for name in source.offset_keys():  # names come in the order of their bytes, which have no gaps
                piece = source.get_slice(name)
                if name in self._located:
                    raise UserError(f"{name} is in {self._located[name][0]} and in {file}; fetch the folder again")
                if piece.get_dtype() not in WEIGHT_DTYPES:
                    raise UserError(
                        f"{file}: {name} is {piece.get_dtype()}; weights of {', '.join(WEIGHT_DTYPES)} are read: name "
                        "a release that is not quantized"
                    )
                self.shapes[name], self.dtypes[name] = tuple(piece.get_shape()), WEIGHT_DTYPES[piece.get_dtype()]
                self._located[name] = file, start
                start += num_bytes((name, self.dtypes[name], self.shapes[name]))

    def _check_index(self, index: dict[str, Path]) -> None:
        file_of = {name: file for name, (file, _) in self._located.items()}
        problems = {
            "not in the shard that the index names": sorted(n for n, file in index.items() if file_of.get(n) != file),
            "in a shard but not in the index": sorted(file_of.keys() - index.keys()),
        }
        if any(problems.values()):
            raise UserError(f"{self.path} is not what its index says: {listed(problems)}; {remedy(self.path)}")


def download_hint(path: str | Path) -> str:
    """Tells how to fetch what a path names, where it could be a repository of the Hugging Face hub; else ""."""
    match = re.fullmatch(r"(?:https?:/+huggingface\.co/)?([\w.-]+/[\w.-]+)(?:/[\w./-]*)?", str(path))
    if match is None or Path(match[1]).parent.exists():
        return ""
    return (
        f"; if it is a repository of the Hugging Face hub, fetch it (hf download {match[1]} --local-dir DIR) and name "
        "the folder"
    )


def _open(file: Path):
    """Opens a file, checking its header; its tensors are left alone ("np" maps them without claiming memory)."""
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or no safetensors file ({error}); {remedy(file)}") from None


def listed(problems: dict[str, list[str]]) -> str:
    """Returns problems in words: how many names each has, and the first ten of them."""
    sentences, most = [], 10
    for what, names in problems.items():
        if names:
            rest = f" and {len(names) - most} more" if len(names) > most else ""
            sentences.append(f"{len(names)} {what}: {', '.join(names[:most])}{rest}")
    return "; ".join(sentences)


def shapes(state: Mapping[str, Tensor]) -> Shapes:
    """Returns the shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_tensors(path: str | Path, what: str, found: Shapes, expected: Shapes) -> None:
    """Raises UserError, listing names, unless the tensors at `path` are exactly those expected of `what`."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
    }
    if any(problems.values()):
        raise UserError(f"{path} is not a whole {what}: {listed(problems)}; {remedy(path)}, or name another")


def _files(path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """Returns the safetensors files that make up the checkpoint at `path`, and which of them its index, if any, names
    for each tensor."""
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle file, which can run code when read; {SAFE}")
    if path.is_file():
        return [path], None
    if not path.is_dir():
        hint = download_hint(path) or "; name a run's folder, a checkpoint, a model's folder or a .safetensors file"
        raise UserError(f"{path} does not exist{hint}")
    indexes, files = sorted(path.glob("*" + INDEX)), sorted(path.glob("*.safetensors"))
    if len(indexes) == 1:
        index = read_index(indexes[0])
        files = sorted(set(index.values()))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{path} lacks the shards {missing} that its index names; {remedy(path)}")
        return files, index
    if len(files) == 1:
        return files, None
    if not files:
        pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
        if pickles:
            raise UserError(f"{path} holds only pickles {pickles[:3]}, which can run code when read; {SAFE}")
        raise UserError(f"{path} holds no .safetensors file; name the folder or file of the model itself")
    names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
    raise UserError(
        f"{path} holds {len(files)} safetensors files ({names}) and {len(indexes) or 'no'} index files: it may mix "
        "models, such as Wan2.2's high and low noise experts; name one file, or a folder with one index"
    )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which gets its name when the block ends well and is removed when it does not."""
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(file: Path, entries: Iterable[Entry], read: Callable[[str], Tensor]) -> None:
    """Writes one safetensors file, holding one tensor in memory at a time.

    read(name) returns a tensor, in any dtype. The file appears when it is whole.
    """
    by_name = {entry[0]: entry for entry in entries}
    header, starts = file_header(by_name.values())
    partial = file.with_name(f".{file.name}{PARTIAL}")
    try:
        with partial.open("wb") as out:
            out.write(header)
            for name in starts:
                _, dtype, shape = by_name[name]
                tensor = read(name).to(dtype).reshape(shape).contiguous()
                out.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
        os.replace(partial, file)
    except OSError as error:  # the error of a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(error.filename or file)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_sharded(
    folder: Path,
    entries: Iterable[Entry],
    read: Callable[[str], Tensor],
    stem: str = "diffusion_pytorch_model",
    shard_bytes: int = 10 * 1000**3,
) -> None:
    """Writes a folder as diffusers does: one file, or shards of at most `shard_bytes` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, dealt in deal_to_files(folder, entries, stem, shard_bytes).items():
        write_tensors(file, dealt, read)
