"""This module gives configurations as the commands compose and parse them."""

import importlib
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from configs.command import parse, store_defaults

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
GROUPS = sorted(
    path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name not in ("scripts", "__pycache__")
)
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
# These settings have no defaults, so each command needs them.
REQUIRED = {
    "sample": ["checkpoint=c", "script=s", "out=o"],
    "draw_memory": ["checkpoint=c", "script=s", "out=o"],
    "app": ["checkpoint=c", "folder=f"],
    "prepare": ["input=i", "output=o"],
    "storyworld": ["output=o"],
    "example_film": ["output=o"],
    "convert": ["input=i"],
    "benchmark_data": ["folder=f"],
    "benchmark_film": ["film=f"],
    "model=wan": ["model.path=p"],
    "encoders=wan": ["encoders.codec.path=p", "encoders.text.path=p"],
    "encoders=holocine": ["encoders.codec.path=p", "encoders.text.path=p"],
}


def commands() -> dict[str, tuple[str, str]]:
    """Returns config name -> (module, schema) of every `command(...)` in the checkout."""
    found = {}
    for path in [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "scripts").glob("*.py"))]:
        for name, schema in re.findall(r'\bcommand\("(\w+)", (\w+)\)', path.read_text()):
            found[name] = (".".join(path.relative_to(ROOT).with_suffix("").parts), schema)
    return found


COMMANDS = commands()


def schema_of(name: str) -> type:
    module, schema = COMMANDS[name]
    return getattr(importlib.import_module(module), schema)


def composed(name: str, *overrides: str) -> DictConfig:
    store_defaults(name, schema_of(name))
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose(name, list(overrides))


def parsed(name: str, *overrides: str):
    return parse(composed(name, *REQUIRED.get(name, []), *overrides), schema_of(name))


def users_of(group: str) -> list[str]:
    pattern = re.compile(rf"^  - {group}: ", re.MULTILINE)
    return [name for name in COMMANDS if pattern.search((CONFIGS / f"{name}.yaml").read_text())]
