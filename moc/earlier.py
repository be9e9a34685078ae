"""This module alone knows how settings of earlier versions, in a run's config.yaml, a model's moc.json and a film's
metadata, are called now."""

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
    "moc.descriptor_parts": "moc.descriptor_subchunks",
    "optim.parts": "optim.rates",
    "parallel.recompute_parts": "parallel.recompute_sublayers",
}
# These values, by today's keys, said that nothing is set; null says it now.
UNSET: dict[str, Any] = {
    "model.cut_gap": 0.0,
    "model.path": "",
    "data.path": "",
    "data.local_cache": "",
    "parallel.replicate": 0,
    "prepare.fps": 0.0,
    "prepare.threshold": 0.0,
    "encoders.codec.path": "",
    "encoders.text.path": "",
    "sampler.high_noise_guidance_scale": 0.0,
    "sampler.context_shots": 0,
}


def translated(settings: Mapping[str, Any], owner: str = "") -> dict[str, Any]:
    """Returns the settings of a run, by dotted key, as today's version would have written them; or those of one
    `owner`, such as "sampler", by name."""
    prefix = f"{owner}." if owner else ""
    found = {RENAMED.get(key, key): value for key, value in settings.items()}
    return found | {key: None for key, value in found.items() if value == UNSET.get(prefix + key)}


def set_nulls(config: Any, owner: str) -> None:
    """Sets the fields of a frozen dataclass to null where they hold what said in earlier versions that nothing is set,
    as commands and files from then do. owner: as in `translated`."""
    for name, value in translated(vars(config), owner).items():
        object.__setattr__(config, name, value)


def as_written(key: str, value: Any) -> Any:
    """Returns the value of a setting, by dotted key, as files have it whose names are hashes of what they hold."""
    return UNSET[key] if value is None else value


def refuse_renamed(argument: str) -> None:
    """Raises UserError for a command line's key=value whose key is called otherwise now."""
    key = argument.partition("=")[0].lstrip("+~")
    if key in RENAMED:
        where = ", and set where a model is trained" if RENAMED[key].startswith("model.") else ""
        raise UserError(f"{key} is called {RENAMED[key]} now{where}")


def moc_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a moc.json by today's names, without those that are none of attention's any more."""
    found = {RENAMED.get(f"moc.{name}", f"moc.{name}"): value for name, value in stored.items()}
    return {key.removeprefix("moc."): value for key, value in found.items() if key.startswith("moc.")}


def cut_gap(settings: Mapping[str, Any], moc_folder: Path | None) -> float:
    """Returns the `cut_gap` of a Wan model: that of its config.json, whose `settings` are given and leave out a gap of
    0, or the one that the moc.json of a folder holds, where earlier versions wrote it."""
    file = moc_folder / "moc.json" if moc_folder else None
    if "cut_gap" in settings or not (file and file.is_file()):
        return settings.get("cut_gap", 0.0)
    values = json.loads(file.read_text())
    return values.get("cut_gap", 0.0) if isinstance(values, dict) else 0.0
