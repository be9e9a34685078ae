"""This module measures how long films take to sample on a GPU, and how much memory: dense against MoC, in each way."""

import resource
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from evaluation.benchmarks.measurements import header, put_row
from evaluation.benchmarks.sampling_report import page, rival
from evaluation.benchmarks.timing import check_gpu
from moc import Execution, MoCConfig
from moc.diffusion import Flow, Progress, SamplingConfig, Story, plan_steps, sample_shots
from moc.diffusion.sides import Side, Stream
from moc.errors import UserError, check_among, check_least
from moc.files import write_whole
from moc.kernels import dense
from moc.statistics import RoutingMap
from moc.training import Parallel, ParallelConfig
from models import CodecConfig, ModelConfig, build_codec, build_model, move_model
from models.drawn import draw_model
from models.encoders.codec import CodecKind
from models.frozen import Base, multiply_in_fp8, replace_linears
from models.stream import StreamModel

# What each mode sets of the sampler besides the lag: staggered and joint have their own, and films are extended shot by
# shot.
MODES: dict[str, dict[str, Any]] = {
    "staggered": {},
    "joint": {},
    "extend": {"offload_cache": False},
    "extend_uncached": {"cache": False},
    "extend_offload": {"offload_cache": True},
    "decode": {},
}
IMPLEMENTATIONS = ("moc", "dense")
CHANNELS, TEXT_TOKENS = 16, 64  # channels of a latent; tokens of each caption
WARM_UP = (4, 5, 7)  # latent frames of shots; kernels compiled for these lengths serve any length
KEY = ("gpu", "model", "weights", "top_k", "film", "impl", "mode", "guidance_scale", "context_shots", "processes")

Shots = tuple[int, ...]


@dataclass(frozen=True)
class Film:
    """A film to sample has these sizes. frames: latent frames of each shot. size: height, width of a latent.
    chunk_tokens: a chunk's."""

    frames: tuple[int, ...]
    size: tuple[int, int]
    chunk_tokens: int

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        return [(CHANNELS, frames, *self.size) for frames in self.frames]


FILMS = {
    "paper": Film((36,) * 8, (40, 64), 1280),
    "wan": Film((31,) + (30,) * 7, (60, 104), 1560),
    # As many frames, in shots no longer than those that Wan was trained on.
    "wan_12": Film((21,) + (20,) * 11, (60, 104), 1560),
    "wan_81": Film((21,) * 2, (60, 104), 1560),  # two shots of 81 frames
    "tiny": Film((2,) * 3, (4, 6), 6),  # only to try the benchmark
}


