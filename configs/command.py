"""This module runs every command: Hydra composes its YAML, `parse` types it, and an error of the user's becomes one
message.

After `parse` there is no DictConfig any more. Unknown keys, wrong types and missing values are refused with their key.
"""

import errno
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException, ConfigCompositionException, MissingConfigException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from configs.earlier import refuse_renamed
from configs.overrides import readable, refuse_words
from configs.words import explained, words
from moc import MoCConfig
from moc.errors import FREE_SOME, Refused, UserError, disk_error

T = TypeVar("T")
CONFIGS = Path(__file__).parent
_FULL = "HYDRA_FULL_ERROR"
_SWEEP = {"-m", "--multirun"}
# What the user must give has this value until then: a merge of OmegaConf's own `???` leaves a default as it is.
_REQUIRED = "${required}"

# Hydra copies all stored configs each time it composes, and for each group that `--help` lists: it only reads them.
setattr(ConfigStore, "__deepcopy__", lambda store, _: store)  # noqa: B010 (mypy refuses the assignment)

# Errors of the operating system that the user can mend: a wrong path, a missing right, no network.
_KINDS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ConnectionError,
    TimeoutError,
)
_REMEDIES = {errno.ENOSPC: FREE_SOME, errno.EDQUOT: FREE_SOME, errno.EROFS: "choose a folder that can be written"}


class BesideBars(logging.Handler):
    """This handler writes to the standard error, each message on a line of its own: progress bars are drawn again below
    it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def command(config_name: str, schema: type[T]) -> Callable[[Callable[[T], Any]], Callable[[], None]]:
    """Makes a function of a typed config the main function of a command, with `configs/<config_name>.yaml` behind it.

    What the user can mend (`for_user`) ends it with one line and status 1, and HYDRA_FULL_ERROR=1 shows the traceback;
    any other error is a bug and keeps its traceback.
    """
    store_defaults(config_name, schema)

    def decorate(run: Callable[[T], Any]) -> Callable[[], None]:
        def main() -> None:
            full = os.environ.get(_FULL) == "1"
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # Ctrl-C raises KeyboardInterrupt from here on
                signal.signal(signal.SIGINT, signal.default_int_handler)

            def task(cfg: DictConfig) -> None:
                logging.basicConfig(format="%(message)s", handlers=[BesideBars()])
                # Their notes are shown, such as which dense kernel attention has chosen.
                for name in ("moc", "configs", "evaluation", "__main__"):
                    logging.getLogger(name).setLevel(logging.INFO)
                with _full_errors(full), _ending(full):
                    run(parse(cfg, schema))

            # Hydra would end the process with many lines of its own; it has a ValueError for options that do not agree.
            with _ending(full, ValueError), _full_errors(True):
                for argument in sys.argv[1:]:
                    refuse_renamed(argument)
                arguments = _sweep_first(sys.argv[1:])
                _refuse_sweep(arguments, config_name)
                refuse_words(arguments)
                sys.argv[1:] = [readable(argument, CONFIGS) for argument in arguments]
                with _explaining(schema, run.__globals__["__doc__"] or ""), _naming_settings(schema):
                    hydra.main(config_path=str(CONFIGS), config_name=config_name, version_base=None)(task)()

        return main

    return decorate


def _sweep_first(arguments: list[str]) -> list[str]:
    """Returns the arguments with -m before all settings: argparse takes no settings on both sides of it."""
    return sorted(arguments, key=lambda argument: argument not in _SWEEP)


def _refuse_sweep(arguments: list[str], config_name: str) -> None:
    """Raises UserError for -m where the command's YAML does not say where a sweep goes: its jobs would write over each
    other."""
    if _SWEEP.isdisjoint(arguments):
        return
    if OmegaConf.load(CONFIGS / f"{config_name}.yaml").hydra.get("sweep") is None:
        raise UserError("-m is for sweeps of train.py; call this command once for each value, each with its own output")


@contextmanager
def _naming_settings(schema: type) -> Iterator[None]:
    """Raises UserError for a setting that does not exist, with those it may mean, and for an option of a group, with
    those there are: Hydra's message advises to add the one, and names the schema among the others."""
    try:
        yield
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if not group:
            raise
        options = ", ".join(option for option in error.options or () if option != "schema")
        raise UserError(f"{group}={name} does not exist; choose one of {options}") from None
    except ConfigCompositionException as error:
        unknown = re.match(r"Could not override '([\w.]+)'", str(error))
        if unknown is None:
            raise
        key, meant = unknown[1], _meant(unknown[1], list(words(schema)))
        remedy = f"did you mean {' or '.join(meant)}? --help lists all" if meant else "--help lists all"
        if _is_open(key.rpartition(".")[0], schema):
            remedy = f"say +{key}=VALUE to add it"
        raise UserError(f"there is no setting {key}; {remedy}") from None


