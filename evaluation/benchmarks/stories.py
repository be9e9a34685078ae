"""This module measures what a trained recall model remembers over whole stories, and in ways it was not trained for."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.loading.endless import RecallWorld
from evaluation.benchmarks.measurements import machine, markdown_table, measured_on, put_row, read_rows
from evaluation.recall.agreement import make_stories, story_scores
from evaluation.recall.bench import RecallBench, accuracy, check_shots, kept_reader, summary
from moc import MoCConfig
from moc.diffusion import SamplingConfig
from moc.errors import check_among, check_least
from moc.files import write_whole
from moc.training import Parallel, ParallelConfig
from models import load_model
from models.checkpoints.contents import Contents
from models.checkpoints.opening import open_checkpoint

WAYS = ("joint", "staggered", "shot_by_shot")  # options of configs/sampler
KEPT = ("docs/checkpoints/recall_moc",)
AFTER_TRUTH = ("recall", "mass")  # measurements that follow true shots and make no stories
KEY = ("checkpoint", "changed", "shots", "way", "count")  # what tells a row of the record from others


@dataclass(frozen=True)
class StoriesConfig:
    """These settings say which models to test and how.

    checkpoints: models of experiment=recall; without any, the table of the output's rows is made anew.
    ways: names among joint, staggered and shot_by_shot, and `recall` and `mass`, of the last shot after a true history.
    shots: how many shots a story has; each number is tested.
    stories: how many are made in each way.
    scenes: how many the ways `recall`, in which each gives two readings, and `mass` take.
    sampling_steps: those of each shot.
    batch: scenes that the way `recall` samples at a time, and that the reader learns from.
    reader_steps, reader_width: how long the reader is trained, and how wide it is; it is kept in `folder`.
    moc: settings of attention; null takes the checkpoint's.
    settings: those of train.py that the models were trained with, besides experiment=recall.
    folder: where the reader is, or goes.
    output: the record to write.
    device: as in `moc.training.ParallelConfig`.
    """

    checkpoints: list[str] = field(default_factory=lambda: list(KEPT))
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    shots: list[int] = field(default_factory=lambda: [8])
    stories: int = 96
    scenes: int = 640
    sampling_steps: int = 10
    batch: int = 32
    reader_steps: int = 1500
    reader_width: int = 256
    moc: dict[str, Any] = field(default_factory=MoCConfig.unset)
    settings: list[str] = field(default_factory=list)
    folder: str = "outputs/recall"
    output: str = "docs/benchmarks/stories.json"
    device: str = "auto"

    def __post_init__(self) -> None:
        counts = ("stories", "scenes", "sampling_steps", "batch", "reader_steps", "reader_width")
        check_least(self, "", 1, *counts)
        check_among(self, "ways", (*AFTER_TRUTH, *WAYS))
        check_shots(self.shots)


def write_record(
    config: StoriesConfig, make_world: Callable[[torch.device], RecallWorld], lags: Mapping[str, float]
) -> None:
    """Tests checkpoints and writes their record.

    make_world: returns the world on a device. lags: those of WAYS, by name.
    """
    folder, output = Path(config.folder).resolve(), Path(config.output)
    if not config.checkpoints:
        write_tables(read_rows(output), output)
        return
    for checkpoint in config.checkpoints:
        open_checkpoint(checkpoint)  # what cannot be opened is told before a reader learns for minutes
    folder.mkdir(parents=True, exist_ok=True)
    parallel = Parallel(ParallelConfig(config.device))
    world = make_world(parallel.device)
    file = folder / "reader.safetensors"
    reader = kept_reader(world, file, config.reader_steps, config.reader_width, config.batch)
    read_right = accuracy(reader, world, min(config.scenes, 512), config.batch)
    print(f"reader on true shots: {read_right}", flush=True)
    header = {"reader": read_right, "steps": config.sampling_steps, "machine": machine(parallel)}
    bench = RecallBench(world, reader, parallel, config.sampling_steps, batch=config.batch)
    for checkpoint, shots, way in product(config.checkpoints, config.shots, config.ways):
        start = time.monotonic()
        found = test(checkpoint, shots, way, bench, config, lags)
        count = config.scenes if way in AFTER_TRUTH else config.stories
        row = {"checkpoint": checkpoint, "changed": changed(config), "shots": shots, "way": way, "count": count}
        row |= found | {"seconds": round(time.monotonic() - start, 1), "command": shlex.join(sys.argv)}
        print(json.dumps(row), flush=True)
        write_tables(put_row(output, row, KEY, header), output)


def test(
    checkpoint: str, shots: int, way: str, bench: RecallBench, config: StoriesConfig, lags: Mapping[str, float]
) -> dict[str, Any]:
    """Returns what a checkpoint remembers in one way of sampling, as plain numbers."""
    contents = Contents(Path(checkpoint))
    attention, flow = contents.moc.override(config.moc), contents.own_flow
    model: Any = load_model(checkpoint)
    model.to(bench.parallel.device).eval()
    if way == "mass":
        return {"mass": bench.mass(model, contents.moc, attention, flow, config.scenes)}
    if way == "recall":
        return summary(bench.run(model, attention, flow, config.scenes, shots=shots))
    sampling = SamplingConfig(config.sampling_steps, guidance_scale=1.0, lag=lags[way])
    made = make_stories(bench.world, config.stories, shots, model, attention, flow, sampling, bench.parallel)
    return story_scores(*made, bench.reader)


def changed(config: StoriesConfig) -> str:
    """Returns the settings of attention that are not the checkpoint's, as they are given; "" where all are."""
    return " ".join(f"moc.{key}={value}" for key, value in config.moc.items() if value is not None)


