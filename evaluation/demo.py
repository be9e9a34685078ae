"""This module does the main job on the embedded default: the commands of the demo, in order, and its verdict."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.loading.dataset import DataConfig
from data.prepare.shots import build_detector
from data.records import write_whole
from evaluation.films.judge import JUDGED_SIGMA, Verdict, held_out_floors, judge_film, ratio_to_line
from film.script import load_script
from moc.checkout import ROOT
from moc.errors import UserError, check_least, check_seed
from moc.training import read_metrics
from moc.training.processes import visible_gpus


@dataclass(frozen=True)
class Scale:
    """A scale says how large the demo's world and its model are; configs/demo.yaml has the values.

    scenes: how many the world has.
    held_out: how many of them training holds out.
    size: height and width of its frames.
    world, prepare, sample: settings of these commands.
    experiment: that of train.py.
    script: the file that says what to film, a path in the checkout.
    threads: how many torch has; one is fastest for a small model.
    trained: settings of sample.py for the first film, by a model that was trained before.
    seconds: what each of the five stages took on the machine it was tuned on.
    """

    scenes: int = 1
    held_out: int = 0
    size: list[int] = field(default_factory=list)
    world: list[str] = field(default_factory=list)
    prepare: list[str] = field(default_factory=list)
    experiment: str = "storyworld"
    script: str = "configs/scripts/storyworld.yaml"
    sample: list[str] = field(default_factory=list)
    threads: int = 1
    trained: list[str] = field(default_factory=list)
    seconds: list[int] = field(default_factory=list)

    def check(self, scenes: int | None, name: str) -> None:
        """Raises UserError for what a stage would refuse minutes later. scenes: how many the world has instead, unless
        None. name: the scale's."""
        if (count := self.scenes if scenes is None else scenes) <= self.held_out:
            key, most = f"{name}.scenes" if scenes is None else "scenes", self.held_out
            raise UserError(
                f"{key}={count} leaves none to train: {most} are held out to judge it; say {most + 1} or more"
            )
        checks = {
            "size": (len(self.size) == 2 and all(n >= 32 and n % 16 == 0 for n in self.size),
                     "[height, width], multiples of 16 from 32"),
            "experiment": ((ROOT / f"configs/experiment/{self.experiment}.yaml").is_file(),
                           "one of configs/experiment, without .yaml"),
            "script": ((ROOT / self.script).is_file(), "a file, its path from the checkout"),
            "threads": (self.threads >= 1, "at least 1"),
            "seconds": (len(self.seconds) == 5 and min(self.seconds) > 0, "five numbers above 0, one a stage"),
        }  # fmt: skip
        for field_name, (good, rule) in checks.items():
            if not good:
                raise UserError(f"{name}.{field_name}={getattr(self, field_name)} must be {rule}")


@dataclass(frozen=True)
class DemoConfig:
    """These settings say what the demo does.

    output: the folder of all that it makes.
    scale: small, large or auto, which is large where there is a GPU.
    scenes: how many the world has; null takes the scale's.
    steps: how long training is; null takes the scale's.
    workers: processes that render the world; null is one a core.
    seed: the seed of the world, of training and of its film.
    small, large: the settings of each scale.
    """

    output: str = "outputs/demo"
    scale: str = "auto"
    scenes: int | None = None
    steps: int | None = None
    workers: int | None = None
    seed: int = 0
    small: Scale = field(default_factory=Scale)
    large: Scale = field(default_factory=Scale)

    def __post_init__(self) -> None:
        check_least(self, "", 1, "scenes", "steps", null="the scale's")
        check_least(self, "", 1, "workers", null="one a core")
        check_seed(self, "")
        if self.scale not in ("auto", "small", "large"):
            raise UserError(f"scale={self.scale} is none; say auto, small or large")
        self.chosen().check(self.scenes, "large" if self.chosen() is self.large else "small")

    def chosen(self) -> Scale:
        large = self.scale == "large" or (self.scale == "auto" and bool(visible_gpus()))
        return self.large if large else self.small


