"""This module opens a cache's files wherever they lie: local ones directly, those of an fsspec URL by way of local
copies."""

import os
import zlib
from pathlib import Path

import fsspec
import torch
from torch import Tensor

from data.errors import DataError
from moc.files import PARTIAL, OutsideError, beside, inside

_COPY = ".moc-copy"  # nobody else uses this ending, so making room never removes a user's file


def checksum(tensor: Tensor) -> int:
    """Returns the CRC32 of a CPU tensor's bytes, which the index of a cache keeps for each."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


class FileStore:
    """A store gives the files of one folder by name. It opens none before it is asked, so it can be sent to workers.

    url: a local path or an fsspec URL (s3://, gs://, https://, ...). copies: local folder for files of a URL, which may
    hold other files as well; the copies together stay under max_bytes: the least recently used are deleted first.
    Names may come from an index: one that leads out of the folder raises DataError (outside-root).
    """

    def __init__(self, url: str, copies: str | None = None, max_bytes: int = 50 << 30) -> None:
        self.url = url.removeprefix("file://").rstrip("/")
        self.copies, self.max_bytes = copies, max_bytes
        if self.is_remote and copies is None:
            raise DataError("no-local-cache", url, "is remote: set data.local_cache to a folder for copies")

    @property
    def is_remote(self) -> bool:
        return "://" in self.url

    def size(self, name: str) -> int | None:
        """Returns bytes of a file, None where there is none."""
        fs, path = self._located(name)
        return fs.size(path) if fs.isfile(path) else None

    def read_bytes(self, name: str) -> bytes:
        """Reads a whole small file. Raises OSError."""
        fs, path = self._located(name)
        return fs.cat_file(path)

    def glob(self, pattern: str) -> list[str]:
        """Returns names under the folder that match, sorted."""
        fs, root = self._root()
        return sorted(path[len(root) :].lstrip("/") for path in fs.glob(f"{root}/{pattern}"))

    def local(self, name: str) -> Path:
        """Returns the file on the local disk, copied there if need be. Raises DataError (cache-too-small), OSError."""
        return self._copied(name) if self.is_remote else self._inside(self.url, name)

    def forget(self, name: str) -> bool:
        """Deletes the local copy of a file of a URL and returns whether there was one."""
        if not self.is_remote:
            return False
        copy = self._copy(name + _COPY)
        if not copy.is_file():
            return False
        copy.unlink(missing_ok=True)
        return True

    def local_folder(self, name: str) -> Path:
        """Returns a folder of small files on the local disk, copied there if it must be, to stay."""
        if not self.is_remote:
            return self.local(name)
        for file in self.glob(f"{name}/**"):
            if self.size(file) is not None and not self._copy(file).is_file():
                self._fetch(file, self._copy(file))
        return self._copy(name)

    def _root(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Returns the file system, kept by fsspec for each process since handles do not survive a fork, and the folder
        in it. Raises DataError (no-file-system)."""
        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # a package that is not installed, an unknown kind of URL
            raise DataError("no-file-system", self.url, f"cannot be opened here ({error})") from error

    def _located(self, name: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """Returns the file system and the path of a file in it."""
        fs, root = self._root()
        self._inside(root, name)
        return fs, f"{root}/{name}"

    def _copy(self, name: str) -> Path:
        assert self.copies is not None  # a store with a URL always has a folder for copies
        return self._inside(Path(self.copies, fsspec.utils.tokenize(self.url)[:16]), name)

    def _inside(self, folder: str | Path, name: str) -> Path:
        try:
            return inside(folder, name)
        except OutsideError as error:
            raise DataError(
                "outside-root", self.url, f"{name!r} leads outside the cache, as no cache that prepare_data made does"
            ) from error

    def _copied(self, name: str) -> Path:
        """Returns the copy of a file of a URL, made if there is none."""
        copy = self._copy(name + _COPY)
        if copy.is_file():
            os.utime(copy)  # records that the copy was used now
            return copy
        fs, path = self._located(name)
        self._evict(fs.size(path), name)
        self._fetch(name, copy)
        return copy

    def _fetch(self, name: str, copy: Path) -> None:
        fs, path = self._located(name)
        with beside(copy) as partial:
            fs.get_file(path, str(partial))

    def _evict(self, size: int, name: str) -> None:
        if size > self.max_bytes:
            raise DataError(
                "cache-too-small", name, f"has {size} bytes, the local cache takes {self.max_bytes}; raise it"
            )
        assert self.copies is not None
        kept = sorted(_uses(Path(self.copies)))
        total = sum(file_size for _, file_size, _ in kept)
        for _, file_size, path in kept:
            if total + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= file_size


def _uses(folder: Path) -> list[tuple[float, int, Path]]:
    """Returns (last use, bytes, path) of each copy, unfinished ones too; other processes may be deleting them."""
    found = []
    for path in [*folder.rglob(f"*{_COPY}"), *folder.rglob(f".*{PARTIAL}")]:
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        found.append((stat.st_mtime, stat.st_size, path))
    return found
