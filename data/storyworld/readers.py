"""This module reads storyworld from pixels alone: which place a shot shows, and a character's colours.

Both compare colours in CIE Lab, where distances are close to what the eye sees.
"""

import cv2
import numpy as np

from data.storyworld.canvas import mix, rgb
from data.storyworld.characters import COLOURS
from data.storyworld.places import HORIZON, PLACES

# The regions of a character's box, as (x0, y0, x1, y1) shares, where its fur and its outfit show.
FUR_REGION, OUTFIT_REGION = (0.3, 0.25, 0.7, 0.45), (0.35, 0.77, 0.65, 0.87)


def name_place(frames: np.ndarray) -> str:
    """Returns the place that frames [F, H, W, 3], uint8, show; robust to blur, noise and faded colours.

    The colours of its upper and lower half (medians of rows, averaged) are taken relative to the mean of all places,
    and the place whose palette deviates from that mean in the most similar direction is named: fading towards the
    mean, as an unsure model does, changes the length of the deviation, not its direction.
    """
    names = list(PLACES)
    palettes = np.stack([_palette(name) for name in names])
    mean = palettes.mean(axis=0)
    deviations = (palettes - mean).reshape(len(names), -1)
    seen = (_bands(frames) - mean).reshape(-1)
    return names[int(np.argmax(deviations @ seen / np.linalg.norm(deviations, axis=1)))]


def name_looks(frames: np.ndarray, boxes: list) -> dict[str, str]:
    """Returns the fur and outfit colour of the character in `boxes`, one [x0, y0, x1, y1] (or None) for each frame.

    frames: uint8 [F, H, W, 3]. Every pixel of the regions votes. Made for recall scenes, whose coats are plain: a
    pattern or a hat can mislead it. Raises ValueError if no box is given.
    """
    pairs = [(frame, box) for frame, box in zip(frames, boxes, strict=True) if box is not None]
    if not pairs:
        raise ValueError("no box to read looks in: give one [x0, y0, x1, y1] at least")
    return {
        "fur": _name_colour(np.concatenate([_crop(frame, box, FUR_REGION) for frame, box in pairs])),
        "outfit": _name_colour(np.concatenate([_crop(frame, box, OUTFIT_REGION) for frame, box in pairs])),
    }


def _bands(frames: np.ndarray) -> np.ndarray:
    """Returns the Lab colour [2, 3] of the upper and the lower half of the picture."""
    height = frames.shape[1]
    upper, lower = frames[:, : int(0.4 * height)], frames[:, int(0.7 * height) :]
    return np.stack([_lab(np.median(half, axis=2).mean(axis=(0, 1)) / 255) for half in (upper, lower)])


def _palette(name: str) -> np.ndarray:
    place = PLACES[name]
    (zenith, horizon), (near, far) = map(rgb, place.sky), map(rgb, place.ground)
    sky, ground = mix(zenith, horizon, 0.2 / HORIZON), mix(near, far, 0.5)
    return np.stack([_lab(sky), _lab(ground)])


def _name_colour(pixels: np.ndarray) -> str:
    """Returns the commonest nearest colour of pixels [n, 3], uint8."""
    names = list(COLOURS)
    palette = np.stack([_lab(COLOURS[name]) for name in names])
    lab = cv2.cvtColor((pixels[None] / 255).astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    nearest = np.linalg.norm(lab[:, None] - palette, axis=2).argmin(axis=1)
    return names[int(np.bincount(nearest).argmax())]


def _crop(frame: np.ndarray, box, region: tuple[float, float, float, float]) -> np.ndarray:
    """Returns the pixels [n, 3] of a region of the box; one at least."""
    x0, y0, x1, y1 = box
    left, right = (int(x0 + share * (x1 - x0)) for share in (region[0], region[2]))
    top, bottom = (int(y0 + share * (y1 - y0)) for share in (region[1], region[3]))
    return frame[top : max(bottom, top + 1), left : max(right, left + 1)].reshape(-1, 3)


def _lab(colour: np.ndarray) -> np.ndarray:
    """Returns Lab [3] of one RGB colour in [0, 1]."""
    return cv2.cvtColor(np.asarray(colour[:3], np.float32)[None, None], cv2.COLOR_RGB2LAB)[0, 0]
