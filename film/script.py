"""Prompt scripts: what to film, shot by shot. Ours, HoloCine's and StoryMem's forms, YAML or JSON.

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

HoloCine: `global_caption`, `shot_captions`, `num_frames`, optionally `shot_cut_frames`; or `prompt`, one string with
[global caption], [per shot caption] and [shot cut] tags. StoryMem: `story_overview` and `scenes` of `video_prompts` and
`cut`. Both may add `title`, `size`, `fps` and `negative_prompt`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.documents import parse_json, parse_yaml, read_text
from data.errors import DataError, refuse_unknown
from data.manifest import resolve, shot_prompt
from data.stories import prompts_and_cuts, spans_between
from film.footage import seconds_after

DEFAULT_SIZE, DEFAULT_FPS, DEFAULT_SECONDS = (480, 832), 16.0, 5.0
_FIELDS = {"title", "global", "size", "fps", "negative", "shots", "references"}
_SHOT_FIELDS = {"prompt", "seconds", "cut", "image", "last_image", "video", "start", "guidance", "seed"}
_SHARED_FIELDS = {"title", "size", "fps", "negative_prompt"}  # that the peers' forms may add to their own


@dataclass(frozen=True)
class ScriptShot:
    """One shot of a film. Files lie inside the script's folder.

    cut: a true cut begins it; false: it goes on from the shot before. image: a picture that the shot shall look like.
    last_image: the picture that it ends in. video: what the shot is, from `start` seconds on, so that it is not made.
    guidance: the guidance scale. seed: of its noise. None takes the film's.
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

    @property
    def begins_anew(self) -> bool:
        """Whether it does not go on from the shot before, but from a cut or a picture."""
        return self.cut or self.image is not None

    @property
    def caption(self) -> str:
        """The prompt as the text encoder gets it."""
        return shot_prompt(self.prompt, self.cut)


@dataclass(frozen=True)
class Reference:
    """A picture of a character or a place, already inside the script's folder, and what it shows."""

    prompt: str
    image: Path


@dataclass(frozen=True)
class Script:
    """A story. size: (height, width) in pixels. references: what every shot may look back to."""

    title: str
    global_caption: str
    size: tuple[int, int]
    fps: float
    negative: str
    shots: tuple[ScriptShot, ...]
    references: tuple[Reference, ...] = ()

    def record(self, seed: int, names: Mapping[Path, str]) -> dict[str, Any]:
        """The script as JSON has it. seed: of the shots without one. names: under which pictures are named."""
        shots: list[dict[str, Any]] = []
        for shot in self.shots:
            fields = {"prompt": shot.prompt, "seconds": shot.seconds, "cut": shot.cut}
            files = {"image": shot.image, "last_image": shot.last_image, "video": shot.video}
            fields |= {field: names[file] for field, file in files.items() if file}
            fields |= {"start": shot.start} if shot.video else {}
            fields |= {"guidance": shot.guidance} if shot.guidance is not None else {}
            shots.append(fields | {"seed": seed if shot.seed is None else shot.seed})
        top = {"title": self.title, "global": self.global_caption, "size": list(self.size), "fps": self.fps}
        pictures = [{"prompt": one.prompt, "image": names[one.image]} for one in self.references]
        return top | {"negative": self.negative, "shots": shots} | ({"references": pictures} if pictures else {})