def _is_open(group: str, schema: type) -> bool:
    """Returns whether a group takes settings of any name, as optim.args does: by default it has none."""
    values: Any = defaults(schema)
    for name in group.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values == {}


def _meant(key: str, known: list[str]) -> list[str]:
    """Returns the settings that `key` may mean: those of its name in any group, else those that are spelt nearly so,
    with the group or without it."""
    name_of = {setting: setting.rpartition(".")[-1] for setting in known}
    name = key.rpartition(".")[-1]
    same = [setting for setting in known if name_of[setting] == name]
    near = get_close_matches(name, set(name_of.values()))
    return same or list(dict.fromkeys([*get_close_matches(key, known), *(s for s in known if name_of[s] in near)]))


def store_defaults(config_name: str, schema: type) -> None:
    """Gives Hydra a schema's defaults, which the command's YAML names as `<config_name>_schema` and the options of its
    groups as `schema`, so that YAML holds only what differs from them."""
    store = ConfigStore.instance()
    store.store(f"{config_name}_schema", defaults(schema))
    store.store("schema", defaults(MoCConfig), group="moc")  # every command has the group, used or not
    for name, hint in get_type_hints(schema).items():
        group = next((kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)), None)
        if group and (CONFIGS / name).is_dir():
            store.store("schema", defaults(group), group=name)


def defaults(schema: type) -> dict[str, Any]:
    """Returns the defaults of a schema as plain values, `${required}` for a field without one; `parse` gives them their
    types."""
    node = _writable(OmegaConf.structured(schema))
    for key in OmegaConf.missing_keys(node):
        OmegaConf.update(node, key, _REQUIRED)
    return _plain(node)


def _plain(node: DictConfig) -> dict[str, Any]:
    """Returns plain values, interpolations as they are written."""
    return OmegaConf.to_container(node, enum_to_str=True)  # type: ignore[return-value]


@contextmanager
def _explaining(schema: type, about: str) -> Iterator[None]:
    """Has `--help`, which ends the process, say what each key is. about: what the command does."""
    if {"--help", "-h"}.isdisjoint(sys.argv):
        yield
        return
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        print(explained(said.getvalue(), words(schema), about), end="")


@contextmanager
def _full_errors(wanted: bool) -> Iterator[None]:
    """Has Hydra, and the processes started meanwhile, raise errors as they are, or not."""
    before = os.environ.pop(_FULL, None)
    try:
        os.environ |= {_FULL: "1"} if wanted else {}
        yield
    finally:
        os.environ.pop(_FULL, None)
        os.environ |= {_FULL: before} if before is not None else {}


@contextmanager
def _ending(full: bool, *mendable: type[Exception]) -> Iterator[None]:
    """Ends the process at an error: with one line where the user can mend it, else with the traceback.

    full: raise it as it is instead. mendable: more types of errors that the user can mend.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # so that the message has a line of its own
        if full:
            raise
        if isinstance(error, KeyboardInterrupt):
            print("; ".join(["interrupted", *map(str, error.args)]), file=sys.stderr)
            sys.exit(128 + signal.SIGINT)  # the status that a shell gives an interrupted command
        if for_user(error) or isinstance(error, mendable):
            sys.exit(f"error: {message_of(error)}")
        traceback.print_exception(error)
        sys.exit(1)


def for_user(error: Exception) -> bool:
    """Returns whether an error is one that the user can mend, rather than a bug of the code."""
    if isinstance(error, (UserError, FloatingPointError, CompactHydraException, OmegaConfBaseException)):
        return True
    return isinstance(error, _KINDS) or disk_error(error) is not None


def message_of(error: Exception) -> str:
    """Returns an error's message on one line, or a line for each of several; the operating system's own names the file
    first, and what to do where the disk is full or read-only."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
        return (f"{error.filename}: {error.strerror}" if error.filename else error.strerror) + remedy
    return " ".join(str(error).partition("Config search path:")[0].split())


def parse(cfg: DictConfig, schema: type[T]) -> T:
    """Returns Hydra's config as a `schema` object; raises UserError with the full key of what is wrong.

    What has no default in the schema, or is `${required}` in YAML, is a setting that the user must give. A text that
    begins with `~/` is a path in the user's home.
    """
    known = defaults(schema)
    values = _at_home(_plain(cfg))
    if missing := list(_missing(values, known)):
        raise UserError(_not_set(missing, words(schema)))
    cfg = OmegaConf.create(values)
    try:
        OmegaConf.missing_keys(cfg)  # raises an error that names an interpolation without a target
        _check_elements(cfg, schema)
        _refuse_empty(cfg, known)
        typed = OmegaConf.merge(_structured(schema, cfg), cfg)
        return OmegaConf.to_object(typed)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(_message(error)) from None


