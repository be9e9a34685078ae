"""Storyworld's characters: eight animals with clothes, drawn from a look (who) and a pose (how).

A name owns its animal, its emblem and its gait, always: they are its visible badge. Fur and outfit colour, pattern,
accessory and size belong to a scene. Local units: the feet stand on (0, 0), the head's top is near y = -0.9, y down.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data.storyworld.canvas import Canvas, Colour, Paint, capsule, darker, ellipse, lighter, mix, rgb, shaded, star

# Six values, far apart in hue or lightness, so that a reader of pixels can tell them after a lossy codec.
COLOURS: dict[str, Colour] = {
    "red": rgb("#e0483c"), "yellow": rgb("#f7c93e"), "green": rgb("#4fae4a"),
    "blue": rgb("#3f74e0"), "pink": rgb("#f58ad0"), "white": rgb("#f4f1ea"),
}  # fmt: skip
PATTERNS = ("plain", "striped", "dotted", "checked", "barred", "hemmed")
ACCESSORIES = ("hat", "scarf", "bow", "crown", "glasses", "flower")
SIZES = {"small": 0.44, "big": 0.56}  # frame heights
CREAM, INK = rgb("#fff6e0"), rgb("#2b2438")


@dataclass(frozen=True)
class Badge:
    """What a name owns in every scene. bounce: frame heights of bob at a step; pace: steps a second."""

    animal: str
    emblem: str
    bounce: float
    pace: float


BADGES: dict[str, Badge] = {
    "Mia": Badge("rabbit", "star", 0.030, 2.2),
    "Bo": Badge("bear", "heart", 0.008, 1.4),
    "Kit": Badge("cat", "moon", 0.012, 2.0),
    "Pip": Badge("chick", "ring", 0.020, 2.8),
    "Fen": Badge("fox", "leaf", 0.014, 2.1),
    "Lulu": Badge("mouse", "dot", 0.016, 2.6),
    "Gus": Badge("frog", "cross", 0.034, 1.7),
    "Ella": Badge("elephant", "bar", 0.006, 1.2),
}


@dataclass(frozen=True)
class Look:
    """A character as drawn in one scene; colour names, "" for no accessory."""

    name: str
    fur: str
    outfit: str
    pattern: str = "plain"
    accessory: str = ""
    size: str = "big"


@dataclass(frozen=True)
class Pose:
    """x, y: feet on the ground, world units. facing: -1 left .. 1 right, 0 to the viewer. Angles in radians."""

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
    """Draw on a canvas of world units. light: the tint of the place, multiplied into every colour."""
    height = SIZES[look.size]
    me = canvas.at(pose.x, pose.y - pose.lift, height / pose.stretch, height * pose.stretch, pose.lean)
    fur, outfit = COLOURS[look.fur] * light, COLOURS[look.outfit] * light
    badge = BADGES[look.name]
    _draw_tail(me, badge.animal, fur, pose.facing)
    for side in (-1, 1):
        swing = side * pose.stride
        foot_x, foot_y = side * 0.1 + 0.1 * swing * pose.facing, -0.035 - 0.05 * max(0.0, swing)
        _fill(me, capsule(side * 0.09, -0.2, foot_x, foot_y, 0.065, 0.06), shaded(darker(fur, 0.12), -0.25, 0.0), fur)
        me.fill(ellipse(foot_x + 0.03 * pose.facing, foot_y + 0.01, 0.085, 0.045), shaded(darker(fur, 0.2), -0.1, 0.05))
    body = _body_outline()
    _fill(me, body, _cloth(look.pattern, outfit, CREAM * light), outfit)
    _draw_emblem(me.at(0.05 * pose.facing, -0.32), badge.emblem, CREAM * light, darker(outfit, 0.45))
    for side, angle in ((-1, pose.left_arm), (1, pose.right_arm)):
        hand_x, hand_y = side * (0.16 + 0.2 * np.sin(angle)), -0.38 + 0.2 * np.cos(angle)
        _fill(me, capsule(side * 0.15, -0.38, hand_x, hand_y, 0.06, 0.055), shaded(outfit, -0.5, -0.1), outfit)
        me.fill(ellipse(hand_x, hand_y, 0.055, 0.055), shaded(fur, hand_y - 0.06, hand_y + 0.06))
    _draw_head(me, badge.animal, fur, light, pose)
    _draw_accessory(me, look.accessory, light, pose.facing)


def _fill(canvas: Canvas, points: np.ndarray, paint: Paint, tone: Colour) -> None:
    """Fill with a thin dark rim of the same tone, which keeps a character apart from a place of its colour."""
    centre = points.mean(axis=0)
    reach = np.linalg.norm(points - centre, axis=1, keepdims=True)
    canvas.fill(centre + (points - centre) * (1 + 0.014 / np.maximum(reach, 0.02)), darker(tone, 0.45), opacity=0.8)
    canvas.fill(points, paint)


def _body_outline() -> np.ndarray:
    """A pear: narrow shoulders, wide hem."""
    pear = ellipse(0, -0.27, 0.2, 0.2)
    pear[:, 0] *= 1 + 0.9 * (pear[:, 1] + 0.27)
    return pear


def _cloth(pattern: str, colour: Colour, trim: Colour) -> Paint:
    """The outfit's paint: shading, and the pattern in `trim`."""
    base = shaded(colour, -0.47, -0.05)
    figures = {
        "striped": lambda x, y: np.sin(y * 75) + 0 * x,
        "barred": lambda x, y: np.sin(x * 62) + 0 * y,
        "checked": lambda x, y: np.sin(x * 42) * np.sin(y * 42) * 1.6,
        "dotted": lambda x, y: 3.2 * (np.cos(x * 58) * np.cos(y * 58) - 0.45),
        "hemmed": lambda x, y: 40 * (y + 0.16) + 0 * x,
    }
    if pattern == "plain":
        return base
    figure = figures[pattern]

    def paint(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        share = np.clip(0.5 + 1.5 * figure(x, y), 0, 1)[..., None] * 0.7
        return base(x, y) * (1 - share) + trim * share

    return paint


def _draw_emblem(canvas: Canvas, emblem: str, light: Colour, dark: Colour) -> None:
    canvas.fill(ellipse(0, 0, 0.078, 0.078), light)
    shapes = {
        "star": star(0, 0, 0.075, 5, 0.45),
        "heart": np.array([(0, 0.06), (-0.06, -0.005), (-0.055, -0.045), (-0.025, -0.055), (0, -0.03),
                           (0.025, -0.055), (0.055, -0.045), (0.06, -0.005)]),
        "moon": np.concatenate([ellipse(0, 0, 0.06, 0.06)[4:28], ellipse(0.03, 0, 0.05, 0.05)[27:4:-1]]),
        "ring": ellipse(0, 0, 0.058, 0.058),
        "leaf": np.array([(-0.05, 0.05), (-0.04, -0.03), (0.055, -0.055), (0.03, 0.04)]),
        "dot": ellipse(0, 0, 0.035, 0.035),
        "cross": star(0, 0, 0.07, 4, 0.32),
        "bar": np.array([(-0.06, -0.022), (-0.06, 0.022), (0.06, 0.022), (0.06, -0.022)]),
    }  # fmt: skip
    canvas.fill(shapes[emblem], dark)
    if emblem == "ring":
        canvas.fill(ellipse(0, 0, 0.03, 0.03), light)


def _draw_tail(canvas: Canvas, animal: str, fur: Colour, facing: float) -> None:
    back = -facing
    if animal == "rabbit":
        _fill(canvas, ellipse(0.2 * back, -0.16, 0.07, 0.07), lighter(fur, 0.4), fur)
    elif animal == "fox":
        _fill(canvas, ellipse(0.29 * back, -0.22, 0.19, 0.09, -0.7 * back), shaded(fur, -0.4, 0), fur)
        canvas.fill(ellipse(0.39 * back, -0.31, 0.07, 0.055, -0.7 * back), CREAM)
    elif animal in ("cat", "mouse"):
        thick = 0.035 if animal == "cat" else 0.018
        turn = np.linspace(0, 1, 10)
        for t0, t1 in pairwise(turn):
            ends = [(back * (0.14 + 0.22 * np.sin(t * 2.0)), -0.1 - 0.34 * t**1.5) for t in (t0, t1)]
            canvas.fill(capsule(*ends[0], *ends[1], thick), darker(fur, 0.15))
    elif animal == "elephant":
        canvas.fill(capsule(0.18 * back, -0.22, 0.27 * back, -0.1, 0.018), darker(fur, 0.2))


def _draw_head(canvas: Canvas, animal: str, fur: Colour, light: Colour, pose: Pose) -> None:
    head = canvas.at(0.02 * pose.facing, -0.62)
    shift = 0.055 * pose.facing
    inner = mix(fur, rgb("#ffb3b8"), 0.6)
    skin = shaded(fur, -0.24, 0.24)
    _draw_ears(head, animal, fur, inner, skin)
    _fill(head, ellipse(0, 0, 0.26, 0.22), skin, fur)
    if animal == "fox":
        for side in (-1, 1):
            head.fill(np.array([(side * 0.18, -0.04), (side * 0.31, 0.1), (side * 0.1, 0.19)]), lighter(fur, 0.3))
    if animal == "frog":
        head.fill(ellipse(shift, 0.08, 0.15, 0.035), darker(fur, 0.4))
        head.fill(ellipse(shift, 0.072, 0.145, 0.028), fur)
    elif animal == "chick":
        beak = np.array([(shift - 0.06, 0.03), (shift + 0.06, 0.03), (shift + 0.03 * pose.facing, 0.12)])
        _fill(head, beak, rgb("#f79a32") * light, rgb("#f79a32"))
    elif animal == "elephant":
        for t in np.linspace(0, 1, 7):
            x, y = shift + 0.1 * pose.facing * t**2, 0.05 + 0.24 * t
            head.fill(ellipse(x, y, 0.06 - 0.015 * t, 0.05), mix(lighter(fur, 0.12), darker(fur, 0.2), t))
    else:
        head.fill(ellipse(shift, 0.09, 0.1, 0.075), lighter(fur, 0.5))
        head.fill(ellipse(shift, 0.055, 0.032, 0.022), INK)
        head.fill(capsule(shift - 0.03, 0.115, shift + 0.03, 0.115, 0.008), INK)
    for side in (-1, 1):
        head.fill(ellipse(side * 0.165 + shift, 0.07, 0.045, 0.03), rgb("#ff8f8f"), opacity=0.5)
        y = -0.19 if animal == "frog" else -0.03
        x = side * (0.14 if animal == "frog" else 0.105) + shift
        head.fill(ellipse(x, y, 0.034, 0.006 + 0.042 * pose.eyes), INK)
        if pose.eyes > 0.5:
            head.fill(ellipse(x - 0.01, y - 0.016, 0.012, 0.014), rgb("#ffffff"))


def _draw_ears(head: Canvas, animal: str, fur: Colour, inner: Colour, skin: Paint) -> None:
    for side in (-1, 1):
        if animal == "rabbit":
            _fill(head, ellipse(side * 0.11, -0.3, 0.065, 0.18, side * 0.18), skin, fur)
            head.fill(ellipse(side * 0.11, -0.29, 0.032, 0.13, side * 0.18), inner)
        elif animal in ("bear", "mouse"):
            radius = 0.085 if animal == "bear" else 0.15
            x, y = side * (0.18 if animal == "bear" else 0.24), -0.17
            _fill(head, ellipse(x, y, radius, radius), skin, fur)
            head.fill(ellipse(x, y, radius * 0.6, radius * 0.6), inner)
        elif animal in ("cat", "fox"):
            tall = 0.34 if animal == "cat" else 0.4
            _fill(head, np.array([(side * 0.25, -0.02), (side * 0.24, -tall), (side * 0.05, -0.18)]), skin, fur)
            head.fill(np.array([(side * 0.22, -0.1), (side * 0.22, -tall + 0.08), (side * 0.1, -0.17)]), inner)
        elif animal == "elephant":
            _fill(head, ellipse(side * 0.3, -0.01, 0.15, 0.19), skin, fur)
            head.fill(ellipse(side * 0.3, 0.0, 0.09, 0.13), inner)
        elif animal == "frog":
            _fill(head, ellipse(side * 0.14, -0.18, 0.095, 0.09), skin, fur)
            head.fill(ellipse(side * 0.14, -0.19, 0.065, 0.06), rgb("#ffffff"))
        else:
            _fill(head, ellipse(side * 0.035, -0.25, 0.03, 0.075, side * 0.5), skin, fur)


def _draw_accessory(canvas: Canvas, accessory: str, light: Colour, facing: float) -> None:
    head = canvas.at(0.02 * facing, -0.62)
    shift = 0.055 * facing
    dark, gold, rose = INK * light, rgb("#ffc93c") * light, rgb("#ff6f91") * light
    if accessory == "hat":
        _fill(head, ellipse(0, -0.17, 0.22, 0.04), dark, dark)
        _fill(
            head,
            np.array([(-0.13, -0.17), (-0.11, -0.36), (0.11, -0.36), (0.13, -0.17)]),
            shaded(dark, -0.5, 0.0),
            dark,
        )
        head.fill(np.array([(-0.13, -0.18), (-0.125, -0.22), (0.125, -0.22), (0.13, -0.18)]), rose)
    elif accessory == "scarf":
        teal = rgb("#2aa6a1") * light
        _fill(canvas, capsule(-0.14, -0.43, 0.14, -0.43, 0.045), shaded(teal, -0.5, -0.38), teal)
        _fill(canvas, capsule(0.1, -0.42, 0.14, -0.24, 0.04), shaded(teal, -0.45, -0.2), teal)
    elif accessory == "bow":
        for side in (-1, 1):
            wing = np.array([(0.16, -0.2), (0.16 + side * 0.12, -0.28), (0.16 + side * 0.12, -0.12)])
            _fill(head, wing, shaded(rose, -0.3, -0.1), rose)
        head.fill(ellipse(0.16, -0.2, 0.035, 0.035), darker(rose, 0.2))
    elif accessory == "crown":
        points = [
            (-0.13, -0.17),
            (-0.15, -0.34),
            (-0.07, -0.25),
            (0, -0.38),
            (0.07, -0.25),
            (0.15, -0.34),
            (0.13, -0.17),
        ]
        _fill(head, np.array(points), shaded(gold, -0.4, -0.15), gold)
        head.fill(ellipse(0, -0.22, 0.025, 0.025), rose)
    elif accessory == "glasses":
        for side in (-1, 1):
            head.fill(ellipse(side * 0.105 + shift, -0.03, 0.082, 0.082), dark)
            head.fill(ellipse(side * 0.105 + shift, -0.03, 0.065, 0.065), rgb("#dff4ff"))
            head.fill(ellipse(side * 0.105 + shift, -0.025, 0.03, 0.04), dark)
        head.fill(capsule(shift - 0.03, -0.03, shift + 0.03, -0.03, 0.01), dark)
    elif accessory == "flower":
        head.fill(star(-0.15, -0.19, 0.11, 6, 0.6), shaded(CREAM * light, -0.3, -0.1))
        head.fill(ellipse(-0.15, -0.19, 0.04, 0.04), gold)
