"""This module measures how fast and how right data comes: steps that wait for the loader, decoding, shots found against
truth."""

import gc
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import moc
from data.cache.writer import NULL_GLOBAL, NULL_SHOT, CacheWriter, EncodedScene, finish
from data.loading.dataset import DataConfig
from data.loading.loader import build_loader
from data.manifest import SceneRecord, ShotRecord, load_manifest, write_manifest
from data.media.decode import open_video
from data.media.index import index_video
from data.media.resize import fit
from data.media.write import write_video
from data.prepare.scan import scan_video
from data.prepare.shots import DETECTORS, Span, build_detector
from data.prepare.sources import MANIFEST
from data.records import write_whole
from evaluation.benchmarks.measurements import cpu_name
from evaluation.films.cuts import cut_accuracy
from moc.checkout import commit
from moc.errors import UserError, check_least

_PIECE, _MARGIN = (10, 40), 2  # frames in a piece of a shot; frames left out at the shot's ends


@dataclass
class DataBenchmarkConfig:
    """These settings say what is measured; samples are as in the paper: 8 shots of 480x832, about 180k tokens, T5's
    text.

    folder: where the made-up cache goes, about 250 MB.
    output: the record to write.
    film: a video whose decoding is measured too; null is none.
    truth: folders with a manifest whose shots are true, to measure detectors on.
    films: videos to measure detectors on, joined by known cuts.
    scenes: how many the cache has.
    shots: how many a scene has.
    latent: channels, frames, height and width of a shot's latent; the default is 53 frames of 480x832.
    text: rows and width of a caption's features.
    steps: how many are measured.
    step_seconds: how long a training step is taken to last.
    workers: processes that read samples.
    detectors: the finders of shots to measure.
    """

    folder: str
    output: str = "docs/benchmarks/data.json"
    film: str | None = None
    truth: list[str] = field(default_factory=list)
    films: list[str] = field(default_factory=list)
    scenes: int = 8
    shots: int = 8
    latent: list[int] = field(default_factory=lambda: [16, 14, 60, 104])
    text: list[int] = field(default_factory=lambda: [128, 4096])
    steps: int = 40
    step_seconds: float = 0.2
    workers: int = 2
    detectors: list[str] = field(default_factory=lambda: list(DETECTORS))

    def __post_init__(self) -> None:
        check_least(self, "", 1, "scenes", "shots", "steps")
        check_least(self, "", 0, "step_seconds", "workers")


def write_record(config: DataBenchmarkConfig) -> None:
    """Measures the loader, decoding and cuts, writes the record and prints its rows."""
    write_random_cache(config)
    rows = [measure_loader(config)]
    folder = Path(config.folder)
    truths = [Path(truth) for truth in config.truth]
    if config.films:
        truths.append(join_films([Path(film) for film in config.films], folder / "joined"))
    for detector in config.detectors:
        if config.film:
            rows.append(measure_decoding(Path(config.film), detector, folder / "scans"))
        rows += [measure_cuts(truth, detector, folder / "scans") for truth in truths]
    header = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_whole(Path(config.output), json.dumps({"header": header, "rows": rows}, indent=1).encode())
    print(json.dumps(rows, indent=1))


