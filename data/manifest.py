"""A manifest is JSON Lines with one scene a line: one video with its shots, or one image.

{"id": "...", "video": "rel/path.mp4", "caption": "...", "fps": 24,
 "shots": [{"start": 0, "end": 96, "caption": "...", "cut": true}, ...]}

Frames are half-open decoded indices. Paths are relative to the manifest and stay inside its root. A caption is a
string or a list of lengths. Without `shots` a video's shots are found by detection. Errors cite file:line, field.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.documents import read_objects
from data.errors import DataError, refuse_unknown
from data.records import write_whole
from moc.files import OutsideError, inside

Caption = str | tuple[str, ...]

CUT_PREFIX = "[SHOT CUT]"
MAX_CAPTION_CHARACTERS = 20_000
_SCENE_FIELDS = frozenset({"id", "video", "image", "caption", "fps", "shots"})
_SHOT_FIELDS = frozenset({"start", "end", "caption", "cut"})


@dataclass(frozen=True)
class ShotRecord:
    """A shot is the frames [start, end) of its video. cut: whether a true cut begins it, or it continues the shot
    before."""

    start: int
    end: int
    caption: Caption = ""
    cut: bool = True


@dataclass(frozen=True)
class SceneRecord:
    """A scene is one line of a manifest. Exactly one of video and image is set; fps None: the video's own; shots empty:
    to be detected.

    shot_captions: of the shots to be detected, from other tools' files; never in a manifest. origin: the file and line
    that the scene was read from, "" where it was no line of a file; it does not count when scenes are compared.
    """

    id: str
    video: str | None = None
    image: str | None = None
    caption: Caption = ""
    fps: float | None = None
    shots: tuple[ShotRecord, ...] = ()
    shot_captions: tuple[Caption, ...] = ()
    origin: str = field(default="", compare=False)

    @property
    def path(self) -> str:
        return self.video or self.image or ""

    @property
    def where(self) -> str:
        """Returns what an error cites: the line that the scene was read from, or its id."""
        return self.origin or self.id

    def to_dict(self) -> dict:
        """Returns the JSON object of the line, without the fields that say nothing."""
        other = ("shots", "shot_captions", "origin")
        fields = {k: v for k, v in asdict(self).items() if v is not None and k not in other}
        return fields | ({"shots": [asdict(shot) for shot in self.shots]} if self.shots else {})


def captions(caption: Caption) -> tuple[str, ...]:
    """Returns all the lengths of a caption, one at least."""
    return (caption,) if isinstance(caption, str) else caption


def shot_prompt(caption: str, cut: bool) -> str:
    """Returns a shot's caption as the text encoder gets it, in training and sampling: LCT marks a true cut by a
    prefix."""
    if not cut or caption.startswith(CUT_PREFIX):
        return caption
    return f"{CUT_PREFIX} {caption}".strip()


def write_manifest(path: str | Path, scenes: Iterable[SceneRecord]) -> None:
    """Writes one line a scene; the file appears whole or not at all."""
    lines = [json.dumps(scene.to_dict(), ensure_ascii=False) + "\n" for scene in scenes]
    write_whole(Path(path), "".join(lines).encode())


def load_manifest(path: str | Path, root: str | Path | None = None) -> list[SceneRecord]:
    """Returns all scenes. root: the folder that paths are relative to; None is the manifest's own, and preparing writes
    a manifest whose paths are relative to its input. Raises DataError at the first fault, and where there is no scene.
    """
    scenes = []
    for entry in read_manifest(path, root):
        if isinstance(entry, DataError):
            raise entry
        scenes.append(entry)
    if not scenes:
        raise DataError("empty-manifest", path, "holds no scene")
    return scenes


def read_manifest(path: str | Path, root: str | Path | None = None) -> Iterator[SceneRecord | DataError]:
    """Yields each line's scene, or what is wrong with it; a bad line does not hide the others. root: as in
    `load_manifest`."""
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    if not path.is_file():
        raise DataError("missing-manifest", path, "no such file")
    first_line: dict[str, int] = {}
    for number, fields in read_objects(path):
        where = f"{path}:{number}"
        try:
            if isinstance(fields, DataError):
                raise fields
            scene = scene_from_dict(fields, where)
            if scene.id in first_line:
                raise DataError("duplicate-id", f"{where} id", f"{scene.id!r} is already line {first_line[scene.id]}")
            first_line[scene.id] = number
            resolve(root, scene.path, f"{where} {'video' if scene.video else 'image'}")
        except DataError as error:
            yield error
        else:
            yield scene


def resolve(root: Path, relative: str, where: object) -> Path:
    """Returns the file `relative` names under `root`. Raises DataError: outside-root (.., absolute, or a symlink that
    leads out), missing-file, bad-path (no name that a file can have, a circle of symlinks)."""
    try:
        relative.encode()
        path = inside(root, relative, follow_links=True)
        missing = not path.is_file()
    except OutsideError as error:
        raise DataError("outside-root", where, _said_of_outside(root, relative)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            "bad-path", where, f"{relative[:80]!r} names no file ({type(error).__name__}); rename or remove it"
        ) from error
    if missing:
        raise DataError("missing-file", where, f"{relative!r} is not in {root}; put it there, or correct its name")
    return path


def _said_of_outside(root: Path, name: str) -> str:
    """Returns what is wrong with a name that is absolute, has .. in it or leads out, and what to do."""
    folder = root.resolve()
    path = (folder / name).resolve()
    if path.is_relative_to(folder):
        return f"{name!r} is not a path from {root} on; write {path.relative_to(folder).as_posix()!r}"
    return f"{name!r} leads outside {root}; move the file under it"


def scene_from_dict(fields: dict, where: str) -> SceneRecord:
    """Checks one line's object. Raises DataError citing `where` and the field."""
    refuse_unknown(fields, _SCENE_FIELDS, where, "unknown-field")
    scene_id = fields.get("id")
    if not isinstance(scene_id, str) or not 0 < len(scene_id) <= 200:
        raise DataError("bad-id", f"{where} id", f"must be a string of 1 to 200 characters, got {scene_id!r}")
    _check_utf8(scene_id, f"{where} id")
    kinds = [kind for kind in ("video", "image") if kind in fields]
    if len(kinds) != 1:
        raise DataError("no-media", where, f"needs exactly one of video and image, has {kinds or 'neither'}")
    media = fields[kinds[0]]
    if not isinstance(media, str) or not media:
        raise DataError("bad-path", f"{where} {kinds[0]}", f"must be a relative path, got {media!r}")
    if kinds == ["image"] and "shots" in fields:
        raise DataError("image-with-shots", f"{where} shots", "an image has no shots; leave the field out")
    return SceneRecord(
        id=scene_id,
        video=media if kinds == ["video"] else None,
        image=media if kinds == ["image"] else None,
        caption=check_caption(fields.get("caption", ""), f"{where} caption"),
        fps=_fps(fields, where),
        shots=_shots(fields.get("shots"), where),
        origin=where,
    )


