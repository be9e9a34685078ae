"""Every configuration composes and parses, every setting can be set and has its words, every default stands once."""

import re
from dataclasses import fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from configs.command import defaults, parse, store_defaults
from configs.words import words
from moc.errors import UserError
from models import ModelConfig
from models.mmdit import MMDiT
from tests.composing import COMMANDS, CONFIGS, GROUPS, OPTIONS, REQUIRED, composed, parsed, schema_of, users_of

OWNERS = {"moc": "train", "encoders": "prepare"}  # the command whose schema types the group


def test_every_command_has_its_yaml_and_every_yaml_its_command():
    assert sorted(COMMANDS) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert {"train", "sample", "prepare", "storyworld"} <= set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_composes_and_parses(name):
    assert isinstance(parsed(name), schema_of(name))


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() & REQUIRED))
def test_a_command_without_arguments_names_all_that_it_needs_in_one_line(name):
    with pytest.raises(UserError) as error:
        parse(composed(name), schema_of(name))
    assert re.findall(r"([\w.]+)=[A-Z]+", str(error.value)) == [word.partition("=")[0] for word in REQUIRED[name]]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_leave_no_log_file_behind(name):
    store_defaults(name, schema_of(name))
    with initialize_config_dir(str(CONFIGS), version_base=None):
        hydra = compose(name, return_hydra_config=True).hydra
    assert not (hydra.job_logging.get("handlers") or {}).get("file")
    assert (hydra.run.dir, hydra.output_subdir) == (".", None)


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_belongs_to_a_command(group):
    assert users_of(group)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_parses(group, option):
    choice = f"{group}={option}"
    for name in users_of(group):
        assert isinstance(parsed(name, choice, *REQUIRED.get(choice, [])), schema_of(name))


def settings(schema: type, prefix: str = "") -> set[str]:
    """Returns the full keys of every setting of a schema."""
    hints, keys = get_type_hints(schema), set()
    for field in fields(schema):
        nested = hints[field.name]
        keys |= settings(nested, f"{prefix}{field.name}.") if is_dataclass(nested) else {prefix + field.name}
    return keys


def values(cfg: DictConfig, schema: type, prefix: str = "") -> set[str]:
    hints, keys = get_type_hints(schema), set()
    for name in cfg:
        nested = hints[name]
        keys |= values(cfg[name], nested, f"{prefix}{name}.") if is_dataclass(nested) else {prefix + name}
    return keys


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_setting_can_be_seen_in_the_help(name):
    """A setting without a value in YAML could not be set as `key=value`, and `--help` would not show it."""
    schema = schema_of(name)
    assert values(composed(name, *REQUIRED.get(name, [])), schema) == settings(schema)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_has_words_on_every_setting(name):
    """A dataclass's docstring holds them, as "name: words." or "name, other: words."."""
    said = words(schema_of(name))
    assert said.keys() >= settings(schema_of(name))
    assert not [key for key, text in said.items() if len(text.split()) < 2]


def inherited(path: Path, schema: type) -> DictConfig:
    """Returns what a YAML file's values are merged into: what its `defaults` name, in order."""
    merged = OmegaConf.create()
    for entry in OmegaConf.load(path).get("defaults", []):
        option, package = entry, None
        if OmegaConf.is_dict(entry):
            ((key, option),) = entry.items()
            package = key.removeprefix("override ").lstrip("/")
        if option in (None, "_self_", "none"):
            continue
        folder = path.parent if package is None else CONFIGS / package
        if str(option).endswith("schema"):
            values = OmegaConf.create(defaults(schema))
        else:
            values = whole(folder / f"{option}.yaml", schema if package is None else get_type_hints(schema)[package])
        merged = OmegaConf.merge(merged, {package: values} if package else values)
    return merged


def whole(path: Path, schema: type) -> DictConfig:
    own = OmegaConf.load(path)
    own.pop("defaults", None)
    return OmegaConf.merge(inherited(path, schema), own)


def leaves(cfg: DictConfig) -> dict[str, object]:
    """Yields dotted key -> value, interpolations as they are written."""

    def walk(values: dict, prefix: str = ""):
        for name, value in values.items():
            nested = isinstance(value, dict) and value
            yield from walk(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]

    return dict(walk(OmegaConf.to_container(cfg)))


def yaml_files() -> list:
    """Returns (file, schema of its values) of every command, option and experiment."""
    found = [(CONFIGS / f"{name}.yaml", schema_of(name)) for name in sorted(COMMANDS)]
    for group, option in OPTIONS:
        command = schema_of(OWNERS.get(group) or users_of(group)[0])
        schema = command if group == "experiment" else get_type_hints(command)[group]
        found.append((CONFIGS / group / f"{option}.yaml", schema))
    return [pytest.param(*pair, id=f"{pair[0].parent.name}/{pair[0].stem}") for pair in found]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_no_default_is_a_text_of_nothing(name):
    """A setting that must be given has no default, and one that need not be is null."""
    assert "" not in leaves(OmegaConf.create(defaults(schema_of(name)))).values()


@pytest.mark.parametrize(("path", "schema"), yaml_files())
def test_a_default_stands_once(path, schema):
    """The dataclass has the default; a YAML file holds only what differs from what it builds on."""
    own = OmegaConf.load(path)
    own = leaves(OmegaConf.masked_copy(own, [key for key in own if key not in ("defaults", "hydra")]))
    before = leaves(inherited(path, schema))
    assert not {key: value for key, value in own.items() if key in before and before[key] == value}


def test_the_defaults_of_the_model_and_of_its_settings_agree():
    """The class has its own, since diffusers builds it from config.json alone."""
    own = {name: sized.default for name, sized in signature(MMDiT.__init__).parameters.items()}
    settings_of_both = [field for field in fields(ModelConfig) if field.name in own]
    assert len(settings_of_both) == 6
    assert {field.name: own[field.name] for field in settings_of_both} == {f.name: f.default for f in settings_of_both}
