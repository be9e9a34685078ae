"""A prompt script says what to film, shot by shot. It is YAML or JSON, in our form or one of `film.forms`.

    title: The lighthouse
    global: "..."            # characters, place, story
    size: [480, 832]
    fps: 16
    negative: "..."
    shots:
      - {prompt: "...", seconds: 8, cut: true}
      - {prompt: "...", seconds: 8, cut: false, image: ref.png, last_image: end.png, seed: 3, guidance: 4}
      - {prompt: "...", video: take.mp4, start: 2.5, seconds: 4}    # given, not made: the others go on from it
    references:              # pictures of characters and places that every shot may look back to, never filmed
      - {prompt: "...", image: ann.png}

A film's metadata.json is read as the script of that film, with the seed of each shot.

A benchmark's script also says who and what is in each shot, and where: `entities` of a shot, by kind, and `entities` of
the script, a description of each name. A shot's `scene` is its [scene, shot] there, after which its video is named.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.documents import parse, read_text
from data.errors import DataError, refuse_unknown
from data.manifest import resolve, shot_prompt
from film.fields import DEFAULT_FPS, DEFAULT_SECONDS, number, positive, seed_of, text_of, whole
from film.footage import seconds_after
from film.forms import as_ours

logger = logging.getLogger(__name__)

DEFAULT_SIZE = (480, 832)
_FIELDS = {"title", "global", "size", "fps", "negative", "shots", "references", "entities"}
_SHOT_FIELDS = {
    "prompt", "seconds", "cut", "image", "last_image", "video", "start", "guidance", "seed", "entities", "scene",
}  # fmt: skip


@dataclass(frozen=True)
class ScriptShot:
    """This describes one shot of a film. Files lie inside the script's folder.

    cut: a true cut begins it; false: it goes on from the shot before. image: a picture that the shot shall look like.
    last_image: the picture that it ends in. video: what the shot is, from `start` seconds on, so that it is not made.
    guidance: the guidance scale. seed: that of its noise. None takes the film's. entities: the names of who and what
    is seen, and where, by kind. scene: the numbers of a scene and of a shot in it, from 1, in a benchmark.
    """

    prompt: str
    seconds: float
    cut: bool = True
    image: Path | None = None
    seed: int | None = None
    last_image: Path | None = None
    video: Path | None = None
    start: float = 0.0
    guidance: float | None = None
    entities: Mapping[str, Sequence[str]] | None = None
    scene: tuple[int, int] | None = None

    @property
    def begins_anew(self) -> bool:
        """Returns whether the shot begins with a cut or a picture instead of going on from the shot before."""
        return self.cut or self.image is not None

    @property
    def beginning(self) -> str:
        """Says in a word or two how the shot begins, or that it is given."""
        return "given" if self.video else "picture" if self.image else "cut" if self.cut else "goes on"

    @property
    def caption(self) -> str:
        """Returns the prompt as the text encoder gets it."""
        return shot_prompt(self.prompt, self.cut)


@dataclass(frozen=True)
class Reference:
    """A reference is a picture of a character or a place, inside the script's folder, and what it shows."""

    prompt: str
    image: Path


