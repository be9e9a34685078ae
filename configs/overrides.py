"""This module reads the command line before Hydra does: it refuses what is no `key=value`, and quotes a value where
Hydra's grammar needs it, such as a path with brackets."""

from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from moc.errors import UserError


def refuse_words(arguments: list[str]) -> None:
    """Raises UserError for what is neither `key=value` nor an option of Hydra's: a word alone, or a setting with
    dashes, as other commands take."""
    parser = get_args_parser()
    parser.allow_abbrev = False  # --experiment would mean --experimental-rerun
    known, unknown = parser.parse_known_args(arguments)
    wrong = [argument for argument in unknown if argument.startswith("-")]
    wrong += [argument for argument in known.overrides if "=" not in argument and not argument.startswith("~")]
    if wrong:
        raise UserError(f"{wrong[0]} is no setting; say KEY=VALUE, without dashes or spaces; --help lists all")


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
