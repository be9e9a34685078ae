"""This module paints storyworld's places, once a scene, as parallax layers: palette, backdrop, texture, props and
light.

A place's layers are painted from its own seed, so a place that returns later in a scene looks as it did before.
In world units the frame is one unit high at zoom 1, y points down, and x = 0 is the middle of the stage.
"""

from dataclasses import dataclass, replace

import numpy as np

from data.storyworld.canvas import Canvas, Colour, Gradient, Paint, darker, ellipse, lighter, mix, rgb
from data.storyworld.props import PROPS, WARM_LIGHT

HORIZON = 0.6
FAR_PARALLAX, FRONT_PARALLAX = 0.5, 1.2
MARGIN = 0.45  # world units painted beyond the frame on either side, for pans


@dataclass(frozen=True)
class PropKind:
    """This describes a kind of prop of a place: its drawing, its two colours, its height and how many stand there."""

    name: str
    colours: tuple[str, str]
    height: float
    count: int


@dataclass(frozen=True)
class Drift:
    """A drift is small things that move through the air; their velocity is in frame heights a second."""

    colour: str
    count: int
    size: float
    velocity: tuple[float, float]
    glow: bool = False


@dataclass(frozen=True)
class Place:
    """A place is the scenery of a shot. Its colours run from top to bottom; `light` is the tint it throws on
    characters."""

    sky: tuple[str, str]
    hills: tuple[str, str]
    ground: tuple[str, str]
    ridge: str  # a name in RIDGES
    texture: str  # dash, dot, crack
    orb: tuple[str, float, float, float] | None  # sun or moon: colour, x, y, radius
    clouds: int
    light: str
    behind: tuple[PropKind, ...]
    front: tuple[PropKind, ...]
    occluder: PropKind  # tall and near enough to hide a character that passes behind
    drift: Drift


