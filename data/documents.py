"""This module reads JSON and YAML that people write, strictly: a key given twice is refused with its line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data.errors import DataError

_MAX_LINE_BYTES = 16_000_000
# What people do most often, by what YAML's reader says of it, and what to do.
_YAML_REMEDIES = {
    "mapping values are not allowed": "put quotes around a text that has a colon in it",
    "found character '\\t'": "indent by spaces, not by tabs",
    "found unknown escape character": "write a backslash twice in double quotes, or take single quotes",
}
_WORDS = {"true": True, "false": False, "1": True, "0": False}


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark. Raises DataError (not-utf-8), OSError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("not-utf-8", path, f"byte {error.start} is not UTF-8; save it as UTF-8") from error


def parse_json(text: str, path: object, line: int = 1) -> Any:
    """Returns the value of a JSON text. line: where the text begins in the file. Raises DataError, with the line:
    not-json, repeated-key."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise DataError("not-json", where, f"not JSON ({error.msg} at column {error.colno})") from error
    except _RepeatedKeyError:
        key, repeated = _first_repeated_key(text)
        raise _twice(key, f"{path}:{line + repeated - 1}") from None
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise DataError("not-json", f"{path}:{line}", f"not JSON ({error})") from error


def read_objects(path: Path) -> Iterator[tuple[int, dict | DataError]]:
    """Yields (line, object) of each line of JSON Lines that is not blank, or what is wrong with it: huge-line,
    not-utf-8, not-json, repeated-key, not-an-object. Only a line feed ends a line: texts may hold U+2028, U+0085 and
    their like. Raises OSError."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield number, _object_of_line(raw, path, number)
            except DataError as error:
                yield number, error


def _object_of_line(raw: bytes, path: Path, number: int) -> dict:
    where = f"{path}:{number}"
    if len(raw) > _MAX_LINE_BYTES:
        raise DataError("huge-line", where, f"{len(raw)} bytes in one line, at most {_MAX_LINE_BYTES}")
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError("not-utf-8", where, f"byte {error.start} is not UTF-8; save the file as UTF-8") from error
    fields = parse_json(text, path, number)
    if not isinstance(fields, dict):
        raise DataError("not-an-object", where, f"a line is a JSON object, got {type(fields).__name__}")
    return fields


def parse_yaml(text: str, path: object) -> Any:
    """Returns the value of a YAML text of plain types. Raises DataError, with the line where it is known: not-yaml,
    repeated-key."""
    try:
        return yaml.load(text, _StrictLoader)
    except _RepeatedKeyError as error:
        raise _twice(error.key, f"{path}:{error.line}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        problem = error.problem or error.context or ""
        remedy = next((f"; {said}" for begin, said in _YAML_REMEDIES.items() if problem.startswith(begin)), "")
        raise DataError("not-yaml", where, f"not YAML ({problem}){remedy}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a control character, a 13th month, lists too deep
        raise DataError("not-yaml", path, f"not YAML ({str(error).splitlines()[0]})") from error


def parse(text: str, path: Path) -> Any:
    """Returns what `parse_json` does of a file that ends in .json, else what `parse_yaml` does: YAML refuses tabs, by
    which JSON may be indented."""
    return parse_json(text, path) if path.suffix.lower() == ".json" else parse_yaml(text, path)


def flag(value: Any) -> bool | None:
    """Returns what a truth value of a hand-written or generated file says: true, "True", "true" or 1; None for any
    other."""
    return _WORDS.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None


class _RepeatedKeyError(Exception):
    """This error says that a mapping has a key twice. key, line: the key and where YAML's reader found it."""

    def __init__(self, key: str = "", line: int = 0) -> None:
        super().__init__(key)
        self.key, self.line = key, line


def _twice(key: str, where: str) -> DataError:
    return DataError("repeated-key", where, f"{key!r} is given a second time; keep one of the two")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; json itself would keep the last of two equal keys."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _RepeatedKeyError
    return fields


def _first_repeated_key(text: str) -> tuple[str, int]:
    """Returns the first key that its object has already, and its line, in a text with such a key."""
    objects: list[set[str]] = []
    for token in re.finditer(r'("(?:[^"\\]|\\.)*")\s*(:?)|[{}]', text):
        string, colon = token.groups()
        if token[0] == "{":
            objects.append(set())
        elif token[0] == "}":
            objects.pop()
        elif colon:
            key = json.loads(string)
            if key in objects[-1]:
                return key, text.count("\n", 0, token.start()) + 1
            objects[-1].add(key)
    raise AssertionError("no key is repeated")


class _StrictLoader(yaml.SafeLoader):
    """This loader loads as YAML's safe one does, but refuses a key that is given twice, of which YAML would keep the
    last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _RepeatedKeyError(key.value, key.start_mark.line + 1)
                seen.add((key.tag, key.value))
        return node
