"""This module measures one sampled film, or a folder of them, as plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data.prepare.shots import ShotDetector
from evaluation.estimates import half_difference, half_width
from evaluation.films.consistency import Consistency, consistency, fidelity, prompt_scores
from evaluation.films.cuts import CutAccuracy, cut_accuracy, found_cuts, scripted_cuts
from evaluation.films.features import Clip, Features
from evaluation.films.shown import Film
from evaluation.films.speed_and_drift import STILL, drift, speed


@dataclass(frozen=True)
class Measured:
    """These are the scores of a film. speeds: those of its shots. consistency: by each kind of features. alignment: the
    similarities of shots to their prompts by a CLIP; None without one."""

    seconds: float
    cuts: CutAccuracy
    speeds: list[float]
    drift: dict[str, tuple[float, float]]
    consistency: list[Consistency]
    alignment: Tensor | None


def measure(film: Film, features: Sequence[Features], clip: Clip | None, detector: ShotDetector) -> Measured:
    """Returns the scores of a film. clip: for text alignment and the gate of consistency; None leaves them out."""
    every = [*features, clip] if clip and clip not in features else features
    seen = {one.name: [one.images(shot.pictures) for shot in film.shots] for one in every}
    alike = prompt_scores(film, clip, seen[clip.name]) if clip else None
    gate = fidelity(film, alike)
    return Measured(
        seconds=sum(shot.frames for shot in film.shots) / film.fps,
        cuts=cuts(film, detector),
        speeds=[speed(shot, film.fps) for shot in film.shots],
        drift=drift(film),
        consistency=[consistency(film, one.name, seen[one.name], gate) for one in features],
        alignment=None if alike is None else alike.diagonal(),
    )


def cuts(film: Film, detector: ShotDetector) -> CutAccuracy:
    """Returns how well the cuts found in the whole video match the scripted ones."""
    frames = [shot.frames for shot in film.shots]
    scripted = scripted_cuts([shot.cut for shot in film.shots], frames)
    return cut_accuracy(found_cuts(film.folder, detector), scripted, sum(frames))


def scores(name: str, films: Sequence[Measured]) -> dict[str, Any]:
    """Returns the scores of one film or several together, JSON-ready: shots and returns of all of them are pooled, cuts
    and drift averaged. A value is null where nothing was there to measure."""
    speeds = torch.tensor([x for film in films for x in film.speeds])
    found_in = [asdict(film.cuts) for film in films]
    alignments = [film.alignment for film in films if film.alignment is not None]
    return {
        "name": name,
        "films": len(films),
        "shots": len(speeds),
        "seconds": round(sum(film.seconds for film in films), 3),
        "cuts": {key: average([cut[key] for cut in found_in]) for key in found_in[0]},
        "motion": {"heights_a_second": counted(speeds), "still": average((speeds < STILL).double().tolist())},
        "drift": slopes([film.drift for film in films if film.drift]),
        "consistency": [summary(kind) for kind in zip(*(film.consistency for film in films), strict=True)],
        "text_alignment": counted(torch.cat(alignments)) if alignments else None,
    }


def slopes(drifts: Sequence[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float | None]]:
    """Returns the mean slope of each measure over films, and for one film the probability of its slope by chance."""
    names = drifts[0] if drifts else {}
    return {
        name: {
            "a_shot": average([drift[name][0] for drift in drifts]),
            "p": average([drifts[0][name][1]]) if len(drifts) == 1 else None,
        }
        for name in names
    }


def summary(films: Sequence[Consistency]) -> dict[str, Any]:
    """Returns consistency by one kind of features as plain numbers: within shots; of names that return, in all and by
    distance in shots; of shots that share no name; and the difference of the last two (Welch's interval)."""
    same = [pair for film in films for pair in film.same]
    similar, different = torch.tensor([x for _, x in same]), torch.tensor([x for film in films for x in film.different])
    return {
        "features": films[0].features,
        "gate": films[0].gate,
        "admitted": sum(sum(film.admitted) for film in films),
        "intra": counted(torch.tensor([x for film in films for x in film.intra if x is not None])),
        "same_name": counted(similar),
        "other_name": counted(different),
        "same_minus_other": difference(similar, different),
        "by_distance": {
            distance: counted(torch.tensor([x for d, x in same if d == distance]))
            for distance in sorted({distance for distance, _ in same})
        },
    }


def difference(one: Tensor, other: Tensor) -> dict[str, float | None] | None:
    """Returns the difference of two means with half of its 95 % interval, None of fewer than FEWEST
    values; None where one of them has none."""
    if not len(one) or not len(other):
        return None
    return {"mean": rounded(float(one.mean() - other.mean())), "half": rounded(half_difference(one, other))}


def counted(values: Tensor) -> dict[str, Any] | None:
    """Returns mean, half of its 95 % interval, None where n is below FEWEST, and count of values [n]; None where there
    are no values."""
    if not len(values):
        return None
    return {"mean": rounded(float(values.mean())), "half": rounded(half_width(values)), "count": len(values)}


def average(values: Sequence[float]) -> float | None:
    """Returns the mean of the values that are numbers; None where none is."""
    known = [value for value in values if not math.isnan(value)]
    return rounded(sum(known) / len(known)) if known else None


def rounded(value: float) -> float | None:
    """Returns a value for JSON, which knows no nan."""
    return None if math.isnan(value) else round(value, 5)
