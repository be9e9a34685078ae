"""This module draws antialiased for storyworld: filled shapes with gradients, soft edges and alpha, on float RGBA
pixels.

Colours are opaque RGBA in [0, 1], float32 [4]; pixels are premultiplied RGBA, float32 [H, W, 4]. A canvas carries an
affine map from local units to pixels, so that a shape is written once in its own units (y points down) and placed
anywhere, at any size. Several pictures that differ in their colours alone are drawn at once: pixels [H, W, k, 4] take
colours [k, 4]. NumPy paints planes faster than pixels, so that a view of [4, H, W] is the better canvas.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

Colour = np.ndarray  # float32 [4]

SUBPIXEL_BITS = 4  # OpenCV takes corners of polygons as fixed-point numbers with this many fractional bits
SUBPIXELS = 2**SUBPIXEL_BITS
RIM = 0.014  # the width of a figure's rim, in its own units


def rgb(hex_code: str) -> Colour:
    """Returns the colour of a code such as "#f0c080"."""
    return np.array([*(int(hex_code[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0], np.float32)


_LIGHT = rgb("#ffffff")
_DARK = rgb("#170f29")  # a little blue in it, since grey shadows look dirty


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Returns `a` with the given share of `b`."""
    return a + (b - a) * share


def lighter(colour: Colour, share: float) -> Colour:
    return mix(colour, _LIGHT, share)


def darker(colour: Colour, share: float) -> Colour:
    return mix(colour, _DARK, share)


@dataclass(frozen=True)
class Gradient:
    """Colours run from `start` at y0 to `end` at y1 in local units; `slant` tilts their direction along x."""

    start: Colour
    end: Colour
    y0: float
    y1: float
    slant: float = 0.0

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        share = np.clip((y + self.slant * x - self.y0) / (self.y1 - self.y0), 0, 1)[..., None]
        return self.start + (self.end - self.start) * share


Paint = Colour | Gradient | Callable[[np.ndarray, np.ndarray], np.ndarray]  # the last maps local (x, y) to [h, w, 4]


def shaded(colour: Colour, y0: float, y1: float) -> Gradient:
    """Returns the colour lit from the upper left: a lighter tone at y0, a darker one at y1."""
    return Gradient(lighter(colour, 0.16), darker(colour, 0.2), y0, y1, slant=0.4)


_TURN = np.linspace(0, 2 * np.pi, 33)[:-1]
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
_CAP = np.stack([np.cos(_TURN[:17] - np.pi / 2), np.sin(_TURN[:17] - np.pi / 2)], axis=1)[::2]  # half a circle


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """Returns corner points [n, 2] of an ellipse; `angle` in radians, clockwise on the picture."""
    c, s = math.cos(angle), math.sin(angle)
    return _CIRCLE @ np.array([[rx * c, rx * s], [-ry * s, ry * c]]) + (x, y)


def capsule(x0: float, y0: float, x1: float, y1: float, r0: float, r1: float | None = None) -> np.ndarray:
    """Returns the points of a round-ended limb from (x0, y0), radius r0, to (x1, y1), radius r1 (r0 if not given)."""
    r1 = r0 if r1 is None else r1
    angle = math.atan2(y1 - y0, x1 - x0)
    c, s = math.cos(angle), math.sin(angle)
    cap = _CAP @ np.array([[c, s], [-s, c]])
    return np.concatenate([cap * r1 + (x1, y1), cap * -r0 + (x0, y0)])


def star(x: float, y: float, radius: float, tips: int, depth: float) -> np.ndarray:
    """Returns the points of a star, one tip up, whose inner corners lie at `depth` of the radius."""
    turn = -np.pi / 2 + np.arange(2 * tips) * np.pi / tips
    reach = radius * np.where(np.arange(2 * tips) % 2 == 0, 1.0, depth)
    return np.stack([x + reach * np.cos(turn), y + reach * np.sin(turn)], axis=1)


