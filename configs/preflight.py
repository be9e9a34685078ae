"""This module looks whether a run can start, and what it will take, before hours are spent on it: in a second or two
before each start (`look_first`), and with a trial of some steps and a save by `train.py preflight=true`."""

import logging
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from configs.command import for_user, message_of
from configs.run_record import check_same_run, checkpoint_to_resume, takes_its_own
from configs.schema import TrainConfig
from configs.world import Data
from data.loading.endless import RecallWorld
from moc import memory
from moc.errors import UserError
from moc.training import Parallel, TrackerConfig, Trainer, read_metrics
from moc.training.checkpoint import COMPLETE, read_run_state, refuse_later
from moc.training.clock import about
from moc.training.optim import kept_states
from moc.training.parallel import gather_lists
from moc.training.shards import local
from models import build_model

logger = logging.getLogger(__name__)

Train = Callable[[TrainConfig, Data, Parallel], bool]

_SCENES = 32  # scenes that are read
_SCENES_A_START = 4  # scenes that each process reads before a start
_STEPS = 3  # steps that are tried; the first ones compile kernels


def preflight(config: TrainConfig, dataset: Data, parallel: Parallel, train: Train) -> tuple[bool, bool]:
    """Prints a line for each thing that a run needs. Returns whether it came to the end, rather than interrupted, and
    whether all is well. Every process takes part.

    train: runs a configuration; it is given a short run in a folder of its own, which is removed.
    """
    start = cache(partial(_start, config))  # finding the start reads a whole checkpoint, so it is done once
    checks: dict[str, Callable[[], str | None]] = {
        "processes": lambda: _processes(parallel),
        "data": lambda: _data(dataset, _SCENES),
        "checkpoint": lambda: _checkpoint(config, parallel, *start()),
        "trial": lambda: _trial(config, dataset, parallel, train, *start()),
    }
    well = True
    for name, check in checks.items():
        told: str | None = "another process says what is wrong"
        failed = False
        try:
            told = check()
        except Exception as error:
            if not for_user(error):
                raise
            told, failed = message_of(error), True
        if parallel.any(failed):
            well = False
        if told is None:
            return False, well
        if parallel.is_main or failed:
            # One write keeps the lines of several processes apart.
            print(f"{'FAIL' if failed else 'ok':6}{name:12}{told}\n", end="", flush=True)
    return True, well


def look_first(config: TrainConfig, dataset: Data, parallel: Parallel, trainer: Trainer) -> None:
    """Says in one line that a run can start: that the processes reach each other, some scenes are what was written, and
    memory and disk hold at least weights, averages, gradients and states. Every process takes part.

    Raises UserError, on all of them, where something is amiss, or the run's folder holds checkpoints of later steps.
    """
    refuse_later(config.run_folder, trainer.step)
    where = _processes(parallel)
    with parallel.together():
        told = [
            where,
            _data(dataset, _SCENES_A_START, parallel.rank + trainer.step, near=True),
            _memory(trainer),
            _disk(config.run_folder, trainer),
            f"it starts at step {trainer.step + 1} of {config.trainer.num_steps}" + _time_left(config, trainer.step),
        ]
    if parallel.is_main:
        logger.info("ready: %s", "; ".join(told))


def check_weights_fit(config: TrainConfig, dataset: Data, parallel: Parallel) -> None:
    """Counts the weights of a model that is drawn anew, before it is. Raises UserError where they do not fit into a
    CPU's memory with their averages and gradients: there the system would end the process without a word."""
    if parallel.device.type != "cpu" or config.model.path or config.parallel.shard * config.parallel.sequence > 1:
        return
    sizes = dataset.latent_channels, dataset.text_dim  # a world without a disk encodes a caption to tell them
    with torch.device("meta"):
        weights = list(build_model(config.model, *sizes).parameters())
    copies = 1 if config.optim.rates else 3  # with optim.rates some weights may be frozen
    _refuse_over(memory.host_free_bytes(), copies * sum(weight.nbytes for weight in weights) / 2**30)