@dataclass(frozen=True)
class Script:
    """A script tells a story. size: (height, width) in pixels. references: what every shot may look back to. entities:
    a description of each name."""

    title: str
    global_caption: str
    size: tuple[int, int]
    fps: float
    negative: str
    shots: tuple[ScriptShot, ...]
    references: tuple[Reference, ...] = ()
    entities: Mapping[str, str] | None = None

    def is_guided(self, usual: float) -> bool:
        """Returns whether some shot is guided. usual: the guidance scale of shots without one."""
        return any((usual if shot.guidance is None else shot.guidance) != 1 for shot in self.shots)

    @property
    def captions(self) -> list[str]:
        """Returns all that the script says, in words."""
        of_references, of_shots = (one.prompt for one in self.references), (one.prompt for one in self.shots)
        return [self.global_caption, self.negative, *of_references, *of_shots]

    def record(self, seed: int, names: Mapping[Path, str]) -> dict[str, Any]:
        """Returns the script as JSON has it. seed: of the shots without one. names: under which pictures are named."""
        shots: list[dict[str, Any]] = []
        for shot in self.shots:
            fields = {"prompt": shot.prompt, "seconds": shot.seconds, "cut": shot.cut}
            files = {"image": shot.image, "last_image": shot.last_image, "video": shot.video}
            fields |= {field: names[file] for field, file in files.items() if file}
            fields |= {"start": shot.start} if shot.video else {}
            fields |= {"guidance": shot.guidance} if shot.guidance is not None else {}
            fields |= {"entities": dict(shot.entities)} if shot.entities else {}
            fields |= {"scene": list(shot.scene)} if shot.scene else {}
            shots.append(fields | {"seed": seed if shot.seed is None else shot.seed})
        top = {"title": self.title, "global": self.global_caption, "size": list(self.size), "fps": self.fps}
        pictures = [{"prompt": one.prompt, "image": names[one.image]} for one in self.references]
        more = ({"references": pictures} if pictures else {}) | ({"entities": self.entities} if self.entities else {})
        return top | {"negative": self.negative, "shots": shots} | more


