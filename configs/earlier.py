"""This module unites what all packages know of the settings of earlier versions, by dotted key."""

from collections.abc import Mapping
from typing import Any

from data.earlier import DATA, PREPARE
from moc.earlier import EXECUTION, MOC, OPTIM, PARALLEL, SAMPLER, with_nulls
from moc.errors import UserError
from models.earlier import CODEC, MODEL, TEXT

_OWNERS = (MOC, EXECUTION, MODEL, DATA, CODEC, TEXT, OPTIM, PARALLEL, PREPARE, SAMPLER)
_RENAMED = {old: f"{one.owner}.{name}" for one in _OWNERS for old, name in one.renamed.items()}
_UNSET = {f"{one.owner}.{name}": value for one in _OWNERS for name, value in one.unset.items()}


def translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a run as today's version would have written them."""
    return with_nulls({_RENAMED.get(key, key): value for key, value in settings.items()}, _UNSET)


def refuse_renamed(argument: str) -> None:
    """Raises UserError for a command line's key=value whose key is called otherwise now."""
    key = argument.partition("=")[0].lstrip("+~")
    if key in _RENAMED:
        where = ", and set where a model is trained" if _RENAMED[key].startswith("model.") else ""
        raise UserError(f"{key} is called {_RENAMED[key]} now{where}")