@dataclass(frozen=True)
class SamplingBenchmarkConfig:
    """These settings say what to measure.

    model: the model and its sizes.
    moc: what attention attends to; the size of chunks is the film's.
    execution: how it is computed.
    parallel: device and precision, and how several processes make a film.
    weights, fp8_matmuls, swap_blocks: as in `film.filmmaker.FilmmakerConfig`. The error of weights in fewer bytes is
        not measured where blocks are swapped.
    sampler: how films are sampled; each mode sets the lag and what is kept of finished shots.
    films: names among FILMS.
    impls: moc, dense or both.
    modes: names among MODES; of those that extend dense attention has one, in which it computes all shots again.
    timed: how many steps of each stream are taken.
    text_dim: the width of the captions' features.
    vae_dim: the width of the codec that decodes.
    output: the record to write.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    moc: MoCConfig = field(default_factory=MoCConfig)
    execution: Execution = field(default_factory=Execution)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    weights: Base | None = None
    fp8_matmuls: bool = False
    swap_blocks: int = 0
    sampler: SamplingConfig = field(default_factory=SamplingConfig)
    films: list[str] = field(default_factory=lambda: ["paper"])
    impls: list[str] = field(default_factory=lambda: list(IMPLEMENTATIONS))
    modes: list[str] = field(default_factory=lambda: list(MODES))
    timed: int = 3
    text_dim: int = 4096
    vae_dim: int = 96
    output: str = "docs/benchmarks/sampling.json"

    def __post_init__(self) -> None:
        check_least(self, "", 1, "timed")
        check_least(self, "", 0, "swap_blocks")
        for name, known in (("films", FILMS), ("impls", IMPLEMENTATIONS), ("modes", MODES)):
            check_among(self, name, known)


@dataclass
class Taken:
    """These are the steps of one stream: their seconds, how many of these the model took, and the peak of memory in
    bytes."""

    seconds: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def usual(self) -> float:
        """Returns the seconds of a step that has nothing to remember."""
        return median(self.seconds[1:] or self.seconds)


class Clocked:
    """This wraps a model and tells how long its forwards took on the device, and whether one had a cache."""

    def __init__(self, model: StreamModel, on_gpu: bool) -> None:
        self.model, self.on_gpu, self.had_cache = model, on_gpu, False
        self._spans: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        start = self._now()
        out = self.model(*args, **kwargs)
        self._spans.append((start, self._now()))
        self.had_cache = kwargs.get("cache") is not None
        return out

    def seconds(self) -> float:
        """Returns those since it was last asked; the device must be done."""
        took = sum(start.elapsed_time(end) / 1e3 if self.on_gpu else end - start for start, end in self._spans)
        self._spans.clear()
        return took

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class EnoughError(Exception):
    """This error says that all is timed."""


def write_record(config: SamplingBenchmarkConfig, lags: Mapping[str, float]) -> None:
    """Measures the films in each mode and writes a row as soon as it is measured. lags: by way of sampling."""
    check_gpu(config.parallel.device)
    bench = Bench(config, lags)
    for name in config.films:
        for impl in config.impls:
            bench.film(name, impl)
        if "decode" in config.modes and bench.parallel.is_main:
            bench.add(name, "", "decode", decode(FILMS[name], config.vae_dim, bench.parallel))
    bench.parallel.close()


class Bench:
    """A bench times a model and keeps the record. kernel: the fastest dense one that is present."""

    def __init__(self, config: SamplingBenchmarkConfig, lags: Mapping[str, float]) -> None:
        self.config, self.lags, self.parallel = config, lags, Parallel(config.parallel)
        device, dtype = self.parallel.device, self.parallel.dtype
        base, exact = config.weights or Base.fp32, None
        if config.swap_blocks:
            model = draw_model(config.model, CHANNELS, config.text_dim, device, "cpu", base, dtype)
            model.execution = config.execution
        else:
            model = self._whole_model()
            exact = self._velocity(model) if config.weights else None
            replace_linears(model, base)
        if config.fp8_matmuls:
            multiply_in_fp8(model, device)
        self.error = None if exact is None else float((self._velocity(model) - exact).norm() / exact.norm())
        moved = move_model(model, self.parallel, swap_blocks=config.swap_blocks)
        self.model = Clocked(moved, device.type == "cuda")  # type: ignore[arg-type]
        head_dim = config.model.dim // config.model.num_heads
        self.kernel = dense.choose(torch.empty(1, 1, head_dim, device=device, dtype=dtype)).name

    def _whole_model(self) -> StreamModel:
        """Returns a model on the device, its linears not yet frozen."""
        config, device, dtype = self.config, self.parallel.device, self.parallel.dtype
        with device:
            model = build_model(config.model, latent_channels=CHANNELS, text_dim=config.text_dim)
        wide = set[str](model._keep_in_fp32_modules or ())
        for weight_name, weight in model.named_parameters():  # one by one, as a checkpoint is loaded
            if not wide & set(weight_name.split(".")):
                weight.data = weight.data.to(dtype)
        model.execution = config.execution
        return model

    @torch.no_grad()
    def _velocity(self, model: StreamModel) -> Tensor:
        """Returns what a model says of two short shots, which are the same in every call."""
        film, device, draw = FILMS[self.config.films[0]], self.parallel.device, torch.Generator().manual_seed(0)
        latents = [torch.randn(CHANNELS, 3, *film.size, generator=draw).to(device) for _ in range(2)]
        text = [torch.randn(TEXT_TOKENS, self.config.text_dim, generator=draw).to(device) for _ in range(3)]
        moc = replace(self.config.moc, chunk_tokens=film.chunk_tokens)
        with self.parallel.autocast():
            side = Side(model, model.stream, text, [True, True])
            out = side.velocity(Stream([0, 1], latents, torch.tensor([0.5, 0.5])), moc)
        return torch.stack(list(out.values()))

    def film(self, name: str, impl: str) -> None:
        """Measures the rows of a film in one implementation; streams that are computed whole are timed once for all
        modes."""
        film, whole = FILMS[name], dict[Shots, Taken]()
        moc = replace(self.config.moc, dense=impl == "dense", chunk_tokens=film.chunk_tokens)
        for mode in self.config.modes:
            lag = self.lags.get(mode, self.lags["shot_by_shot"])
            sampler = replace(self.config.sampler, lag=lag, **MODES[mode])
            remembers = sampler.keeps_history and moc.flows_forward
            if mode == "decode" or (moc.dense and mode != rival(mode)):
                continue
            streams = Counter(tuple(step.shots) for step in plan_steps(len(film.frames), (), sampler, Flow()))
            taken, problem = {} if remembers else whole, ""
            try:
                if not streams.keys() <= taken.keys():
                    for frames in WARM_UP:
                        short = replace(film, frames=(min(frames, film.frames[0]),) * 2)
                        self.take_steps(short, moc, sampler)
                    taken.update(self.take_steps(film, moc, sampler))
            except (torch.OutOfMemoryError, UserError) as error:
                problem = str(error).partition(". GPU")[0]
            if self.parallel.is_main:
                row = {"problem": problem} if problem else summary(streams, taken)
                history = "kept" if remembers and self.model.had_cache else "computed again"
                self.add(name, impl, mode, row | {"history": history})
            if self.model.on_gpu:
                torch.cuda.empty_cache()

    def take_steps(self, film: Film, moc: MoCConfig, sampler: SamplingConfig) -> dict[Shots, Taken]:
        """Takes `timed` steps of each stream of a film, in their order: a film of fewer steps, or its beginning."""
        timed, num_shots, parallel = self.config.timed, len(film.frames), self.parallel
        enough = (steps for steps in count(timed) if sampler.lag == 0 or round(sampler.lag * steps) >= timed)
        sampler = replace(sampler, steps=next(enough))
        steps = plan_steps(num_shots, (), sampler, Flow())
        taken = {tuple(step.shots): Taken() for step in steps}
        last = tuple(steps[-1].shots)
        text = [torch.randn(TEXT_TOKENS, self.config.text_dim, device=parallel.device) for _ in range(num_shots + 1)]
        story, routing_map = Story(film.shapes, text, text), RoutingMap(num_shots, parallel.sum_over_heads)
        self.model.seconds()
        started = self._done()

        def on_step(progress: Progress) -> None:
            nonlocal started
            shots, now = tuple(steps[progress.step - 1].shots), self._done()
            one = taken[shots]
            one.seconds.append(now - started)
            one.inside.append(self.model.seconds())
            if self.model.on_gpu:
                one.peak = max(one.peak, torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()
            if shots == last and len(one.seconds) == timed:
                raise EnoughError
            started = self._done()

        if self.model.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        settings = (self.model, self.model.stream, moc, Flow(), story, sampler, on_step, routing_map)
        try:
            with parallel.autocast():
                for _ in sample_shots(*settings):
                    pass
        except EnoughError:
            pass
        return taken

    def _done(self) -> float:
        """Returns the time when the device is done."""
        if self.model.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, name: str, impl: str, mode: str, measured: Mapping[str, Any]) -> None:
        """Puts a row into the record."""
        config, film = self.config, FILMS[name]
        sizes = {size: asdict(config.model)[size] for size in ("dim", "num_layers", "num_heads", "ffn_dim")}
        film_made = {"film": name, "impl": impl, "mode": mode, "processes": self.parallel.world_size}
        setup = {
            "weights": weights_in_words(config),
            "top_k": config.moc.top_k, "guidance_scale": config.sampler.usual_scale,
            "context_shots": config.sampler.context_shots, "steps": config.sampler.steps,
            "tokens": sum(film.frames) * film.size[0] * film.size[1] // 4,
        }  # fmt: skip
        host = {"host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        error = {} if self.error is None else {"error": round(self.error, 4)}
        row = film_made | setup | error | dict(measured) | host
        print(row, flush=True)
        head = header() | {"dense_kernel": self.kernel, "model": sizes, "precision": str(self.parallel.dtype)}
        output = Path(config.output)
        write_whole(output.with_suffix(".md"), page(put_row(output, row, KEY, head)).encode())


def weights_in_words(config: SamplingBenchmarkConfig) -> str:
    """Returns how the weights are kept; "" where they are on the GPU, as computed."""
    said = [str(config.weights)] if config.weights else []
    said += ["fp8 matmuls"] * config.fp8_matmuls
    return ", ".join([*said, *([f"{config.swap_blocks} blocks swapped"] if config.swap_blocks else [])])


def summary(streams: Mapping[Shots, int], taken: Mapping[Shots, Taken]) -> dict[str, Any]:
    """Returns a row, from the steps taken of each stream. streams: how many steps of a whole film see each.

    step_seconds: of the usual step of the last stream. film_seconds: of the whole film, extrapolated: of each stream
    one first step and so many usual ones. outside: the share of the usual steps that is not spent in the model.
    """
    last = taken[list(streams)[-1]]
    ones = [taken[shots] for shots in streams]
    seconds = [one.seconds[0] + (number - 1) * one.usual for one, number in zip(ones, streams.values(), strict=True)]
    usual, inside = (sum(sum(times[1:] or times) for times in kind) for kind in (
        [one.seconds for one in ones], [one.inside for one in ones],
    ))  # fmt: skip
    return {
        "step_seconds": round(last.usual, 4), "film_steps": sum(streams.values()),
        "film_seconds": round(sum(seconds), 2), "timed_steps": sum(len(one.seconds) for one in ones),
        "outside": round(1 - inside / usual, 4), "peak_bytes": max(one.peak for one in ones),
    }  # fmt: skip


def decode(film: Film, width: int, parallel: Parallel) -> dict[str, Any]:
    """Returns a row: seconds and peak of decoding one shot as films do, and of all of them by count."""
    device = parallel.device
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKLWan(base_dim=width).save_pretrained(folder)  # type: ignore[attr-defined]
        codec = build_codec(CodecConfig(CodecKind.wan, folder)).to(device)

    def frames(latent: Tensor) -> int:
        return sum(piece.cpu().shape[1] for piece in codec.decode_stream(latent))

    latent = torch.randn(film.shapes[0], device=device)
    frames(latent[:, :2])  # loads kernels
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    num_frames = frames(latent)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    of_all = seconds * sum(film.frames) / film.frames[0]
    return {"step_seconds": round(seconds, 3), "film_seconds": round(of_all, 2), "film_steps": len(film.frames),
            "timed_steps": 1, "frames": num_frames, "peak_bytes": peak}  # fmt: skip
