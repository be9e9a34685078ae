"""This module records a run and its launches: where a launch goes on; in config.yaml what the run was trained with,
which a later launch of that name may change only if told so; and in launches.jsonl a line for each launch."""

import json
import logging
import shlex
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from yaml import YAMLError

from configs.earlier import translated
from configs.schema import TrainConfig
from moc.checkout import commit, git
from moc.errors import UserError
from moc.files import held, write_whole
from moc.training import Parallel, find_checkpoint, sound_checkpoint
from moc.training.parallel import gather_lists

logger = logging.getLogger(__name__)

# These change neither the model nor what it learns from; all other settings are part of what a run is.
FREE = (
    "name", "output", "resume", "allow_changes", "preflight", "tracking", "parallel", "execution",
    "trainer.num_steps", "trainer.log_every", "trainer.validate_every", "trainer.checkpoint_every",
    "trainer.sample_every", "trainer.keep_checkpoints", "trainer.keep_every", "trainer.save_in_background",
    "trainer.max_skipped_steps", "trainer.cuda_graphs", "optim.offload",
    "data.workers", "data.prefetch", "data.local_cache", "data.local_cache_gigabytes",
)  # fmt: skip
_RESTORE = "restore it, or remove it to go on with the settings given now"
OPEN = "optim.args."  # a key that is missing here was not set; elsewhere an earlier version did not have it yet


def own_name(name: str) -> str:
    """Returns a run's name; that of a sweep's job (`-m`) has its number added, since a run of its own needs a folder of
    its own."""
    hydra = HydraConfig.get()
    return f"{name}-{hydra.job.num}" if hydra.mode is RunMode.MULTIRUN else name


@contextmanager
def hold_run(config: TrainConfig, parallel: Parallel) -> Iterator[None]:
    """Has the run's folder to this launch alone while it lasts. Raises UserError, on all processes, where another
    launch has it."""
    with ExitStack() as stack:
        with parallel.together():
            stack.enter_context(held(config.run_folder, holds=parallel.is_main))
        yield


def takes_its_own(config: TrainConfig) -> bool:
    """Returns whether a launch goes on from its run's newest checkpoint: with resume=auto, and with a path outside the
    run's folder once the run has a checkpoint, since it began there and the same command goes on."""
    if config.resume in ("auto", "none"):
        return config.resume == "auto"
    is_outside = not Path(config.resume).resolve().is_relative_to(config.run_folder.resolve())
    return is_outside and find_checkpoint(config.run_folder) is not None


def begin(config: TrainConfig) -> Path | None:
    """Returns what `checkpoint_to_resume` does, of a run that is to go on now. Raises UserError also where its settings
    are others."""
    checkpoint = checkpoint_to_resume(config)
    if checkpoint and takes_its_own(config):
        check_same_run(config)
    return checkpoint


def checkpoint_to_resume(config: TrainConfig, set_aside: bool = True) -> Path | None:
    """Returns where `resume` has the run go on, if anywhere. Raises UserError where a folder that it names has none.

    set_aside: rename the run's damaged checkpoints, as `sound_checkpoint` does."""
    if takes_its_own(config):
        return sound_checkpoint(config.run_folder, set_aside=set_aside)
    if config.resume == "none":
        return None
    checkpoint = sound_checkpoint(config.resume)
    if checkpoint is None:
        raise UserError(f"resume={config.resume} holds no complete checkpoint; use auto, none or a run's folder")
    return checkpoint


def check_same_run(config: TrainConfig) -> None:
    """Compares with the settings of the run that is resumed; tells of those that may change.

    Raises UserError for others, unless `allow_changes` names them: their checkpoints would lie about what made them;
    and for a name there that is no setting's.
    """
    file = config.run_folder / "config.yaml"
    if not file.exists():
        return
    settings = _recorded(file), _values(config)
    before, now = (translated(dict(_flat(values))) for values in settings)
    keys = before | now
    unknown = [name for name in config.allow_changes if not any(_is_among(key, [name]) for key in keys)]
    if unknown:
        raise UserError(f"allow_changes={unknown} names no setting; --help lists all")
    compared = [key for key in keys if (key in before and key in now) or key.startswith(OPEN)]
    changed = {key: (before.get(key), now.get(key)) for key in compared if before.get(key) != now.get(key)}
    free = {key for key in changed if _is_among(key, FREE) or _is_among(key, config.allow_changes)}
    refused = [f"{key}={value} (was {was})" for key, (was, value) in changed.items() if key not in free]
    if refused:
        raise UserError(
            f"{config.run_folder} was trained with other settings: {', '.join(refused)}. Give the new run its own "
            f"name, name=OTHER, or go on with them by allow_changes=[{','.join(k for k in changed if k not in free)}]"
        )
    for key in sorted(free - {"resume", "allow_changes"}):
        was, value = changed[key]
        logger.info("%s is now %s (was %s)", key, value, was)


def record_launch(config: TrainConfig, parallel: Parallel, step: int) -> None:
    """Writes config.yaml and adds a line to launches.jsonl: when and at which step, the command, the code's commit and
    whether files were changed since, versions, and how many processes each host has. Every process takes part."""
    hosts = gather_lists([socket.gethostname()])
    if not parallel.is_main:
        return
    _record_settings(config)
    row = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "hosts": Counter(hosts),
        "device": parallel.device_name,
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }
    with (config.run_folder / "launches.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def sampling_command(run_folder: Path) -> str:
    """Returns the command that films with a run's model, as it can be pasted into a shell."""
    return shlex.join(["python", "sample.py", f"checkpoint={run_folder}", "script=FILE", "out=DIR"])


def _record_settings(config: TrainConfig) -> None:
    """Writes config.yaml; other settings that lie there are kept beside it, as config.1.yaml, config.2.yaml, ..."""
    file, text = config.run_folder / "config.yaml", OmegaConf.to_yaml(_values(config))
    config.run_folder.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.read_text() != text:
        number = next(n for n in range(1, 10**6) if not _kept(file, n).exists())
        file.rename(_kept(file, number))
    write_whole(file, text.encode())


def _recorded(file: Path) -> dict[str, Any]:
    """Returns the settings in a config.yaml. Raises UserError where it holds none."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(file))
    except YAMLError as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())}); {_RESTORE}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold settings by their names, not {str(values)[:20]!r}; {_RESTORE}")
    return values


def _kept(file: Path, number: int) -> Path:
    return file.with_name(f"config.{number}.yaml")


def _values(config: TrainConfig) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of nested mappings; a list is one value, without what its items leave at null."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", [_without_nulls(item) for item in value]
        else:
            yield f"{prefix}{key}", value


def _without_nulls(item: Any) -> Any:
    return {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item


def _is_among(key: str, names: Any) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