def check_caption(value: object, where: str) -> Caption:
    """Returns a string, or a list of strings as a tuple. Raises DataError: bad-caption, huge-caption, not-utf-8."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError("bad-caption", where, f"a string or a list of strings, got {str(value)[:80]!r}")
    longest = max(len(text) for text in texts)
    if longest > MAX_CAPTION_CHARACTERS:
        raise DataError("huge-caption", where, f"{longest} characters, at most {MAX_CAPTION_CHARACTERS}")
    for text in texts:
        _check_utf8(text, where)
    return value if isinstance(value, str) else tuple(texts)


def _check_utf8(text: str, where: str) -> None:
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise DataError("not-utf-8", where, "holds a lone surrogate, which is no UTF-8 text")


def _fps(fields: dict, where: str) -> float | None:
    fps = fields.get("fps")
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0:
        raise DataError("bad-fps", f"{where} fps", f"a positive number of frames a second, got {fps!r}")
    return float(fps)


def _shots(values: object, where: str) -> tuple[ShotRecord, ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or not values:
        raise DataError("no-shots", f"{where} shots", "a non-empty list; leave it out to have shots detected")
    shots: list[ShotRecord] = []
    for i, fields in enumerate(values):
        shot = _shot(fields, f"{where} shots[{i}]")
        if shots and shot.start < shots[-1].end:
            raise DataError(
                "overlapping-shots",
                f"{where} shots[{i}].start",
                f"{shot.start} is before the end {shots[-1].end} of shot {i - 1}",
            )
        shots.append(shot)
    return tuple(shots)


def _shot(fields: object, where: str) -> ShotRecord:
    if not isinstance(fields, dict):
        raise DataError("bad-shot", where, f"a shot is an object, got {fields!r}")
    refuse_unknown(fields, _SHOT_FIELDS, where, "unknown-field")
    for name in ("start", "end"):
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise DataError("bad-frame", f"{where}.{name}", f"a frame index of 0 or more, got {value!r}")
    if fields["end"] <= fields["start"]:
        raise DataError("reversed-shot", f"{where}.end", f"{fields['end']} is not after the start {fields['start']}")
    if not isinstance(fields.get("cut", True), bool):
        raise DataError("bad-cut", f"{where}.cut", f"true or false, got {fields['cut']!r}")
    return ShotRecord(
        fields["start"],
        fields["end"],
        check_caption(fields.get("caption", ""), f"{where}.caption"),
        fields.get("cut", True),
    )
