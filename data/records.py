"""This module keeps small files that a run of preparing leaves for the next; one that is not as it was written is made
anew."""

import hashlib
import json
import logging
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from data.errors import DataError
from moc import files
from moc.errors import FREE_SOME

logger = logging.getLogger(__name__)


def write_whole(path: Path, payload: bytes) -> None:
    """Writes as `moc.files.write_whole` does. Raises DataError (cannot-write)."""
    try:
        files.write_whole(path, payload)
    except OSError as error:
        raise DataError("cannot-write", path, f"{error.strerror}; {FREE_SOME} to resume") from error


def digest(recipe: dict) -> str:
    """Returns 16 hex digits to name what a recipe gives: equal recipes give the same, whatever the order of their
    keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def write_record(path: Path, content: Any) -> None:
    """Writes content that JSON can hold, but None, with its checksum. Raises DataError (cannot-write)."""
    text = json.dumps(content)
    write_whole(path, f'{{"crc32": {_checksum(text)}, "content": {text}}}\n'.encode())


def read_record(path: Path) -> Any:
    """Returns the content of a record; None where there is none, or, which is said once for each folder, one that is
    empty, cut short, altered or of an older version."""
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        return None
    content = parse_record(payload)
    if content is None:
        _tell(path.parent, _is_old(payload))
    return content


def parse_record(payload: bytes) -> Any:
    """Returns what `read_record` would, of a file's bytes."""
    try:
        fields = json.loads(payload)
        whole = fields["crc32"] == _checksum(json.dumps(fields["content"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return fields["content"] if whole else None


def _is_old(payload: bytes) -> bool:
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        return False
    return not (isinstance(fields, dict) and fields.keys() & {"crc32", "content"})


@cache
def _tell(folder: Path, are_old: bool) -> None:
    what = "were made by an older version, without checksums" if are_old else "are not as they were written"
    logger.warning("%s: records %s; what they tell of is made again", folder, what)


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())
