"""This module draws storyworld's props: trees, rocks, houses, corals ... each in its own units.

Every prop stands on (0, 0), is about one unit high (y points down, so its top is near y = -1) and takes two colours.
"""

from collections.abc import Callable

import numpy as np

from data.storyworld.canvas import Canvas, Colour, Gradient, capsule, darker, ellipse, lighter, mix, rgb, shaded, star

Prop = Callable[[Canvas, np.random.Generator, Colour, Colour], None]

WARM_LIGHT = rgb("#ffd98a")


def tree(canvas: Canvas, rng: np.random.Generator, leaves: Colour, wood: Colour) -> None:
    canvas.fill(capsule(0, -0.5, 0, -0.02, 0.04, 0.065), shaded(wood, -0.5, 0.1))
    canvas.fill(capsule(0, -0.42, 0.16, -0.62, 0.025, 0.015), wood)
    crowns = [(0.2, -0.6, 0.2), (-0.2, -0.58, 0.21), (0.0, -0.74, 0.27)]
    for x, y, radius in crowns:
        radius *= rng.uniform(0.9, 1.1)
        canvas.fill(ellipse(x, y, radius, radius * 0.92), shaded(leaves, y - radius, y + radius))
    for _ in range(9):
        x, y = rng.uniform(-0.24, 0.2), rng.uniform(-0.9, -0.55)
        canvas.fill(ellipse(x, y, 0.035, 0.026), lighter(leaves, 0.3), opacity=0.7)


def pine(canvas: Canvas, rng: np.random.Generator, leaves: Colour, snow: Colour) -> None:
    canvas.fill(capsule(0, -0.2, 0, -0.02, 0.04), rgb("#7a5a4a"))
    for width, base, top in [(0.3, -0.12, -0.55), (0.24, -0.36, -0.76), (0.17, -0.6, -1.0)]:
        sway = rng.uniform(-0.02, 0.02)
        sides = [
            (-width, base),
            (-width * 0.4, base + 0.03),
            (0, base + 0.015),
            (width * 0.4, base + 0.03),
            (width, base),
        ]
        canvas.fill(np.array([*sides, (sway, top)]), shaded(leaves, top, base))
        cap = top + (base - top) * 0.45
        half = width * 0.42
        canvas.fill(
            np.array([(-half, cap), (-half / 3, cap - 0.03), (half / 4, cap + 0.02), (half, cap), (sway, top)]), snow
        )


def cactus(canvas: Canvas, rng: np.random.Generator, skin: Colour, bloom: Colour) -> None:
    paint = shaded(skin, -0.9, 0.1)
    lift = rng.uniform(-0.08, 0.08)
    for side, y in [(-1, -0.4 + lift), (1, -0.52 - lift)]:
        canvas.fill(capsule(0, y, side * 0.22, y, 0.06), paint)
        canvas.fill(capsule(side * 0.22, y, side * 0.22, y - 0.2, 0.06), paint)
    canvas.fill(capsule(0, -0.84, 0, 0.0, 0.1, 0.11), paint)
    for x in (-0.04, 0.03):
        canvas.fill(capsule(x, -0.82, x, -0.05, 0.008), darker(skin, 0.25), opacity=0.6)
    canvas.fill(star(0.02, -0.95, 0.08, 6, 0.55), bloom)


def rock(canvas: Canvas, rng: np.random.Generator, stone: Colour, moss: Colour) -> None:
    turn = np.linspace(np.pi, 2 * np.pi, 9)
    reach = rng.uniform(0.85, 1.1, 9)
    points = np.stack([0.8 * reach * np.cos(turn), 0.95 * reach * np.sin(turn) + 0.04], axis=1)
    canvas.fill(points, shaded(stone, -0.9, 0.15))
    canvas.fill(points * (0.55, 0.6) + (-0.16, -0.3), lighter(stone, 0.22), opacity=0.55)
    canvas.fill(ellipse(0.25, -0.1, 0.4, 0.1), moss, opacity=0.5)


