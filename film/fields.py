"""This module reads values of a script; each function raises DataError (bad-script) with file and field."""

from typing import Any

from data.errors import DataError
from moc.errors import MAX_SEED, SEED_RULE

DEFAULT_FPS, DEFAULT_SECONDS = 16.0, 5.0


def text_of(raw: dict[str, Any], name: str, where: object) -> str:
    """Returns the text of a field, or "" where there is none; YAML makes numbers of titles like 1984."""
    value = raw.get(name)
    if isinstance(value, dict | list):
        raise DataError("bad-script", f"{where} {name}", f"{value!r} is not a text")
    return "" if value is None else whole(str(value), f"{where} {name}").strip()


def whole(text: str, where: str) -> str:
    """Returns the text, with two halves of a character that YAML read from \\u escapes joined; a lone half is
    refused."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise DataError("bad-script", where, "holds half a character (one of \\ud800 to \\udfff alone)") from None


def positive(value: Any, where: str) -> float:
    """Returns a number above 0 and below a million; raises DataError for any other value."""
    if not _is_number(value) or not 0 < value < 1e6:
        raise DataError("bad-script", where, f"{value!r} is not a positive number below a million")
    return float(value)


def number(value: Any, where: str) -> float:
    """Returns a number of at least 0, below a million; raises DataError for any other value."""
    if not _is_number(value) or not 0 <= value < 1e6:
        raise DataError("bad-script", where, f"{value!r} is not a number of at least 0, below a million")
    return float(value)


def seed_of(value: Any, where: str) -> int | None:
    """Returns the seed of a shot, None where it has none of its own; raises DataError for one that breaks
    `moc.errors.SEED_RULE`."""
    if value is not None and not (type(value) is int and 0 <= value <= MAX_SEED):
        raise DataError("bad-script", where, f"{value!r} is not {SEED_RULE}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
