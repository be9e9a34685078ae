"""This module measures how much moves in a film, and how its pictures change from shot to shot."""

import cv2
import numpy as np
from scipy.stats import linregress

from evaluation.films.shown import Film, ShownShot

STILL = 0.01  # a shot below this speed, in frame heights a second, counts as still
_FLOW_HEIGHT = 128


def speed(shot: ShownShot, fps: float) -> float:
    """Returns mean length of the optical flow (Farneback's, by OpenCV) between neighbouring frames, in heights of the
    frame a second. VBench's dynamic degree takes RAFT's instead, and is another number."""
    if shot.frames < 2:
        return 0.0
    lengths = []
    for before, after in zip(shot.pictures, shot.after, strict=True):
        grey = [_grey(picture) for picture in (before, after)]
        still = np.zeros((*grey[0].shape, 2), np.float32)
        flow = cv2.calcOpticalFlowFarneback(grey[0], grey[1], still, 0.5, 3, 15, 3, 5, 1.2, 0)
        lengths.append(float(np.linalg.norm(flow, axis=2).mean()) / _FLOW_HEIGHT)
    return fps * sum(lengths) / len(lengths)


def _grey(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    size = (max(16, round(width * _FLOW_HEIGHT / height)), _FLOW_HEIGHT)
    return cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)


def appearance(shot: ShownShot) -> dict[str, float]:
    """Returns what tends to drift in long sampling: brightness, contrast and saturation in [0, 1], and sharpness, the
    deviation of the Laplacian of values in [0, 1]."""
    hsv = np.stack([cv2.cvtColor(picture, cv2.COLOR_RGB2HSV) for picture in shot.pictures]) / 255
    grey = np.stack([cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in shot.pictures]) / 255
    return {
        "brightness": float(hsv[..., 2].mean()),
        "contrast": float(grey.std(axis=(1, 2)).mean()),
        "saturation": float(hsv[..., 1].mean()),
        "sharpness": float(np.mean([cv2.Laplacian(picture, cv2.CV_64F).std() for picture in grey])),
    }


def drift(film: Film) -> dict[str, tuple[float, float]]:
    """Returns how much each measure of `appearance` changes from one shot to the next, as a share of its mean over the
    film, and the probability of such a slope by chance (p of a linear regression); {} for fewer than three shots."""
    if len(film.shots) < 3:
        return {}
    rows = [appearance(shot) for shot in film.shots]
    found = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        if np.ptp(values) == 0:  # there is no slope; a regression would give nan
            found[name] = (0.0, 1.0)
            continue
        line = linregress(np.arange(len(values)), values)
        found[name] = (float(line.slope / max(abs(values.mean()), 1e-9)), float(line.pvalue))
    return found
