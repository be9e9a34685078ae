"""This module draws what storyworld's characters wear besides their coat, on the head and in the head's units
(animals.py)."""

from collections.abc import Callable

import numpy as np

from data.storyworld.animals import CREAM, FACE_SHIFT, INK
from data.storyworld.canvas import Canvas, Colour, capsule, darker, ellipse, rgb, shaded, star

TEAL, GOLD, PINK = rgb("#2aa6a1"), rgb("#ffc93c"), rgb("#ff6f91")


def _hat(head: Canvas, light: Colour, facing: float) -> None:
    dark = INK * light
    head.fill_rimmed(ellipse(0, -0.17, 0.22, 0.04), dark, dark)
    tube = np.array([(-0.13, -0.17), (-0.11, -0.36), (0.11, -0.36), (0.13, -0.17)])
    head.fill_rimmed(tube, shaded(dark, -0.5, 0.0), dark)
    head.fill(np.array([(-0.13, -0.18), (-0.125, -0.22), (0.125, -0.22), (0.13, -0.18)]), PINK * light)


def _scarf(head: Canvas, light: Colour, facing: float) -> None:
    teal = TEAL * light
    head.fill_rimmed(capsule(-0.14, 0.19, 0.14, 0.19, 0.045), shaded(teal, 0.12, 0.24), teal)
    head.fill_rimmed(capsule(0.1, 0.2, 0.14, 0.38, 0.04), shaded(teal, 0.17, 0.42), teal)


def _bow(head: Canvas, light: Colour, facing: float) -> None:
    pink = PINK * light
    for side in (-1, 1):
        wing = np.array([(0.16, -0.2), (0.16 + side * 0.12, -0.28), (0.16 + side * 0.12, -0.12)])
        head.fill_rimmed(wing, shaded(pink, -0.3, -0.1), pink)
    head.fill(ellipse(0.16, -0.2, 0.035, 0.035), darker(pink, 0.2))


def _crown(head: Canvas, light: Colour, facing: float) -> None:
    gold = GOLD * light
    right = [(0, -0.38), (0.07, -0.25), (0.15, -0.34), (0.13, -0.17)]
    left = [(-x, y) for x, y in right[:0:-1]]
    head.fill_rimmed(np.array(left + right), shaded(gold, -0.4, -0.15), gold)
    head.fill(ellipse(0, -0.22, 0.025, 0.025), PINK * light)


def _glasses(head: Canvas, light: Colour, facing: float) -> None:
    shift, dark = FACE_SHIFT * facing, INK * light
    for side in (-1, 1):
        x = side * 0.105 + shift
        head.fill(ellipse(x, -0.03, 0.082, 0.082), dark)
        head.fill(ellipse(x, -0.03, 0.065, 0.065), rgb("#dff4ff") * light)
        head.fill(ellipse(x, -0.025, 0.03, 0.04), dark)
    head.fill(capsule(shift - 0.03, -0.03, shift + 0.03, -0.03, 0.01), dark)


def _flower(head: Canvas, light: Colour, facing: float) -> None:
    head.fill(star(-0.15, -0.19, 0.11, 6, 0.6), shaded(CREAM * light, -0.3, -0.1))
    head.fill(ellipse(-0.15, -0.19, 0.04, 0.04), GOLD * light)


ACCESSORIES: dict[str, Callable[[Canvas, Colour, float], None]] = {
    "hat": _hat, "scarf": _scarf, "bow": _bow, "crown": _crown, "glasses": _glasses, "flower": _flower,
}  # fmt: skip
