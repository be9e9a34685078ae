"""Files and folders are shared with others: names stay inside a folder, files are whole, one holds a folder at a
time."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import filelock

from moc.errors import UserError

PARTIAL = ".moc-partial"  # nobody else uses this ending
LOCK = ".lock"
PATIENCE = 1.0  # seconds; the system may refuse a lock for a moment: a slow disk, or a process that is just ending


class OutsideError(UserError):
    """This error is raised for a name that leads out of the folder it was given for."""


class HeldError(UserError):
    """This error is raised for a folder that another process holds."""


def inside(folder: str | Path, name: str, follow_links: bool = False) -> Path:
    """Returns the path of `name` within `folder`, whether or not there is such a file.

    Every name that comes from a file, an index or a setting passes through here before it is joined to a folder.
    follow_links: refuse a symlink that leads out too. Hugging Face's cache keeps whole models behind such links.
    Raises OutsideError for an absolute name and for one with .. in it.
    """
    folder, pure = Path(folder), PurePath(name)
    path = folder / pure
    leaves = pure.is_absolute() or ".." in pure.parts
    if leaves or (follow_links and not path.resolve().is_relative_to(folder.resolve())):
        raise OutsideError(f"{name!r} does not lie within {folder}; name a path below it, without ..")
    return path


def write_whole(path: Path, payload: bytes, durable: bool = False) -> None:
    """Writes beside, then renames, so that `path` is never half-written, even by two at once.

    durable: the bytes are on the disk before the name is, so that a power cut leaves the old file or the new one.
    Raises OSError, leaving nothing behind.
    """
    with beside(path) as partial:
        partial.write_bytes(payload)
        if durable:
            with partial.open("rb") as file:
                os.fsync(file.fileno())


def check_writable(path: Path) -> None:
    """Tries, before hours of work, whether its result can be written to `path`, whose folder is made. Raises UserError
    where it cannot."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file") from None


def copy_whole(source: Path, path: Path) -> None:
    """Copies a file of any size as `write_whole` writes one. Raises OSError, leaving nothing behind."""
    with beside(path) as partial:
        shutil.copyfile(source, partial)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Gives a new path in the same folder to write to; it gets the name `path` when the block ends well."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, holds: bool = True) -> Iterator[None]:
    """Holds the folder, which is made if need be, for those alone who came together.

    holds: whether this process is the one that holds it for all of them; the others pass. The lock is the system's and
    ends with the process, however that ends. Raises HeldError where others hold it for longer than `PATIENCE`, OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=PATIENCE)
    try:
        if holds:
            lock.acquire()
    except filelock.Timeout:
        raise HeldError(f"{folder} is in use by another process; wait for it to end, or name another folder") from None
    try:
        yield
    finally:
        lock.release()
