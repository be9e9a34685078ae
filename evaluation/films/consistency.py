"""This module measures whether a film keeps its looks, within each shot and when a name comes back after some shots.

Raw similarity of two shots says little, since all shots of a film are alike and a model that copies one look everywhere
would score best. So the score is the similarity of shots that share a name, by how long ago it was shown last, minus
that of shots which share none. Only shots that show what they should are compared (a gate by fidelity, as in
EntityBench): with CLIP those that fit their own prompt better than the film's other prompts on average, without it
those that are not blank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from evaluation.films.features import Clip
from evaluation.films.shown import Film

_BLANK_DEVIATION = 3.0  # in values of 0 to 255


@dataclass(frozen=True)
class Gate:
    """A gate tells which shots are compared. admitted: whether each shows what it should. rule: how that was found."""

    admitted: list[bool]
    rule: str


@dataclass(frozen=True)
class Consistency:
    """These similarities say how far a film keeps its looks. intra: within each shot, None for one picture. admitted:
    whether each shot is compared. same: (distance in shots, similarity) of each return of a name. different: of two
    shots that name somebody, but nobody in common."""

    features: str
    gate: str
    intra: list[float | None]
    admitted: list[bool]
    same: list[tuple[int, float]] = field(default_factory=list)
    different: list[float] = field(default_factory=list)


def consistency(film: Film, features: str, seen: Sequence[Tensor], gate: Gate) -> Consistency:
    """Returns the consistency of a film by features of a name. seen: those of each shot's pictures, [n, D]."""
    means = torch.nn.functional.normalize(torch.stack([shot.mean(0) for shot in seen]), dim=1)
    similar = means @ means.T
    found = Consistency(features, gate.rule, [within(shot) for shot in seen], gate.admitted)
    names = [shot.names if fits else frozenset() for shot, fits in zip(film.shots, gate.admitted, strict=True)]
    for earlier, later in returns(names):
        found.same.append((later - earlier, float(similar[earlier, later])))
    for one, other in combinations(range(len(names)), 2):
        if names[one] and names[other] and not names[one] & names[other]:
            found.different.append(float(similar[one, other]))
    return found


def returns(names: Sequence[frozenset[str]]) -> list[tuple[int, int]]:
    """Returns the pairs (shot that shows a name, next shot that shows it again), each once. names: of each shot."""
    last: dict[str, int] = {}
    pairs = set()
    for index, named in enumerate(names):
        pairs |= {(last[name], index) for name in named if name in last}
        last |= dict.fromkeys(named, index)
    return sorted(pairs)


def within(pictures: Tensor) -> float | None:
    """Measures VBench's consistency within a shot: the mean similarity of each picture to the first and to the one
    before, of features [n, D]; None of one picture."""
    if len(pictures) < 2:
        return None
    first = (pictures[1:] @ pictures[0]).mean()
    before = (pictures[1:] * pictures[:-1]).sum(1).mean()
    return float((first + before) / 2)


def fidelity(film: Film, scores: Tensor | None = None) -> Gate:
    """Returns which shots show what they should. scores: of a CLIP (`prompt_scores`)."""
    deviations = [float(shot.pictures.std(axis=(1, 2)).max()) for shot in film.shots]
    shown = [deviation > _BLANK_DEVIATION for deviation in deviations]
    if scores is None or len(scores) < 2:
        return Gate(shown, "not blank")
    others = (scores.sum(1) - scores.diagonal()) / (len(scores) - 1)
    fits = (scores.diagonal() > others).tolist()
    return Gate([a and b for a, b in zip(shown, fits, strict=True)], "fits its own prompt by CLIP, not blank")


def prompt_scores(film: Film, clip: Clip, seen: Sequence[Tensor]) -> Tensor:
    """Returns the similarity of each shot to each prompt, averaged over its pictures: [shots, prompts]. seen: the
    CLIP's features of each shot's pictures, [n, D]."""
    texts = clip.texts([shot.prompt for shot in film.shots])
    return torch.stack([(shot @ texts.T).mean(0) for shot in seen])
