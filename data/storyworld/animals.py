"""This module draws what tells storyworld's animals apart: their ears, face and tail.

In head units (0, 0) is the head's middle, half a head is about 0.24; y points down. `facing` runs from -1 (left) to 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data.storyworld.canvas import Canvas, Colour, Gradient, capsule, darker, ellipse, lighter, mix, rgb, shaded

INK, CREAM, ROSE = rgb("#2b2438"), rgb("#fff6e0"), rgb("#ffb3b8")
FACE_SHIFT = 0.055  # how far the face moves towards where it looks


@dataclass(frozen=True)
class Coat:
    """A coat is the fur's colour, its shading on the head, and the colour inside the ears."""

    fur: Colour
    skin: Gradient
    inner: Colour

    @classmethod
    def of(cls, fur: Colour) -> "Coat":
        return cls(fur, shaded(fur, -0.24, 0.24), mix(fur, ROSE, 0.6))


def _no_tail(body: Canvas, fur: Colour, back: float) -> None:
    pass


@dataclass(frozen=True)
class Animal:
    """These functions draw one animal. ears: behind the head. face: upon it. tail: on the body's side `back`. eyes:
    where they are, x and y."""

    ears: Callable[[Canvas, Coat], None]
    face: Callable[[Canvas, Coat, float], None]
    tail: Callable[[Canvas, Colour, float], None] = _no_tail
    eyes: tuple[float, float] = (0.105, -0.03)


# Ears


def _long_ears(head: Canvas, coat: Coat) -> None:
    for side in (-1, 1):
        head.fill_rimmed(ellipse(side * 0.11, -0.3, 0.065, 0.18, side * 0.18), coat.skin, coat.fur)
        head.fill(ellipse(side * 0.11, -0.29, 0.032, 0.13, side * 0.18), coat.inner)


def _round_ears(x: float, radius: float) -> Callable[[Canvas, Coat], None]:
    def draw(head: Canvas, coat: Coat) -> None:
        for side in (-1, 1):
            head.fill_rimmed(ellipse(side * x, -0.17, radius, radius), coat.skin, coat.fur)
            head.fill(ellipse(side * x, -0.17, radius * 0.6, radius * 0.6), coat.inner)

    return draw


def _pointed_ears(height: float) -> Callable[[Canvas, Coat], None]:
    def draw(head: Canvas, coat: Coat) -> None:
        for side in (-1, 1):
            ear = np.array([(side * 0.25, -0.02), (side * 0.24, -height), (side * 0.05, -0.18)])
            head.fill_rimmed(ear, coat.skin, coat.fur)
            inside = np.array([(side * 0.22, -0.1), (side * 0.22, -height + 0.08), (side * 0.1, -0.17)])
            head.fill(inside, coat.inner)

    return draw


def _broad_ears(head: Canvas, coat: Coat) -> None:
    for side in (-1, 1):
        head.fill_rimmed(ellipse(side * 0.3, -0.01, 0.15, 0.19), coat.skin, coat.fur)
        head.fill(ellipse(side * 0.3, 0.0, 0.09, 0.13), coat.inner)


def _eye_bumps(head: Canvas, coat: Coat) -> None:
    for side in (-1, 1):
        head.fill_rimmed(ellipse(side * 0.14, -0.18, 0.095, 0.09), coat.skin, coat.fur)
        head.fill(ellipse(side * 0.14, -0.19, 0.065, 0.06), rgb("#ffffff"))


def _crest(head: Canvas, coat: Coat) -> None:
    for side in (-1, 1):
        head.fill_rimmed(ellipse(side * 0.035, -0.25, 0.03, 0.075, side * 0.5), coat.skin, coat.fur)


# Faces


def _muzzle(head: Canvas, coat: Coat, facing: float) -> None:
    x, pale = FACE_SHIFT * facing, lighter(coat.fur, 0.5)
    head.fill(ellipse(x, 0.09, 0.1, 0.075), pale)
    head.fill(ellipse(x, 0.115, 0.042, 0.026), INK)
    head.fill(ellipse(x, 0.1, 0.05, 0.028), pale)  # leaves only a smile of the dark ellipse
    head.fill(ellipse(x, 0.052, 0.032, 0.022), INK)