def write_tables(rows: list[dict], output: Path) -> None:
    """Writes the tables of a record beside it."""
    reader = rows[0]["reader"]
    stories = [row for row in rows if row["way"] not in AFTER_TRUTH]
    last, mass = ([row for row in rows if row["way"] == way] for way in AFTER_TRUTH)
    head = ["model", "shots", "way", "stories", "same minus different names", "same", "different", "name right",
            "place right"]  # fmt: skip
    distances = sorted({int(distance) for row in stories for distance in row["by_distance"]})
    sections = [
        "# Whole stories, and more shots than in training\n\n"
        f"{measured_on(row['machine'] for row in rows)} Made by scripts/benchmark_stories.py. The reader tells fur and "
        f"outfit of true shots to {min(reader['fur'], reader['outfit']):.3f} at least. Intervals hold 95 %.",
        "## Agreement of looks\n\n" + markdown_table(head, [
            [_model(row), row["shots"], row["way"], row["stories"], _interval(row["difference"]), f"{row['same']:.3f}",
             f"{row['different']:.3f}", f"{row['name']:.3f}", f"{row['place']:.3f}"] for row in stories]),
        "## The same, by how many shots ago the name was last shown\n\n" + markdown_table(
            ["model", "shots", "way", *map(str, distances)],
            [[_model(row), row["shots"], row["way"], *(_at(row, distance) for distance in distances)]
             for row in stories]),
        *(["## The last shot after a true history\n\n" + markdown_table(
            ["model", "shots", "readings", "recall", "sparsity of video pairs"],
            [[_model(row), row["shots"], row["readings"], _interval([row["recall"], *row["interval"]]),
              f"{row['sparsity']:.1%}"] for row in last])] if last else []),
        *(["## The mass of dense attention that routes keep\n\nOf what the tokens of the returning character spend on "
           "other shots: in the head that spends most there, and in all.\n\n" + markdown_table(
            ["model", "scenes", "the head's mass elsewhere", "of it on the routes", "on the best as many", "of all on "
             "the routes", "on the best as many"],
            [[_model(row), row["count"], *(f"{share:.3f}" for share in _kept(row["mass"]))] for row in mass])]
          if mass else []),
        "## Commands\n\n" + "\n".join(dict.fromkeys(f"- `python {row['command']}`" for row in rows)),
    ]  # fmt: skip
    write_whole(output.with_suffix(".md"), ("\n\n".join(sections) + "\n").encode())


def _model(row: dict) -> str:
    return " ".join(filter(None, [Path(row["checkpoint"]).name, row["changed"]]))


def _kept(mass: dict) -> list[float]:
    """Returns the mass elsewhere of the head with the most, the shares of it that routes keep and could keep at best,
    and these shares over all heads."""
    elsewhere, kept, best = (np.ravel(mass[name]) for name in ("elsewhere", "kept", "best"))
    head, total = elsewhere.argmax(), elsewhere.sum()
    return [elsewhere[head], kept[head], best[head], (elsewhere * kept).sum() / total, (elsewhere * best).sum() / total]


def _interval(values: list[float]) -> str:
    value, low, high = values
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _at(row: dict, distance: int) -> str:
    found = row["by_distance"].get(str(distance))
    return f"{_interval(found['difference'])}, {found['pairs']} pairs" if found else ""
