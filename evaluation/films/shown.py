"""This module reads a sampled film to be judged: pictures of each shot, what its script asked for, and who each shot
names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from data.documents import parse, read_text
from data.errors import DataError
from film.folder import METADATA, FilmFolder
from film.script import Script, load_script
from film.storyboard import pick_frames
from moc.errors import Refusals

PICTURES = 8  # frames of a shot that are compared, spread over it, each with the frame after it
_HEIGHT = 256  # pixels; higher pictures are made smaller
_CHARACTERS = re.compile(r"\[character\](.*?)(?:\[|$)", re.IGNORECASE | re.DOTALL)
_NAME = re.compile(r"(?:^|[.;,]\s*|\n)\s*([A-Z][\w' -]{0,30}?):")


@dataclass(frozen=True)
class ShownShot:
    """A shown shot holds the pictures by which a shot is judged. pictures, after: uint8 [n, h, w, 3], frames spread
    over the shot and the frame that follows each. frames: how many the shot has. names: the characters and places that
    it is said to show."""

    prompt: str
    cut: bool
    frames: int
    pictures: np.ndarray
    after: np.ndarray
    names: frozenset[str]


@dataclass(frozen=True)
class Film:
    """This is a film to be judged. folder: as sample.py wrote it."""

    folder: Path
    script: Script
    shots: list[ShownShot]

    @property
    def fps(self) -> float:
        return self.script.fps


def open_film(folder: str | Path, schedule: Sequence[Sequence[str]] | None = None) -> Film:
    """Returns the film of a folder that sample.py has finished. schedule: names by shot, in place of those found in
    prompts.

    Raises DataError where there is no whole film, or the schedule is not of as many shots.
    """
    folder = Path(folder)
    _check_whole(folder)
    files = FilmFolder(folder)
    script = load_script(folder / METADATA)
    if schedule is not None and len(schedule) != len(script.shots):
        said = f"has {len(script.shots)} shots, the schedule {len(schedule)}; give a list of names for each shot"
        raise DataError("other-schedule", folder, said)
    names = names_by_shot(script) if schedule is None else [frozenset(shot) for shot in schedule]
    shots = []
    for number, (shot, named) in enumerate(zip(script.shots, names, strict=True), start=1):
        shots.append(ShownShot(shot.prompt, shot.cut, *_pictures(files, number), named))
    return Film(folder, script, shots)


def film_folders(folder: str | Path, refusals: Refusals) -> list[Path]:
    """Returns the folder of one film, or those of all films in it. Those that hold no finished film are noted, as is a
    folder without any film."""
    folder = Path(folder)
    films = [folder] if (folder / METADATA).is_file() else sorted(file.parent for file in folder.glob(f"*/{METADATA}"))
    for film in films or [folder]:
        with refusals.noted():
            _check_whole(film)
    return films


def _check_whole(folder: Path) -> None:
    if not FilmFolder(folder).is_finished:
        raise DataError("no-film", folder, "holds no whole film; name a folder that sample.py has finished")


def names_by_shot(script: Script) -> list[frozenset[str]]:
    """Returns who and what each shot shows: the entities of a benchmark's script (EntityBench's schedule, MSR-50's),
    else the names that its prompt mentions, of those that the global caption's "[character] Ann: ... Bob: ..."
    gives."""
    if any(shot.entities for shot in script.shots):
        return [frozenset(chain.from_iterable((shot.entities or {}).values())) for shot in script.shots]
    characters = _CHARACTERS.search(script.global_caption)
    known = _NAME.findall(characters[1]) if characters else []
    return [
        frozenset(name for name in known if re.search(rf"\b{re.escape(name)}\b", shot.prompt)) for shot in script.shots
    ]


def read_schedule(path: str | Path) -> list[list[str]]:
    """Returns a file of who and what recurs, as EntityBench keeps it for each shot: JSON or YAML, `shots`, a list of
    lists of names. Raises DataError where it is none."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            "missing-schedule", path, "no such file; give a JSON or YAML file with shots: [[name, ...], ...]"
        )
    raw = parse(read_text(path), path)
    shots = raw.get("shots") if isinstance(raw, dict) else None
    if not isinstance(shots, list):
        raise DataError("bad-schedule", f"{path} shots", "is not a list with the names in each shot")
    for index, names in enumerate(shots):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError("bad-schedule", f"{path} shots[{index}]", f"{names!r} is not a list of names")
    return shots


def _pictures(files: FilmFolder, number: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Returns how many frames a shot has, some of them, and the frame after each."""
    count = files.num_frames(number)
    chosen = pick_frames(max(1, count - 1), PICTURES)
    after = [min(index + 1, count - 1) for index in chosen]
    wanted = sorted({*chosen, *after})
    frames = files.frames(number, lambda _: wanted, _small_size)
    return count, frames[[wanted.index(index) for index in chosen]], frames[[wanted.index(index) for index in after]]


def _small_size(height: int, width: int) -> tuple[int, int]:
    return min(height, _HEIGHT), max(1, round(width * min(1, _HEIGHT / height)))
