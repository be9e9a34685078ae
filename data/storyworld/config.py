"""This module defines storyworld's settings."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from data.storyworld.characters import BADGES
from data.storyworld.motion import CAMERAS
from data.storyworld.places import PLACES
from moc.errors import UserError


class Mode(StrEnum):
    """The mode says who tells the looks. described: the captions do. recall: only an early shot shows them."""

    described = "described"
    recall = "recall"


@dataclass(frozen=True)
class StoryworldConfig:
    """These settings say what to write, and where.

    output: the folder to write.
    scenes: how many.
    seed: the seed of every scene.
    mode: what captions tell.
    size: height and width.
    fps: the frame rate.
    frames_per_shot, shots: the choices a scene draws from.
    characters: names in one scene.
    characters_per_shot: the most that one shot shows.
    names, places, cameras: those to use, all if empty.
    places_per_scene: a true cut changes place if there are two or more.
    continuation: the share of shots after the first that go on without a cut (described mode only).
    familiar: every scene has the same places and every name the same look, which a small model learns in minutes; the
    look is that of the name in every familiar world.
    look_alikes: two others share the fur and the outfit of the name that the last shot of a recall scene returns to.
    crf: the quality of the videos, lower is better.
    workers: processes; null means one for each core.
    overwrite: replace the storyworld already in `output`.
    """

    output: str
    scenes: int = 200
    seed: int = 0
    mode: Mode = Mode.described
    size: list[int] = field(default_factory=lambda: [64, 96])
    fps: int = 12
    frames_per_shot: list[int] = field(default_factory=lambda: [17])
    shots: list[int] = field(default_factory=lambda: [4])
    characters: int = 2
    characters_per_shot: int = 1
    names: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    cameras: list[str] = field(default_factory=list)
    places_per_scene: int = 3
    continuation: float = 0.2
    familiar: bool = False
    look_alikes: bool = False
    crf: int = 14
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        checks = {
            "scenes": (self.scenes, self.scenes >= 1, "at least 1"),
            "seed": (self.seed, self.seed >= 0, "0 or more"),
            "size": (self.size, len(self.size) == 2 and all(32 <= n <= 4096 and n % 2 == 0 for n in self.size),
                     "[height, width], even, from 32 to 4096"),
            "fps": (self.fps, 1 <= self.fps <= 120, "from 1 to 120"),
            "frames_per_shot": (self.frames_per_shot, bool(self.frames_per_shot) and min(self.frames_per_shot) >= 1,
                                "a list of whole numbers from 1"),
            "shots": (self.shots, bool(self.shots) and min(self.shots) >= self._least_shots(),
                      f"a list of whole numbers from {self._least_shots()} in this mode"),
            "names": (self.names, _are_among(self.names, BADGES), f"among {', '.join(BADGES)}, each once"),
            "cameras": (self.cameras, set(self.cameras) <= set(CAMERAS), f"among {', '.join(CAMERAS)}"),
            "characters": (self.characters, 1 <= self.characters <= len(self.names or BADGES),
                           f"from 1 to {len(self.names or BADGES)}, the number of names"),
            "characters_per_shot": (self.characters_per_shot, 1 <= self.characters_per_shot <= min(3, self.characters),
                                    "from 1 to 3, and at most `characters`"),
            "places": (self.places, _are_among(self.places, PLACES), f"names among {', '.join(PLACES)}, each once"),
            "places_per_scene": (self.places_per_scene, 1 <= self.places_per_scene <= len(self.places or PLACES),
                                 "from 1 to the number of places"),
            "continuation": (self.continuation, 0 <= self.continuation <= 1, "from 0 to 1"),
            "crf": (self.crf, 0 <= self.crf <= 51, "from 0 (lossless) to 51"),
            "workers": (self.workers, self.workers is None or self.workers >= 1, "at least 1, or null for one a core"),
        }  # fmt: skip
        for name, (value, good, rule) in checks.items():
            if not good:
                raise UserError(f"storyworld {name}={value}: must be {rule}")
        if self.mode == Mode.recall and self.characters <= self.characters_per_shot:
            raise UserError(
                f"storyworld characters={self.characters}: recall needs more than characters_per_shot="
                f"{self.characters_per_shot}, so that a name can be away; raise characters"
            )

    def _least_shots(self) -> int:
        return 2 if self.mode == Mode.recall else 1


def _are_among(names: list[str], known: Collection[str]) -> bool:
    """Returns whether all names are known ones, and none is there twice."""
    return len(set(names)) == len(names) and set(names) <= set(known)
