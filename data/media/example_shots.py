"""This module says who appears in each shot of the example film, by a list made by eye, and divides it into overlapping
scenes.

A scene is one shot, or a shot with those before it, and is named after the blocks of ten shots that it touches: a block
is held out of training by `data.held_out=["*b03*"]`, with all scenes that show any of it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.manifest import SceneRecord, ShotRecord

LIST = Path(__file__).with_name("big_buck_bunny.json")
BLOCK = 10  # shots
LONGEST = 10 * 24  # frames; a longer shot is cut to its last ones, when all its characters have entered


@dataclass(frozen=True)
class FilmShot:
    """This describes one shot of the film. number: counts from 1, as the detector has it. start, end: its frames,
    half-open. characters: who appears, by name."""

    number: int
    start: int
    end: int
    characters: tuple[str, ...]
    caption: str


def film_shots() -> list[FilmShot]:
    """Returns the film's shots, but for black ones and those of the credits."""
    shots = json.loads(LIST.read_text(encoding="utf-8"))["shots"]
    return [FilmShot(**shot | {"characters": tuple(shot["characters"])}) for shot in shots]


def last_seen(shots: Sequence[FilmShot], index: int) -> dict[str, int | None]:
    """Returns how many shots ago each character of shot `index` was seen last; None where never before."""
    found: dict[str, int | None] = {}
    for name in shots[index].characters:
        before = [back for back in range(1, index + 1) if name in shots[index - back].characters]
        found[name] = before[0] if before else None
    return found


def block(index: int) -> int:
    """Returns the block of a shot, both counted from 0."""
    return index // BLOCK


def scenes(film: str, caption: str, shots_of_a_scene: Sequence[int]) -> Iterator[SceneRecord]:
    """Yields the scene of each length that ends with each shot; the film's first scenes are shorter.

    film: the path of the video. caption: the global one. shots_of_a_scene: lengths in shots.
    """
    shots = film_shots()
    for last in range(len(shots)):
        for length in sorted({min(length, last + 1) for length in shots_of_a_scene}):
            first = last + 1 - length
            records = tuple(
                ShotRecord(max(s.start, s.end - LONGEST), s.end, s.caption) for s in shots[first : last + 1]
            )
            yield SceneRecord(scene_id(first, last), film, caption=caption, fps=24.0, shots=records)


def scene_id(first: int, last: int) -> str:
    """Returns the id of the scene of shots first to last, both included and counted from 0."""
    blocks = "".join(f"b{number:02d}" for number in range(block(first), block(last) + 1))
    return f"{blocks}-shots{first:03d}-{last:03d}"