def house(canvas: Canvas, rng: np.random.Generator, wall: Colour, roof: Colour) -> None:
    canvas.fill(np.array([(-0.34, 0), (-0.34, -0.6), (0.34, -0.6), (0.34, 0)]), shaded(wall, -0.7, 0.2))
    canvas.fill(np.array([(0.14, -0.7), (0.14, -0.95), (0.24, -0.95), (0.24, -0.6)]), darker(roof, 0.2))
    canvas.fill(np.array([(-0.44, -0.56), (0.0, -1.0), (0.44, -0.56)]), shaded(roof, -1.0, -0.4))
    for x in (-0.18, 0.18):
        lit = WARM_LIGHT if rng.random() < 0.75 else darker(wall, 0.4)
        canvas.fill(ellipse(x, -0.4, 0.16, 0.16), lit, opacity=0.35, blur=0.05)
        canvas.fill(np.array([(x - 0.08, -0.3), (x - 0.08, -0.5), (x + 0.08, -0.5), (x + 0.08, -0.3)]), lit)
        canvas.fill(capsule(x, -0.49, x, -0.31, 0.008), roof)
    canvas.fill(capsule(0, -0.16, 0, 0, 0.08), darker(roof, 0.35))


def lamp(canvas: Canvas, rng: np.random.Generator, metal: Colour, light: Colour) -> None:
    canvas.fill(ellipse(0, -0.86, 0.42, 0.4), light, opacity=0.45, blur=0.14)
    canvas.fill(capsule(0, -0.78, 0, 0, 0.025, 0.035), metal)
    canvas.fill(ellipse(0, -0.0, 0.09, 0.03), metal)
    canvas.fill(ellipse(0, -0.86, 0.095, 0.11), Gradient(lighter(light, 0.7), light, -0.98, -0.75))
    canvas.fill(np.array([(-0.1, -0.94), (0, -1.02), (0.1, -0.94)]), metal)


def coral(canvas: Canvas, rng: np.random.Generator, flesh: Colour, tip: Colour) -> None:
    paint = Gradient(tip, flesh, -1.0, -0.3)

    def branch(x: float, y: float, angle: float, length: float, depth: int) -> None:
        end_x, end_y = x + length * np.sin(angle), y - length * np.cos(angle)
        canvas.fill(capsule(x, y, end_x, end_y, 0.03 + 0.015 * depth, 0.03 + 0.012 * depth), paint)
        if depth:
            for turn in (-0.5, 0.45):
                branch(end_x, end_y, angle + turn * rng.uniform(0.7, 1.2), length * 0.78, depth - 1)

    branch(0, 0, 0, 0.36, 3)


def weed(canvas: Canvas, rng: np.random.Generator, leaf: Colour, tip: Colour) -> None:
    y = np.linspace(0, 1, 14)
    for x, tall in [(-0.12, 0.7), (0.12, 0.8), (0.0, 1.0)]:
        sway = 0.07 * np.sin(y * 7 + rng.uniform(0, 6))
        width = 0.055 * (1 - y) ** 0.6 + 0.004
        left = np.stack([x + sway - width, -y * tall], axis=1)
        right = np.stack([x + sway + width, -y * tall], axis=1)
        canvas.fill(np.concatenate([left, right[::-1]]), Gradient(tip, leaf, -tall, 0))


def crystal(canvas: Canvas, rng: np.random.Generator, body: Colour, glow: Colour) -> None:
    canvas.fill(ellipse(0, -0.4, 0.5, 0.45), glow, opacity=0.4, blur=0.16)
    for angle, tall, width in [(-0.5, 0.62, 0.1), (0.45, 0.7, 0.11), (0.0, 1.0, 0.15)]:
        prism = canvas.at(0, 0.02, tall, tall, angle + rng.uniform(-0.1, 0.1))
        width /= tall
        prism.fill(np.array([(-width, 0), (-width, -0.72), (0, -1), (0, 0)]), Gradient(lighter(glow, 0.3), body, -1, 0))
        prism.fill(
            np.array([(width, 0), (width, -0.72), (0, -1), (0, 0)]),
            Gradient(mix(body, glow, 0.4), darker(body, 0.3), -1, 0),
        )


