"""How every command runs: Hydra composes its YAML, `parse` types it, and an error of the user's is one message.

After `parse` there is no DictConfig any more. Unknown keys, wrong types and missing values are refused with their key.
"""

import errno
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moc.errors import UserError

T = TypeVar("T")


# Errors of the operating system that the user can mend: a wrong path, a missing right, no network, a full disk.
_KINDS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ConnectionError,
    TimeoutError,
)
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE}


def command(config_name: str, schema: type[T]) -> Callable[[Callable[[T], Any]], Callable[[], None]]:
    """Makes a function of a typed config the main function of a command, with `configs/<config_name>.yaml` behind it.

    What the user can mend (`for_user`) ends it with one line and status 1, and HYDRA_FULL_ERROR=1 shows the traceback;
    any other error is a bug and keeps its traceback.
    """

    def decorate(run: Callable[[T], Any]) -> Callable[[], None]:
        def main(cfg: DictConfig) -> None:
            logging.basicConfig(format="%(message)s")
            logging.getLogger("moc").setLevel(logging.INFO)  # such as which dense kernel attention has chosen
            try:
                run(parse(cfg, schema))
            except Exception as error:
                if os.environ.get("HYDRA_FULL_ERROR") == "1" or not for_user(error):
                    raise
                sys.exit(f"error: {message_of(error)}")

        folder = str(Path(__file__).parent)
        return hydra.main(config_path=folder, config_name=config_name, version_base=None)(main)

    return decorate


def for_user(error: Exception) -> bool:
    """Whether an error is one that the user can mend, rather than a bug of the code."""
    if isinstance(error, OSError):
        return isinstance(error, _KINDS) or error.errno in _DISK
    return isinstance(error, (UserError, FloatingPointError))


def message_of(error: Exception) -> str:
    """An error's message on one line; the operating system's own names the file first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def parse(cfg: DictConfig, schema: type[T]) -> T:
    """Hydra's config as a `schema` object; raises UserError with the full key of what is wrong."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:  # a merge would take the schema's default for them
        raise UserError(f"{missing[0]} is not set; say {missing[0]}=VALUE")
    try:
        _check_elements(cfg, schema)
        typed = OmegaConf.merge(_structured(schema, cfg), cfg)
        return OmegaConf.to_object(typed)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(_message(error)) from None


def _check_elements(cfg: DictConfig, schema: type, prefix: str = "") -> None:
    """Lists of dataclasses, one element after another: OmegaConf's message would not say which of them is wrong."""
    for name, hint in get_type_hints(schema).items():
        value = cfg.get(name) if name in cfg else None
        if is_dataclass(hint) and OmegaConf.is_dict(value):
            _check_elements(value, hint, f"{prefix}{name}.")
        elif OmegaConf.is_list(value) and is_dataclass(element := next(iter(get_args(hint)), None)):
            for index, item in enumerate(value):
                try:
                    OmegaConf.merge(_writable(OmegaConf.structured(element)), item)
                except OmegaConfBaseException as error:
                    raise UserError(f"{prefix}{name}[{index}].{_message(error)}") from None


def _structured(schema: type, cfg: DictConfig) -> DictConfig:
    """The schema's defaults, to merge into; an optional dataclass that `cfg` sets has its own."""
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
    reason = str(error.msg or error).splitlines()[0]
    return f"{error.full_key}: {reason}" if error.full_key else reason
