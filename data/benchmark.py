"""How fast the data comes: training steps kept waiting by the loader, and frames a second of decoding and detection."""

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import moc
from data.cache import NULL_GLOBAL, NULL_SHOT, CacheWriter, EncodedScene, finish
from data.dataset import DataConfig
from data.loader import build_loader
from data.scan import scan_video
from data.shots import build_detector


@dataclass
class DataBenchmarkConfig:
    """Samples as in the paper: 8 shots of 480x832, about 180k tokens, T5's text. film: also measure decoding it."""

    folder: str = ""  # where the made-up cache goes
    output: str = "docs/benchmarks/data.json"
    film: str = ""
    scenes: int = 8
    shots: int = 8
    latent: list[int] = field(default_factory=lambda: [16, 14, 60, 104])  # C, T, H, W of a shot
    text: list[int] = field(default_factory=lambda: [128, 4096])  # rows, text_dim of a caption
    steps: int = 40
    step_seconds: float = 0.2
    workers: int = 2
    detector: str = "transnetv2"

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("say folder=DIR, a place for the made-up cache")


def write_random_cache(config: DataBenchmarkConfig) -> Path:
    """A cache of random latents and text, once."""
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
    """Steps of a fixed time, one sample each, on the loader: the share of the time spent waiting for data, and the
    processor time of this process in it, which is what the wait comes to on a machine that is not busy otherwise."""
    _, frames, height, width = config.latent
    tokens = config.shots * (frames * (height // 2) * (width // 2) + config.text[0]) + config.text[0]
    data = DataConfig(path=config.folder, batch_tokens=tokens, workers=config.workers)
    steps = iter(build_loader(data, moc.StreamSpec(), chunk_tokens=1280))
    for _ in range(2 * config.workers):  # starting the workers is not a step's time
        next(steps)
    gc.collect()
    gc.freeze()  # as the trainer does: a collection over all of torch's objects takes tens of milliseconds
    waits, busy = [], 0.0
    for _ in range(config.steps):
        time.sleep(config.step_seconds)
        start, busy_start = time.perf_counter(), time.process_time()
        next(steps)
        waits.append(time.perf_counter() - start)
        busy += time.process_time() - busy_start
    total = sum(waits) + config.steps * config.step_seconds
    return {
        "what": "loader",
        "tokens": tokens,
        "workers": config.workers,
        "step_seconds": config.step_seconds,
        "mean_wait_seconds": sum(waits) / len(waits),
        "max_wait_seconds": max(waits),
        "wait_share": sum(waits) / total,
        "busy_share": busy / total,
    }


def measure_decoding(film: Path, detector: str, folder: Path) -> dict:
    """Frames a second of decoding a film whole, and of finding its shots."""
    scan = scan_video(film.parent, film.name, folder, build_detector(detector), progress=True)
    if scan.index is None:
        raise scan.error or ValueError(f"{film} was not scanned")
    return {
        "what": "scan",
        "film": film.name,
        "frames": scan.index.num_frames,
        "size": [scan.index.height, scan.index.width],
        "decode_frames_per_second": scan.index.num_frames / scan.decode_seconds,
        f"{detector}_frames_per_second": scan.index.num_frames / scan.detect_seconds,
    }
