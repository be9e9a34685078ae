"""A folder is what was written: every file is on the disk before the mark `complete` is, which holds its checksum.

The mark holds one JSON object, from a file's path within the folder to the CRC32 of its bytes. Files that say where
other weights lie are left out, since who moves those edits them. Checkpoints of earlier versions have an empty mark;
they are taken as they are.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from moc.files import inside

COMPLETE = "complete"
_EDITED = {"lora.json", "encoders.json"}
_BLOCK = 1 << 22  # bytes read at a time
_THREADS = 8


def files_to_seal(folder: Path) -> list[str]:
    """Returns the paths within a folder of the files whose checksums its mark is to hold."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (COMPLETE, *_EDITED))
    return [path.relative_to(folder).as_posix() for path in files]


def checksums(folder: Path, files: Sequence[str]) -> dict[str, int]:
    """Returns the checksum of each of some files, by its path within the folder. Raises OSError."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(lambda name: _checksum(folder / name), files), strict=True))


def seal(folder: Path, sums: Mapping[str, int]) -> None:
    """Writes the mark of a folder that is ready, after all of its files are safe on the disk.

    sums: `checksums` of all of `files_to_seal`. Raises RuntimeError where they are not of these files.
    """
    if differing := sorted(sums.keys() ^ set(files_to_seal(folder))):
        raise RuntimeError(f"{folder} cannot be sealed: {', '.join(differing[:5])} came or went while it was read")
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(sync, sorted(folder.rglob("*"))))
    (folder / COMPLETE).write_text(json.dumps(dict(sorted(sums.items())), indent=1) + "\n")
    sync(folder / COMPLETE)
    sync(folder)


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are safe on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damaged_files(folder: Path, among: frozenset[str] | None = None) -> list[str]:
    """Returns the paths within a sealed folder of the files that are missing, unreadable or changed since.

    among: look only at files and folders of these names at the folder's top. What was found once is not looked at again
    in the same process.
    """
    return _damaged_files(folder, among, (folder / COMPLETE).stat().st_mtime_ns)


@lru_cache
def _damaged_files(folder: Path, among: frozenset[str] | None, written: int) -> list[str]:
    """Returns what `damaged_files` does. It looks once for each `written`, the time of the mark, so that a folder that
    is written anew is looked at anew."""
    text = (folder / COMPLETE).read_text(errors="replace")
    try:
        sums = dict(json.loads(text or "{}"))
        paths = [inside(folder, name) for name in sums]
    except (ValueError, TypeError):
        return [COMPLETE]
    looked_at = [path for path in paths if among is None or path.relative_to(folder).parts[0] in among]
    with ThreadPoolExecutor(_THREADS) as pool:
        names = [path.relative_to(folder).as_posix() for path in looked_at]
        found = pool.map(_checksum_if_there, looked_at)
        return [name for name, value in zip(names, found, strict=True) if value != sums[name]]


def _checksum(path: Path) -> int:
    """Returns the CRC32 of a file's bytes. Raises OSError."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _checksum_if_there(path: Path) -> int | None:
    """Returns the CRC32 of a file's bytes, None where they cannot be read. Raises PermissionError."""
    try:
        return _checksum(path)
    except PermissionError:
        raise
    except OSError:
        return None