def load_script(
    path: str | Path,
    given: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Script:
    """Reads a script in any of the forms; raises DataError citing file and field. given, defaults: a `size` and `fps`
    instead of the script's, and where it has none."""
    path = Path(path)
    if not path.is_file():
        raise DataError("missing-script", path, "no such file; give script=FILE, a YAML or JSON prompt script")
    text = read_text(path)
    raw = parse_json(text, path) if path.suffix.lower() == ".json" else parse_yaml(text, path)
    if not isinstance(raw, dict):
        raise DataError("unreadable-script", path, "must be a mapping with `shots` (see the README)")
    if "fingerprints" in raw and isinstance(raw.get("script"), dict):  # the metadata of a film
        raw = raw["script"]
    raw = {**(defaults or {}), **raw, **(given or {})}
    if "shot_captions" in raw or isinstance(raw.get("prompt"), str):
        raw = _from_holocine(raw, path)
    elif "scenes" in raw:
        raw = _from_storymem(raw, path)
    return _parse(raw, path)


def _parse(raw: dict[str, Any], path: Path) -> Script:
    refuse_unknown(raw, _FIELDS, str(path), "bad-script")
    size = raw.get("size", DEFAULT_SIZE)
    if not (isinstance(size, Sequence) and len(size) == 2 and all(type(x) is int and x > 0 for x in size)):
        raise DataError("bad-script", f"{path} size", f"{size!r} is not [height, width] in pixels")
    shots = raw.get("shots")
    if not isinstance(shots, list) or not shots:
        raise DataError("bad-script", f"{path} shots", "there is no shot; give a list of at least one")
    made = [_shot(shot, f"{path} shots[{index}]", path.parent) for index, shot in enumerate(shots)]
    if all(shot.video for shot in made):
        raise DataError("bad-script", f"{path} shots", "every shot is a given video; leave one at least to be made")
    return Script(
        title=_text(raw, "title", path) or path.stem,
        global_caption=_text(raw, "global", path),
        size=(size[0], size[1]),
        fps=_positive(raw.get("fps", DEFAULT_FPS), f"{path} fps"),
        negative=_text(raw, "negative", path),
        shots=tuple(made),
        references=_references(raw.get("references"), path),
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
        prompt, image = _text(one, "prompt", where), resolve(path.parent, str(one["image"]), f"{where}.image")
        found.append(Reference(prompt, image))
    return tuple(found)


def _shot(raw: Any, where: str, root: Path) -> ScriptShot:
    if not isinstance(raw, dict):
        raise DataError("bad-script", where, f"{raw!r} is not a mapping with prompt and seconds")
    refuse_unknown(raw, _SHOT_FIELDS, where, "bad-script")
    prompt, cut, seed = raw.get("prompt"), raw.get("cut", True), raw.get("seed")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("bad-script", f"{where}.prompt", f"{prompt!r} is not a text; say what the shot shows")
    if not isinstance(cut, bool):
        raise DataError("bad-script", f"{where}.cut", f"{cut!r} is not true or false")
    if seed is not None and not (type(seed) is int and seed >= 0):
        raise DataError("bad-script", f"{where}.seed", f"{seed!r} is not a whole number of at least 0")
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
    start = 0.0 if start is None else _number(start, f"{where}.start")
    default = seconds_after(video, start) if video and "seconds" not in raw else DEFAULT_SECONDS
    return ScriptShot(
        prompt=_whole(prompt, f"{where}.prompt").strip(),
        seconds=_positive(raw.get("seconds", default), f"{where}.seconds"),
        cut=cut,
        image=files.get("image"),
        seed=seed,
        last_image=files.get("last_image"),
        video=video,
        start=start,
        guidance=None if guidance is None else _number(guidance, f"{where}.guidance"),
    )


def _text(raw: dict[str, Any], name: str, where: object) -> str:
    """The text of a field, or "" where there is none; YAML makes numbers of titles like 1984."""
    value = raw.get(name)
    if isinstance(value, dict | list):
        raise DataError("bad-script", f"{where} {name}", f"{value!r} is not a text")
    return "" if value is None else _whole(str(value), f"{where} {name}").strip()


def _whole(text: str, where: str) -> str:
    """The text, with two halves of a character that YAML read from \\u escapes joined; a lone half is refused."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise DataError("bad-script", where, "holds half a character (one of \\ud800 to \\udfff alone)") from None


def _positive(value: Any, where: str) -> float:
    if not _is_number(value) or not 0 < value < 1e6:
        raise DataError("bad-script", where, f"{value!r} is not a positive number")
    return float(value)


def _number(value: Any, where: str) -> float:
    if not _is_number(value) or not 0 <= value < 1e6:
        raise DataError("bad-script", where, f"{value!r} is not a number of at least 0")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# The peers' forms, rewritten as ours


def _from_holocine(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """HoloCine: captions apart with a frame count, or one tagged prompt."""
    own = {"global_caption", "shot_captions", "num_frames", "shot_cut_frames", "prompt"}
    refuse_unknown(raw, own | _SHARED_FIELDS, str(path), "bad-script")
    apart = sorted({"global_caption", "shot_captions"} & raw.keys())
    if "prompt" in raw and apart:
        raise DataError(
            "bad-script", f"{path} prompt", f"stands beside {apart[0]}; give one tagged prompt, or captions apart"
        )
    if "prompt" in raw:
        field, (global_caption, captions) = "prompt", _tagged(raw["prompt"])
    else:
        field, global_caption, captions = "shot_captions", _text(raw, "global_caption", path), raw["shot_captions"]
    if not isinstance(captions, list) or not captions:
        raise DataError("bad-script", f"{path} {field}", "there is no shot; give at least one")
    fps = _positive(raw.get("fps", DEFAULT_FPS), f"{path} fps")
    num_frames = _positive(raw.get("num_frames", DEFAULT_SECONDS * fps * len(captions)), f"{path} num_frames")
    cuts = raw.get("shot_cut_frames")
    if cuts is None:
        cuts = [num_frames * i / len(captions) for i in range(1, len(captions))]
    spans = spans_between(cuts, num_frames, len(captions), f"{path} shot_cut_frames", "bad-script")
    shots = [
        {"prompt": caption, "seconds": (end - start) / fps}
        for caption, (start, end) in zip(captions, spans, strict=True)
    ]
    global_caption = re.sub(r"This scene contains \d+ shots?\.", "", global_caption, flags=re.IGNORECASE)
    return _shared(raw) | {"global": global_caption, "shots": shots}


def _shared(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields that mean the same in every form, under our names."""
    return {"negative" if key == "negative_prompt" else key: raw[key] for key in _SHARED_FIELDS & raw.keys()}


def _tagged(prompt: str) -> tuple[str, list[str]]:
    """Global caption and shot captions of a prompt with [global caption], [per shot caption] and [shot cut]."""
    whole, *rest = re.split(r"\[per shot caption\]", prompt, maxsplit=1, flags=re.IGNORECASE)
    global_caption = re.sub(r"\[global caption\]", "", whole, flags=re.IGNORECASE)
    return global_caption, re.split(r"\[shot cut\]", rest[0], flags=re.IGNORECASE) if rest else []


def _from_storymem(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """StoryMem: scenes, each with a list of prompts and a list that says which of them a cut begins."""
    refuse_unknown(raw, {"story_overview", "scenes"} | _SHARED_FIELDS, str(path), "bad-script")
    prompts = prompts_and_cuts(raw["scenes"], f"{path} scenes", "bad-script")
    shots = [{"prompt": prompt, "cut": cut} for prompt, cut in prompts]
    return _shared(raw) | {"global": raw.get("story_overview"), "shots": shots}
