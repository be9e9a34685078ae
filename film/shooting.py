"""This module writes the files of a film from the latents that a sampler gives shot by shot.

Each shot is written as soon as it is sampled. The state of sampling is kept after each shot and every few steps, so
that the same command goes on from there and gives the same bytes as one that was never stopped.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.interfaces import Codec
from film.folder import FilmFolder
from film.plan import FilmPlan
from film.video import VideoConfig
from moc.diffusion import Progress
from moc.statistics import RoutingMap

OnStep = Callable[[Progress], None]
Sampling = Callable[[OnStep, Progress | None], Iterable[tuple[int, Tensor]]]
ROUTE_COUNTS = "routing"  # the kept tensor that holds the counts of the routing map
REUSED = "reused"  # the kept tensor that counts steps which took an earlier step's velocity


class Shooting:
    """A shooting makes one film, or goes on with what the folder keeps of it. request: what it is asked to be, as its
    folder keeps it. routing_map: what sampling counts routes in. keep_every: steps after which sampling is kept.
    reused: how many steps took an earlier one's velocity (`SamplingConfig.step_cache`)."""

    def __init__(
        self,
        folder: FilmFolder,
        plan: FilmPlan,
        codec: Codec,
        request: Mapping[str, Any],
        routing_map: RoutingMap,
        keep_every: int,
    ) -> None:
        self.folder, self.plan, self.codec, self.request = folder, plan, codec, request
        self.routing_map, self.keep_every = routing_map, keep_every
        self.video = VideoConfig(**request.get("video", {}))
        self.numbers = {index: number for number, index in enumerate(plan.filmed, start=1)}
        self.decode = codec.shot_decoder()
        self.kept = folder.kept()
        routing_map.counts = self.kept.tensors.pop(ROUTE_COUNTS, routing_map.counts)
        self.reused = int(self.kept.tensors.pop(REUSED, 0))

    def run(self, sampling: Sampling, watch: OnStep | None = None) -> int:
        """Writes what is missing of the film; returns its frames.

        sampling: is told what to call after each step and where to go on from, and yields (index in the stream, latent
        [C, T, H, W]) of each shot in order. watch: is told of each step too, once what was finished is kept. Raises
        FloatingPointError, with the shot, where its pictures are not finite.
        """
        start = self._start()
        with tqdm(desc="sample", unit="step", initial=self.kept.step) as bar:

            def on_step(progress: Progress) -> None:
                bar.total = progress.num_steps
                bar.update(progress.step - bar.n)
                self.reused = progress.reused
                if progress.step % self.keep_every == 0 or self._is_new:
                    self._keep(progress)
                if watch:
                    watch(progress)

            for index, latent in sampling(on_step, start):
                number = self.numbers[index]
                self.kept.made[number] = self.folder.write_latent(number, latent)
                self._is_new = True
                self._write_shot(number, latent)
        return self._join()

    def restore(self) -> None:
        """Writes what a whole film has lost, but for what is drawn of it: copies of what its script names, and videos
        from the latents. Raises DataError (lost-shot) where those of a shot are lost too."""
        self.folder.copy_pictures(self.plan.pictures)
        self._write_given(self.folder.missing(len(self.numbers)).latents)
        missing = self.folder.missing(len(self.numbers))
        if lost := missing.shots & missing.latents:
            raise self.folder.lost(sorted(lost))
        if missing.shots:
            self._write_videos((number, self.folder.read_latent(number)) for number in self._decoded(missing.shots))
        if missing.film:
            self._join()

    _is_new = False  # whether a shot is finished but not kept yet

    def _start(self) -> Progress | None:
        """Returns where sampling goes on from. Shots with latents alone get their videos, given ones first."""
        if self.folder.request() is None:  # the request is kept first, so that later files are known by it
            self.folder.keep(self.request, self.kept)
        self._write_given(set(self.numbers.values()) - self.kept.made.keys())
        made = {number: self.folder.read_latent(number) for number in sorted(self.kept.made)}
        self._write_videos(made.items())
        if not self.kept.step:
            return None
        latents = {int(name): tensor for name, tensor in self.kept.tensors.items() if name.isdigit()}
        latents |= {self.plan.filmed[number - 1]: latent for number, latent in made.items()}
        remembered: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.kept.tensors.items():
            shot, _, of_solver = name.partition(".")
            if of_solver:
                remembered.setdefault(int(shot), {})[of_solver] = tensor
        return Progress(self.kept.step, 0, latents, remembered, self.reused)

    def given(self) -> dict[int, Tensor]:
        """Returns latents, by their index in the stream, of the shots that stay while others are made anew."""
        stay = sorted(self.kept.made.keys() - self.kept.redo) if self.kept.redo else []
        return {self.plan.filmed[number - 1]: self.folder.read_latent(number) for number in stay}

    def _keep(self, progress: Progress) -> None:
        self.kept.step, self._is_new = progress.step, False
        self.kept.tensors = {
            str(index): latent
            for index, latent in progress.latents.items()
            if self.numbers.get(index, 0) not in {0, *self.kept.made}  # no picture, and no shot with a file of its own
        }
        for index, own in progress.remembered.items():
            self.kept.tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
        tensors = self.kept.tensors | {ROUTE_COUNTS: self.routing_map.counts, REUSED: torch.tensor(progress.reused)}
        self.folder.keep(self.request, replace(self.kept, tensors=tensors))

    def _write_given(self, numbers: Collection[int]) -> None:
        """Writes the latents of those shots among `numbers` that are given videos."""
        for number, index in enumerate(self.plan.filmed, start=1):
            if index in self.plan.given and number in numbers:
                self.kept.made[number] = self.folder.write_latent(number, self.plan.given[index])

    def _decoded(self, numbers: Collection[int]) -> list[int]:
        """Returns which shots are decoded for the videos of some: those before them too, where the codec makes one
        video of all shots."""
        return [n for n in range(1, max(numbers) + 1) if n in numbers or not self.codec.begins_video(n)]

    def _write_videos(self, latents: Iterable[tuple[int, Tensor]]) -> None:
        """Writes the videos that are missing of shots, whose numbers and latents are given in order."""
        missing = self.folder.missing(len(self.numbers)).shots
        for number, latent in latents:
            if number in missing:
                self._write_shot(number, latent)
            elif not self.codec.begins_video(number):
                for _ in self.decode(latent.to(self.plan.device)):  # the codec goes on to the next shot from here
                    pass

    def _join(self) -> int:
        """Joins the videos of all shots; returns their frames."""
        titles = [shot.prompt for shot in self.plan.script.shots] if self.video.chapters else None
        return self.folder.join_shots(len(self.numbers), titles)

    def _write_shot(self, number: int, latent: Tensor) -> None:
        pieces = (pictures(piece, f"shot {number}") for piece in self.decode(latent.to(self.plan.device)))
        frames: Iterator[np.ndarray] = (frame for piece in pieces for frame in piece)
        shown, video = islice(frames, self.plan.num_frames[number - 1]), self.video
        self.folder.write_shot(number, shown, self.plan.script.fps, video.codec, video.crf)


@contextmanager
def telling_what_goes_on(folders: Sequence[FilmFolder], redo: Sequence[int]) -> Iterator[None]:
    """Has Ctrl-C say that the same command goes on, where one of its films' folders holds anything. That of a batch
    with `redo` does not: it would make shots of its finished films anew once more."""
    try:
        yield
    except KeyboardInterrupt:
        if any(folder.request() is not None for folder in folders) and not (redo and len(folders) > 1):
            raise KeyboardInterrupt("the same command goes on") from None
        raise


def pictures(video: Tensor, of: str) -> np.ndarray:
    """Turns float [3, F, H, W] in [-1, 1] into uint8 [F, H, W, 3]. Raises FloatingPointError, naming what they are
    `of`, where they are not finite: they would be shown as black."""
    if not video.isfinite().all():
        raise FloatingPointError(f"{of}: its latent is finite, its decoded pictures are not; the codec may hold nan")
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
