"""A checkpoint is a folder for a step; nothing is pickled, and none looks whole that is not.

    step_0000100/
        model/            a diffusers folder (config.json, safetensors) with moc.json: loads anywhere by itself
        ema/              the same with the averaged weights
        optimizer*.safetensors   states by parameter name, in shards with a JSON index where they are large
        rng_00000.safetensors    random states of the main process; a run's own draws are keyed and need none
        state.json        step, data position, what the run was
        complete          the other files' checksums; written last, before the folder gets its name

It is written under a temporary name and renamed when all of it is on the disk, so a crash leaves nothing that
`find_checkpoint` would take.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moc.errors import UserError, disk_error
from moc.files import OutsideError, inside
from moc.training.integrity import COMPLETE, checksums, damaged_files, files_to_seal, seal, sync
from moc.training.optim import state_device
from moc.training.storage import read_tensors
from moc.training.tensor_files import DTYPES, Entry

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_NUMBERS = {int: torch.int64, float: torch.float64}
_PARTIAL_FOLDER = re.compile(r"partial_\d{7,}")
_STEP_FOLDER = re.compile(r"step_(\d{7,})")


class DiskError(UserError):
    """This error is raised for a checkpoint that the disk does not take; `problem` says why, and that the earlier ones
    stand."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}: make room and start again")


def find_checkpoint(path: str | Path) -> Path | None:
    """Returns the newest complete checkpoint of a run's folder, or `path` itself when it is one; else None."""
    path = Path(path)
    if (path / COMPLETE).exists():
        return path
    return next(iter(_newest_first(path)), None)


def sound_checkpoint(path: str | Path, weights: str | None = None, set_aside: bool = False) -> Path | None:
    """Returns the newest complete checkpoint of a run's folder whose files are what was written, or `path` itself when
    it is one; None where there is no complete one. Those passed over are told.

    weights: look only at what sampling with these ("ema" or "model") reads, not at the optimizer. set_aside: rename
    those passed over to damaged_0000100, so that the run can go on to their steps again.
    Raises UserError where all are damaged.
    """
    path = Path(path)
    damaged: list[tuple[Path, list[str]]] = []
    for checkpoint in [path] if (path / COMPLETE).exists() else _newest_first(path):
        chosen = weights if weights and (checkpoint / weights).is_dir() else "model"
        among = frozenset((chosen, "encoders", "state.json")) if weights else None
        wrong = damaged_files(checkpoint, among)
        if not wrong:
            for passed_over, files in damaged:
                kept = f", and it is kept as {_rename_damaged(passed_over)}" if set_aside else ""
                what = f"{files[0]} is" if len(files) == 1 else f"{files[0]} and {len(files) - 1} other files are"
                logger.warning(
                    "%s is damaged: %s not what was written; %s is taken instead%s",
                    *(passed_over, what, checkpoint.name, kept),
                )
            return checkpoint
        damaged.append((checkpoint, wrong))
    if not damaged:
        return None
    checkpoint, files = damaged[0]
    others = f", and no earlier checkpoint of {path} is whole" if len(damaged) > 1 else ""
    raise UserError(f"{checkpoint / files[0]} is not what was written{others}; {remedy(checkpoint)}")


def _rename_damaged(checkpoint: Path) -> str:
    name = f"damaged_{step_of(checkpoint):07d}"
    names = chain([name], (f"{name}_{number}" for number in count(2)))
    aside = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    checkpoint.rename(aside)
    return aside.name


def step_of(checkpoint: Path) -> int:
    """Returns the number of finished steps that a checkpoint's name tells."""
    match = _STEP_FOLDER.fullmatch(checkpoint.name)
    if not match:
        raise UserError(f"{checkpoint} is not named like a checkpoint (step_0000100)")
    return int(match[1])


class Alone:
    """`Alone` is a process that writes a checkpoint by itself; `Parallel` stands for several that write one
    together."""

    is_main, rank, world_size = True, 0, 1

    def together(self) -> AbstractContextManager:
        return nullcontext()

    def gather(self, value: Result) -> list[Result]:
        return [value]


class Writers(Protocol):
    """`Writers` are the processes that write a checkpoint; see `Parallel`."""

    @property
    def is_main(self) -> bool: ...

    rank: int
    world_size: int

    def together(self) -> AbstractContextManager: ...

    def gather(self, value: Result) -> list[Result]: ...