class Canvas:
    """A canvas is pixels and the map from local units to them: pixel = matrix @ (x, y, 1)."""

    def __init__(self, pixels: np.ndarray, matrix: np.ndarray):
        (a, b, tx), (c, d, ty) = matrix.tolist()
        self.pixels = pixels
        self.matrix = matrix
        self._colour_axes = (1,) * (pixels.ndim - 2)
        self.determinant = a * d - b * c
        # Pixel back to local units: x = inverse[0] . (px, py, 1), y = inverse[1] . (px, py, 1).
        rows = ((d, -b, b * ty - d * tx), (-c, a, c * tx - a * ty))
        self.inverse = [[value / self.determinant for value in row] for row in rows]
        # OpenCV counts from pixel centres, we from pixel corners; half a subpixel more to round.
        self._to_fixed = matrix.T * SUBPIXELS - [[0.0], [0.0], [SUBPIXELS / 2 - 0.5]]

    @classmethod
    def blank(cls, height: int, width: int, scale: float, left: float) -> "Canvas":
        """Returns a transparent canvas whose first pixel lies at (left, 0), with `scale` pixels a unit."""
        matrix = np.array([[scale, 0.0, -left * scale], [0.0, scale, 0.0]])
        return cls(np.zeros((height, width, 4), np.float32), matrix)

    def at(
        self, x: float, y: float, scale_x: float = 1.0, scale_y: float | None = None, angle: float = 0.0
    ) -> "Canvas":
        """Returns the same pixels seen from a new origin, scaled and turned."""
        scale_y = scale_x if scale_y is None else scale_y
        c, s = math.cos(angle), math.sin(angle)
        local = np.array([[c * scale_x, -s * scale_y, x], [s * scale_x, c * scale_y, y], [0.0, 0.0, 1.0]])
        return Canvas(self.pixels, self.matrix @ local)

    def fill(self, points: np.ndarray, paint: Paint, opacity: float = 1.0, blur: float = 0.0) -> None:
        """Paints a polygon [n, 2], or several [k, n, 2] at once that do not overlap.

        blur: the softness of the edge, a Gaussian sigma in local units.
        """
        fixed = np.floor(points @ self._to_fixed[:2] + self._to_fixed[2]).astype(np.int32)
        sigma = blur * math.sqrt(abs(self.determinant))
        margin = 2 + int(3 * sigma)
        x, y, w, h = cv2.boundingRect(fixed.reshape(-1, 2))
        height, width = self.pixels.shape[:2]
        x0, x1 = max(x // SUBPIXELS - margin, 0), min((x + w) // SUBPIXELS + margin, width)
        y0, y1 = max(y // SUBPIXELS - margin, 0), min((y + h) // SUBPIXELS + margin, height)
        if x0 >= x1 or y0 >= y1:
            return
        fixed -= np.array((x0 * SUBPIXELS, y0 * SUBPIXELS), np.int32)
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        cv2.fillPoly(mask, list(fixed.reshape(-1, *fixed.shape[-2:])), 255, cv2.LINE_AA, SUBPIXEL_BITS)
        if sigma > 0.3:
            mask = cv2.GaussianBlur(mask, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
        alpha = mask.reshape(mask.shape + self._colour_axes) * np.float32(opacity / 255)
        region = self.pixels[y0:y1, x0:x1]
        region += alpha * (self._colours(paint, x0, y0, x1, y1) - region)

    def fill_rimmed(self, points: np.ndarray, paint: Paint, tone: Colour) -> None:
        """Fills with a thin dark rim of the tone, which sets a figure off from what has its colour behind it."""
        centre = points.mean(axis=0)
        spokes = points - centre
        reach = np.sqrt((spokes**2).sum(axis=1, keepdims=True))
        self.fill(points + spokes * (RIM / np.maximum(reach, RIM)), darker(tone, 0.45), opacity=0.8)
        self.fill(points, paint)

    def _colours(self, paint: Paint, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Returns the paint's colour [4], or its colours [h, w, 4] over the pixels of the box."""
        if isinstance(paint, np.ndarray):
            return paint
        px = np.arange(x0 + 0.5, x1, dtype=np.float32)
        py = np.arange(y0 + 0.5, y1, dtype=np.float32)[:, None]
        (xx, xy, x_start), (yx, yy, y_start) = self.inverse
        if isinstance(paint, Gradient):  # linear, so it needs no grid of local coordinates
            run = 1 / (paint.y1 - paint.y0)
            start = (y_start + paint.slant * x_start - paint.y0) * run
            share = (yx + paint.slant * xx) * run * px + ((yy + paint.slant * xy) * run * py + start)
            share = np.minimum(np.maximum(share, 0), 1)
            share = share.reshape(share.shape + self._colour_axes)
            return paint.start + share * (paint.end - paint.start)
        return paint(xx * px + (xy * py + x_start), yx * px + (yy * py + y_start))


def lay_over(under: np.ndarray, upper: np.ndarray) -> None:
    """Lays premultiplied `upper` on `under` in place; both float32 [H, W, 4]."""
    under *= 1 - upper[..., 3:]
    under += upper