@dataclass(frozen=True)
class Stage:
    """A stage is a command of the demo, and the seconds it took on the machine it was tuned on."""

    title: str
    seconds: int
    arguments: list[str]


def plan(config: DemoConfig) -> list[Stage]:
    """Returns the commands of the demo, in order."""
    scale, out = config.chosen(), Path(config.output).resolve()
    size = f"size=[{scale.size[0]},{scale.size[1]}]"
    changed = [f"data.validation={scale.held_out}"]
    changed += [f"trainer.num_steps={config.steps}"] if config.steps else []
    world = [
        f"output={out}/world",
        f"scenes={config.scenes or scale.scenes}",
        f"workers={config.workers or 'null'}",
        size,
    ]
    prepare = [f"input={out}/world", f"output={out}/prepared", size]
    train = [f"experiment={scale.experiment}", f"data.path={out}/prepared", f"output={out}", "name=run", *changed]
    sample = [f"checkpoint={out}/run", f"script={ROOT / scale.script}", f"out={out}/film"]
    seed = f"seed={config.seed}"
    stages = {
        "film a story with a model that was trained before": ["sample.py", *scale.trained, f"out={out}/friends"],
        "make a storyworld": ["scripts/make_storyworld.py", *world, seed, *scale.world],
        "prepare its films": ["scripts/prepare_data.py", *prepare, *scale.prepare],
        "train with Mixture of Contexts": ["train.py", *train, seed],
        "sample a story": ["sample.py", *sample, f"sampler.{seed}", *scale.sample],
    }
    return [Stage(title, s, words) for (title, words), s in zip(stages.items(), scale.seconds, strict=True)]


def run_demo(config: DemoConfig) -> dict[str, float]:
    """Runs the demo's commands; returns the seconds of each. Raises UserError at one that fails."""
    scale = config.chosen()
    found = ", ".join(visible_gpus()) or "no GPU"
    print(f"{found} found, scale={config.scale}: films of {scale.size[0]}x{scale.size[1]}, {scale.experiment}")
    with raised_signals():
        return run(plan(config), scale.threads)


def run(stages: list[Stage], threads: int) -> dict[str, float]:
    """Runs the commands in turn, telling how long the rest will take; returns the seconds of each."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    taken: dict[str, float] = {}
    for index, stage in enumerate(stages):
        pace = sum(taken.values()) / sum(s.seconds for s in stages[:index]) if taken else 1.0
        minutes = pace * sum(s.seconds for s in stages[index:]) / 60
        print(f"\n[{index + 1}/{len(stages)}] {stage.title} (about {minutes:.1f} minutes left)", flush=True)
        start = time.perf_counter()
        if _status([sys.executable, *stage.arguments], environment):
            raise UserError(f"the stage failed: python {shlex.join(stage.arguments)}")
        taken[stage.title] = time.perf_counter() - start
    return taken


def _status(words: list[str], environment: dict[str, str]) -> int:
    """Runs a command and returns its exit status. What is raised meanwhile ends it too, with all that it started, which
    is why it has a process group of its own."""
    process = subprocess.Popen(words, cwd=ROOT, env=environment, process_group=0)
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


@contextmanager
def raised_signals() -> Iterator[None]:
    """Has signals that would end this process at once raise SystemExit instead."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)  # the status that a shell gives a process ended by this signal

    fatal = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in fatal:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in fatal:
            signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True)
class HeldOut:
    """These are held-out losses by noise level.

    start, end: the model's, before training and after it.
    linear: those of the best linear predictor.
    mean: that of predicting the mean, which is one for all levels.
    """

    sigmas: list[float]
    start: list[float]
    end: list[float]
    linear: list[float]
    mean: float

    @property
    def ratio(self) -> float:
        """How the model's losses stand to the best linear predictor's, up to JUDGED_SIGMA."""
        return ratio_to_line(self.sigmas, self.end, self.linear)


