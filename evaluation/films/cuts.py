"""This module measures how well found cuts match the true ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from data.prepare.scan import scan_video
from data.prepare.shots import ShotDetector

TOLERANCE = 1  # a cut is found where one is seen at most so many frames off


@dataclass(frozen=True)
class CutAccuracy:
    """These scores tell how well cuts were found. score: exp(-NSD), HoloCine's shot-cut accuracy. precision, recall:
    shares of the found and of the true cuts, within `TOLERANCE`. deviation: how many frames off matched cuts are on
    average; nan where none is matched."""

    score: float
    precision: float
    recall: float
    deviation: float = math.nan


def cut_accuracy(found: Sequence[int], truth: Sequence[int], num_frames: int) -> CutAccuracy:
    """Compares cuts (first frames of new shots) of a video of num_frames.

    NSD = (frame errors of matched cuts + a mean shot length for each missed or extra cut) / num_frames, where cuts
    are matched one to one, nearest first, up to half a mean shot length apart.
    """
    shot_length = num_frames / (len(truth) + 1)
    errors = match_cuts(found, truth, shot_length / 2)
    unmatched = len(found) + len(truth) - 2 * len(errors)
    discrepancy = (sum(errors) + unmatched * shot_length) / num_frames
    hits = len(match_cuts(found, truth, TOLERANCE))
    deviation = sum(errors) / len(errors) if errors else math.nan
    return CutAccuracy(math.exp(-discrepancy), _share(hits, len(found)), _share(hits, len(truth)), deviation)


def scripted_cuts(is_cut: Sequence[bool], frames: Sequence[int]) -> list[int]:
    """Returns the first frames of the shots of a film, but for the first one, that begin with a cut. frames: how many
    each shot has."""
    return [start for cut, start in zip(is_cut[1:], accumulate(frames), strict=False) if cut]


def found_cuts(film: Path, detector: ShotDetector) -> list[int]:
    """Returns the first frames of all shots but the first that a detector sees in `film/video.mp4`; `film/scans`
    keeps the scan."""
    spans = scan_video(film, "video.mp4", film / "scans", detector).spans or ()
    return [start for start, _ in spans[1:]]


def match_cuts(found: Sequence[int], truth: Sequence[int], within: float) -> list[int]:
    """Returns distances of the pairs of found and true cuts, matched one to one, nearest first."""
    pairs = sorted((abs(a - b), i, j) for i, a in enumerate(found) for j, b in enumerate(truth) if abs(a - b) <= within)
    used_found: set[int] = set()
    used_truth: set[int] = set()
    errors = []
    for error, i, j in pairs:
        if i not in used_found and j not in used_truth:
            used_found.add(i)
            used_truth.add(j)
            errors.append(error)
    return errors


def _share(some: int, whole: int) -> float:
    return some / whole if whole else 1.0
