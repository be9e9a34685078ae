"""Files of a cache, wherever it lies: local ones as they are, those of an fsspec URL through bounded local copies."""

import os
import uuid
from pathlib import Path

import fsspec

from data.errors import DataError


class FileStore:
    """The files of one folder, by name. Opens nothing before it is asked, so it travels to worker processes.

    url: a local path or an fsspec URL (s3://, gs://, https://, ...). copies: local folder for files of a URL; together
    they stay under max_bytes, the least recently used going first.
    """

    def __init__(self, url: str, copies: str = "", max_bytes: int = 50 << 30) -> None:
        self.url, self.copies, self.max_bytes = url.rstrip("/"), copies, max_bytes
        if self.is_remote and not copies:
            raise DataError("no-local-cache", url, "is remote: set data.local_cache to a folder for copies")

    @property
    def is_remote(self) -> bool:
        return "://" in self.url and not self.url.startswith("file://")

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        fs, root = fsspec.core.url_to_fs(self.url)  # kept by fsspec for each process: handles do not survive a fork
        path = f"{root}/{name}"
        return fs.size(path) if fs.isfile(path) else None

    def read_bytes(self, name: str) -> bytes:
        """A whole small file. Raises OSError."""
        fs, root = fsspec.core.url_to_fs(self.url)
        return fs.cat_file(f"{root}/{name}")

    def glob(self, pattern: str) -> list[str]:
        """Names under the folder that match, sorted."""
        fs, root = fsspec.core.url_to_fs(self.url)
        return sorted(path[len(root) :].lstrip("/") for path in fs.glob(f"{root}/{pattern}"))

    def local(self, name: str) -> Path:
        """The file on the local disk, copied there if it must be. Raises DataError (cache-too-small), OSError."""
        fs, root = fsspec.core.url_to_fs(self.url)
        if not self.is_remote:
            return Path(root, name)
        copy = Path(self.copies, fsspec.utils.tokenize(self.url)[:16], name)
        if copy.is_file():
            os.utime(copy)  # its last use
            return copy
        self._make_room(fs.size(f"{root}/{name}"), name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}.partial")
        try:
            fs.get_file(f"{root}/{name}", str(partial))
            partial.replace(copy)
        finally:
            partial.unlink(missing_ok=True)
        return copy

    def forget(self, name: str) -> bool:
        """Delete the local copy of a file of a URL; whether there was one to delete."""
        copy = Path(self.copies, fsspec.utils.tokenize(self.url)[:16], name)
        if not self.is_remote or not copy.is_file():
            return False
        copy.unlink(missing_ok=True)
        return True

    def local_folder(self, name: str) -> Path:
        """A folder of small files on the local disk, copied there if it must be."""
        if not self.is_remote:
            return self.local(name)
        for file in self.glob(f"{name}/**"):
            if self.size(file) is not None:
                self.local(file)
        return Path(self.copies, fsspec.utils.tokenize(self.url)[:16], name)

    def _make_room(self, size: int, name: str) -> None:
        if size > self.max_bytes:
            raise DataError(
                "cache-too-small", name, f"has {size} bytes, the local cache takes {self.max_bytes}; raise it"
            )
        kept = sorted(_uses(Path(self.copies)))
        total = sum(file_size for _, file_size, _ in kept)
        for _, file_size, path in kept:
            if total + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= file_size


def _uses(folder: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, path) of each copy, unfinished ones of killed processes too; others may be deleting them."""
    found = []
    for path in [*folder.rglob("*.safetensors"), *folder.rglob(".*.partial")]:
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        found.append((stat.st_mtime, stat.st_size, path))
    return found
