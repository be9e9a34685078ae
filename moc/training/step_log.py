"""A `StepLog` reads what came of each step, a step late, and says what went wrong in it."""

from collections import deque

from moc.training.breakdown import Breakdown
from moc.training.metrics import Metrics
from moc.training.outcome import Outcome, SkipCount, Spikes, Totals


class StepLog:
    """A step log counts skipped steps, reports spikes and takes the loss apart.

    most_skipped: how many steps in a row may be skipped. tells: whether this process logs, as one of all does.
    proven: whether the weights have given a finite loss, as far as is known.
    """

    def __init__(self, most_skipped: int, tells: bool) -> None:
        self.skips, self.spikes, self.breakdown = SkipCount(most_skipped, tells), Spikes(tells), Breakdown()
        self.proven = True
        self._unread: deque[Outcome] = deque()

    def add(self, outcome: Outcome) -> None:
        """Takes the outcome of a step that the device may still be at."""
        self._unread.append(outcome)

    def read(self, metrics: Metrics | None, but: int = 0) -> Totals:
        """Reads all outcomes but the `but` newest and returns the totals of the last one. metrics: takes the scenes of
        skipped steps and spikes, on the main process. Every process takes part.

        Raises TooManySkipped where too many steps in a row were skipped.
        """
        totals = Totals()
        while len(self._unread) > but:
            outcome = self._unread.popleft()
            totals = outcome.read()
            # A step that follows a skipped one has the same weights, so what is known of them stays true.
            self.proven = totals.num_finite > 0 or (self.proven and self.skips.in_a_row > 0)
            self.breakdown.add(outcome)
            for name, scenes in (
                ("skipped_scenes", self.skips.add(outcome, totals)),
                ("spike_scenes", self.spikes.add(outcome, totals)),
            ):
                if scenes and metrics:
                    metrics.log(outcome.step, {name: ", ".join(scenes)})
        return totals