PLACES: dict[str, Place] = {
    "meadow": Place(
        sky=("#a9dcb4", "#eef6cf"), hills=("#a5d089", "#7fbf63"), ground=("#79b950", "#3f8a3c"), ridge="hills",
        texture="dash", orb=("#fff3a8", 0.45, 0.2, 0.09), clouds=3, light="#fffff2",
        behind=(PropKind("tree", ("#4f9a44", "#8a6244"), 0.5, 4), PropKind("flower", ("#ffffff", "#3f8a3c"), 0.1, 7)),
        front=(PropKind("tuft", ("#2f7434", "#8fce5c"), 0.15, 9),),
        occluder=PropKind("flower", ("#ffe9f2", "#2f7434"), 0.42, 2),
        drift=Drift("#fffbd0", 10, 0.008, (0.03, -0.015)),
    ),
    "desert": Place(
        sky=("#ffc877", "#ffe9bd"), hills=("#f3b467", "#e99a48"), ground=("#f0a951", "#cf7a2c"), ridge="hills",
        texture="dash", orb=("#fff4cf", -0.4, 0.22, 0.12), clouds=0, light="#fff4e2",
        behind=(PropKind("cactus", ("#7f9a4a", "#f26d7d"), 0.34, 3), PropKind("rock", ("#c9752f", "#dd9142"), 0.14, 3)),
        front=(PropKind("rock", ("#b0622a", "#d98a3c"), 0.14, 4),),
        occluder=PropKind("cactus", ("#5f7c3a", "#f26d7d"), 0.5, 1),
        drift=Drift("#ffe6b0", 12, 0.006, (0.16, 0.01)),
    ),
    "snow": Place(
        sky=("#b7d3ea", "#edf4fa"), hills=("#d3e2f0", "#e3edf6"), ground=("#f7faff", "#d3e0ef"), ridge="peaks",
        texture="dot", orb=None, clouds=2, light="#f4f8ff",
        behind=(PropKind("pine", ("#6f9fae", "#f6faff"), 0.46, 5),
                PropKind("snowman", ("#f2f6fc", "#e0555c"), 0.26, 1)),
        front=(PropKind("rock", ("#c3d3e6", "#ffffff"), 0.13, 5),),
        occluder=PropKind("pine", ("#4f8292", "#f6faff"), 0.55, 1),
        drift=Drift("#ffffff", 42, 0.010, (0.03, 0.14)),
    ),
    "town": Place(
        sky=("#101f55", "#35509c"), hills=("#253a86", "#1e2e6e"), ground=("#2c458c", "#152456"), ridge="houses",
        texture="dot", orb=("#fff2c4", 0.5, 0.18, 0.08), clouds=1, light="#e6e8ff",
        behind=(PropKind("house", ("#4a56a8", "#272c6c"), 0.42, 4), PropKind("lamp", ("#171a40", "#ffd98a"), 0.4, 2)),
        front=(PropKind("tuft", ("#141942", "#3c4aa0"), 0.12, 6),),
        occluder=PropKind("lamp", ("#0c1230", "#ffd98a"), 0.78, 1),
        drift=Drift("#ffe9a0", 9, 0.008, (0.012, -0.01), glow=True),
    ),
    "volcano": Place(
        sky=("#4a0f18", "#b8382a"), hills=("#7c1f22", "#641a20"), ground=("#76222a", "#3c0f18"), ridge="peaks",
        texture="crack", orb=None, clouds=2, light="#fff0e6",
        behind=(PropKind("vent", ("#55161d", "#ff7a2c"), 0.34, 2), PropKind("rock", ("#56171f", "#8c2a2c"), 0.16, 4)),
        front=(PropKind("rock", ("#38101a", "#7c2028"), 0.15, 5),),
        occluder=PropKind("crystal", ("#7c1a20", "#ff8a4a"), 0.4, 1),
        drift=Drift("#ffa24a", 22, 0.008, (0.02, -0.13), glow=True),
    ),
    "orchard": Place(
        sky=("#ffb9cb", "#ffe7e6"), hills=("#f7b0c4", "#f08fae"), ground=("#ee9bb6", "#cf6a92"), ridge="hills",
        texture="dot", orb=("#fff6e6", -0.45, 0.2, 0.09), clouds=3, light="#fff6f4",
        behind=(PropKind("tree", ("#f276a4", "#8a5a5e"), 0.52, 5), PropKind("flower", ("#fff0f4", "#b0577c"), 0.1, 6)),
        front=(PropKind("tuft", ("#b04c78", "#ffb7cc"), 0.13, 7),),
        occluder=PropKind("flower", ("#fff0f4", "#8f3a62"), 0.42, 2),
        drift=Drift("#ffe3ea", 24, 0.010, (0.07, 0.07)),
    ),
    "reef": Place(
        sky=("#93e3e6", "#35acc0"), hills=("#3aa7b9", "#248fa4"), ground=("#49b3bb", "#197588"), ridge="hills",
        texture="dash", orb=None, clouds=0, light="#eafffa",
        behind=(PropKind("coral", ("#1d86a0", "#86eadb"), 0.34, 4), PropKind("weed", ("#16747f", "#62d2bd"), 0.4, 5)),
        front=(PropKind("weed", ("#0f5c6c", "#40b8b4"), 0.22, 7),),
        occluder=PropKind("coral", ("#0f5c6c", "#5fd0c8"), 0.46, 1),
        drift=Drift("#dffff6", 20, 0.011, (0.01, -0.1), glow=True),
    ),
    "cave": Place(
        sky=("#4a1a70", "#9a52c0"), hills=("#8244ae", "#6a3298"), ground=("#8848b2", "#501c80"), ridge="cave",
        texture="dot", orb=None, clouds=0, light="#f6ecff",
        behind=(PropKind("crystal", ("#7a3fc0", "#d49cff"), 0.34, 4),
                PropKind("mushroom", ("#b45fd8", "#f2dcff"), 0.15, 4)),
        front=(PropKind("rock", ("#42186c", "#8c4cbc"), 0.14, 5),),
        occluder=PropKind("crystal", ("#5a2496", "#e0a8ff"), 0.46, 1),
        drift=Drift("#e9c6ff", 14, 0.007, (0.01, -0.02), glow=True),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A layer is premultiplied float32 [h, w, 4] pixels, `scale` of them a world unit, starting at world (left, 0)."""

    pixels: np.ndarray
    scale: float
    left: float
    parallax: float


def paint_layers(
    name: str, seed: tuple[int, ...], aspect: float, scale: float, occluder: bool
) -> tuple[Layer, Layer, Layer]:
    """Returns the far backdrop (opaque), the ground with its props, and what stands before the characters.

    aspect: frame width over height. scale: pixels a world unit. occluder: whether something tall stands in front. The
    same seed gives the same picture at any scale.
    """
    place = PLACES[name]
    if occluder:
        place = replace(place, front=(*place.front, place.occluder))
    painters = ((_paint_far, FAR_PARALLAX), (_paint_ground, 1.0), (_paint_front, FRONT_PARALLAX))

    def layer(depth: int) -> Layer:
        painter, parallax = painters[depth]
        half = aspect / 2 + MARGIN * parallax
        canvas = Canvas.blank(round(scale), round(2 * half * scale), scale, left=-half)
        painter(canvas, place, np.random.default_rng((*seed, depth)), half)
        return Layer(canvas.pixels, scale, -half, parallax)

    return layer(0), layer(1), layer(2)


def _paint_far(canvas: Canvas, place: Place, rng: np.random.Generator, half: float) -> None:
    top, bottom = map(rgb, place.sky)
    canvas.fill(_box(-half - 1, -0.5, half + 1, 1.5), Gradient(top, bottom, 0.0, HORIZON))
    if place.ridge == "houses":
        for _ in range(40):
            canvas.fill(ellipse(rng.uniform(-half, half), rng.uniform(0, 0.4), 0.004, 0.004), lighter(bottom, 0.7))
    if place.texture == "dash" and place.orb is None:
        _paint_rays(canvas, rng, lighter(top, 0.5), half)
    if place.orb:
        code, x, y, radius = place.orb
        canvas.fill(ellipse(x, y, 2.2 * radius, 2.2 * radius), rgb(code), opacity=0.45, blur=0.8 * radius)
        canvas.fill(ellipse(x, y, radius, radius), Gradient(lighter(rgb(code), 0.5), rgb(code), y - radius, y + radius))
    for _ in range(place.clouds):
        # Dark skies get dark clouds.
        _paint_cloud(canvas, rng, lighter(bottom, 0.7 * float(bottom[:3].mean()) ** 1.5), half)
    for depth, (code, base) in enumerate(zip(place.hills, (HORIZON - 0.17, HORIZON - 0.07), strict=True)):
        near = rgb(code)
        paint = Gradient(near, mix(near, bottom, 0.35), base - 0.1, HORIZON + 0.1)
        RIDGES[place.ridge](canvas, rng, base, depth, paint, half)


def _paint_rays(canvas: Canvas, rng: np.random.Generator, light: Colour, half: float) -> None:
    for x in rng.uniform(-half, half, 5):
        width, lean = rng.uniform(0.03, 0.09), rng.uniform(0.1, 0.3)
        beam = np.array([(x - width, -0.1), (x + width, -0.1), (x + lean + 3 * width, 0.75), (x + lean - width, 0.75)])
        canvas.fill(beam, light, opacity=0.35, blur=0.02)


def _paint_cloud(canvas: Canvas, rng: np.random.Generator, colour: Colour, half: float) -> None:
    x, y, size = rng.uniform(-half, half), rng.uniform(0.08, 0.28), rng.uniform(0.05, 0.085)
    for dx, dy, radius in [(-1.3, 0.2, 0.7), (1.3, 0.25, 0.65), (-0.5, -0.2, 0.95), (0.55, -0.05, 0.85), (0, 0.3, 0.9)]:
        paint = Gradient(lighter(colour, 0.3), colour, y - size, y + size)
        canvas.fill(ellipse(x + dx * size, y + dy * size, 1.3 * radius * size, radius * size), paint)


def _paint_hills(canvas: Canvas, rng: np.random.Generator, base: float, depth: int, paint: Paint, half: float) -> None:
    x = np.linspace(-half - 0.1, half + 0.1, 120)
    phase, pitch = rng.uniform(0, 6, 2), rng.uniform(2.2, 3.4)
    wave = np.sin(x * pitch + phase[0]) + 0.4 * np.sin(2.3 * x * pitch + phase[1])
    _paint_below(canvas, x, base - 0.07 * wave, paint)


def _paint_peaks(canvas: Canvas, rng: np.random.Generator, base: float, depth: int, paint: Paint, half: float) -> None:
    x = np.linspace(-half - 0.1, half + 0.1, 120)
    phase, pitch = rng.uniform(0, 6, 2), rng.uniform(2.2, 3.4)
    wave = 2.6 * np.abs((x * pitch / 2.2 + phase[0]) % 2 - 1) + 0.2 * np.sin(9 * x + phase[1]) - 0.6
    _paint_below(canvas, x, base - 0.08 * wave, paint)


def _paint_below(canvas: Canvas, x: np.ndarray, crest: np.ndarray, paint: Paint) -> None:
    outline = np.stack([x, crest], axis=1)
    canvas.fill(np.concatenate([outline, [(x[-1], 1.3), (x[0], 1.3)]]), paint)


def _paint_houses(canvas: Canvas, rng: np.random.Generator, base: float, depth: int, paint: Paint, half: float) -> None:
    x = -half - 0.2
    while x < half + 0.2:
        width, top = rng.uniform(0.1, 0.2), base - rng.uniform(0.02, 0.2)
        canvas.fill(_box(x, top, x + width, 1), paint)
        for window in rng.uniform((x + 0.02, top + 0.02), (x + width - 0.02, base + 0.06), (5, 2)):
            canvas.fill(_box(*window, *(window + np.array((0.012, 0.016)))), WARM_LIGHT, opacity=0.8)
        x += width + rng.uniform(0, 0.03)


def _paint_cave(canvas: Canvas, rng: np.random.Generator, base: float, depth: int, paint: Paint, half: float) -> None:
    """Paints hills, and stone hanging from the roof."""
    x = -half - 0.1
    while x < half + 0.1:
        width, tall = rng.uniform(0.05, 0.12), rng.uniform(0.08, 0.26) * (1.2 - 0.4 * depth)
        canvas.fill(np.array([(x - 0.03, -0.1), (x + width / 2, tall), (x + width + 0.03, -0.1)]), paint)
        x += width * (1.0 + depth)
    _paint_hills(canvas, rng, base, depth, paint, half)


RIDGES = {"hills": _paint_hills, "peaks": _paint_peaks, "houses": _paint_houses, "cave": _paint_cave}


def _paint_ground(canvas: Canvas, place: Place, rng: np.random.Generator, half: float) -> None:
    top, bottom = map(rgb, place.ground)
    x = np.linspace(-half - 0.1, half + 0.1, 60)
    edge = HORIZON + 0.012 * np.sin(3 * x + rng.uniform(0, 6))
    _paint_below(canvas, x, edge, Gradient(top, bottom, HORIZON, 1.05))
    _paint_texture(canvas, rng, place.texture, top, bottom, half)
    _place_props(canvas, rng, place.behind, (HORIZON + 0.02, HORIZON + 0.12), half)


def _paint_texture(canvas, rng, kind: str, top: Colour, bottom: Colour, half: float) -> None:
    for _ in range(70):
        y = HORIZON + 0.38 * rng.random() ** 0.8 + 0.02
        x, size = rng.uniform(-half, half), 0.1 * (y - HORIZON + 0.1)
        tone = lighter(mix(top, bottom, y - HORIZON), 0.3) if rng.random() < 0.5 else darker(bottom, 0.15)
        if kind == "dash":
            canvas.fill(ellipse(x, y, size * 1.4, size * 0.12, rng.uniform(-0.1, 0.1)), tone, opacity=0.55)
        elif kind == "dot":
            canvas.fill(ellipse(x, y, size * 0.4, size * 0.2), tone, opacity=0.5)
        elif rng.random() < 0.4:
            path = np.cumsum(rng.uniform((-0.2, -0.25), (1.0, 0.25), (4, 2)) * size * 1.2, axis=0) + np.array((x, y))
            crack = np.concatenate([path, path[::-1] + np.array((0, 0.16 * size))])
            canvas.fill(crack, rgb("#ff5a2a"), opacity=0.45, blur=0.012)
            canvas.fill(crack, rgb("#ff9a4a"))


def _place_props(canvas, rng, kinds: tuple[PropKind, ...], baseline: tuple[float, float], half: float) -> None:
    stands = []
    for kind in kinds:
        # Each of `count` equal stretches has one prop, so that props are scattered, never bunched.
        stretch = 2 * half / kind.count
        for i in range(kind.count):
            x = -half + (i + rng.uniform(0.15, 0.85)) * stretch
            stands.append((rng.uniform(*baseline), x, kind, rng.uniform(0.8, 1.15)))
    for y, x, kind, grow in sorted(stands, key=lambda stand: stand[0]):
        size = kind.height * grow
        canvas.fill(
            ellipse(x + 0.1 * size, y, 0.42 * size, 0.06 * size), darker(rgb(kind.colours[0]), 0.6), 0.3, 0.03 * size
        )
        flip = 1 if rng.random() < 0.5 else -1
        PROPS[kind.name](canvas.at(x, y, flip * size, size), rng, *map(rgb, kind.colours))


def _paint_front(canvas: Canvas, place: Place, rng: np.random.Generator, half: float) -> None:
    _place_props(canvas, rng, place.front, (0.985, 1.03), half)


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x0, y1), (x1, y1), (x1, y0)])