def _refuse_over(usable: float, size: float) -> None:
    """Raises UserError where what a process of a CPU holds, in GiB, is over the bytes that it has."""
    if size > usable / 2**30:
        raise UserError(
            f"weights, averages, gradients and states take at least {size:.3g} GiB a process, and this machine has "
            f"{usable / 2**30:.3g} for it: take a smaller model, or an adapter of one (model.lora_rank)"
        )


def _processes(parallel: Parallel) -> str:
    """Returns whether the processes reach each other from device to device, and where they are."""
    total = int(parallel.sum(parallel.put(torch.ones(()))))
    if total != parallel.data_ranks:
        raise UserError(f"{parallel.data_ranks} processes sum ones to {total}; look at the network and NCCL's settings")
    hosts = Counter(gather_lists([socket.gethostname()]))
    if hosts.total() == 1:
        return f"one process on {socket.gethostname()}, with {parallel.device_name}"
    where = ", ".join(f"{count} on {host}" for host, count in hosts.items())
    return f"{where}; each has {parallel.device_name}, and they reach each other"


def _data(dataset: Data, most: int, first: int = 0, near: bool = False) -> str:
    """Reads up to `most` scenes, spread over the data from scene `first` on, and says how many were as they were
    written. near: takes only scenes whose latents lie on this machine, since these are read at once. Raises DataError
    where one is not."""
    if isinstance(dataset, RecallWorld):
        return "scenes are composed as they are asked for"
    items = enumerate(dataset.items)
    among = [i for i, (c, scene) in items if not (near and (scene.frames or dataset.caches[c].store.is_remote))]
    apart = max(1, len(among) // most)
    some = among[first % apart :: apart][:most]
    for index in some:
        dataset[index]
    if not some:
        return f"none of {len(dataset)} scenes read: all come from a remote store or are encoded as they are asked for"
    return f"{len(some)} of {len(dataset)} scenes read; their checksums fit"


def _memory(trainer: Trainer) -> str:
    """Returns what a process holds on its device all the time, by count. Raises UserError where the device cannot."""
    device = trainer.parallel.device
    what, size = "weights, averages, gradients and states take at least", _held_bytes(trainer) / 2**30
    if device.type != "cuda":
        _refuse_over(memory.usable_bytes(device), size)
        return f"{what} {size:.1f} GiB a process"
    whole = torch.cuda.get_device_properties(device).total_memory / 2**30
    if size > whole:
        raise UserError(f"{what} {size:.0f} GiB, and {trainer.parallel.device_name} has {whole:.0f}: {memory.STEP}")
    return f"{what} {size:.1f} of {whole:.0f} GiB"


def _held_bytes(trainer: Trainer) -> int:
    """Returns bytes of weights, averages, gradients and the optimizer's states on a process's device, at least."""
    kind = trainer.parallel.device.type
    weights = [weight for weight in trainer.bare_model.parameters() if local(weight).device.type == kind]
    gradients = [weight for weight in weights if weight.requires_grad]
    held = sum(local(tensor).nbytes for tensor in (*weights, *gradients, *trainer.ema.averages.values()))
    kept = kept_states(trainer.optimizer)
    return held + int(sum(times * local(weight).nbytes for weight, times, where in kept if where.type == kind))


def _disk(run_folder: Path, trainer: Trainer) -> str:
    """Returns what a checkpoint takes, by count. Raises UserError where the disk does not hold one more. The run's
    folder need not be there yet."""
    weights = [tensor for tensors in trainer.saved_tensors().values() for tensor in tensors.values()]
    stored = [(tensor, 1.0) for tensor in weights] + [(weight, n) for weight, n, _ in kept_states(trainer.optimizer)]
    size = sum(tensor.numel() * tensor.itemsize * times for tensor, times in stored)
    free = shutil.disk_usage(next(folder for folder in (run_folder, *run_folder.parents) if folder.exists())).free
    if free < size:
        raise UserError(
            f"{run_folder} has {free / 1e9:.2f} GB free, and a checkpoint takes at least {size / 1e9:.2f}: make room, "
            "or set output"
        )
    return f"a checkpoint takes at least {size / 1e9:.2f} of {free / 1e9:.0f} GB free"


def _time_left(config: TrainConfig, step: int) -> str:
    """Returns how long the rest will take by what the run has taken, if that is known."""
    rows = [row for row in read_metrics(config.run_folder) if "step_seconds" in row and row["step"] <= step]
    return f", {about(rows[-1]['step_seconds'] * (config.trainer.num_steps - step))}" if rows else ""


def _checkpoint(config: TrainConfig, parallel: Parallel, found: Path | None, step: int) -> str:
    """Returns whether the run can go on where it stopped; every process takes part. Raises UserError where it
    cannot."""
    if not found:
        return "none; the run begins"
    if takes_its_own(config):
        parallel.of_main(lambda: check_same_run(config))
    if step >= config.trainer.num_steps:
        return f"{found} is whole; the run is already finished: step {step} of {config.trainer.num_steps}"
    return f"{found} is whole; the run goes on from step {step}"


def _start(config: TrainConfig) -> tuple[Path | None, int]:
    """Returns the checkpoint to go on from, if any, and its step."""
    found = checkpoint_to_resume(config, set_aside=False)
    return found, read_run_state(found)["step"] if found else 0


def _trial(
    config: TrainConfig, dataset: Data, parallel: Parallel, train: Train, found: Path | None, first: int
) -> str | None:
    """Makes some steps and a save of the run itself; returns what the run will take, None where a signal ended the
    trial. Raises UserError where memory or the disk does not suffice."""
    if first >= config.trainer.num_steps:
        return "none; no step is left"
    length = replace(config.trainer, num_steps=first + _STEPS, log_every=1, checkpoint_every=0)
    trial = replace(
        config,
        output=str(config.run_folder),
        name=".trial",
        resume=str(found) if found else "none",
        trainer=length,
        tracking=TrackerConfig(),
    )

    def remove() -> None:
        parallel.wait()
        if parallel.is_main:
            shutil.rmtree(trial.run_folder, ignore_errors=True)

    remove()  # a trial that was killed has left its folder
    if parallel.is_main:
        slow = "; on a CPU this may take long" if parallel.device.type == "cpu" else ""
        logger.info("trial: %d steps of up to %s tokens, and a save%s", _STEPS, f"{config.data.batch_tokens:,}", slow)
    try:
        finished = train(trial, dataset, parallel)
        parallel.wait()
        return _told(config, trial, first, parallel) if finished else None
    finally:
        remove()


def _told(config: TrainConfig, trial: TrainConfig, first: int, parallel: Parallel) -> str:
    """Returns what the run will take, by its trial. Raises UserError where its checkpoints do not fit on the disk."""
    row = read_metrics(trial.run_folder)[-1]
    (saved,) = trial.run_folder.glob("checkpoints/step_*")
    size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    seconds = (saved / COMPLETE).stat().st_mtime - (trial.run_folder / "metrics.jsonl").stat().st_mtime
    free, kept = shutil.disk_usage(trial.run_folder).free + size, config.trainer.keep_checkpoints + 1
    if free < kept * size:
        raise UserError(
            f"{config.run_folder} has {free / 1e9:.1f} GB free; {kept} checkpoints of {size / 1e9:.1f} GB (one of them "
            "while it is written) do not fit: make room or lower trainer.keep_checkpoints"
        )
    whole_run = about(row["step_seconds"] * (config.trainer.num_steps - first))
    taken = "memory not measured"
    if "memory_gib" in row:
        whole = torch.cuda.get_device_properties(parallel.device).total_memory / 2**30
        taken = f"{row['memory_gib']:.1f} of {whole:.0f} GiB of memory"
    return (
        f"a step takes {row['step_seconds']:.2f} s ({row['tokens_per_second']:,.0f} tokens/s) and {taken}; a save "
        f"{seconds:.1f} s and {size / 1e9:.2f} of {free / 1e9:.0f} GB free; steps {first + 1} to "
        f"{config.trainer.num_steps} will take {whole_run}"
    )
