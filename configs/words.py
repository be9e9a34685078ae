"""This module finds what `--help` says of each key: the words that the docstring of its dataclass has for it.

A docstring names one field or several, then a colon, where a paragraph or a sentence begins: "lr: the learning rate."
Its words last until the next such names, or the end of the paragraph.
"""

import re
import textwrap
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

from moc import MoCConfig

_CONFIG = "== Config ==\n"  # Hydra's heading of the composed YAML
_APPLICATION = "command is powered by Hydra."  # Hydra's first line, which names the function that it runs


def words(schema: type) -> dict[str, str]:
    """Returns the words on every key of a schema and of the dataclasses in it, by full key. Those on the settings of a
    list's items are among the list's own."""
    own = {name: text for kind in reversed(schema.__mro__) if is_dataclass(kind) for name, text in _said(kind).items()}
    hints, found = get_type_hints(schema), {}
    for name in (field.name for field in fields(schema)):
        found[name] = own.get(name, "")
        kind: type = MoCConfig if name == "moc" else hints[name]  # some commands' `moc` is a mapping of changes
        item: type = next(iter(get_args(kind)), object)
        if is_dataclass(kind):
            found |= {f"{name}.{key}": text for key, text in words(kind).items()}
        elif is_dataclass(item) and type(None) not in get_args(kind):
            found[name] += "".join(f" {key}: {text}" for key, text in words(item).items())
    return found


def _said(kind: type) -> dict[str, str]:
    names = {field.name for field in fields(kind)}
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", kind.__doc__ or ""):
        pieces = re.split(r"(?:^|(?<=\. ))((?:\w+, )*\w+): ", " ".join(paragraph.split()))
        for keys, text in zip(pieces[1::2], pieces[2::2], strict=True):
            about = text.partition("Raises ")[0].strip()
            found |= {key: about for key in keys.split(", ") if key in names}
    return found


def explained(help_text: str, said: dict[str, str], about_command: str) -> str:
    """Returns Hydra's help, begun with what the command does, with the words on each key above its line.

    Keys that share their words follow each other.
    """
    head, heading, config = help_text.partition(_CONFIG)
    head = head.replace(_APPLICATION, about_command.strip(), 1)
    lines: list[str] = []
    path: list[str] = []
    before = ""
    for line in config.splitlines():
        if key := re.match(r"( *)(\w+):", line):
            path = [*path[: len(key[1]) // 2], key[2]]
            comment = f"{key[1]}# "
            about = said.get(".".join(path), "")
            if about != before:
                lines += textwrap.wrap(about, 110, initial_indent=comment, subsequent_indent=comment)
            before = about
        lines.append(line)
    return head + heading + "\n".join(lines) + "\n"
