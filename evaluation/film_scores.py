"""All that is measured of one sampled film, as plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from data.prepare.shots import ShotDetector
from evaluation.consistency import Consistency, consistency, prompt_scores
from evaluation.cuts import CutAccuracy, cut_accuracy, found_cuts
from evaluation.estimates import half_width
from evaluation.features import Clip, Features
from evaluation.films import Film
from evaluation.motion import STILL, drift, speed


def film_scores(film: Film, features: Sequence[Features], clip: Clip | None, detector: ShotDetector) -> dict[str, Any]:
    """The scores of a film, JSON-ready. clip: for text alignment and the gate of consistency; None leaves them out."""
    speeds = [speed(shot, film.fps) for shot in film.shots]
    scores: dict[str, Any] = {
        "film": film.name,
        "folder": str(film.folder),
        "shots": len(film.shots),
        "seconds": round(sum(shot.frames for shot in film.shots) / film.fps, 3),
        "cuts": rounded(asdict(cuts(film, detector))),
        "motion": rounded({"heights_a_second": mean(speeds), "still": mean([x < STILL for x in speeds])}),
        "drift": {name: rounded({"a_shot": slope, "p": p}) for name, (slope, p) in drift(film).items()},
        "consistency": [summary(consistency(film, one, clip)) for one in features],
        "text_alignment": None,
    }
    if clip:
        own = prompt_scores(film, clip).diagonal()
        scores["text_alignment"] = rounded({"mean": float(own.mean()), "half": half_width(own)}) | {"by": clip.name}
    return scores


def cuts(film: Film, detector: ShotDetector) -> CutAccuracy:
    """How well the cuts found in the whole video match the scripted ones."""
    scripted, frames = [], 0
    for index, shot in enumerate(film.shots):
        if index and shot.cut:
            scripted.append(frames)
        frames += shot.frames
    return cut_accuracy(found_cuts(film.folder, detector), scripted, frames)


def summary(found: Consistency) -> dict[str, Any]:
    """Consistency as plain numbers: within shots; of names that return, in all and by distance in shots, each with half
    the width of its 95 % interval and how many; of shots that share no name; and the difference of the last two."""
    intra = torch.tensor([x for x in found.intra if x is not None])
    similar = torch.tensor([similarity for _, similarity in found.same])
    different = torch.tensor(found.different)
    distances = sorted({distance for distance, _ in found.same})
    by_distance = {
        distance: counted(torch.tensor([similarity for d, similarity in found.same if d == distance]))
        for distance in distances
    }
    more = float(similar.mean() - different.mean()) if len(similar) and len(different) else math.nan
    return {
        "features": found.features,
        "gate": found.gate,
        "admitted": sum(found.admitted),
        "intra": counted(intra),
        "same_name": counted(similar),
        "other_name": counted(different),
        "same_minus_other": rounded({"value": more})["value"],
        "by_distance": by_distance,
    }


def counted(values: torch.Tensor) -> dict[str, Any] | None:
    """Mean, half of its 95 % interval and count of values [n]; None of none."""
    if not len(values):
        return None
    return rounded({"mean": float(values.mean()), "half": half_width(values)}) | {"count": len(values)}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rounded(values: dict[str, float]) -> dict[str, float | None]:
    """Values for JSON, which knows no nan."""
    return {name: None if math.isnan(value) else round(value, 5) for name, value in values.items()}