def write_random_cache(config: DataBenchmarkConfig) -> Path:
    """Writes a cache of random latents and text, once."""
    folder = Path(config.folder)
    recipe = {"codec": "random", "text": "random"}
    writer = CacheWriter(folder, recipe)
    generator = torch.Generator().manual_seed(0)

    def random(shape: list[int]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for key in (NULL_GLOBAL, NULL_SHOT):
        writer.add_text(random([1, config.text[1]]), "null caption", key)
    keys = [f"{config.latent}{config.shots}-{i}" for i in range(config.scenes)]
    for key in keys:
        if key not in writer.done:
            latents = [random(config.latent) for _ in range(config.shots)]
            text = [random(config.text) for _ in range(1 + config.shots)]
            writer.add(EncodedScene(key, key, "multi", latents, [text]))
    writer.flush()
    finish(folder, recipe, keys)
    return folder


def measure_loader(config: DataBenchmarkConfig) -> dict:
    """Takes steps of a fixed time, one sample each, on the loader; returns the share of the time spent waiting for
    data, and the processor time of this process in it, which is what the wait comes to on a machine that is not busy
    otherwise."""
    _, frames, height, width = config.latent
    tokens = config.shots * (frames * (height // 2) * (width // 2) + config.text[0]) + config.text[0]
    data = DataConfig(path=config.folder, batch_tokens=tokens, workers=config.workers)
    steps = iter(build_loader(data, moc.StreamSpec(), chunk_tokens=1280))
    for _ in range(2 * config.workers):  # the time to start the workers is not measured
        batch = next(steps)
    gc.collect()
    gc.freeze()  # collecting torch's objects takes tens of milliseconds that are not the loader's
    waits, busy = [], 0.0
    for _ in range(config.steps):
        time.sleep(config.step_seconds)
        del batch  # the time to free a batch is not measured
        start, busy_start = time.perf_counter(), time.process_time()
        batch = next(steps)
        waits.append(time.perf_counter() - start)
        busy += time.process_time() - busy_start
    total = sum(waits) + config.steps * config.step_seconds
    return {
        "what": "loader",
        "tokens": batch[0].layout.num_tokens,
        "workers": config.workers,
        "step_seconds": config.step_seconds,
        "mean_wait_seconds": sum(waits) / len(waits),
        "max_wait_seconds": max(waits),
        "wait_share": sum(waits) / total,
        "busy_share": busy / total,
    }


def measure_decoding(film: Path, detector: str, folder: Path) -> dict:
    """Returns frames a second of decoding a film whole, and of finding its shots."""
    scan = scan_video(film.parent, film.name, folder, build_detector(detector), progress=True)
    if scan.index is None:
        raise scan.error or UserError(f"{film} was not scanned")
    return {
        "what": "scan",
        "film": film.name,
        "size": [scan.index.height, scan.index.width],
        "frames": scan.index.num_frames,
        "detector": detector,
        "shots": len(scan.spans or ()),
        "decode_frames_per_second": scan.index.num_frames / scan.decode_seconds,
        "detect_frames_per_second": scan.index.num_frames / scan.detect_seconds,
    }


def measure_cuts(truth: Path, detector: str, folder: Path) -> dict:
    """Compares the cuts found in the videos of a manifest with the shots that it gives; all videos count as one."""
    found: list[int] = []
    true: list[int] = []
    total = 0
    finder = build_detector(detector)
    for scene in load_manifest(truth / MANIFEST):
        scan = scan_video(truth, scene.path, folder, finder)
        if scan.index is None or scan.spans is None:
            raise scan.error or UserError(f"{scene.path} was not scanned")
        found += [total + start for start, _ in scan.spans[1:]]
        true += [total + shot.start for shot in scene.shots[1:] if shot.cut]
        total += scan.index.num_frames
    accuracy = cut_accuracy(found, true, total)
    return {"what": "cuts", "truth": truth.name, "detector": detector, "frames": total, "cuts": len(true)} | asdict(
        accuracy
    )


def join_films(films: Sequence[Path], folder: Path, num_cuts: int = 60) -> Path:
    """Makes a film of pieces of real shots joined by hard cuts, and its manifest. Pieces keep off the ends of the shots
    that PySceneDetect finds in `films`, and a shot never follows itself."""
    readers = [open_video(film) for film in films]
    pool = [(reader, span) for reader, film in zip(readers, films, strict=True) for span in _long_shots(film)]
    rng = random.Random(0)
    pieces: list[np.ndarray] = []
    previous = -1
    while len(pieces) <= num_cuts:
        choice = rng.choice([i for i in range(len(pool)) if i != previous])
        reader, (start, end) = pool[choice]
        length = rng.randint(_PIECE[0], min(_PIECE[1], end - start - 2 * _MARGIN))
        first = rng.randint(start + _MARGIN, end - _MARGIN - length)
        video = fit(reader.read(first, first + length), (144, 256))
        pieces.append(((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy())
        previous = choice
    edges = np.cumsum([0, *(len(piece) for piece in pieces)]).tolist()
    write_video(folder / "joined.mp4", np.concatenate(pieces), fps=24)
    shots = tuple(ShotRecord(start, end) for start, end in pairwise(edges))
    write_manifest(folder / MANIFEST, [SceneRecord(id="joined", video="joined.mp4", shots=shots)])
    return folder


def _long_shots(film: Path) -> list[Span]:
    finder = build_detector("adaptive").finder()
    index_video(film, finder.see)
    return [(start, end) for start, end in finder.spans() if end - start >= _PIECE[0] + 2 * _MARGIN]