def vent(canvas: Canvas, rng: np.random.Generator, stone: Colour, lava: Colour) -> None:
    canvas.fill(ellipse(0, -0.85, 0.5, 0.4), lava, opacity=0.5, blur=0.16)
    canvas.fill(np.array([(-0.6, 0.02), (-0.2, -0.85), (0.2, -0.85), (0.6, 0.02)]), shaded(stone, -0.9, 0.1))
    canvas.fill(ellipse(0, -0.85, 0.2, 0.06), Gradient(rgb("#ffe08a"), lava, -0.92, -0.8))
    for x, low in [(-0.1, -0.5), (0.04, -0.25), (0.14, -0.6)]:
        low += rng.uniform(-0.1, 0.1)
        canvas.fill(capsule(x, -0.84, x * 1.8, low, 0.04, 0.03), Gradient(rgb("#ffc46a"), lava, -0.85, low))


def flower(canvas: Canvas, rng: np.random.Generator, petals: Colour, stem: Colour) -> None:
    lean = rng.uniform(-0.12, 0.12)
    canvas.fill(capsule(lean, -0.7, 0, 0, 0.03, 0.04), stem)
    canvas.fill(ellipse(0.14, -0.3, 0.14, 0.06, -0.5), stem)
    canvas.fill(star(lean, -0.76, 0.26, 6, 0.6), shaded(petals, -1.0, -0.5))
    canvas.fill(ellipse(lean, -0.76, 0.09, 0.09), WARM_LIGHT)


def tuft(canvas: Canvas, rng: np.random.Generator, blade: Colour, tip: Colour) -> None:
    for x in np.linspace(-0.5, 0.5, 9):
        lean, tall = x * 0.7 + rng.uniform(-0.1, 0.1), rng.uniform(0.65, 1.0)
        points = np.array([(x - 0.09, 0.05), (x + lean * 0.4 - 0.04, -tall * 0.6), (x + lean, -tall), (x + 0.09, 0.05)])
        canvas.fill(points, Gradient(tip, blade, -1.0, -0.1))


def snowman(canvas: Canvas, rng: np.random.Generator, snow: Colour, scarf: Colour) -> None:
    for y, radius in [(-0.22, 0.26), (-0.58, 0.19), (-0.84, 0.14)]:
        canvas.fill(
            ellipse(0, y, radius, radius), Gradient(lighter(snow, 0.6), darker(snow, 0.18), y - radius, y + radius, 0.4)
        )
    canvas.fill(capsule(-0.11, -0.71, 0.11, -0.71, 0.04), scarf)
    canvas.fill(capsule(0.09, -0.7, 0.13, -0.52, 0.04), scarf)
    canvas.fill(np.array([(0.02, -0.86), (0.02, -0.8), (0.2, -0.82)]), rgb("#f0883c"))
    for x in (-0.05, 0.06):
        canvas.fill(ellipse(x, -0.89, 0.018, 0.018), rgb("#2c2838"))


def mushroom(canvas: Canvas, rng: np.random.Generator, cap: Colour, spots: Colour) -> None:
    canvas.fill(ellipse(0, -0.6, 0.5, 0.42), cap, opacity=0.3, blur=0.12)
    canvas.fill(capsule(0, -0.5, 0, -0.06, 0.11, 0.14), shaded(rgb("#f4e6dc"), -0.6, 0.1))
    turn = np.linspace(np.pi, 2 * np.pi, 16)
    dome = np.stack([0.46 * np.cos(turn), -0.5 + 0.48 * np.sin(turn)], axis=1)
    canvas.fill(dome, shaded(cap, -1.0, -0.4))
    for x, y, radius in [(-0.2, -0.66, 0.07), (0.05, -0.8, 0.08), (0.25, -0.62, 0.05)]:
        canvas.fill(ellipse(x + rng.uniform(-0.03, 0.03), y, radius, radius * 0.8), spots)


PROPS: dict[str, Prop] = {
    "tree": tree, "pine": pine, "cactus": cactus, "rock": rock, "house": house, "lamp": lamp, "coral": coral,
    "weed": weed, "crystal": crystal, "vent": vent, "flower": flower, "tuft": tuft, "snowman": snowman,
    "mushroom": mushroom,
}  # fmt: skip
