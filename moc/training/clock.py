"""A `Clock` tells how long steps take: as a whole, waiting for data and for other processes, and in each phase."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from moc.batch import Batch

Moment = float | torch.cuda.Event


class Clock:
    """A clock measures how long steps take, how long they wait for data, and how long the device is at each of their
    phases, and within them waits for other processes. device: on a GPU all but the data is timed there, by events, for
    which the host never waits."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._now: Callable[[], Moment] = _event if torch.device(device).type == "cuda" else time.perf_counter
        self.reset()

    def reset(self) -> None:
        self.start, self.waited, self.steps, self.tokens = time.perf_counter(), 0.0, 0, 0
        self._marks: list[tuple[str, Moment]] = []
        self._communications: list[tuple[Moment, Moment]] = []

    def wait(self, take: Callable[[], Sequence[Batch] | None]) -> Sequence[Batch] | None:
        """Returns the batches of a step that `take` waits for, if any come."""
        asked = time.perf_counter()
        batches = take()
        self.waited += time.perf_counter() - asked
        self.steps += 1
        self.tokens += sum(batch.layout.num_tokens for batch in batches or ())
        return batches

    def begin(self, phase: str) -> None:
        """Counts what the device is given until the next call as this phase's, or as no phase's if it is ""."""
        self._marks.append((phase, self._now()))

    @contextmanager
    def communication(self) -> Iterator[None]:
        """Counts what the device is given meanwhile as communication, which is a part of the phase around it."""
        begun = self._now()
        yield
        self._communications.append((begun, self._now()))

    def read(self) -> dict[str, float]:
        """Returns seconds a step and of each of its phases, the share of it spent waiting for data, and tokens a
        second, since the last reading. On a GPU the last step must be finished."""
        elapsed, steps = time.perf_counter() - self.start, max(1, self.steps)
        values = {
            "step_seconds": elapsed / steps,
            "data_wait": self.waited / elapsed,
            "tokens_per_second": self.tokens / elapsed,
        }
        phases: dict[str, float] = defaultdict(float, data=self.waited)
        for (phase, begun), (_, ended) in pairwise(self._marks):
            if phase:
                phases[phase] += _seconds(begun, ended)
        phases["communication"] = sum(_seconds(*span) for span in self._communications)
        self.reset()
        return values | {f"{phase}_seconds": seconds / steps for phase, seconds in phases.items()}


def about(seconds: float) -> str:
    """Returns a time in the unit that one would say it in."""
    if seconds < 120:
        return f"about {seconds:.0f} s" if seconds >= 1 else "less than a second"
    if seconds < 7200:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"about {seconds / 86400:.1f} days"


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begun: Moment, ended: Moment) -> float:
    if isinstance(begun, float) and isinstance(ended, float):
        return ended - begun
    return begun.elapsed_time(ended) / 1000  # type: ignore[union-attr, arg-type]
