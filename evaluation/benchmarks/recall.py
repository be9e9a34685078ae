"""This module measures what models remember that are trained alike under different kinds of attention, a row for
each."""

import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data.loading.endless import RecallWorld
from data.storyworld.recall_scenes import draw_scenes
from evaluation.benchmarks.measurements import machine, put_row, read_rows
from evaluation.benchmarks.recall_report import write_report
from evaluation.benchmarks.trainings import train_for
from evaluation.recall.bench import RecallBench, accuracy, check_shots, kept_reader, summary
from moc import MoCConfig
from moc.counts import count_of
from moc.diffusion import Flow
from moc.errors import check_among, check_least, check_seed
from moc.training import Parallel, ParallelConfig, find_checkpoint
from moc.training.integrity import COMPLETE
from models import load_model
from models.checkpoints.contents import Contents
from models.checkpoints.opening import open_checkpoint

# The schedule begins with chunks of all that went before, which is dense and causal; then they are finer and fewer.
PROGRESSIVE = ((0.0, 48, 7), (0.2, 24, 7), (0.4, 12, 7), (0.6, 6, 8), (0.8, 6, 5))


@dataclass(frozen=True)
class RecallRowsConfig:
    """These settings say what to train and to read.

    rows: names among ROWS; without any, the tables of the output's rows are made anew.
    steps: how long each is trained.
    minutes: how long training lasts in this call, at most.
    at_once: how many rows train side by side; null is all. The others wait, and one begins only if as much time is left
        as the longest row before it took.
    start: a model's folder whose weights all rows begin with; null is none.
    seed: the seed of training and of the reader.
    scenes: how many are tested; each gives two readings.
    look_alikes: how many scenes with look-alikes are tested besides.
    course: every so many steps a checkpoint is kept and tested, on as many scenes as one batch holds; 0 is none.
    swaps: whether dense rows are tested besides with MoC in the place of their attention, an eighth of `scenes` each.
    shots: numbers of shots, other than in training, of scenes that are tested besides, an eighth of `scenes` each.
    reader_steps: how long the reader is trained.
    sampling_steps: those of each sampled shot.
    batch: scenes that are sampled at a time.
    settings: those of train.py, for all rows.
    folder: where the runs and the reader go.
    output: the record to write.
    device: as in `moc.training.ParallelConfig`.
    """

    rows: list[str] = field(default_factory=lambda: ["dense", "own_shot"])
    steps: int = 4000
    minutes: float = 8.0
    at_once: int | None = None
    start: str | None = None
    seed: int = 0
    scenes: int = 5120
    look_alikes: int = 1024
    course: int = 0
    swaps: bool = True
    shots: list[int] = field(default_factory=list)
    reader_steps: int = 1500
    sampling_steps: int = 10
    batch: int = 64
    settings: list[str] = field(default_factory=list)
    folder: str = "outputs/recall"
    output: str = "docs/benchmarks/recall.json"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_least(self, "", 1, "steps", "scenes", "reader_steps", "sampling_steps", "batch", "at_once")
        check_seed(self, "")
        check_shots(self.shots)
        check_among(self, "rows", ROWS)


def progressive(steps: int) -> str:
    """Returns the setting of train.py that makes chunks smaller over a run of so many steps."""
    stages = (f"{{step: {int(share * steps)}, chunk_tokens: {c}, top_k: {k}}}" for share, c, k in PROGRESSIVE)
    return f"schedule=[{', '.join(stages)}]"


KEY = ("row", "seed", "steps", "start")  # what tells a row of the record from others
# What a dense model is swapped to, untrained: chunk tokens, of which a frame has 24 and a row of it 6, chunks that it
# routes to, and sub-chunks that have a mean of their own.
SWAPS = (
    (24, 1, 1), (24, 2, 1), (24, 4, 1), (24, 7, 1), (24, 14, 1), (12, 2, 1), (12, 3, 1),
    (6, 4, 1), (6, 5, 1), (6, 8, 1), (6, 11, 1), (24, 1, 4), (24, 1, 24), (24, 2, 4), (24, 4, 4), (6, 5, 3), (6, 5, 6),
)  # fmt: skip
NO_DROPS = ["moc.drop_off_max=0", "moc.drop_in_rate=0"]
ROWS = {
    "dense": lambda steps: ["moc=dense"],
    "moc_progressive": lambda steps: [progressive(steps)],
    "moc": lambda steps: [],
    "own_shot": lambda steps: ["moc.top_k=0", *NO_DROPS],
    "first_frame": lambda steps: ["moc.candidates=first", "moc.chunk_tokens=24", "moc.top_k=7", *NO_DROPS],
    "random": lambda steps: ["moc.top_k=0", "moc.drop_off_max=0", "moc.drop_in_rate=100", "moc.drop_in_max=5"],
    "moc_of_frames": lambda steps: ["moc.chunk_tokens=24", "moc.top_k=1"],
    "moc_of_half_frames": lambda steps: ["moc.chunk_tokens=12", "moc.top_k=2"],
    "moc_pre_rope": lambda steps: ["moc.descriptor=pre_rope"],
    "moc_lse": lambda steps: ["moc.descriptor_subchunks=3"],
    "moc_lse_of_frames": lambda steps: ["moc.chunk_tokens=24", "moc.top_k=1", "moc.descriptor_subchunks=4"],
    "moc_no_drops": lambda steps: NO_DROPS,
    "moc_no_drops_all_text": lambda steps: ["moc.text_anchor=all", *NO_DROPS],
    "moc_all_text": lambda steps: ["moc.text_anchor=all"],
    "moc_no_own_shot": lambda steps: ["moc.own_anchor=none"],
    "moc_no_text": lambda steps: ["moc.text_anchor=none"],
    "moc_not_causal": lambda steps: ["moc.causal=false"],
    "moc_not_causal_of_four": lambda steps: ["moc.causal=false", "moc.top_k=4"],
    "moc_lse_not_causal_of_four": lambda steps: ["moc.causal=false", "moc.top_k=4", "moc.descriptor_subchunks=3"],
    "moc_dense_target": lambda steps: ["flow.dense_target=0.5"],
    "dense_causal": lambda steps: ["moc.chunk_tokens=48", "moc.top_k=7", *NO_DROPS],
}


