"""This module renders storyworld's shots to frames, with the box and the visible share of each character.

A frame is the mean of one or more drawings while the shutter is open (motion blur); a small one is drawn larger.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from data.storyworld.canvas import Canvas, Colour, darker, ellipse, lay_over, rgb
from data.storyworld.characters import SIZES, Pose, draw_character
from data.storyworld.motion import View, pose_at
from data.storyworld.places import PLACES, Drift, Layer, Place, paint_layers
from data.storyworld.scenes import CLOSE, Scene, Shot, view_at

SHUTTER = 0.35  # the share of a frame's time that the shutter is open
MAX_SAMPLES = 8
FINE_BELOW = 300  # frame heights under this are drawn at twice the size


@dataclass(frozen=True)
class Sighting:
    """A sighting says what is seen of an actor. box: x0, y0, x1, y1 in pixels, None outside. visible: the share not
    hidden."""

    box: tuple[float, float, float, float] | None
    visible: float


@dataclass(frozen=True)
class Cutout:
    """A cutout is the alpha of one actor (its number in the cast) within a window of the fine frame."""

    actor: int
    window: tuple[slice, slice]
    alpha: np.ndarray


class Renderer:
    """A renderer draws the shots of one scene; the layers of each place are painted once."""

    def __init__(self, scene: Scene, size: tuple[int, int], fps: float):
        self.scene, self.size, self.fps = scene, size, fps
        self.fine = 2 if size[0] < FINE_BELOW else 1
        self.height, self.width = size[0] * self.fine, size[1] * self.fine
        self.aspect = size[1] / size[0]
        scale = self.height * math.sqrt(CLOSE)  # between the widest view and the closest
        self.layers = {
            place: paint_layers(place, (*scene.paint_seed, number), self.aspect, scale, scene.occluders)
            for number, place in enumerate(PLACES)
            if any(shot.place == place for shot in scene.shots)
        }
        self.air = np.random.default_rng((*scene.seed, len(PLACES))).random((64, 3))  # where drifting things begin
        self.vignette = self._make_vignette()

    def render(self, shot: Shot) -> Iterator[tuple[np.ndarray, list[Sighting]]]:
        """Yields each frame, uint8 [H, W, 3], with a sighting of each of the shot's actors."""
        for frame in range(shot.frames):
            yield self._render_frame(shot, (frame + 0.5) / self.fps)

    def _render_frame(self, shot: Shot, time: float) -> tuple[np.ndarray, list[Sighting]]:
        half = SHUTTER / 2 / self.fps
        count = self.count_samples(shot, time - half, time + half)
        total = np.zeros((self.height, self.width, 3), np.float32)
        sightings: list[Sighting] = []
        for sample in range(count):
            moment = time + half * ((2 * sample + 1) / count - 1)
            image, cutouts, front = self._draw(shot, moment)
            total += image[..., :3]
            if sample == count // 2:
                sightings = self._sight(cutouts, front)
        total *= self.vignette / count
        small = cv2.resize(total, (self.size[1], self.size[0]), interpolation=cv2.INTER_AREA)
        return np.clip(small * 255 + 0.5, 0, 255).astype(np.uint8), sightings

    def count_samples(self, shot: Shot, start: float, end: float) -> int:
        """Returns how many samples keep every move between two of them under about a pixel and a half."""
        views = [view_at(shot, time) for time in (start, end)]
        moved = abs(views[1].x - views[0].x) + abs(math.log(views[1].zoom / views[0].zoom)) * self.aspect / 2
        for actor in shot.actors:
            a, b = (pose_at(actor, shot.timing, time) for time in (start, end))
            limbs = max(abs(a.left_arm - b.left_arm), abs(a.right_arm - b.right_arm), abs(a.stride - b.stride) / 2)
            moved = max(moved, math.hypot(a.x - b.x, a.lift - b.lift) + 0.12 * limbs + 0.5 * abs(a.lean - b.lean))
        return min(max(math.ceil(moved * self.size[0] / 1.5), 1), MAX_SAMPLES)

    def _draw(self, shot: Shot, time: float) -> tuple[np.ndarray, list[Cutout], np.ndarray]:
        """Returns the picture [H, W, 4], a cutout of each actor, and the front layer's alpha [H, W]."""
        view = view_at(shot, time)
        image, ground, front = (self.warp(layer, view) for layer in self.layers[shot.place])
        lay_over(image, ground)
        place = PLACES[shot.place]
        world = self.world(view)
        cutouts = []
        poses = [pose_at(actor, shot.timing, time) for actor in shot.actors]
        for i in sorted(range(len(poses)), key=lambda i: poses[i].y):
            look = shot.actors[i].look
            draw_shadow(Canvas(image, world), poses[i], SIZES[look.size], shadow_colour(place))
            window = self._window(world, poses[i], SIZES[look.size])
            patch = np.zeros_like(image[window])
            shift = np.array([[0, 0, window[1].start], [0, 0, window[0].start]])
            draw_character(Canvas(patch, world - shift), look, poses[i], rgb(place.light))
            lay_over(image[window], patch)
            cutouts.append(Cutout(i, window, patch[..., 3]))
        self.draw_drift(Canvas(image, world), place.drift, shot.clock + time)
        lay_over(image, front)
        return image, cutouts, front[..., 3]

    def _window(self, world: np.ndarray, pose: Pose, size: float) -> tuple[slice, slice]:
        """Returns the rows and columns of the frame that hold the whole character."""
        foot = pose.y - pose.lift
        reach = np.array([[pose.x - 0.65 * size, foot - 1.25 * size], [pose.x + 0.65 * size, foot + 0.12 * size]])
        (x0, y0), (x1, y1) = (reach * np.diag(world[:, :2]) + world[:, 2]).astype(int)
        columns = slice(min(max(x0, 0), self.width), min(max(x1, 0), self.width))
        return slice(min(max(y0, 0), self.height), min(max(y1, 0), self.height)), columns

    def world(self, view: View) -> np.ndarray:
        """Returns the map [2, 3] from world units to the frame's (fine) pixels."""
        scale = self.height * view.zoom
        left, top = view.x - self.aspect / 2 / view.zoom, view.y - 0.5 / view.zoom
        return np.array([[scale, 0.0, -left * scale], [0.0, scale, -top * scale]])

    def warp(self, layer: Layer, view: View) -> np.ndarray:
        """Returns the layer as the camera sees it."""
        step, left, top = self.sampling(layer, view)
        return cv2.warpAffine(
            layer.pixels,
            np.array([[step, 0.0, left], [0.0, step, top]]),
            (self.width, self.height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )

    def sampling(self, layer: Layer, view: View) -> tuple[float, float, float]:
        """Returns where the frame's pixels lie in the layer, in its pixels: how far apart, and the first one's column
        and row. Nearer layers move and grow more."""
        zoom = 1 + (view.zoom - 1) * layer.parallax
        x, y = view.x * layer.parallax, 0.5 + (view.y - 0.5) * layer.parallax
        step = layer.scale / (self.height * zoom)  # how many layer pixels a frame pixel spans
        left = (x - self.aspect / 2 / zoom - layer.left) * layer.scale + 0.5 * step - 0.5
        return step, left, (y - 0.5 / zoom) * layer.scale + 0.5 * step - 0.5

    def draw_drift(self, canvas: Canvas, drift: Drift, clock: float) -> None:
        start = self.air[: drift.count]
        reach = self.aspect + 0.6
        across = (np.arange(drift.count) + start[:, 0]) / drift.count
        x = (across * reach + drift.velocity[0] * clock) % reach - reach / 2
        x += 0.02 * np.sin(1.7 * clock + 6.3 * start[:, 2])
        y = (start[:, 1] * 1.1 + drift.velocity[1] * (0.6 + 0.8 * start[:, 2]) * clock) % 1.1 - 0.05
        radius = drift.size * (0.6 + 0.8 * start[:, 2])
        dots = ellipse(0, 0, 1, 1)[::2] * radius[:, None, None] + np.stack([x, y], axis=1)[:, None]
        if drift.glow:
            canvas.fill(dots, rgb(drift.colour), opacity=0.6, blur=drift.size)
        canvas.fill(dots, rgb(drift.colour), opacity=0.85)

    def _sight(self, cutouts: list[Cutout], front: np.ndarray) -> list[Sighting]:
        """Returns the sighting of each actor, in the order of the shot's cast."""
        sightings = {}
        hidden = front.copy()
        for cutout in reversed(cutouts):  # the nearest comes first
            rows, columns = (np.flatnonzero((cutout.alpha > 0.5).any(axis=axis)) for axis in (1, 0))
            if not len(rows):
                sightings[cutout.actor] = Sighting(None, 0.0)
                continue
            cover = hidden[cutout.window]
            visible = float((cutout.alpha * (1 - cover)).sum() / cutout.alpha.sum())
            cover += cutout.alpha * (1 - cover)
            top, left = cutout.window[0].start, cutout.window[1].start
            box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
            x0, y0, x1, y1 = (float(edge) / self.fine for edge in box)
            sightings[cutout.actor] = Sighting((x0, y0, x1, y1), visible)
        return [sightings[i] for i in range(len(cutouts))]

    def _make_vignette(self) -> np.ndarray:
        y = np.linspace(-1, 1, self.height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, self.width, dtype=np.float32)
        return (1 - 0.1 * np.clip((x**2 + y**2) / 2, 0, 1) ** 1.5)[..., None]


def draw_shadow(canvas: Canvas, pose: Pose, size: float, colour: Colour) -> None:
    """Draws the soft shadow at the feet of a character of `size` frame heights."""
    grow = 1 / (1 + 3 * pose.lift)
    shadow = ellipse(pose.x + 0.06 * size, pose.y, 0.3 * size * grow, 0.06 * size * grow)
    canvas.fill(shadow, colour, opacity=0.5 * grow, blur=0.04 * size)


def shadow_colour(place: Place) -> Colour:
    return darker(rgb(place.ground[1]), 0.7)