@contextmanager
def new_checkpoint(run_folder: Path, step: int, writers: Writers | None = None) -> Iterator[Path]:
    """Yields a folder to fill; it becomes `checkpoints/step_...` when the block ends well, and is removed when not.

    writers: the processes that fill it, where they are several; all come here, and what the block raises it must raise
    on all of them. Raises DiskError where the disk does not take it.
    """
    writers = writers or Alone()
    final = run_folder / "checkpoints" / f"step_{step:07d}"
    partial = final.with_name(f"partial_{step:07d}")
    try:
        with writers.together():
            if writers.is_main:
                _remove_partial(final.parent)
                partial.mkdir(parents=True)
        yield partial
        with writers.together():
            files = files_to_seal(partial) if writers.is_main else []
        files = writers.gather(files)[0]  # all use the main process's list, since another host may see some files later
        with writers.together():
            share = checksums(partial, files[writers.rank :: writers.world_size])
        shares = writers.gather(share)
        with writers.together():
            if writers.is_main:
                seal(partial, {name: value for share in shares for name, value in share.items()})
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                sync(final.parent)
    except BaseException as error:
        if writers.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if reason := disk_error(error):
            raise DiskError(
                f"{final} cannot be written: {reason}; nothing of it is kept, and what was there before stands"
            ) from error
        raise


def _remove_partial(folder: Path) -> None:
    """Removes what a launch left that was killed as it wrote."""
    for stale in folder.glob("partial_*"):
        if _PARTIAL_FOLDER.fullmatch(stale.name):
            shutil.rmtree(stale)


def refuse_later(run_folder: Path, step: int) -> None:
    """Raises UserError where a run's folder holds checkpoints past `step`: those of another run, or of some of this
    one that is to be done again. They would be taken for the newest. At step 0 converted weights count as well: the run
    would remove them as its oldest checkpoint."""
    later = [folder.name for folder in _checkpoints(run_folder) if step_of(folder) > step or step == 0]
    if later:
        names = ", ".join(later)
        raise UserError(
            f"{run_folder} holds checkpoints past step {step} ({names}); go on from them with resume=auto, remove them "
            "or set another name"
        )


def check_same_model(folder: Path, model: Any) -> None:
    """Raises UserError where the diffusers folder holds a model of another class or other sizes than `model`. Its
    `completed(config, folder)`, if it has one, adds settings that a config.json leaves out."""
    stored, current = read_json(folder / "config.json"), json.loads(model.to_json_string())
    if hasattr(model, "completed"):
        stored, current = model.completed(stored, folder), model.completed(current, None)
    names = [name for name in stored | current if not name.startswith("_") or name == "_class_name"]
    wrong = [f"{n}={stored.get(n)}, not {current.get(n)}" for n in names if stored.get(n) != current.get(n)]
    if wrong:
        raise UserError(f"{folder} is of another model: {'; '.join(wrong)}. Set model to match it, or another name")


def remove_old(run_folder: Path, keep: int, every: int = 0) -> None:
    """Removes all but the newest `keep` checkpoints of a run, and those of steps that `every` divides, if it is set."""
    for folder in _checkpoints(run_folder)[:-keep]:
        if not every or step_of(folder) % every:
            shutil.rmtree(folder)