def _muzzle_and_cheeks(head: Canvas, coat: Coat, facing: float) -> None:
    for side in (-1, 1):
        head.fill(np.array([(side * 0.18, -0.04), (side * 0.31, 0.1), (side * 0.1, 0.19)]), lighter(coat.fur, 0.3))
    _muzzle(head, coat, facing)


def _wide_mouth(head: Canvas, coat: Coat, facing: float) -> None:
    x = FACE_SHIFT * facing
    head.fill(ellipse(x, 0.08, 0.15, 0.035), darker(coat.fur, 0.4))
    head.fill(ellipse(x, 0.07, 0.15, 0.03), coat.fur)


def _beak(head: Canvas, coat: Coat, facing: float) -> None:
    x, orange = FACE_SHIFT * facing, rgb("#f79a32")
    head.fill_rimmed(np.array([(x - 0.06, 0.03), (x + 0.06, 0.03), (x + 0.03 * facing, 0.12)]), orange, orange)


def _trunk(head: Canvas, coat: Coat, facing: float) -> None:
    for t in np.linspace(0, 1, 7).tolist():
        x, y = FACE_SHIFT * facing + 0.1 * facing * t**2, 0.05 + 0.24 * t
        head.fill(ellipse(x, y, 0.06 - 0.015 * t, 0.05), mix(lighter(coat.fur, 0.12), darker(coat.fur, 0.2), t))


# Tails


def _puff(body: Canvas, fur: Colour, back: float) -> None:
    body.fill_rimmed(ellipse(0.2 * back, -0.16, 0.07, 0.07), lighter(fur, 0.4), fur)


def _brush(body: Canvas, fur: Colour, back: float) -> None:
    body.fill_rimmed(ellipse(0.29 * back, -0.22, 0.19, 0.09, -0.7 * back), shaded(fur, -0.4, 0), fur)
    body.fill(ellipse(0.39 * back, -0.31, 0.07, 0.055, -0.7 * back), CREAM)


def _curl(thickness: float) -> Callable[[Canvas, Colour, float], None]:
    def draw(body: Canvas, fur: Colour, back: float) -> None:
        way = [(back * (0.14 + 0.22 * np.sin(t * 2.0)), -0.1 - 0.34 * t**1.5) for t in np.linspace(0, 1, 9)]
        for start, end in pairwise(way):
            body.fill(capsule(*start, *end, thickness), darker(fur, 0.15))

    return draw


def _string(body: Canvas, fur: Colour, back: float) -> None:
    body.fill(capsule(0.18 * back, -0.22, 0.27 * back, -0.1, 0.018), darker(fur, 0.2))


ANIMALS: dict[str, Animal] = {
    "rabbit": Animal(_long_ears, _muzzle, _puff),
    "bear": Animal(_round_ears(0.18, 0.085), _muzzle),
    "cat": Animal(_pointed_ears(0.34), _muzzle, _curl(0.035)),
    "chick": Animal(_crest, _beak),
    "fox": Animal(_pointed_ears(0.4), _muzzle_and_cheeks, _brush),
    "mouse": Animal(_round_ears(0.24, 0.15), _muzzle, _curl(0.018)),
    "frog": Animal(_eye_bumps, _wide_mouth, eyes=(0.14, -0.19)),
    "elephant": Animal(_broad_ears, _trunk, _string),
}


def draw_head(head: Canvas, animal: Animal, fur: Colour, facing: float, open_eyes: float) -> None:
    """Draws the head. open_eyes: 1 open, 0 closed."""
    coat = Coat.of(fur)
    animal.ears(head, coat)
    head.fill_rimmed(ellipse(0, 0, 0.26, 0.22), coat.skin, fur)
    animal.face(head, coat, facing)
    for side in (-1, 1):
        head.fill(ellipse(side * 0.165 + FACE_SHIFT * facing, 0.07, 0.045, 0.03), rgb("#ff8f8f"), opacity=0.5)
        x, y = side * animal.eyes[0] + FACE_SHIFT * facing, animal.eyes[1]
        head.fill(ellipse(x, y, 0.034, 0.006 + 0.042 * open_eyes), INK)
        if open_eyes > 0.5:
            head.fill(ellipse(x - 0.01, y - 0.016, 0.012, 0.014), rgb("#ffffff"))
