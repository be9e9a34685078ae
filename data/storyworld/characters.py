"""This module draws storyworld's characters, eight animals with clothes, from a look (who) and a pose (how).

A name always has the same animal, emblem and gait: they are its visible badge. Fur and outfit colour, pattern,
accessory and size belong to a scene. In local units the feet stand on (0, 0), the head's top is near y = -0.9, y down.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.storyworld.accessories import ACCESSORIES
from data.storyworld.animals import ANIMALS, CREAM, draw_head
from data.storyworld.canvas import Canvas, Colour, Paint, capsule, darker, ellipse, rgb, shaded, star

# The six values are far apart in hue or lightness, so that a reader of pixels can tell them after a lossy codec.
COLOURS: dict[str, Colour] = {
    "red": rgb("#e0483c"), "yellow": rgb("#f7c93e"), "green": rgb("#4fae4a"),
    "blue": rgb("#3f74e0"), "pink": rgb("#f58ad0"), "white": rgb("#f4f1ea"),
}  # fmt: skip
SIZES = {"small": 0.44, "big": 0.56}  # frame heights

# How much of the trim's colour shows at local (x, y): above 0 trim, below 0 cloth.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda x, y: np.full_like(x, -1),
    "striped": lambda x, y: np.sin(75 * y),
    "dotted": lambda x, y: 3.2 * (np.cos(58 * x) * np.cos(58 * y) - 0.45),
    "checked": lambda x, y: 1.6 * np.sin(42 * x) * np.sin(42 * y),
    "barred": lambda x, y: np.sin(62 * x),
    "hemmed": lambda x, y: 40 * (y + 0.16),
}

EMBLEMS: dict[str, np.ndarray] = {
    "star": star(0, 0, 0.075, 5, 0.45),
    "heart": np.array([(0, 0.06), (-0.06, -0.005), (-0.055, -0.045), (-0.025, -0.055), (0, -0.03),
                       (0.025, -0.055), (0.055, -0.045), (0.06, -0.005)]),
    "moon": np.concatenate([ellipse(0, 0, 0.06, 0.06)[4:28], ellipse(0.03, 0, 0.05, 0.05)[27:4:-1]]),
    "drop": np.array([(0, -0.07), (0.04, 0.0), (0.03, 0.045), (0, 0.055), (-0.03, 0.045), (-0.04, 0.0)]),
    "leaf": np.array([(-0.05, 0.05), (-0.04, -0.03), (0.055, -0.055), (0.03, 0.04)]),
    "dot": ellipse(0, 0, 0.035, 0.035),
    "cross": star(0, 0, 0.07, 4, 0.32),
    "bar": np.array([(-0.06, -0.022), (-0.06, 0.022), (0.06, 0.022), (0.06, -0.022)]),
}  # fmt: skip


@dataclass(frozen=True)
class Badge:
    """A badge is what a name has in every scene. bounce: its bob at a step, in frame heights; pace: steps a second."""

    animal: str
    emblem: str
    bounce: float
    pace: float


BADGES: dict[str, Badge] = {
    "Mia": Badge("rabbit", "star", 0.030, 2.2),
    "Bo": Badge("bear", "heart", 0.008, 1.4),
    "Kit": Badge("cat", "moon", 0.012, 2.0),
    "Pip": Badge("chick", "drop", 0.020, 2.8),
    "Fen": Badge("fox", "leaf", 0.014, 2.1),
    "Lulu": Badge("mouse", "dot", 0.016, 2.6),
    "Gus": Badge("frog", "cross", 0.034, 1.7),
    "Ella": Badge("elephant", "bar", 0.006, 1.2),
}


@dataclass(frozen=True)
class Look:
    """A look says how a character is drawn in one scene: names of colours and of the rest, "" for no accessory."""

    name: str
    fur: str
    outfit: str
    pattern: str = "plain"
    accessory: str = ""
    size: str = "big"


@dataclass(frozen=True)
class Pose:
    """A pose says how a character stands. x, y: its feet, world units. facing: -1 left, 1 right, 0 the viewer. Angles
    are in radians."""

    x: float
    y: float
    facing: float = 1.0
    lift: float = 0.0  # height above the ground, world units
    stretch: float = 1.0  # 1.1: taller and thinner
    lean: float = 0.0
    stride: float = 0.0  # -1 .. 1, legs apart
    left_arm: float = 0.35  # 0 hangs down, pi points up
    right_arm: float = 0.35
    eyes: float = 1.0  # 0 closed


def draw_character(canvas: Canvas, look: Look, pose: Pose, light: Colour) -> None:
    """Draws on a canvas of world units. light: the tint of the place, multiplied into the colours."""
    draw_in_colours(canvas, look, pose, COLOURS[look.fur] * light, COLOURS[look.outfit] * light, light)


def draw_in_colours(canvas: Canvas, look: Look, pose: Pose, fur: Colour, outfit: Colour, light: Colour) -> None:
    """Draws a look in other colours of fur and outfit, to which the light was applied already. Every pixel is an affine
    function of `fur`, `outfit` and `light`, channel by channel, where the look has no accessory."""
    height = SIZES[look.size]
    body = canvas.at(pose.x, pose.y - pose.lift, height / pose.stretch, height * pose.stretch, pose.lean)
    trim = CREAM * light
    badge = BADGES[look.name]
    animal = ANIMALS[badge.animal]
    animal.tail(body, fur, -pose.facing)
    _draw_legs(body, pose, fur)
    body.fill_rimmed(_pear(), _cloth(look.pattern, outfit, trim), outfit)
    emblem = body.at(0.05 * pose.facing, -0.32)
    emblem.fill(ellipse(0, 0, 0.078, 0.078), trim)
    emblem.fill(EMBLEMS[badge.emblem], darker(outfit, 0.45))
    _draw_arms(body, pose, fur, outfit)
    head = body.at(0.02 * pose.facing, -0.62)
    draw_head(head, animal, fur, pose.facing, pose.eyes)
    if look.accessory:
        ACCESSORIES[look.accessory](head, light, pose.facing)


def _draw_legs(body: Canvas, pose: Pose, fur: Colour) -> None:
    for side in (-1, 1):
        swing = side * pose.stride
        x, y = side * 0.1 + 0.1 * swing * pose.facing, -0.035 - 0.05 * max(0.0, swing)
        body.fill_rimmed(capsule(side * 0.09, -0.2, x, y, 0.065, 0.06), shaded(darker(fur, 0.12), -0.25, 0.0), fur)
        body.fill(ellipse(x + 0.03 * pose.facing, y + 0.01, 0.085, 0.045), shaded(darker(fur, 0.2), -0.1, 0.05))


def _draw_arms(body: Canvas, pose: Pose, fur: Colour, outfit: Colour) -> None:
    for side, angle in ((-1, pose.left_arm), (1, pose.right_arm)):
        x, y = side * (0.16 + 0.2 * np.sin(angle)), -0.38 + 0.2 * np.cos(angle)
        body.fill_rimmed(capsule(side * 0.15, -0.38, x, y, 0.06, 0.055), shaded(outfit, -0.5, -0.1), outfit)
        body.fill(ellipse(x, y, 0.055, 0.055), shaded(fur, y - 0.06, y + 0.06))


def _pear() -> np.ndarray:
    """Returns the outline of the coat: narrow shoulders, wide hem."""
    outline = ellipse(0, -0.27, 0.2, 0.2)
    outline[:, 0] *= 1 + 0.9 * (outline[:, 1] + 0.27)
    return outline


def _cloth(pattern: str, colour: Colour, trim: Colour) -> Paint:
    base = shaded(colour, -0.47, -0.05)
    if pattern == "plain":
        return base
    figure = PATTERNS[pattern]

    def paint(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        share = 0.7 * np.clip(0.5 + 1.5 * figure(x, y), 0, 1)[..., None]
        return base(x, y) * (1 - share) + trim * share

    return paint
