"""Settings of earlier versions, in a run's config.yaml, a model's moc.json and a film's metadata: how they are called
now. The one module that knows them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moc.errors import UserError

RENAMED = {
    "moc.backend": "execution.backend",
    "moc.dense_kernel": "execution.dense_kernel",
    "moc.deterministic": "execution.deterministic",
    "moc.cut_gap": "model.cut_gap",
}
# Values that said that nothing is set, by today's keys; null says it now.
UNSET: dict[str, Any] = {"model.cut_gap": 0.0, "model.path": "", "data.local_cache": "", "parallel.replicate": 0}


def translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, by dotted key, as today's version would have written them."""
    found = {RENAMED.get(key, key): value for key, value in settings.items()}
    return found | {key: None for key, unset in UNSET.items() if key in found and found[key] == unset}


def refuse_renamed(argument: str) -> None:
    """Raises UserError for a command line's key=value whose key is called otherwise now."""
    key = argument.partition("=")[0].lstrip("+~")
    if key in RENAMED:
        where = ", and set where a model is trained" if RENAMED[key].startswith("model.") else ""
        raise UserError(f"{key} is called {RENAMED[key]} now{where}")


def moc_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a moc.json, without those that are none of attention's any more."""
    return {name: value for name, value in stored.items() if f"moc.{name}" not in RENAMED}


def cut_gap(settings: Mapping[str, Any], moc_folder: Path | None) -> float:
    """The `cut_gap` of a Wan model: that of its config.json, whose `settings` are given and leave out a gap of 0, or
    the one that the moc.json of a folder holds, where earlier versions wrote it."""
    file = moc_folder / "moc.json" if moc_folder else None
    if "cut_gap" in settings or not (file and file.is_file()):
        return settings.get("cut_gap", 0.0)
    values = json.loads(file.read_text())
    return values.get("cut_gap", 0.0) if isinstance(values, dict) else 0.0
