"""This module loads a model with its encoders and films prompt scripts with it."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from film.estimate import Estimate, estimate
from film.fit import check_fits, placed
from film.folder import FilmFolder
from film.plan import FilmPlan, counts_that_stay, plan_film
from film.presentation import present
from film.redo import with_seeds_of
from film.script import Script, load_script, parse_script
from film.shooting import ROUTE_COUNTS, OnStep, Shooting, telling_what_goes_on
from film.video import VideoConfig
from moc import Execution, MoCConfig, StreamSpec
from moc.checkout import versions
from moc.counts import count_of
from moc.diffusion import Flow, Progress, SamplingConfig, Story, sample_shots
from moc.errors import Refusals, UserError, check_least
from moc.memory import SAMPLING, enough_for, usable_bytes
from moc.statistics import RoutingMap
from moc.training import MeshConfig, Parallel, ParallelConfig
from moc.training.survey import PEAK_FLOPS, peak_flops
from models import Encoders, load_denoiser, load_encoders, move_model
from models.checkpoints.contents import Contents
from models.checkpoints.loras import read_choices
from models.checkpoints.seen import Seen, is_untrained
from models.encoders.fingerprint import fingerprint, weights_digest
from models.frozen import Base, multiply_in_fp8

logger = logging.getLogger(__name__)

UNSEEN = {"seed", "offload_cache"}  # these sampler settings change no frame; each shot has its own seed

Value = TypeVar("Value")


@dataclass
class FilmmakerConfig:
    """These settings say what films are made with.

    checkpoint: a run's folder, one of its checkpoints, a model folder, or a folder of two noise experts (a pipeline of
        Wan2.2-A14B, HoloCine).
    low_noise_checkpoint: the low-noise one of two experts that are kept apart, where checkpoint is the other.
    lora: a LoRA's file or folder, of any maker, or a list of such and of {path: PATH, weight: NUMBER}, merged into the
        weights.
    low_noise_lora: as lora, for the low-noise expert alone; null takes lora.
    encoders_path: a folder of encoders, or a diffusers pipeline; null takes the checkpoint's.
    device, precision: as in `moc.training.ParallelConfig`; the weights take the precision too, norms excepted.
    weights: how those of the blocks' linears are kept instead, unless null: bf16, or fp8 or int8 with a scale a row.
    fp8_matmuls: with fp8 weights these linears round their inputs to fp8 too, and multiply in it.
    parallel: what several processes do together.
    offload: only the one of two experts that is in use stays on the GPU.
    swap_blocks: so many blocks of each expert wait in the host's memory, and each comes while the one before it
        computes.
    shift: that of the noise levels; null takes the checkpoint's.
    moc: the settings of attention; each that is null takes the checkpoint's.
    execution: how attention is computed.
    keep_every: sampling is kept after so many steps and after each shot.
    video: how videos are written.
    """

    checkpoint: str
    low_noise_checkpoint: str | None = None
    lora: Any = None
    low_noise_lora: Any = None
    encoders_path: str | None = None
    device: str = "auto"
    precision: str = "auto"
    weights: Base | None = None
    fp8_matmuls: bool = False
    parallel: MeshConfig = field(default_factory=MeshConfig)
    offload: bool = False
    swap_blocks: int = 0
    shift: float | None = None
    moc: dict[str, Any] = field(default_factory=MoCConfig.unset)
    execution: Execution = field(default_factory=Execution)
    sampler: SamplingConfig = field(default_factory=SamplingConfig)
    keep_every: int = 5
    video: VideoConfig = field(default_factory=VideoConfig)

    def __post_init__(self) -> None:
        for setting in (self.lora, self.low_noise_lora):
            read_choices(setting)
        if self.weights is Base.fp32:
            raise UserError("weights=fp32 are those of precision=fp32; say that, or weights=bf16, fp8 or int8")
        if self.fp8_matmuls and self.weights is not Base.fp8:
            raise UserError("fp8_matmuls=true is of weights that are kept in fp8; set weights=fp8")
        check_least(self, "", 1, "keep_every")
        check_least(self, "", 0, "swap_blocks")
        if self.swap_blocks and self.offload:
            raise UserError("offload=true moves whole experts, swap_blocks their blocks: set one of them")


class Shared(Generic[Value]):
    """A shared property is made when it is first read, once for a filmmaker and those made of it by `with_sampler`."""

    def __init__(self, make: Callable[[Any], Value]) -> None:
        self.make, self.name = make, make.__name__

    def __get__(self, filmmaker: "Filmmaker", _: type) -> Value:
        if self.name not in filmmaker.shared:
            filmmaker.shared[self.name] = self.make(filmmaker)
        return filmmaker.shared[self.name]


class Filmmaker:
    """A filmmaker films any number of scripts with a model and its encoders, which are loaded once, when they are first
    needed."""

    def __init__(self, config: FilmmakerConfig) -> None:
        self.config, self.shared = config, dict[str, Any]()
        self.parallel = Parallel(ParallelConfig(config.device, config.precision, **asdict(config.parallel)))
        self.contents = Contents.sound(config.checkpoint)
        self.checkpoint, self.seen = self.contents.path, Seen.read(self.contents)

    @Shared
    def _loaded(self) -> Any:
        """Returns the model on the CPU."""
        config, dtype = self.config, self.parallel.dtype
        of_low = None if config.low_noise_lora is None else read_choices(config.low_noise_lora)
        loras, base = (read_choices(config.lora), of_low), config.weights or Base.fp32
        model = load_denoiser(self.contents, config.low_noise_checkpoint, dtype, *loras, base)
        if config.fp8_matmuls:
            multiply_in_fp8(model, self.parallel.device)
        model.execution = config.execution
        return model

    @property
    def sampler(self) -> SamplingConfig:
        """Returns how shots are sampled, whose guidance scale is a number."""
        sampler = self.config.sampler
        is_unguided = sampler.guidance_scale is None and self.seen.drop_captions == 0
        return replace(sampler, guidance_scale=1.0 if is_unguided else sampler.usual_scale)

    @property
    def stream(self) -> StreamSpec:
        return self._loaded.stream

    @Shared
    def model(self) -> Any:
        """Returns the model on its device or those of the team, which it takes when the first film is sampled."""
        return move_model(self._loaded, self.parallel, self.config.offload, self.config.swap_blocks)

    @Shared
    def moc(self) -> MoCConfig:
        """Returns the checkpoint's attention settings, but for those asked for; warns where it was trained dense."""
        moc = self.contents.moc.override(self.config.moc)
        if is_untrained(self.contents, moc):
            logger.warning(
                "%s was trained without Mixture of Contexts (it has no moc.json), which is thus untrained in it; "
                "moc=dense attends as it was trained",
                self.checkpoint,
            )
        return moc

    @Shared
    def flow(self) -> Flow:
        flow = self.contents.flow
        return flow if self.config.shift is None else replace(flow, shift=self.config.shift)

    @Shared
    def encoders(self) -> Encoders:
        return load_encoders(self.config.encoders_path or self.contents)

    @Shared
    def fingerprints(self) -> dict[str, str]:
        return {
            "model": fingerprint("model", weights_digest(self._loaded)),
            "codec": self.encoders.codec.fingerprint,
            "text": self.encoders.text.fingerprint,
        }

    def read(
        self, path: Path, size: list[int] | None = None, fps: float | None = None, text: str | None = None
    ) -> Script:
        """Returns a script in the given size and frame rate, else in its own, else in those of the films that the model
        was trained on. text: of a script that is not in its file yet."""
        given = {name: value for name, value in {"size": size, "fps": fps}.items() if value is not None}
        if text is None:
            return load_script(path, given, self.seen.defaults)
        return parse_script(text, path, given, self.seen.defaults)

    def tell_unseen(self, script: Script) -> None:
        """Warns of what of a film the model never saw."""
        is_guided = script.is_guided(self.sampler.usual_scale)
        words = self.encoders.text.unknown_words(script.captions)
        if unseen := self.seen.unseen(script.size, script.fps, len(script.shots), is_guided, words):
            logger.warning("%s was never trained on %s; expect less of the film", self.checkpoint, ", ".join(unseen))

    def plan(self, script: Script) -> FilmPlan:
        """Lays the stream of a script out and encodes what it says and shows."""
        device = self.parallel.device
        plan = plan_film(script, self.encoders.codec.to(device), device, self.sampler.seed)
        text = self.encoders.text.to(device)
        windowed = self.moc.text_flows_forward and not self.stream.text_in_stream
        plan.encode_texts(text.encode_windows if windowed else text.encode)
        text.to("cpu")  # from here on the model needs its memory
        return plan

    def request(self, plan: FilmPlan) -> dict[str, Any]:
        """Returns all that decides the frames of a film."""
        video = self.config.video.record()
        return ({"video": video} if video else {}) | {
            "script": plan.record(),
            "moc": self.moc.to_dict(),
            "flow": asdict(self.flow),
            "sampler": {name: value for name, value in asdict(self.sampler).items() if name not in UNSEEN},
            "precision": str(self.parallel.dtype) + ", fp8 matmuls" * self.config.fp8_matmuls,
            "fingerprints": self.fingerprints,
        }

    def make(
        self, films: Sequence[tuple[Script, FilmFolder]], redo: Sequence[int] = (), watch: OnStep | None = None
    ) -> None:
        """Films scripts, as `film` does, each team of processes its share; returns when all are made. Before the first
        is sampled all are encoded: UserError names all that cannot be, or do not fit into memory."""
        films = films[self.parallel.team :: self.parallel.num_teams]
        plans, refusals = [], Refusals()
        for script, folder in films:
            with refusals.noted(folder.path if len(films) > 1 else ""):
                if redo:
                    leads, codec = self.parallel.leads, self.encoders.codec
                    script = self.parallel.share(with_seeds_of(folder, script, redo, codec) if leads else script)
                plans.append((plan := self.plan(script), folder))
                if self.parallel.leads and (redo or not folder.is_finished):
                    self.check_memory(plan.anew(redo) if redo else plan, is_begun=folder.request() is not None)
        refusals.tell()
        for script, _ in films:
            self.tell_unseen(script)
        with telling_what_goes_on([folder for _, folder in plans], redo):
            for plan, folder in plans:
                self.film(plan, folder, redo, watch)
        self.parallel.gather(None)

    def with_sampler(self, **settings: Any) -> "Filmmaker":
        """Returns a filmmaker that samples otherwise; what is loaded, now or later, is loaded once for both."""
        other = copy(self)
        other.config = replace(self.config, sampler=replace(self.sampler, **settings))
        return other

    def estimate(self, plan: FilmPlan) -> Estimate:
        """Returns what a film will cost."""
        return self._count(plan, self._sampler_of(plan), offload=self.config.offload)

    def cost(self, plan: FilmPlan) -> list[str]:
        """Returns what a film will cost in lines for the user, with what would fit where it cannot fit into the
        device's memory; the time is an H100's where this is no known GPU."""
        peak, sequence = peak_flops(self.parallel.device, self.parallel.dtype), self.config.parallel.sequence
        gpu = "the GPU" if peak else "an H100"
        lines = self.estimate(plan).lines(plan, (peak or PEAK_FLOPS["H100"]) * sequence, gpu)
        try:
            self.check_memory(plan)
        except UserError as error:
            lines.append(f"it does not fit into the memory of {self.parallel.device_name}: {error}")
        self.tell_unseen(plan.script)
        return lines

    def _sampler_of(self, plan: FilmPlan) -> SamplingConfig:
        """Returns how a film is sampled."""
        return placed(plan, self._count, self.sampler, self.config.offload, usable_bytes(self.parallel.device))

    @property
    def _count(self) -> Callable[..., Estimate]:
        """Returns `estimate` for this model and these settings of attention."""
        films = {"model": self._loaded, "moc": self.moc, "flow": self.flow, "codec": self.encoders.codec}
        mesh, swap_blocks = self.config.parallel, self.config.swap_blocks
        return partial(estimate, **films, mesh=mesh, swap_blocks=swap_blocks, dtype=self.parallel.dtype)

    def check_memory(self, plan: FilmPlan, is_begun: bool = False) -> None:
        """Raises UserError, with what would fit, where a film cannot fit into the device's memory. is_begun: whether
        its folder holds it already."""
        offload, has = self.config.offload, usable_bytes(self.parallel.device)
        check_fits(plan, self._count, self._sampler_of(plan), offload, has, self.parallel.is_sharded, is_begun)

    def film(self, plan: FilmPlan, folder: FilmFolder, redo: Sequence[int] = (), watch: OnStep | None = None) -> None:
        """Makes a film, goes on with it where it was stopped, or writes what a whole one has lost. Every process of
        a team takes part, and the first one alone has to do with the folder.

        redo: numbers of shots of a whole film, from 1, that are made anew; the others stay as they are, and a new shot
        sees those before it. watch: is told of each step. Raises DataError where the folder holds another film
        (other-film), or has lost shots of this one (lost-shot).
        """
        if not self.parallel.leads:
            if self.parallel.share(False):
                self._help(plan)
            return
        request = self.request(plan)
        with folder.held():
            folder.check_request(request, redo)
            if folder.is_finished and redo:
                scripts = (folder.request() or request)["script"], request["script"]
                routing = counts_that_stay(folder.read_routing(), *scripts, redo)
                folder.reopen(request, redo, {ROUTE_COUNTS: routing})
            if self.parallel.share(not folder.is_finished):
                with folder.emptied_unless_begun():
                    self._make(plan, folder, request, watch)
            else:
                self._shooting(plan, folder, request).restore()
            present(folder, plan, self.config.video)
            folder.forget()  # forgets what it was asked to redo, so that no shot is made anew twice

    def _sample(
        self,
        story: Story,
        sampler: SamplingConfig,
        routing_map: RoutingMap,
        on_step: OnStep | None = None,
        start: Progress | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Samples the shots of a story, for a team as its first process says and from where that says."""
        start, sampler = self.parallel.share((start, sampler))
        settings = (self.moc, self.flow, story, sampler)
        return sample_shots(self.model, self.model.stream, *settings, on_step, routing_map, start)

    def _help(self, plan: FilmPlan) -> None:
        """Computes this process's share of the forward passes of a film that the team makes."""
        story = self._story(plan, {})
        with self._sampling(plan):
            for _ in self._sample(story, self.sampler, self.routing_map(plan)):
                pass

    def _story(self, plan: FilmPlan, given: dict[int, Tensor]) -> Story:
        """Returns what is sampled. given: latents by index in the stream that are known besides the plan's; a team's
        are those of its first process."""
        return replace(plan.story(), given=plan.given | self.parallel.share(given))

    def routing_map(self, plan: FilmPlan) -> RoutingMap:
        """Returns what counts where the routes of a film go."""
        return RoutingMap(len(plan.shapes), self.parallel.sum_over_heads)

    @contextmanager
    def _sampling(self, plan: FilmPlan) -> Iterator[None]:
        with self.parallel.autocast(), enough_for(f"a film of {count_of(len(plan.shapes), 'shot')}", SAMPLING):
            yield

    def _shooting(self, plan: FilmPlan, folder: FilmFolder, request: dict[str, Any]) -> Shooting:
        return Shooting(folder, plan, self.encoders.codec, request, self.routing_map(plan), self.config.keep_every)

    def _make(self, plan: FilmPlan, folder: FilmFolder, request: dict[str, Any], watch: OnStep | None) -> None:
        started, device = time.time(), self.parallel.device
        folder.copy_pictures(plan.pictures)
        shooting = self._shooting(plan, folder, request)
        routing_map = shooting.routing_map
        story, sampler = self._story(plan, shooting.given()), self._sampler_of(plan)
        with self._sampling(plan):
            num_frames = shooting.run(partial(self._sample, story, sampler, routing_map), watch)
        redone = {*folder.redone(), *shooting.kept.redo}
        folder.remove_pictures()
        folder.write_routing(routing_map.counts)
        facts = {
            "num_frames": num_frames,
            "latent_shapes": plan.shapes,
            "routing": routing_map.shares().tolist(),
            "estimate": asdict(self.estimate(plan)),
            "config": asdict(self.config),
            "checkpoint": str(self.checkpoint.resolve()),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "versions": versions(),
            "redone": sorted(redone),
            "reused_steps": shooting.reused,
            "seconds": round(time.time() - started, 1),
        }
        folder.write_metadata(request | facts)
