"""How long steps take, and how long they wait for data."""

import time
from collections.abc import Callable, Sequence

from moc.batch import Batch


class Clock:
    """Times steps and how long they waited for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.start, self.waited, self.steps, self.tokens = time.perf_counter(), 0.0, 0, 0

    def wait(self, take: Callable[[], Sequence[Batch] | None]) -> Sequence[Batch] | None:
        """The batches of a step that `take` waits for, if any come."""
        asked = time.perf_counter()
        batches = take()
        self.waited += time.perf_counter() - asked
        self.steps += 1
        self.tokens += sum(batch.layout.num_tokens for batch in batches or ())
        return batches

    def read(self) -> dict[str, float]:
        """Seconds a step, the share of it spent waiting for data, and tokens a second, since the last reading."""
        elapsed = time.perf_counter() - self.start
        values = {
            "step_seconds": elapsed / max(1, self.steps),
            "data_wait": self.waited / elapsed,
            "tokens_per_second": self.tokens / elapsed,
        }
        self.reset()
        return values
