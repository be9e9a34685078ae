"""This module draws recall scenes by the thousand: each is a few numbers, drawn from its seed and its index alone.

In a recall scene the last shot returns to a name that exactly one earlier shot showed, and no caption tells its looks,
unless they are `described`. These scenes are of storyworld's things as `stock` and `filmed` compose them: one character
is in a shot, it stands on a whole pixel, and its action begins at one moment. `make_scene` gives a scene as the CPU
renderer takes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.storyworld.characters import BADGES, COLOURS, Look
from data.storyworld.config import Mode
from data.storyworld.motion import ACTIONS, CAMERAS, Actor, Timing, camera_at
from data.storyworld.places import PLACES
from data.storyworld.scenes import Recall, Scene, Shot, end_of, global_caption, shot_caption, start_of
from moc.errors import UserError, check_least

NAMES, COLOUR_NAMES, PLACE_NAMES, ACTION_NAMES = list(BADGES), list(COLOURS), list(PLACES), list(ACTIONS)
FACINGS = (-1.0, 1.0)
STATIC = "static"
STAGE, DEPTH = 0.25, 0.03  # the most that a character stands off the middle of the stage, in world units
GROUND = 0.86  # about the height at which it stands
REACH = 0.33  # how far a walk goes to either side
HELD_OUT = 1 << 40  # the first index of scenes that no training sees


@dataclass
class RecallConfig:
    """These settings describe a world of recall scenes.

    size: height and width. frames: of a shot. characters: names in a scene. places: in a scene, each shot in another
    than the shot before. paintings: how many paintings of each place there are. look_alikes: a second name has the
    returning one's fur, and a third its outfit. described: captions tell the looks. cameras: how the camera may move,
    names among CAMERAS. travel: the share of its way that it goes in a shot.
    """

    seed: int = 0
    size: list[int] = field(default_factory=lambda: [64, 96])
    fps: int = 12
    frames: int = 5
    shots: int = 8
    characters: int = 4
    places: int = 3
    paintings: int = 8
    look_alikes: bool = False
    described: bool = False
    cameras: list[str] = field(default_factory=lambda: [STATIC])
    travel: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"recall.seed={self.seed} must be a whole number from 0 to {(1 << 64) - 1}")
        check_least(self, "recall", 1, "fps", "frames", "paintings")
        check_least(self, "recall", 2, "shots")
        if len(self.size) != 2 or any(n < 32 or n > 256 or n % 2 for n in self.size):
            raise UserError(f"recall.size={self.size} must be an even height and width from 32 to 256")
        if not 2 + self.look_alikes <= self.characters <= len(NAMES):
            raise UserError(
                f"recall.characters={self.characters} must lie in [{2 + self.look_alikes}, {len(NAMES)}], so that the "
                "name which returns can be away"
            )
        if not 2 <= self.places <= len(PLACES):
            raise UserError(f"recall.places={self.places} must lie in [2, {len(PLACES)}], so that a cut changes place")
        if not self.cameras or not set(self.cameras) <= set(CAMERAS):
            raise UserError(f"recall.cameras={self.cameras} must be some of {', '.join(CAMERAS)}")
        if not 0 < self.travel <= 1:
            raise UserError(f"recall.travel={self.travel} must lie in (0, 1]")

    @property
    def camera_moves(self) -> bool:
        return any(camera != STATIC for camera in self.cameras)


@dataclass(frozen=True)
class RecallScenes:
    """These are many scenes as arrays of int64: B scenes, S shots, C characters, P places; the first character is the
    one that returns.

    name, fur, outfit [B, C]: numbers in NAMES and COLOUR_NAMES. cast [B, S]: which character is in a shot. place,
    action, facing [B, S]: numbers in PLACE_NAMES, ACTION_NAMES and FACINGS. camera [B, S]: a number in the config's
    cameras. column, row [B, S]: where the character stands, in fine pixels from (0, GROUND). painting [B]: which
    painting the places have. shown [B]: the earlier shot that shows the returning character. places [B, P]: those of
    the scene.
    """

    name: np.ndarray
    fur: np.ndarray
    outfit: np.ndarray
    cast: np.ndarray
    place: np.ndarray
    action: np.ndarray
    facing: np.ndarray
    camera: np.ndarray
    column: np.ndarray
    row: np.ndarray
    painting: np.ndarray
    shown: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.painting)

    @property
    def distance(self) -> np.ndarray:
        """Returns how many shots ago the returning name was last shown."""
        return self.cast.shape[1] - 1 - self.shown

    def of_shots(self, characters: np.ndarray) -> np.ndarray:
        """Returns what [B, C] says of each shot's character: [B, S]."""
        return np.take_along_axis(characters, self.cast, axis=1)


def fine_height(config: RecallConfig) -> int:
    """Returns rows of the grid that frames are drawn on, twice as fine as their pixels."""
    return 2 * config.size[0]


