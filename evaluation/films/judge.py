"""This module judges from pixels alone whether a sampled film is the scripted story, and says what a model's loss must
beat."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.loading.dataset import DataConfig, open_dataset
from data.loading.loader import held_out
from data.prepare.shots import ShotDetector
from data.storyworld.readers import name_place
from data.storyworld.scenes import place_of_caption
from evaluation.films.cuts import CutAccuracy, cut_accuracy, found_cuts, scripted_cuts
from film.folder import FilmFolder
from film.script import Script
from moc import StreamSpec
from moc.diffusion import Flow
from moc.diffusion.linear_predictor import linear_losses

# Higher noise is not judged: one seed gave 0.66 of the line on one machine and 1.13 on another.
JUDGED_SIGMA = 0.8


@dataclass(frozen=True)
class Verdict:
    """A verdict says what a film shows, beside its script. places: (scripted, seen) of each shot. cuts: first frames of
    shots, as scripted and as found."""

    places: list[tuple[str, str]]
    scripted_cuts: list[int]
    found_cuts: list[int]
    accuracy: CutAccuracy

    @property
    def places_right(self) -> int:
        return sum(scripted == seen for scripted, seen in self.places)


def judge_film(film: Path, script: Script, detector: ShotDetector) -> Verdict:
    """Reads `film/shots/NN.mp4` and `film/video.mp4`, as sample.py wrote them for `script`."""
    files, places, lengths = FilmFolder(film), [], []
    for number, shot in enumerate(script.shots, start=1):
        frames = files.frames(number, lambda count: list(range(count)), lambda height, width: (height, width))
        places.append((place_of_caption(shot.prompt), name_place(frames)))
        lengths.append(len(frames))
    cuts, found = scripted_cuts([shot.cut for shot in script.shots], lengths), found_cuts(film, detector)
    return Verdict(places, cuts, found, cut_accuracy(found, cuts, sum(lengths)))


def held_out_floors(config: DataConfig, sigmas: Sequence[float]) -> tuple[float, list[float]]:
    """Returns two losses on the held-out scenes, at the noise that validation draws: that of predicting the mean
    velocity, and at each noise level that of the best linear predictor fitted to the training scenes. All shots must
    have one size."""
    dataset = open_dataset(config)
    training_items = dataset.split(config.validation).training_items
    training = torch.stack([x.float() for i in training_items for x in dataset[i].latents])
    batches = list(held_out(dataset, config.validation, StreamSpec(), chunk_tokens=1))
    latents = torch.stack([x.float() for batch in batches for x in batch.latents])
    noise = torch.stack([x for batch in batches for x in Flow().draw_noise(batch, seed=0)])
    mean = float((noise - latents + training.mean(0)).square().mean())
    return mean, linear_losses(training, latents, noise, sigmas)


def ratio_to_line(sigmas: Sequence[float], losses: Sequence[float], linear: Sequence[float]) -> float:
    """Returns the geometric mean, over the judged noise levels, of the model's loss / the best linear predictor's."""
    judged = [loss / line for sigma, loss, line in zip(sigmas, losses, linear, strict=True) if sigma <= JUDGED_SIGMA]
    return math.prod(judged) ** (1 / len(judged))