def _newest_first(run_folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a run."""
    return [folder for folder in reversed(_checkpoints(run_folder)) if (folder / COMPLETE).exists()]


def _checkpoints(run_folder: Path) -> list[Path]:
    """Returns the folders with a checkpoint's name, by step."""
    folders = run_folder.glob("checkpoints/step_*")
    return sorted((f for f in folders if _STEP_FOLDER.fullmatch(f.name)), key=step_of)


def optimizer_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns optimizer states as `<parameter>.<state>` tensors; a number of Python's becomes an int64 or a float64 of
    no dimension, which no optimizer keeps as a tensor."""
    return {
        f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=_NUMBERS.get(type(value)))
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def remedy(path: str | Path) -> str:
    """Returns what to do about a damaged or incomplete file or folder: a checkpoint of one's own cannot be fetched
    again."""
    path = Path(path).absolute()
    checkpoint = next((f for f in (path, *path.parents) if _STEP_FOLDER.fullmatch(f.name)), None)
    if checkpoint is None:
        return "fetch it again"
    if step_of(checkpoint) == 0:
        return "convert the weights again"
    return f"remove {checkpoint}, which is damaged, and go on from an earlier checkpoint or a copy"


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores what `optimizer_states` named, each process its own rows; raises UserError where other parameters have
    states than are trained. There are none at all of an optimizer that keeps none."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = _stored_states(folder)
    names = {key.rpartition(".")[0] for key in found}
    if names and names != parameters.keys():
        wrong = sorted(names ^ parameters.keys())
        raise UserError(f"{folder} holds optimizer states of another model; they differ in {wrong[:5]}")
    states = {key: _empty_state(entry, parameters[key.rpartition(".")[0]], optimizer) for key, entry in found.items()}
    read_tensors(folder, states)
    for key, value in states.items():
        name, _, state = key.rpartition(".")
        is_number = value.dim() == 0 and value.dtype in _NUMBERS.values()
        optimizer.state[parameters[name]][state] = value.item() if is_number else value


def _stored_states(folder: Path) -> dict[str, Entry]:
    """Returns the optimizer states in a checkpoint, by the names of `optimizer_states`. Raises UserError for a damaged
    file."""
    found: dict[str, Entry] = {}
    for file in sorted(folder.glob("optimizer*.safetensors")):
        with _damage_told(file), safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118, it is no mapping
                values = stored.get_slice(key)
                found[key] = key, DTYPES[values.get_dtype()], tuple(values.get_shape())
    return found


def _empty_state(entry: Entry, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """Returns a tensor for a state. One of the parameter's shape lies where the optimizer keeps such, sharded as the
    parameter is; another, like fused AdamW's step, beside the parameter."""
    _, dtype, shape = entry
    if shape and shape == parameter.shape:
        device = state_device(optimizer, parameter)
        return torch.empty_like(parameter, dtype=dtype, device=device, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    """Raises UserError for a safetensors file that cannot be read."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); {remedy(file)}") from None


def rng_states() -> dict[str, Tensor]:
    """Returns the random states of this process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def save_rng(folder: Path, states: dict[str, Tensor], rank: int) -> None:
    """Writes the random states of one process, which `load_rng` reads."""
    save_file(states, folder / f"rng_{rank:05d}.safetensors")


def load_rng(folder: Path, rank: int) -> None:
    """Restores a process's random states; a rank the run did not have before keeps its fresh ones."""
    path = folder / f"rng_{rank:05d}.safetensors"
    if not path.exists():
        return
    with _damage_told(path):
        states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes what `read_state` reads."""
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the state of a checkpoint; raises UserError where it is damaged."""
    return read_json(folder / "state.json")


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the state of a run to resume; raises UserError for converted weights, and where some of the state is
    missing."""
    state = read_state(checkpoint)
    if "seed" not in state:
        raise UserError(
            f"{checkpoint} holds converted weights and nothing of a run to resume: start one of another name from "
            f"them, with model.path={checkpoint}"
        )
    data = state.get("data")
    numbers = {"step": state.get("step"), "data.position": data.get("position") if isinstance(data, dict) else None}
    wrong = [f"{name}={value}" for name, value in numbers.items() if not isinstance(value, int) or value < 0]
    if wrong:
        raise UserError(f"{checkpoint / 'state.json'} has {', '.join(wrong)}; {remedy(checkpoint)}")
    return state


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises UserError, naming the file, where it holds none."""
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged or no JSON file ({error}); {remedy(file)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold one JSON object, not {str(values)[:20]!r}; {remedy(file)}")
    return values


def read_index(file: Path) -> dict[str, Path]:
    """Returns the shard of each tensor, by an index file beside the shards. Raises UserError for what is no such index,
    and where it names a file outside its own folder."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{file} has no weight_map from tensors to shards; {remedy(file)}")
    try:
        return {name: inside(file.parent, str(shard)) for name, shard in weight_map.items()}
    except OutsideError as error:
        raise UserError(f"{file} is no index of its own shards: {error}") from None


def check_indexes(folder: Path) -> None:
    """Raises UserError where an index of shards in the folder, which another library is to read, is none or names a
    file outside."""
    for file in sorted(folder.glob("*.index.json")):
        read_index(file)