def load_script(
    path: str | Path,
    given: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Script:
    """Reads a script in any of the forms; raises DataError citing file and field. given, defaults: as in
    `parse_script`."""
    path = Path(path)
    if not path.is_file():
        raise DataError("missing-script", path, "no such file; give script=FILE, a YAML or JSON prompt script")
    return parse_script(read_text(path), path, given, defaults)


def parse_script(
    text: str, path: Path, given: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None
) -> Script:
    """Returns what `load_script` reads in a file, of a text that need not be in one. path: its ending tells JSON from
    YAML, and the pictures lie in its folder. given, defaults: a `size` and `fps` instead of the script's, and where it
    has none.
    """
    raw = parse(text, path)
    if not isinstance(raw, dict):
        raise DataError("unreadable-script", path, "must be a mapping with `shots` (see the README)")
    if "fingerprints" in raw and isinstance(raw.get("script"), dict):  # the metadata of a film
        if raw.get("redone"):
            logger.warning(
                "%s: shots %s were made anew in a whole film; filmed at once, those that see them may differ from that",
                path,
                raw["redone"],
            )
        raw = raw["script"]
    raw = {**(defaults or {}), **raw, **(given or {})}
    return _parse(as_ours(raw, path), path)


def _parse(raw: dict[str, Any], path: Path) -> Script:
    refuse_unknown(raw, _FIELDS, str(path), "bad-script")
    size = raw.get("size", DEFAULT_SIZE)
    if not (isinstance(size, Sequence) and len(size) == 2 and all(type(x) is int and x > 0 for x in size)):
        raise DataError("bad-script", f"{path} size", f"{size!r} is not [height, width] in pixels")
    shots = raw.get("shots")
    if not isinstance(shots, list) or not shots:
        raise DataError("bad-script", f"{path} shots", "there is no shot; give a list of at least one")
    made = [_shot(shot, f"{path} shots[{index}]", path.parent) for index, shot in enumerate(shots)]
    _check_scenes([shot.scene for shot in made], path)
    if all(shot.video for shot in made):
        raise DataError("bad-script", f"{path} shots", "every shot is a given video; leave one at least to be made")
    return Script(
        title=text_of(raw, "title", path) or path.stem,
        global_caption=text_of(raw, "global", path),
        size=(size[0], size[1]),
        fps=positive(raw.get("fps", DEFAULT_FPS), f"{path} fps"),
        negative=text_of(raw, "negative", path),
        shots=tuple(made),
        references=_references(raw.get("references"), path),
        entities=_descriptions(raw.get("entities"), f"{path} entities"),
    )


def _references(raw: Any, path: Path) -> tuple[Reference, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise DataError("bad-script", f"{path} references", f"{raw!r} is not a list of prompts and images")
    found = []
    for index, one in enumerate(raw):
        where = f"{path} references[{index}]"
        if not isinstance(one, dict) or one.keys() != {"prompt", "image"}:
            raise DataError("bad-script", where, f"{one!r} is not a mapping of prompt and image")
        prompt, image = text_of(one, "prompt", where), resolve(path.parent, str(one["image"]), f"{where}.image")
        found.append(Reference(prompt, image))
    return tuple(found)


def _shot(raw: Any, where: str, root: Path) -> ScriptShot:
    if not isinstance(raw, dict):
        raise DataError("bad-script", where, f"{raw!r} is not a mapping with prompt and seconds")
    refuse_unknown(raw, _SHOT_FIELDS, where, "bad-script")
    prompt, cut = raw.get("prompt"), raw.get("cut", True)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("bad-script", f"{where}.prompt", f"{prompt!r} is not a text; say what the shot shows")
    if not isinstance(cut, bool):
        raise DataError("bad-script", f"{where}.cut", f"{cut!r} is not true or false")
    files = {
        field: resolve(root, str(raw[field]), f"{where}.{field}")
        for field in ("image", "last_image", "video")
        if raw.get(field) is not None
    }
    video, start, guidance = files.get("video"), raw.get("start"), raw.get("guidance")
    beside = next((field for field in ("image", "last_image", "guidance") if raw.get(field) is not None), None)
    if video and beside:
        raise DataError("bad-script", f"{where}.{beside}", "has no use beside video, which is the shot; leave out one")
    if start is not None and not video:
        raise DataError(
            "bad-script", f"{where}.start", f"{start!r} says where a video begins; add video, or leave it out"
        )
    start = 0.0 if start is None else number(start, f"{where}.start")
    default = seconds_after(video, start) if video and "seconds" not in raw else DEFAULT_SECONDS
    return ScriptShot(
        prompt=whole(prompt, f"{where}.prompt").strip(),
        seconds=positive(raw.get("seconds", default), f"{where}.seconds"),
        cut=cut,
        image=files.get("image"),
        seed=seed_of(raw.get("seed"), f"{where}.seed"),
        last_image=files.get("last_image"),
        video=video,
        start=start,
        guidance=None if guidance is None else number(guidance, f"{where}.guidance"),
        entities=_names(raw.get("entities"), f"{where}.entities"),
        scene=_scene(raw.get("scene"), f"{where}.scene"),
    )


def _descriptions(raw: Any, where: str) -> dict[str, str] | None:
    if raw is not None and not (isinstance(raw, dict) and all(isinstance(text, str) for text in raw.values())):
        raise DataError("bad-script", where, f"{raw!r} is not a mapping of names to descriptions")
    return {str(name): text for name, text in raw.items()} if raw else None


def _names(raw: Any, where: str) -> dict[str, list[str]] | None:
    """Returns the names of entities by kind."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise DataError("bad-script", where, f"{raw!r} is not a mapping of kinds to lists of names")
    for kind, names in raw.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError("bad-script", f"{where}.{kind}", f"{names!r} is not a list of names")
    return {str(kind): list(names) for kind, names in raw.items()}


def _scene(raw: Any, where: str) -> tuple[int, int] | None:
    if raw is None:
        return None
    if not isinstance(raw, list | tuple) or len(raw) != 2 or not all(type(x) is int and 0 < x < 1000 for x in raw):
        raise DataError("bad-script", where, f"{raw!r} is not [scene, shot], two whole numbers from 1 to 999")
    return raw[0], raw[1]


def _check_scenes(scenes: Sequence[tuple[int, int] | None], path: Path) -> None:
    """Raises DataError where two shots have the same scene, by which their videos are named."""
    for index, scene in enumerate(scenes):
        if scene and (first := scenes.index(scene)) < index:
            taken = f"{list(scene)} is that of shots[{first}] too; number one of them otherwise"
            raise DataError("bad-script", f"{path} shots[{index}].scene", taken)