def _at_home(value: Any) -> Any:
    """Returns plain values with each `~/` written out: not every shell does that after `=`, and a folder that is called
    `~` is dangerous to remove."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _missing(values: dict[str, Any], known: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the keys that the user must give and that are not set, or set to null or to an empty text.

    known: the schema's defaults.
    """
    for name, value in (known | values).items():
        default = known.get(name)
        if isinstance(value, dict):
            yield from _missing(value, default if isinstance(default, dict) else {}, f"{prefix}{name}.")
        elif value in (_REQUIRED, MISSING) or (default == _REQUIRED and value in (None, "")):
            yield f"{prefix}{name}"


def _not_set(keys: list[str], said: dict[str, str]) -> str:
    """Returns the message for keys that are not set, with the words of `--help` on each."""
    *others, last = keys
    names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    remedy = " ".join(f"{key}=VALUE" for key in keys)
    about = "".join(f". {key}: {said[key].rstrip('.')}" for key in keys if said.get(key))
    return f"{names} not set; say {remedy}{about}"


def _refuse_empty(cfg: DictConfig, unset: dict[str, Any], prefix: str = "") -> None:
    """Raises UserError for an empty text where null says that nothing is set: a shell gives one for a variable that
    it does not have."""
    for name, default in unset.items():
        value, key = cfg.get(name), f"{prefix}{name}"
        if isinstance(default, dict) and isinstance(value, DictConfig):
            _refuse_empty(value, default, f"{key}.")
        elif default is None and value == "":
            raise UserError(f"{key} is empty; say {key}=VALUE, or leave it out")


def _check_elements(cfg: DictConfig, schema: type, prefix: str = "") -> None:
    """Checks lists of dataclasses one element after another: OmegaConf's message would not say which of them is
    wrong."""
    for name, hint in get_type_hints(schema).items():
        value = cfg.get(name) if name in cfg else None
        if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, DictConfig):
            _check_elements(value, hint, f"{prefix}{name}.")
        elif isinstance(value, ListConfig) and is_dataclass(element := next(iter(get_args(hint)), object)):
            for index, item in enumerate(value):
                if not OmegaConf.is_dict(item):
                    raise UserError(f"{prefix}{name}[{index}] is {item!r}; it must be a mapping of settings")
                try:
                    OmegaConf.merge(_writable(OmegaConf.structured(element)), item)
                except OmegaConfBaseException as error:
                    raise UserError(f"{prefix}{name}[{index}].{_message(error)}") from None
                if key := next(_missing(_plain(item), defaults(element)), None):
                    raise UserError(f"{prefix}{name}[{index}].{key} is not set; say {prefix}{name}=[{{{key}: VALUE}}]")


def _structured(schema: type, cfg: DictConfig) -> DictConfig:
    """Returns the schema's defaults, to merge into; an optional dataclass that `cfg` sets has its own."""
    node = _writable(OmegaConf.structured(schema))
    for name, hint in get_type_hints(schema).items():
        if OmegaConf.is_dict(cfg.get(name)) and not OmegaConf.is_missing(node, name) and node[name] is None:
            node[name] = _writable(OmegaConf.structured(get_args(hint)[0]))
    return node


def _writable(node: DictConfig) -> DictConfig:
    """Lets values be merged into frozen dataclasses; the objects made of them are frozen again."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            _writable(node[key])
    return node


def _message(error: OmegaConfBaseException) -> str:
    """Returns OmegaConf's error as the value, the rule and the remedy, where it is one that users make."""
    key, reason = error.full_key, str(error.msg or error).splitlines()[0]
    if "is not a ListConfig" in reason:
        return f"{key} is a list; say {key}=[...]"
    if reason.startswith("Incompatible value 'None'") or reason.endswith("is not Optional"):
        return f"{key}=null must have a value; say {key}=VALUE, or leave it out for its default"
    if found := re.match(r"Value (.+) of type '\w+' could not be converted to (Float|Integer)", reason):
        return f"{key}={found[1]} must be {'a number' if found[2] == 'Float' else 'a whole number'}"
    if found := re.match(r"Value (.+) is not a valid bool", reason):
        return f"{key}={found[1]} must be true or false"
    if found := re.match(r"Invalid value (.+), expected one of \[(.+)\]", reason):
        return f"{key}={found[1]} is not one of {found[2]}"
    if reason.startswith("Cannot convert") and "to string" in reason:  # a path such as [2024] reads as a list
        reason += f"; quote a text with brackets twice: {key}='\"[...]\"'"
    return f"{key}: {reason}" if key else reason