def write_record(config: RecallRowsConfig, make_world: Callable[[torch.device], RecallWorld]) -> None:
    """Trains and tests the rows, and writes their record. make_world: returns the world on a device."""
    folder, output = Path(config.folder).resolve(), Path(config.output)
    if not config.rows:
        write_report(read_rows(output), output)
        return
    if config.start:
        open_checkpoint(config.start)  # what cannot be opened is told before a reader learns for minutes
    folder.mkdir(parents=True, exist_ok=True)
    turns = Turns(config, folder)
    with ThreadPoolExecutor(config.at_once or len(config.rows)) as pool:
        trainings = {pool.submit(turns.train, row): row for row in config.rows}
        tester = Tester(config, make_world, folder)  # made while the rows train
        while config.course and not all(training.done() for training in trainings):
            for name in config.rows:
                tester.follow(name)
            time.sleep(1)
        for training in as_completed(trainings):
            minutes = training.result()
            if minutes is None:
                print(f"{trainings[training]} was not begun: too little time was left", flush=True)
                continue
            row = tester.test(trainings[training], minutes)
            put_row(output, row, KEY)
            print(told(row), flush=True)
    write_report(read_rows(output), output)


def told(row: dict) -> str:
    """Returns a row in a line."""
    if "failed" in row:
        return f"{row['row']} failed: {row['failed']}"
    found = brief(row["all"])
    return f"{row['row']}, seed {row['seed']}, step {row['steps_done']}, {row['train_minutes']} min: {found}"


def run_name(row: str, config: RecallRowsConfig) -> str:
    """Returns the name of a row's run."""
    return f"{row}_seed{config.seed}_{config.steps}" + (f"_from_{Path(config.start).name}" if config.start else "")


def arguments(row: str, config: RecallRowsConfig) -> list[str]:
    """Returns the arguments of train.py for a row."""
    steps = [f"trainer.num_steps={config.steps}", f"seed={config.seed}"]
    start = [f"model.path={config.start}"] if config.start else []
    return ["experiment=recall", *config.settings, *start, *steps, *ROWS[row](config.steps)]


class Turns:
    """This object trains rows until the time is over, some of them side by side and the others in their turn."""

    def __init__(self, config: RecallRowsConfig, folder: Path) -> None:
        """Starts the clock."""
        self.config, self.folder = config, folder
        self.end = time.monotonic() + 60 * config.minutes
        self.longest = 0.0  # the minutes that a row took

    def train(self, row: str) -> float | None:
        """Trains a row, or goes on training it, for the time that is left; returns the minutes it took. Returns None
        where a row before took more than is left."""
        left = (self.end - time.monotonic()) / 60
        if left <= self.longest:
            return None
        name, course = run_name(row, self.config), self.config.course
        words = [*arguments(row, self.config), f"output={self.folder}", f"name={name}"]
        words += [f"trainer.checkpoint_every={course}", f"trainer.keep_every={course}"] if course else []
        if self.config.device != "auto":
            words.append(f"parallel.device={self.config.device}")
        minutes = train_for(left, words, self.folder / f"{name}.log")
        self.longest = max(self.longest, minutes)
        return minutes


