"""How every command runs: Hydra composes its YAML, `parse` types it, and an error of the user's is one message."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from omegaconf import DictConfig

from configs.schema import parse

T = TypeVar("T")


def command(config_name: str, schema: type[T]) -> Callable[[Callable[[T], Any]], Callable[[], None]]:
    """Makes a function of a typed config the main function of a command, with `configs/<config_name>.yaml` behind it.

    What the user can mend (ValueError, OSError, FloatingPointError) ends it with one line and status 1;
    HYDRA_FULL_ERROR=1 shows the traceback.
    """

    def decorate(run: Callable[[T], Any]) -> Callable[[], None]:
        def main(cfg: DictConfig) -> None:
            try:
                run(parse(cfg, schema))
            except (ValueError, OSError, FloatingPointError) as error:
                if os.environ.get("HYDRA_FULL_ERROR") == "1":
                    raise
                sys.exit(f"error: {error}")

        folder = str(Path(__file__).parent)
        return hydra.main(config_path=folder, config_name=config_name, version_base=None)(main)

    return decorate
