"""This module has tiny training runs on a made-up cache: for tests of the trainer, and as the worker of runs on several
processes.

python -m torch.distributed.run --nproc_per_node 2 -m tests.runs CACHE FOLDER [--poisoned SCENE] [--told RANK] ...
    [--hung RANK] [--killed RANK] [--full STEP] [--steps N] [--resume] [--every N] [--background]
"""

import errno
import os
import signal
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from data.loading.dataset import DataConfig
from data.loading.loader import build_loader
from moc import Batch, MoCConfig
from moc.diffusion import Flow
from moc.schedule import MoCSchedule
from moc.training import (
    Metrics,
    OptimConfig,
    Parallel,
    ParallelConfig,
    TrackerConfig,
    Trainer,
    TrainerConfig,
    Validator,
    find_checkpoint,
    read_metrics,
    sound_checkpoint,
)
from models.mmdit import MMDiT
from tests.caches import CHANNELS, TEXT_DIM, scene, write_cache

THEN = "then"  # separates two runs of the same processes
MOC = MoCConfig(chunk_tokens=6, top_k=1)
# Anchors are few, so that the loss shows which chunks were dropped in and off.
DROPS = MoCConfig(chunk_tokens=6, top_k=2, own_anchor="chunk", text_anchor="none", drop_in_rate=1.0)


def make_cache(folder: Path) -> Path:
    """Returns eight scenes of three shots."""
    return write_cache(folder, [scene(number / 4, shots=3, frames=1) for number in range(8)])


class Watched:
    """These are the steps of a loader, with a call before each is handed out."""

    def __init__(self, loader, before_step) -> None:
        self.loader, self.before_step = loader, before_step

    def state(self) -> dict:
        return self.loader.state()

    def __iter__(self) -> Iterator:
        for number, batches in enumerate(self.loader):
            self.before_step(number)
            yield batches


def make_trainer(
    folder: Path,
    seed=0,
    accumulation=1,
    moc=MOC,
    schedule=(),
    dim=32,
    optim=None,
    save_extras=None,
    timeout=600.0,
    axes=None,
    **trainer,
) -> Trainer:
    torch.manual_seed(seed)
    model = MMDiT(CHANNELS, TEXT_DIM, dim=dim, num_layers=2, num_heads=2, ffn_dim=32)
    return Trainer(
        Parallel(ParallelConfig("cpu", accumulation=accumulation, timeout=timeout, **(axes or {}))),
        model,
        Flow(),
        moc,
        MoCSchedule(schedule),
        optim or OptimConfig(lr=3e-3, warmup_steps=2, eps=1e-4),
        TrainerConfig(**{"log_every": 1, "checkpoint_every": 0, "ema_decay": 0.9} | trainer),
        folder,
        seed,
        save_extras or (lambda _: None),
    )


def train(
    cache: Path,
    folder: Path,
    num_steps: int = 4,
    resume: bool = False,
    accumulation: int = 1,
    validation: int = 0,
    before_step=None,
    **settings,
) -> Trainer:
    """Returns a run of `num_steps`; its metrics and checkpoints come to lie in `folder`."""
    trainer = make_trainer(folder, num_steps=num_steps, accumulation=accumulation, **settings)
    position = (
        trainer.resume(trainer.parallel.of_main(lambda: sound_checkpoint(folder, set_aside=True)))["position"]
        if resume
        else 0
    )
    config = DataConfig(path=str(cache), batch_tokens=220, workers=0, seed=trainer.seed, validation=validation)
    loader = build_loader(
        config,
        trainer.bare_model.stream,
        MOC.chunk_tokens,
        rank=trainer.parallel.data_rank,
        world_size=trainer.parallel.data_ranks,
        accumulation=accumulation,
        start_position=position,
    )
    validator = Validator(list(loader.held_out()), trainer.flow) if validation else None
    metrics = None
    if trainer.parallel.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        metrics = Metrics(folder, TrackerConfig(), {}, trainer.step)
    with trainer.parallel.naming_absent():
        trainer.finished = trainer.run(Watched(loader, before_step) if before_step else loader, metrics, validator)
    if metrics:
        metrics.close()
    return trainer


