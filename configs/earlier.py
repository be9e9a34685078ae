"""Settings of earlier versions: how they are called now. The one place that knows them."""

from collections.abc import Mapping
from typing import Any

from moc.errors import UserError

RENAMED = {
    "moc.backend": "execution.backend",
    "moc.dense_kernel": "execution.dense_kernel",
    "moc.deterministic": "execution.deterministic",
    "moc.cut_gap": "model.cut_gap",
}
# Values that said that nothing is set, by today's keys; null says it now.
UNSET = {"model.cut_gap": 0.0}


def translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config.yaml, by dotted key, as today's version would have written them."""
    found = {RENAMED.get(key, key): value for key, value in settings.items()}
    return found | {key: None for key, unset in UNSET.items() if key in found and found[key] == unset}


def refuse_renamed(argument: str) -> None:
    """Raises UserError for a command line's key=value whose key is called otherwise now."""
    key = argument.partition("=")[0].lstrip("+~")
    if key in RENAMED:
        where = ", and set where a model is trained" if RENAMED[key].startswith("model.") else ""
        raise UserError(f"{key} is called {RENAMED[key]} now{where}")