class Tester:
    """A tester tests the checkpoints of rows with one reader, which it trains or finds in the folder."""

    def __init__(
        self, config: RecallRowsConfig, make_world: Callable[[torch.device], RecallWorld], folder: Path
    ) -> None:
        self.config, self.folder = config, folder
        self.parallel = Parallel(ParallelConfig(config.device))
        start = time.monotonic()
        world = make_world(self.parallel.device)
        print(f"the world is painted, {time.monotonic() - start:.0f} s", flush=True)
        self.reader = kept_reader(world, folder / "reader.safetensors", config.reader_steps)
        self.accuracy = accuracy(self.reader, world, min(config.scenes, 512))
        self.speed = composing_speed(world, config.batch)
        print(f"{self.speed:.0f} scenes a second are composed and encoded, beside the trainings", flush=True)
        print(f"reader on true shots, {time.monotonic() - start:.0f} s: {self.accuracy}", flush=True)
        self.bench = RecallBench(world, self.reader, self.parallel, config.sampling_steps, batch=config.batch)
        self.courses: dict[str, dict[str, dict]] = {row: {} for row in config.rows}  # by the checkpoint's name

    def follow(self, row: str) -> None:
        """Tests the checkpoints of a course that are new."""
        for complete in sorted((self.folder / run_name(row, self.config)).glob(f"checkpoints/*/{COMPLETE}")):
            checkpoint, course = complete.parent, self.courses[row]
            if checkpoint.name not in course:
                model, moc, flow = self._loaded(checkpoint)
                found = summary(self.bench.run(model, moc, flow, self.config.batch))
                step = {"step": json.loads((checkpoint / "state.json").read_text())["step"]}
                mass = self.bench.mass(model, moc, routing_of(moc), flow)
                course[checkpoint.name] = step | brief(found) | {"precision": found.get("precision"), "mass": mass}

    def _loaded(self, checkpoint: Path) -> tuple[nn.Module, MoCConfig, Flow]:
        contents = Contents(checkpoint)
        model: nn.Module = load_model(contents)
        return model.to(self.parallel.device), contents.moc, contents.own_flow

    def test(self, row: str, minutes: float) -> dict:
        name = run_name(row, self.config)
        checkpoint = find_checkpoint(self.folder / name)
        if checkpoint is None:
            log = (self.folder / f"{name}.log").read_text()
            return {"row": row, "seed": self.config.seed, "steps": self.config.steps, "failed": log[-2000:]}
        model, moc, flow = self._loaded(checkpoint)
        pack(checkpoint / "ema", self.folder / f"{name}.tar.gz")  # packed before the tests, which may be cut off
        start = time.monotonic()
        tally = self.bench.run(model, moc, flow, self.config.scenes)
        found: dict[str, Any] = {"all": summary(tally)}
        if self.config.look_alikes:
            twins = self.bench.run(model, moc, flow, self.config.look_alikes, look_alikes=True)
            found["look_alikes"] = summary(twins)
        for shots in self.config.shots:
            tally = self.bench.run(model, moc, flow, max(1, self.config.scenes // 8), shots=shots)
            found.setdefault("shots", {})[str(shots)] = brief(summary(tally))
        if moc.dense and self.config.swaps:
            for values in SWAPS:
                swap = dict(zip(("chunk_tokens", "top_k", "descriptor_subchunks"), values, strict=True))
                tally = self.bench.run(model, MoCConfig.from_dict(swap), flow, max(1, self.config.scenes // 8))
                found.setdefault("swapped", []).append(swap | brief(summary(tally)))
        routing = routing_of(moc)
        found["mass"] = self.bench.mass(model, moc, routing, flow)
        found["mass_routes"] = f"{count_of(routing.top_k, 'chunk')} of {routing.chunk_tokens} tokens"
        if self.config.course:
            self.follow(row)
            found["course"] = list(self.courses[row].values())
        state = json.loads((checkpoint / "state.json").read_text())
        metrics = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return {
            "row": row,
            "seed": self.config.seed,
            "steps": self.config.steps,
            "start": Path(self.config.start or "").name,
            "steps_done": state["step"],
            "scenes_seen": state["data"]["position"],
            "train_minutes": round(minutes, 2),
            "test_seconds": round(time.monotonic() - start, 1),
            "parameters": sum(p.numel() for p in model.parameters()),
            "moc": moc.to_dict(),
            "train_loss": next((m["loss"] for m in reversed(metrics) if "loss" in m), None),
            "reader": self.accuracy,
            "composed_per_second": round(self.speed),
            **found,
            "command": " ".join(["python train.py", *arguments(row, self.config)]),
            "machine": machine(self.parallel),
            "beside": [other for other in self.config.rows if other != row],
        }


def composing_speed(world: RecallWorld, batch: int) -> float:
    """Returns how many scenes a second become latents, of a few batches."""
    start, repeats = time.monotonic(), 5
    for number in range(repeats):
        latents = world.encode_latents(draw_scenes(world.config, range(number * batch, (number + 1) * batch)))
    latents.sum().item()  # waits for the device
    return repeats * batch / (time.monotonic() - start)


def routing_of(moc: MoCConfig) -> MoCConfig:
    """Returns the attention whose routes a mass is told of: a model's own or, for one that is dense or chooses none by
    score, that of the MoC row."""
    return moc if moc.top_k and not moc.dense else MoCConfig(chunk_tokens=6, top_k=5)


def brief(found: dict) -> dict:
    """Returns a summary without its tables."""
    return {name: found[name] for name in ("readings", "recall", "interval", "sparsity", "loss", "region_loss")}


def pack(folder: Path, archive: Path) -> None:
    """Packs a model's folder with its weights in bf16."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            target = Path(scratch, file.name)
            if file.suffix == ".safetensors":
                save_file({key: value.bfloat16() for key, value in load_file(file).items()}, target)
            else:
                target.write_bytes(file.read_bytes())
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for file in sorted(Path(scratch).iterdir()):
                tar.add(file, file.name)
