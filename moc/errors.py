"""`UserError` is the one class of errors that are meant for the user."""

import errno
import math
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import StrEnum
from typing import Any

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE}


class UserError(ValueError):
    """This error tells what the user can mend, in a setting, a file or a machine: a command ends with its message
    alone.

    The message names the value, the rule and the remedy. A bug raises anything else and keeps its traceback.
    """


class Refused(UserError):
    """This error is several of the user's errors, its arguments, each on a line of its own."""

    def __str__(self) -> str:
        lines = (" ".join(str(error).split()) for error in self.args)
        return "\n".join([f"{len(self.args)} are refused:", *lines])


class Refusals:
    """This object gathers the errors of several things, so that the user hears of all of them at once."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    @contextmanager
    def noted(self, of: object = "") -> Iterator[None]:
        """Notes a UserError that is raised within, and goes on. of: what the message names besides, if anything."""
        try:
            yield
        except UserError as error:
            self.errors.append(UserError(f"{of}: {error}") if of else error)

    def tell(self) -> None:
        """Raises the error that was noted, or all of several as one."""
        if len(self.errors) > 1:
            raise Refused(*self.errors)
        if self.errors:
            raise self.errors[0]


def check_least(config: Any, owner: str, least: float, *names: str, null: str = "") -> None:
    """Raises UserError where a number among the fields `names` of a config is below `least`, infinite or not a number;
    None, a setting that is not set, is none.

    owner: the group of settings in the user's words, such as "optim"; "" where they belong to none. null: what null
    is, for those who say 0 for it.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise _out_of_range(owner, name, value, f"at least {least}", null)


def check_above_zero(config: Any, owner: str, *names: str, null: str = "") -> None:
    """Does what `check_least` does, where a number that is not above 0 is refused."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise _out_of_range(owner, name, value, "above 0", null)


MAX_SEED = 2**32 - 1  # draws hash seeds as 32-bit words: two that differ by a multiple of 2**32 would draw alike
SEED_RULE = f"a whole number from 0 to {MAX_SEED}"


def check_seed(config: Any, owner: str) -> None:
    """Raises UserError where the field `seed` of a config breaks `SEED_RULE`. owner: as in `check_least`."""
    if not 0 <= config.seed <= MAX_SEED:
        raise UserError(f"{owner}{'.' if owner else ''}seed={config.seed} must be {SEED_RULE}")


def check_among(config: Any, name: str, known: Collection[str]) -> None:
    """Raises UserError where a list of names, the field `name` of a config, holds one that is not `known`."""
    if unknown := sorted(set(getattr(config, name)) - set(known)):
        raise UserError(f"{name}={unknown} is not known; choose among {', '.join(known)}")


def _out_of_range(owner: str, name: str, value: float, rule: str, null: str) -> UserError:
    remedy = f"; null is {null}" if null else ""
    return UserError(f"{owner}{'.' if owner else ''}{name}={value} must be finite and {rule}{remedy}")


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def set_types(config: Any, owner: str) -> None:
    """Gives the fields of a frozen dataclass their types, of which it takes names for enums alone: "5" is no number,
    and neither is true. Raises UserError for a value of another type.

    owner: as in `check_least`.
    """
    for field in fields(config):
        object.__setattr__(config, field.name, _typed(f"{owner}.{field.name}", field.type, getattr(config, field.name)))


def _typed(name: str, kind: Any, value: Any) -> Any:
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise UserError(f"{name}={value!r} is not one of {', '.join(kind)}")
        return kind(value)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name}={value!r} must be {_NAMES[kind]}")
    return value


FREE_SOME = "free some or choose another folder, then run again"  # the remedy for a full disk


def disk_error(error: BaseException) -> str | None:
    """Returns what a disk refuses, such as "No space left on device"; None where the error is another one."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and other Rust libraries give the errno like this
    number = error.errno if isinstance(error, OSError) and error.errno else int(told[1]) if told else None
    return os.strerror(number) if number in _DISK else None
