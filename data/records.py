"""Small files that a run of preparing leaves for the next: written whole, and made anew if they are not as written."""

import json
import zlib
from pathlib import Path
from typing import Any

from data.errors import DataError
from moc import files


def write_whole(path: Path, payload: bytes) -> None:
    """As `moc.files.write_whole`. Raises DataError (cannot-write)."""
    try:
        files.write_whole(path, payload)
    except OSError as error:
        raise DataError(
            "cannot-write", path, f"{error.strerror}; free or choose another place, then run again to resume"
        ) from error


def write_record(path: Path, content: Any) -> None:
    """Content that JSON can hold, but None, with its checksum. Raises DataError (cannot-write)."""
    text = json.dumps(content)
    write_whole(path, f'{{"crc32": {_checksum(text)}, "content": {text}}}\n'.encode())


def read_record(path: Path) -> Any:
    """The content of a record; None where there is none, or one that is empty, cut short or altered."""
    try:
        return parse_record(path.read_bytes())
    except FileNotFoundError:
        return None


def parse_record(payload: bytes) -> Any:
    """As `read_record`, of a file's bytes."""
    try:
        fields = json.loads(payload)
        whole = fields["crc32"] == _checksum(json.dumps(fields["content"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return fields["content"] if whole else None


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())
