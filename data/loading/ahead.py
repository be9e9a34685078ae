"""This module takes items ahead in a thread: the next one while the one before is in use."""

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL

Item = TypeVar("Item")


_PATIENCE = 2 * MP_STATUS_CHECK_INTERVAL  # seconds to wait for all threads: one asks so often if its workers live
_running: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue[bool]] = weakref.WeakKeyDictionary()


@atexit.register
def _wait_for_threads() -> None:
    """Waits for the threads that are left. Python ends a thread that is left wherever it is, and within torch's
    operators that aborts the whole process."""
    deadline = time.monotonic() + _PATIENCE
    for thread, wanted in list(_running.items()):
        wanted.put(False)
        thread.join(max(0.0, deadline - time.monotonic()))


@dataclass(frozen=True)
class _Failure:
    error: BaseException


def ahead(make: Callable[[], Iterator[Item]]) -> Iterator[Item]:
    """Yields the items of `make()`, an endless iterator, which is made and asked in a thread.

    A slow or hanging item does not hold up the end of this iterator, and that of the program for some seconds at most;
    a signal reaches the thread that waits here. An error of an item is raised in its place.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    taken: queue.SimpleQueue[Item | _Failure] = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def take() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread begins with the first GPU
        try:
            items = make()
            while wanted.get():
                taken.put(next(items))
        except BaseException as error:
            taken.put(_Failure(error))

    thread = threading.Thread(target=take, daemon=True)
    _running[thread] = wanted
    thread.start()
    try:
        wanted.put(True)
        while True:
            item = taken.get()
            if isinstance(item, _Failure):
                raise item.error
            wanted.put(True)
            held = [item]
            del item
            yield held.pop()  # this generator keeps no reference to the item
    finally:
        wanted.put(False)