def report(config: DemoConfig, data: DataConfig, seconds: dict[str, float]) -> bool:
    """Prints what came out and writes it to `verdict.json`; returns whether it passed.

    data: what the model was trained on. seconds: of each stage.
    """
    out, script = Path(config.output), load_script(ROOT / config.chosen().script)
    verdict = judge_film(out / "film", script, build_detector("transnetv2"))
    rows = [row for row in read_metrics(out / "run") if "routing/sparsity" in row]
    losses, minutes = held_out_losses(rows, data), cpu_minutes()
    print_losses(losses, rows[-1])
    print_film(verdict)
    stages = ", ".join(f"{title} {taken:.0f} s" for title, taken in seconds.items())
    print(f"time         {stages}; {minutes:.1f} CPU-minutes in all")
    for name in ("friends/index.html", "film/index.html", "film/storyboard.png", "film/routing.png"):
        print(f"look at      {out / name}")
    print(
        f"model        {losses.ratio:.3f} of the best linear predictor's loss up to sigma {JUDGED_SIGMA:g}; it must be "
        "under 1"
    )
    record = {
        "ratio": losses.ratio,
        "steps": rows[-1]["step"],
        "losses": {f"{sigma:g}": loss for sigma, loss in zip(losses.sigmas, losses.end, strict=True)},
        "linear": {f"{sigma:g}": loss for sigma, loss in zip(losses.sigmas, losses.linear, strict=True)},
        "places": verdict.places,
        "cuts": verdict.accuracy.score,
        "seconds": seconds,
        "cpu_minutes": minutes,
    }
    write_whole(out / "verdict.json", (json.dumps(record, indent=1) + "\n").encode())
    faults = []
    if verdict.places_right < 0.75 * len(verdict.places):
        faults.append("fewer than three in four shots show the scripted place")
    if losses.ratio >= 1:
        faults.append("the held-out loss does not beat the best linear predictor's")
    for fault in faults:
        print(f"FAILED: {fault}")
    if faults and (config.scenes or config.steps):
        print("the demo passes with its own scenes and steps; leave out scenes= and steps= to have them")
    return not faults


def held_out_losses(rows: list[dict[str, Any]], data: DataConfig) -> HeldOut:
    """Returns the losses of a training. rows: its metrics, those with validation. data: what it was trained on."""
    levels = [key for key in rows[0] if key.startswith("validation/loss_")]
    sigmas = [float(level.removeprefix("validation/loss_")) for level in levels]
    mean, linear = held_out_floors(data, sigmas)
    start, end = ([row[level] for level in levels] for row in (rows[0], rows[-1]))
    return HeldOut(sigmas, start, end, linear, mean)


def print_losses(losses: HeldOut, last: dict[str, Any]) -> None:
    """Prints the losses as a table, and what attention costs. last: the metrics of the last validation."""
    print("\nheld-out loss        start      end   predicting the mean   best linear predictor")
    for sigma, start, end, linear in zip(losses.sigmas, losses.start, losses.end, losses.linear, strict=True):
        print(f"  sigma {sigma:<8g} {start:9.4f} {end:8.4f} {losses.mean:21.4f} {linear:23.4f}")
    sparsity, flops = last["routing/sparsity"], last["routing/flops_of_dense"]
    print(f"attention    sparsity {sparsity:.0%}, FLOPs {flops:.0%} of dense")


def print_film(verdict: Verdict) -> None:
    """Prints what the film shows, beside its script."""
    found = f"found at {verdict.found_cuts}: {verdict.accuracy.score:.2f}"
    print(f"cuts         scripted at {verdict.scripted_cuts}, {found}")
    print("places       " + ", ".join(f"{a} {'seen' if a == b else f'looks like {b}'}" for a, b in verdict.places))


def cpu_minutes() -> float:
    """Returns the CPU time of this process and of all that it started and that are over."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used) / 60
