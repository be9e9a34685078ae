"""Signals that tell a run to end are looked at within a step, and answered with a checkpoint and an exit status; before
training begins, with the exit status alone.

Schedulers send SIGTERM or SIGUSR1 before they take a machine, a user presses Ctrl-C. Repeated ones change nothing.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

NOT_FINISHED = os.EX_TEMPFAIL  # 75, the exit status of a run that the same command goes on with
MARKER = "MOC_UNFINISHED"  # an environment variable names a file to make then, for launchers with another status
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GOES_ON = "no step was taken since the newest checkpoint; the same command goes on"
TRIAL_ENDED = "the trial was interrupted, and nothing of it is kept"

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def ignore_signals() -> None:
    """Has this process ignore further signals while it ends: launchers and schedulers send theirs twice."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_unfinished() -> NoReturn:
    """Ends the process with NOT_FINISHED, and makes the file that tells it."""
    if os.environ.get(MARKER):
        Path(os.environ[MARKER]).touch()
    sys.exit(NOT_FINISHED)


def launcher_patience() -> float | None:
    """Returns how many seconds after a signal torch's launcher, which hands it on, kills processes that go on; None
    where no launcher does."""
    if "SIGTERM" not in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", ""):
        return None
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


@contextmanager
def ending_at_signals(dead: Callable[[], list[str]], told: str = GOES_ON) -> Iterator[None]:
    """Has a signal end the process with one line and NOT_FINISHED, since there is nothing to save yet. An
    `Interruption` that is entered meanwhile takes the signals until it is left.

    dead: returns other processes of the command that are dead. A launcher then ends those that are left by a signal of
    its own, which is a failure: status 1, and the line names the dead. told: what the line says otherwise.
    """

    def end(number: int, frame: object) -> None:
        ignore_signals()
        name = signal.Signals(number).name
        if gone := dead():
            sys.exit(
                f"error: {name}, and dead without a word: {', '.join(gone)}; look at the logs there. The same command "
                "goes on from the newest checkpoint"
            )
        logger.warning("%s: %s", name, told)
        leave_unfinished()

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        # A process that was told to end keeps these handlers, so that no further signal disturbs it.
        if not isinstance(sys.exception(), SystemExit):
            for number, handler in before.items():
                signal.signal(number, handler)


class _Interrupted(BaseException):
    """This error ends a wait. Only the first signal raises it."""


class Interruption:
    """An interruption notes in `signal` the name of the first signal that comes while it is entered. Python hands
    signals to the main thread alone; in another one it notes nothing."""

    def __init__(self) -> None:
        self.signal = ""
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, take: Callable[[], Result]) -> Result | None:
        """Returns what `take` returns, or None as soon as a signal has come, however long `take` would have taken."""
        try:
            try:
                self._waiting = True
                return None if self.signal else take()
            finally:
                self._waiting = False
        except _Interrupted:
            return None
        except Exception:
            if self.signal:  # the signal may have ended helpers of `take` too, which makes it fail
                return None
            raise

    def _receive(self, number: int, frame: object) -> None:
        if self.signal:
            return
        self.signal = signal.Signals(number).name
        if self._waiting:
            raise _Interrupted