def draw_scenes(config: RecallConfig, indices: Sequence[int]) -> RecallScenes:
    """Returns the scenes of these indices, each the same whatever others are drawn with it."""
    shots, names, places = config.shots, config.characters, config.places
    widths = [len(NAMES), names, names, shots, shots, shots, shots, shots, shots, len(PLACES), 1, 1, shots]
    draws = np.split(_uniforms(config.seed, indices, sum(widths)), np.cumsum(widths)[:-1], axis=1)
    u_name, u_fur, u_outfit, u_cast, u_place, u_action, u_facing, u_column, u_row, *draws = draws
    u_stock, u_painting, u_shown, u_camera = draws

    fur, outfit = _choices(u_fur, len(COLOURS)), _choices(u_outfit, len(COLOURS))
    if config.look_alikes:
        fur[:, 1], outfit[:, 2] = fur[:, 0], outfit[:, 0]
    shown = _choices(u_shown[:, 0], shots - 1)
    cast = 1 + _choices(u_cast, names - 1)
    cast[:, -1] = 0
    cast[np.arange(len(cast)), shown] = 0
    stock = u_stock.argsort(axis=1)[:, :places]
    steps = np.concatenate([_choices(u_place[:, :1], places), 1 + _choices(u_place[:, 1:], places - 1)], axis=1)
    scale = fine_height(config)
    return RecallScenes(
        name=u_name.argsort(axis=1)[:, :names],
        fur=fur,
        outfit=outfit,
        cast=cast,
        place=np.take_along_axis(stock, steps.cumsum(axis=1) % places, axis=1),
        action=_choices(u_action, len(ACTIONS)),
        facing=_choices(u_facing, len(FACINGS)),
        camera=_choices(u_camera, len(config.cameras)),
        column=_offsets(u_column, int(STAGE * scale)),
        row=_offsets(u_row, int(DEPTH * scale)),
        painting=_choices(u_painting[:, 0], config.paintings),
        shown=shown,
        places=stock,
    )


def looks_of(scenes: RecallScenes, i: int) -> tuple[Look, ...]:
    """Returns the looks of the characters of scene `i`."""
    return tuple(
        Look(NAMES[n], COLOUR_NAMES[f], COLOUR_NAMES[o])
        for n, f, o in zip(scenes.name[i], scenes.fur[i], scenes.outfit[i], strict=True)
    )


def captions(config: RecallConfig, scenes: RecallScenes, i: int) -> list[str]:
    """Returns the global caption of scene i, then each shot's; names and places stand in the order of the alphabet, so
    that few captions are many scenes'. All have as many words in one scene as in another."""
    looks = looks_of(scenes, i)
    people, places = sorted(looks, key=lambda look: look.name), sorted(PLACE_NAMES[p] for p in scenes.places[i])
    told = [global_caption(people, places, "journey", Mode.described if config.described else Mode.recall)]
    for place, who, action, camera in zip(scenes.place[i], scenes.cast[i], scenes.action[i], scenes.camera[i],
                                          strict=True):  # fmt: skip
        doing = _called(looks[who]) if config.described else looks[who].name, ACTION_NAMES[action]
        told.append(shot_caption(PLACE_NAMES[place], [doing], config.cameras[camera], cut=True))
    return told


def _called(look: Look) -> str:
    """Returns a described name: a small model reads looks from a shot's own caption long before it finds them in
    another."""
    return f"{look.name} the {look.fur} {BADGES[look.name].animal} in the {look.outfit} coat"


def make_scene(config: RecallConfig, scenes: RecallScenes, i: int) -> Scene:
    """Returns scene i as `Renderer` draws it."""
    looks = looks_of(scenes, i)
    caption, *of_shots = captions(config, scenes, i)
    shots = tuple(
        stock_shot(
            config,
            PLACE_NAMES[scenes.place[i, s]],
            actor_of(config, looks[scenes.cast[i, s]], scenes.action[i, s], scenes.facing[i, s],
                     scenes.column[i, s], scenes.row[i, s]),
            of_shots[s],
            config.cameras[scenes.camera[i, s]],
        )
        for s in range(config.shots)
    )  # fmt: skip
    cast = scenes.cast[i].tolist()
    recalls = []
    for s, who in enumerate(cast):
        before = tuple(t for t in range(s) if cast[t] == who)
        if before:
            recalls.append(Recall(s, looks[who].name, before, s - before[-1]))
    seed = (config.seed, int(scenes.painting[i]))
    return Scene(looks, shots, caption, tuple(recalls), False, seed, seed)


def stock_shot(config: RecallConfig, place: str, actor: Actor | None, caption: str = "", camera: str = STATIC) -> Shot:
    """Returns a shot of the stock: what drifts in the air is where a scene has it at first."""
    timing, start, cast = Timing(config.frames / config.fps), start_of(camera), (actor,) if actor else ()
    end = camera_at(start, end_of(camera, start), timing, config.travel * timing.seconds)
    return Shot(place, True, config.frames, timing, camera, start, end, cast, 0.0, caption)


def actor_of(config: RecallConfig, look: Look, action: int, facing: int, column: int = 0, row: int = 0) -> Actor:
    """Returns a character of the stock, whose action begins at a moment of its own."""
    scale = fine_height(config)
    x, y = column / scale, (round(GROUND * scale) + row) / scale
    clip = clip_number(NAMES.index(look.name), action, facing)
    return Actor(look, ACTION_NAMES[action], x, y, FACINGS[facing], (x - REACH, x + REACH), phase=0.61 * clip % 5)


def clip_number(name, action, facing):
    """Returns where the clip of a name's action, seen from one side, stands in the stock; of ints or arrays of them."""
    return (name * len(ACTION_NAMES) + action) * len(FACINGS) + facing


def _choices(uniform: np.ndarray, count: int) -> np.ndarray:
    return (uniform * count).astype(np.int64)


def _offsets(uniform: np.ndarray, most: int) -> np.ndarray:
    """Returns whole numbers in [-most, most]."""
    return _choices(uniform, 2 * most + 1) - most


def _uniforms(seed: int, indices: Sequence[int], count: int) -> np.ndarray:
    """Returns float64 [B, count] in [0, 1), a row for each index, by SplitMix64 of (seed, index, column)."""
    with np.errstate(over="ignore"):
        rows = _mixed(np.asarray(indices, np.uint64) + _mixed(np.array([seed], np.uint64) + _GOLDEN))
        bits = _mixed(rows[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
