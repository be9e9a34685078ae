"""This module quotes `key=value` arguments of the command line where Hydra's grammar needs it, such as a path with
brackets."""

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from moc.errors import UserError


def readable(argument: str, folder: Path) -> str:
    """Returns the argument as Hydra reads it. A text that its grammar refuses, such as `/films [1]/a=b`, is quoted;
    what looks like a list or a mapping is left to Hydra's message.

    folder: of the YAML files, where a group of settings is a folder. Raises UserError where a group is set to what is
    no name, such as null.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return argument if value[:1] + value[-1:] in ("[]", "{}") else f"{key}={quoted(value)}"
    group = folder / key.lstrip("+~")
    if group.is_dir() and not override.is_sweep_override() and not _names_options(override.value()):
        options = ", ".join(sorted(file.stem for file in group.glob("*.yaml")))
        raise UserError(f"{argument}: {key} is a group of settings; leave it out or choose one of {options}")
    return argument


def quoted(text: str) -> str:
    """Returns the text as Hydra's grammar quotes it: only backslashes before a quote, or at the end, are doubled."""
    pieces = text.split("'")
    doubled = [piece + "\\" * (len(piece) - len(piece.rstrip("\\"))) for piece in pieces]
    return "'" + "\\'".join(doubled) + "'"


def _names_options(value: object) -> bool:
    """Returns whether Hydra takes the value for a group: a name or a list of them, or settings for the group itself."""
    return all(isinstance(name, str | dict) for name in (value if isinstance(value, list) else [value]))