@contextmanager
def poisoned(*scene_ids: str, gradient_only: bool = True) -> Iterator[None]:
    """While it lasts, these scenes' gradients are not numbers, and their losses neither unless `gradient_only`."""
    healthy = Flow.loss

    def loss(self, model, batch: Batch, *others, **more) -> torch.Tensor:
        by_shot = healthy(self, model, batch, *others, **more)
        ids = [name for name, (_, shots) in zip(batch.ids, batch.layout.samples, strict=True) for _ in shots]
        return torch.stack([spoil(x) if name in scene_ids else x for name, x in zip(ids, by_shot, strict=True)])

    def spoil(x: torch.Tensor) -> torch.Tensor:
        return x + (0 * x).sqrt() if gradient_only else x * torch.nan  # the root is 0, and its slope there is infinite

    Flow.loss = loss
    try:
        yield
    finally:
        Flow.loss = healthy


def full_at(step: int):
    """Makes the disk full for the checkpoint of one step."""

    def save_extras(folder: Path) -> None:
        if folder.name == f"partial_{step:07d}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return save_extras


def launch(processes: int, *arguments: object) -> str:
    """Runs this module in several processes, which must end well; returns what they said on standard error."""
    result = launched(processes, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def launched(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """Runs this module in several processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *torchrun, "-m", "tests.runs", *map(str, arguments)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


def run(arguments: list[str]) -> None:
    """Trains as one of several processes, by the command line of one run."""
    parser = ArgumentParser()
    parser.add_argument("cache", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--poisoned")
    parser.add_argument("--told", help="the rank that alone is told to end, after two steps")
    parser.add_argument("--hung", help="the rank that hangs after two steps, on which the others wait three seconds")
    parser.add_argument("--killed", help="the rank that is killed without warning after two steps")
    parser.add_argument("--full", type=int, help="the step whose checkpoint the disk does not take; each step has one")
    parser.add_argument("--axis", help="an axis of the mesh along which all processes lie")
    parser.add_argument("--optim", help="the optimizer's name")
    parser.add_argument("--validation", type=int, default=0, help="scenes held out")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--every", type=int, default=0, help="steps between checkpoints")
    parser.add_argument("--background", action="store_true", help="save in a thread")
    asked = parser.parse_args(arguments)
    settings: dict = {"validation": asked.validation, "num_steps": asked.steps, "checkpoint_every": asked.every}
    settings["save_in_background"] = asked.background
    settings["resume"] = asked.resume and find_checkpoint(asked.folder) is not None
    if asked.axis:
        settings["axes"] = {asked.axis: int(os.environ["WORLD_SIZE"])}
    if asked.optim:
        settings["optim"] = OptimConfig(asked.optim, lr=3e-3, warmup_steps=2)
    if asked.hung or asked.killed:
        settings["timeout"] = 3.0
    if asked.full:
        settings |= {"save_extras": full_at(asked.full), "checkpoint_every": 1, "keep_checkpoints": 9}

    def before_step(number: int) -> None:
        if number == 2 and os.environ["RANK"] == asked.hung:
            os.kill(os.getpid(), signal.SIGSTOP)
        if number == 2 and os.environ["RANK"] == asked.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2 and os.environ["RANK"] == asked.told:
            os.kill(os.getpid(), signal.SIGUSR1)

    with poisoned(asked.poisoned) if asked.poisoned else nullcontext():
        trainer = train(asked.cache, asked.folder, moc=DROPS, before_step=before_step, **settings)
    assert (trainer.step, trainer.finished) == ((2, False) if asked.told else (asked.steps, True))
    assert trainer.parallel.world_size == int(os.environ["WORLD_SIZE"])


def by_run(arguments: list[str]) -> list[list[str]]:
    """Returns the arguments of each run, which stand between words THEN."""
    runs: list[list[str]] = [[]]
    for argument in arguments:
        if argument == THEN:
            runs.append([])
        else:
            runs[-1].append(argument)
    return runs


if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in by_run(sys.argv[1:]):
        run(arguments)
    torch.distributed.destroy_process_group()
