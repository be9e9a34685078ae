"""This module is the second stage of preparing: it makes plans of samples, a few shots each, of scenes and scans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.errors import DataError
from data.interfaces import Codec
from data.manifest import Caption, SceneRecord, ShotRecord, captions
from data.media.images import read_image
from data.media.index import VideoIndex
from data.media.resize import nearest_size, resample
from data.prepare.scan import Scan
from data.prepare.shots import Span
from data.records import digest
from moc.counts import count_of

_CLAIM_TOLERANCE = 0.98
_MOST_ENLARGED = 1.1


@dataclass(frozen=True)
class ShotRule:
    """The rule says how shots are cut, in frames at `fps` (None: each video's own). A shot longer than max_frames is
    cut into continuations, one shorter than min_frames is skipped, the rest are trimmed to whole latent frames of the
    codec.
    sizes: (H, W) to choose from. Raises DataError (bad-length) where max_frames holds no whole latent frame."""

    fps: float | None
    min_frames: int
    max_frames: int
    shots_per_sample: int
    codec: Codec
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        least = max(self.codec.nearest_frames(1, shot) for shot in range(2))
        if self.max_frames < least:
            raise DataError("bad-length", "max_frames", f"{self.max_frames} is below this codec's least, {least}")


@dataclass(frozen=True)
class SamplePlan:
    """A plan says how a sample is encoded. scene: its manifest line; indices: the frames of each shot; size: (H, W)
    after resizing; key: a digest of all that the encoding depends on besides the cache's recipe."""

    scene: SceneRecord
    indices: tuple[tuple[int, ...], ...]
    size: tuple[int, int]
    index: VideoIndex | None
    key: str


def plan_scene(
    root: Path, scene: SceneRecord, scan: Scan | None, rule: ShotRule
) -> tuple[list[SamplePlan], list[DataError]]:
    """Returns the samples of a scene, and what was left out of it. Raises DataError where nothing of it can be used."""
    if scene.image:
        height, width = read_image(root / scene.image).shape[1:3]
        return [_plan(root, scene, ((0,),), nearest_size(height, width, rule.sizes), None)], []
    if scan is None or scan.index is None:
        raise scan.error if scan and scan.error else DataError("no-frames", scene.where, "was not scanned")
    index = scan.index
    skipped: list[DataError] = []
    pieces: list[tuple[ShotRecord, tuple[int, ...]]] = []
    records = scene.shots or _detected_shots(scene, scan.spans or ((0, index.num_frames),))
    for i, shot in enumerate(records):
        where = f"{scene.where} shots[{i}]"
        if shot.end > index.num_frames:
            raise DataError(
                "out-of-range-shot",
                f"{where}.end",
                f"{shot.end} is past the {index.num_frames} frames that {scene.video} decodes to; end it there",
            )
        cut = _cut_shot(shot, index, rule, len(pieces))
        if not cut:
            frames = len(resample(index.times, shot.start, shot.end, rule.fps))
            said = f"{count_of(frames, 'frame')} at the set rate, at least {rule.min_frames}"
            skipped.append(DataError("short-shot", where, said))
        pieces += cut
    size = nearest_size(index.height, index.width, rule.sizes)
    windows = [pieces[at : at + rule.shots_per_sample] for at in range(0, len(pieces), rule.shots_per_sample)]
    plans = []
    for number, window in enumerate(windows):
        name = scene.id if len(windows) == 1 else f"{scene.id}#{number:04d}"
        shots = tuple(shot for shot, _ in window)
        own = replace(scene, id=name, fps=index.fps, shots=shots, shot_captions=())
        plans.append(_plan(root, own, tuple(indices for _, indices in window), size, index))
    return plans, skipped


def _detected_shots(scene: SceneRecord, spans: Sequence[Span]) -> list[ShotRecord]:
    texts = scene.shot_captions or ("",) * len(spans)
    if len(texts) != len(spans):
        raise DataError(
            "caption-count",
            scene.where,
            f"has {len(texts)} shot captions, but {len(spans)} shots were found; give the shots in a manifest",
        )
    return [ShotRecord(start, end, text) for (start, end), text in zip(spans, texts, strict=True)]


def doubts(scene: SceneRecord, scan: Scan | None, sizes: Sequence[tuple[int, int]]) -> list[DataError]:
    """Returns what a person should look at, though the scene is used: no caption, fewer frames than claimed, stamps
    that were mended, another rate, HDR, pixels that are not square, fields for frames, a size below that of `sizes`
    that it takes."""
    found = []
    if not any(text.strip() for caption in _captions(scene) for text in captions(caption)):
        found.append(DataError("empty-caption", scene.where, "neither the scene nor any shot has a caption"))
    if scan is None or scan.index is None:
        return found
    index, claimed = scan.index, scan.claimed_frames
    if claimed and index.num_frames < _CLAIM_TOLERANCE * claimed - 2:
        found.append(
            DataError("truncated", scene.where, f"{scene.video} claims {claimed} frames, {index.num_frames} decode")
        )
    if index.stamp_fault:
        found.append(DataError("bad-stamps", scene.where, f"{scene.video}: {index.stamp_fault}"))
    if scene.fps and abs(scene.fps - index.fps) > 0.01 * index.fps:
        found.append(
            DataError("other-fps", scene.where, f"the manifest says {scene.fps} fps, {scene.video} has {index.fps}")
        )
    if index.hdr:
        said = f"{scene.video} is HDR ({index.hdr}) and is read as if it were SDR, with pale colours"
        found.append(DataError("hdr", scene.where, f"{said}; convert it to SDR first"))
    if index.pixel_aspect:
        said = f"{scene.video} has pixels of {index.pixel_aspect}, which are read as if they were square"
        found.append(DataError("anamorphic", scene.where, f"{said}; scale it to square pixels first"))
    if index.interlaced:
        said = f"{scene.video} is interlaced and is read as if it were not, with combs where anything moves"
        found.append(DataError("interlaced", scene.where, f"{said}; deinterlace it first"))
    height, width = nearest_size(index.height, index.width, sizes)
    enlarged = max(height / index.height, width / index.width)
    if enlarged > _MOST_ENLARGED:
        said = f"{index.height}x{index.width} is enlarged {enlarged:.1f} times to {height}x{width}"
        found.append(DataError("enlarged", scene.where, f"{said}; take a smaller size, or leave the film out"))
    return found


def _captions(scene: SceneRecord) -> list[Caption]:
    return [scene.caption, *scene.shot_captions, *(shot.caption for shot in scene.shots)]


def _cut_shot(
    shot: ShotRecord, index: VideoIndex, rule: ShotRule, number: int
) -> list[tuple[ShotRecord, tuple[int, ...]]]:
    """Returns the shot, or its continuations, as shots `number` and on of the scene, and the frames of each."""
    frames = resample(index.times, shot.start, shot.end, rule.fps)
    pieces: list[tuple[ShotRecord, tuple[int, ...]]] = []
    at = 0
    while at < len(frames):
        shot_index = (number + len(pieces)) % rule.shots_per_sample
        left = min(len(frames) - at, rule.max_frames)
        taken = tuple(frames[at : at + rule.codec.whole_frames(left, shot_index)])
        if taken and left >= rule.min_frames:
            pieces.append((ShotRecord(taken[0], taken[-1] + 1, shot.caption, shot.cut and at == 0), taken))
        at += rule.codec.whole_frames(rule.max_frames, shot_index)
    return pieces


def replan(root: Path, plan: SamplePlan, scene: SceneRecord) -> SamplePlan:
    """Returns the plan with other captions, under another key."""
    return _plan(root, scene, plan.indices, plan.size, plan.index)


def _plan(
    root: Path,
    scene: SceneRecord,
    indices: tuple[tuple[int, ...], ...],
    size: tuple[int, int],
    index: VideoIndex | None,
) -> SamplePlan:
    stat = (root / scene.path).stat()
    made_of: dict = {"scene": scene.to_dict(), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
    return SamplePlan(scene, indices, size, index, digest(made_of | {"indices": indices, "size": size}))
