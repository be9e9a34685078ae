"""This module gives means and shares with their 95 % intervals, of values that were measured in some scenes, several
in each."""

import math
from dataclasses import dataclass

from scipy.stats import t
from torch import Tensor

FEWEST = 5  # the interval of fewer values would itself be mostly chance


@dataclass(frozen=True)
class Estimate:
    """An estimate is a mean and half the width of its 95 % interval (Student's t), which is nan for fewer than FEWEST
    scenes or draws.
    scenes: how other scenes would change the mean, the draws of each averaged. draws: how other noise would change it
    on the same scenes. count: how many scenes."""

    mean: float
    scenes: float
    draws: float
    count: int

    def __str__(self) -> str:
        return self.shown(4)

    def shown(self, digits: int, sign: str = "") -> str:
        """Returns the mean with half of its interval, where it has one. sign: "+" shows that of a mean above 0 too."""
        half = "" if math.isnan(self.scenes) else f" ± {self.scenes:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{half}"


def estimate(values: Tensor) -> Estimate:
    """Returns the estimate of values [scenes, draws], of one scene at least."""
    values = values.double().cpu()
    return Estimate(float(values.mean()), half_width(values.mean(1)), half_width(values.mean(0)), len(values))


def half_width(values: Tensor) -> float:
    """Returns half the width of the 95 % interval of the mean of independent values [n]; nan where n is below
    FEWEST."""
    count = len(values)
    if count < FEWEST:
        return math.nan
    return float(t.ppf(0.975, count - 1)) * float(values.std()) / math.sqrt(count)


def half_difference(one: Tensor, other: Tensor) -> float:
    """Returns half the width of the 95 % interval of the difference of the means of independent values [n], [m], by
    Welch; nan where n or m is below FEWEST. scipy's own function warns where values are all alike."""
    counts = len(one), len(other)
    if min(counts) < FEWEST:
        return math.nan
    squares = [float(values.double().var()) / len(values) for values in (one, other)]
    if sum(squares) == 0:
        return 0.0
    freedom = sum(squares) ** 2 / sum(square**2 / (count - 1) for square, count in zip(squares, counts, strict=True))
    return float(t.ppf(0.975, freedom)) * math.sqrt(sum(squares))


def share_interval(right: Tensor) -> tuple[float, float]:
    """Returns the 95 % interval of the share of readings that are right, bool [scenes, readings of one], of one scene
    at least.

    Readings of one scene are often right together. Wilson's score is therefore taken of as many independent readings
    as have the spread that is found between scenes: at least one a scene, at most all of them.
    """
    share, (scenes, of_one) = float(right.double().mean()), right.shape
    spread = float(right.double().mean(1).var()) if scenes > 1 else 0.0
    independent = scenes * share * (1 - share) / spread if spread else math.inf
    count = min(max(independent, scenes), scenes * of_one)
    return wilson(share * count, count)


def wilson(right: float, count: float) -> tuple[float, float]:
    """Returns the 95 % interval of a share of independent readings, by Wilson's score."""
    if not count:
        return 0.0, 1.0
    z = 1.96
    share, square = right / count, z * z / count
    middle, half = share + square / 2, z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return (middle - half) / (1 + square), (middle + half) / (1 + square)
