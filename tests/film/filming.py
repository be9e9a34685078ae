"""This module has a filmmaker with a small trained model, what it films, what a film's folder holds, and work that is
killed."""

import json
import os
import signal
import time
from pathlib import Path

from film.filmmaker import Filmmaker, FilmmakerConfig
from film.folder import METADATA, FilmFolder
from moc.diffusion import SamplingConfig

SHOT = {"prompt": "Mia walks.", "seconds": 4 / 12}
STORY = {"size": [32, 48], "fps": 12, "global": "A journey.", "shots": [SHOT, SHOT | {"cut": False}, SHOT]}


def open_filmmaker(trained: Path, **sampler) -> Filmmaker:
    config = SamplingConfig(**{"steps": 2, "guidance_scale": 2.0} | sampler)
    return Filmmaker(FilmmakerConfig(str(trained), device="cpu", sampler=config, keep_every=1))


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files of a film; what its metadata say of time left out."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files[METADATA])
    return files | {METADATA: json.dumps({key: value for key, value in record.items() if key != "seconds"}).encode()}


def film_of(filmmaker: Filmmaker, story: Path, folder: Path, redo=()) -> dict[str, bytes]:
    filmmaker.make([(filmmaker.read(story), FilmFolder(folder))], redo)
    return contents(folder)


def killed_at(replacement: int, work) -> bool:
    """Returns whether `work`, in a process of its own, is killed where it would give its n-th file its name."""
    child = os.fork()
    if child == 0:
        replace, count = Path.replace, 0

        def counting(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == replacement:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = counting  # type: ignore[method-assign]
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def killed_after(seconds: float, work) -> bool:
    """Returns whether `work`, in a process of its own, is killed before its end, so many seconds after it began."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def times_killed(work) -> int:
    """Does `work` in process after process, each killed before one more file gets its name than the one before it gave,
    until it is done; returns how many were killed."""
    kills = 0
    while killed_at(1 + kills, work):
        kills += 1
    return kills
