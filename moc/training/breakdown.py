"""A `Breakdown` takes the loss apart: by noise level, by the shot's number in its film, by the source of the data."""

from collections import defaultdict

from moc.training.outcome import Outcome
from moc.training.parallel import gather_lists

_BINS = 10  # bins of the noise level over [0, 1]
_LAST_SHOT = 16  # shots from here on count as one
_NOISE = [f"noise_{number / _BINS:g}" for number in range(_BINS)]
_SHOT = [f"shot_{index}" for index in range(_LAST_SHOT + 1)]


class Breakdown:
    """A breakdown splits the mean loss of target shots by noise level, shot and source, over the steps since it was
    last read."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])

    def add(self, outcome: Outcome) -> None:
        """Takes in a step whose outcome has been read. Shots without a finite loss are left out."""
        for shot in outcome.target_shots():
            names = [_NOISE[min(int(shot.sigma * _BINS), _BINS - 1)], _SHOT[min(shot.index, _LAST_SHOT)]]
            for name in [*names, f"source_{shot.source}"] if shot.source else names:
                self._sums[name][0] += shot.loss
                self._sums[name][1] += 1

    def read(self) -> dict[str, float]:
        """Returns the means over all processes, each of which takes part: loss/noise_0.3 is of noise levels in [0.3,
        0.4), loss/shot_1 of the first shots of films, loss/source_NAME of a source of the mix."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        for name, loss, count in gather_lists([(name, *sum_) for name, sum_ in self._sums.items()]):
            sums[name][0] += loss
            sums[name][1] += count
        self._sums.clear()
        return {f"loss/{name}": loss / count for name, (loss, count) in sorted(sums.items())}
