"""The settings of models and encoders are read as earlier versions wrote them, too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moc.earlier import Earlier

MODEL = Earlier("model", renamed={"moc.cut_gap": "cut_gap"}, unset={"path": "", "cut_gap": 0.0})
CODEC = Earlier("encoders.codec", unset={"path": ""})
TEXT = Earlier("encoders.text", unset={"path": ""})


def cut_gap(settings: Mapping[str, Any], moc_folder: Path | None) -> float:
    """Returns the `cut_gap` of a Wan model: that of its config.json, whose `settings` are given and leave out a gap of
    0, or the one that the moc.json of a folder holds, where earlier versions wrote it."""
    file = moc_folder / "moc.json" if moc_folder else None
    if "cut_gap" in settings or not (file and file.is_file()):
        return settings.get("cut_gap", 0.0)
    values = json.loads(file.read_text())
    return values.get("cut_gap", 0.0) if isinstance(values, dict) else 0.0
