"""Does a film keep its looks: within each shot, and when a name comes back after so many shots.

Raw similarity of two shots says little, since all shots of a film are alike and a model that copies one look everywhere
would score best. So what is told is the similarity of shots that share a name, by how long ago it was shown last, minus
that of shots which share none. Only shots that show what they should are compared (a gate by fidelity, as in
EntityBench): with CLIP those that fit their own prompt better than the film's other prompts on average, without it
those that are no blank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from evaluation.features import Clip, Features
from evaluation.films import Film

_BLANK_DEVIATION = 3.0  # of 0..255 values


@dataclass(frozen=True)
class Consistency:
    """intra: of each shot, None of one picture. admitted: whether each shot is compared. same: of each return of a name
    (distance in shots, similarity). different: similarities of shots that name somebody each, and nobody both."""

    features: str
    gate: str
    intra: list[float | None]
    admitted: list[bool]
    same: list[tuple[int, float]] = field(default_factory=list)
    different: list[float] = field(default_factory=list)


def consistency(film: Film, features: Features, clip: Clip | None = None) -> Consistency:
    """The consistency of a film by the given features. clip: for the gate."""
    seen = [features.images(shot.pictures) for shot in film.shots]
    admitted, gate = fidelity(film, clip)
    means = torch.nn.functional.normalize(torch.stack([shot.mean(0) for shot in seen]), dim=1)
    similar = means @ means.T
    found = Consistency(features.name, gate, [within(shot) for shot in seen], admitted)
    names = [shot.names if fits else frozenset() for shot, fits in zip(film.shots, admitted, strict=True)]
    for earlier, later in returns(names):
        found.same.append((later - earlier, float(similar[earlier, later])))
    for one, other in combinations(range(len(names)), 2):
        if names[one] and names[other] and not names[one] & names[other]:
            found.different.append(float(similar[one, other]))
    return found


def returns(names: Sequence[frozenset[str]]) -> list[tuple[int, int]]:
    """Pairs of shots, each (the last one before that shows a name, one that shows it again), once for each pair."""
    last: dict[str, int] = {}
    pairs = set()
    for index, named in enumerate(names):
        pairs |= {(last[name], index) for name in named if name in last}
        last |= dict.fromkeys(named, index)
    return sorted(pairs)


def within(pictures: Tensor) -> float | None:
    """VBench's form of consistency within a shot: the mean similarity of each picture to the first and to the one
    before, of features [n, D]; None of one picture."""
    if len(pictures) < 2:
        return None
    first = (pictures[1:] @ pictures[0]).mean()
    before = (pictures[1:] * pictures[:-1]).sum(1).mean()
    return float((first + before) / 2)


def fidelity(film: Film, clip: Clip | None) -> tuple[list[bool], str]:
    """Whether each shot shows what it should, and by which rule."""
    deviations = [float(shot.pictures.std(axis=(1, 2)).max()) for shot in film.shots]
    shown = [deviation > _BLANK_DEVIATION for deviation in deviations]
    if clip is None or len(film.shots) < 2:
        return shown, "not blank"
    scores = prompt_scores(film, clip)
    others = (scores.sum(1) - scores.diagonal()) / (len(scores) - 1)
    fits = (scores.diagonal() > others).tolist()
    return [a and b for a, b in zip(shown, fits, strict=True)], f"fits its own prompt by {clip.name}, not blank"


def prompt_scores(film: Film, clip: Clip) -> Tensor:
    """The similarity of each shot to each prompt, averaged over its pictures: [shots, prompts]."""
    texts = clip.texts([shot.prompt for shot in film.shots])
    return torch.stack([(clip.images(shot.pictures) @ texts.T).mean(0) for shot in film.shots])
