"""This module reads captions that come in files of other tools into scenes. These forms are known:

- NAME.txt beside NAME.mp4 (diffusion-pipe, musubi, kohya)
- a list or lines of objects: FastVideo's videos2caption.json (`path`, `cap`), Hugging Face's metadata.jsonl or .csv
  (`file_name`, `text`), Open-Sora's CSV (`path`, `text`), and any with the names of `_MEDIA` and `_CAPTION`
- multi-shot objects: HoloCine's `global_caption`, `shot_captions` and `shot_cut_frames`; StoryMem's `story_overview`
  and `scenes` of `video_prompts` and `cut`; Shot2Story's `whole_caption` and `captions`
- one object from file names to captions (diffusion-pipe's captions.json)
- videos.txt and prompts.txt (or prompt.txt), line by line (finetrainers)
"""

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from data.documents import parse_json, read_objects, read_text
from data.errors import DataError, DataWarning
from data.manifest import Caption, SceneRecord, ShotRecord, check_caption, resolve
from data.other_tools import prompts_and_cuts, spans_between

CAPTION_FILES = (
    "videos2caption.json",
    "captions.json",
    "captions.jsonl",
    "captions.csv",
    "metadata.jsonl",
    "metadata.csv",
    "metadata.json",
    "data.csv",
    "data.json",
)
_MEDIA = ("video", "image", "path", "file_name", "video_path", "media_path", "file")
_CAPTION = ("caption", "cap", "text", "prompt", "global_caption", "whole_caption", "story_overview")
_SHOT_CAPTIONS = ("shot_captions", "captions")
_MEDIA_FOLDERS = ("", "videos", "images")
_TOO_MANY = "values without a column"


def find_caption_file(root: Path) -> Path | None:
    """Returns the folder's caption file of a known name, if any."""
    names = [*CAPTION_FILES, "videos.txt"]
    return next((root / name for name in names if (root / name).is_file()), None)


def read_captions(path: Path, image_suffixes: frozenset[str]) -> Iterator[SceneRecord | DataError]:
    """Yields a scene for each entry of the file, or what is wrong with it; and at last a warning for the first entry
    that has no field of captions, whose name may be misspelt, and one for the first that has several."""
    doubts: dict[str, DataWarning] = {}
    for where, fields in _entries(path):
        try:
            if isinstance(fields, DataError):
                raise fields
            yield _scene(path.parent, fields, where, image_suffixes)
        except DataError as error:
            yield error
        else:
            doubt = _doubt(fields, where)
            if doubt:
                doubts.setdefault(doubt.kind, doubt)
    yield from doubts.values()


def _doubt(fields: dict, where: str) -> DataWarning | None:
    """Returns a warning where an entry has no field of captions, or captions of a scene that differ."""
    if not fields.keys() & {*_CAPTION, *_SHOT_CAPTIONS, "scenes"}:
        said = f"none of {', '.join(fields)} is a caption; call it {_CAPTION[0]}"
        return DataWarning("no-caption-field", where, said)
    given = [name for name in _CAPTION if fields.get(name)]
    if any(fields[name] != fields[given[0]] for name in given):
        said = f"{given[0]} is taken as the caption, not {', '.join(given[1:])}; keep one of them"
        return DataWarning("several-captions", where, said)
    return None


def _scene(root: Path, fields: dict, where: str, image_suffixes: frozenset[str]) -> SceneRecord:
    if _TOO_MANY in fields:
        raise DataError(
            "bad-captions", where, "more values than the head has columns; put a caption with commas in quotes"
        )
    media = next((str(fields[name]) for name in _MEDIA if fields.get(name)), None)
    if media is None:
        raise DataError("no-media", where, f"names no file; give one of {', '.join(_MEDIA)}")
    relative = _locate(root, media)
    resolve(root, relative, where)
    caption = _caption(next((fields[name] for name in _CAPTION if fields.get(name)), ""), where)
    if Path(relative).suffix.lower() in image_suffixes:
        return SceneRecord(id=relative, image=relative, caption=caption, origin=where)
    texts = _shot_captions(fields, where)
    shots = _shots(fields, texts, where)
    return SceneRecord(
        id=relative,
        video=relative,
        caption=caption,
        shots=shots,
        shot_captions=() if shots else tuple(texts),
        origin=where,
    )


def read_sidecar(root: Path, media: str) -> str:
    """Returns the caption in NAME.txt beside NAME.mp4, or "". Raises DataError (not-utf-8, huge-caption,
    outside-root)."""
    sidecar = Path(media).with_suffix(".txt").as_posix()
    if not (root / sidecar).is_file():
        return ""
    path = resolve(root, sidecar, sidecar)
    return str(check_caption(read_text(path).strip(), str(path)))


def _entries(path: Path) -> Iterable[tuple[str, dict | DataError]]:
    """Returns (where, fields) of each entry, or what is wrong with its line. Raises DataError where the file cannot
    be read."""
    if path.suffix == ".jsonl":
        return [(f"{path}:{n}", fields) for n, fields in read_objects(path)]
    text = read_text(path)
    if path.name == "videos.txt":
        return _paired_lines(path, text)
    if path.suffix == ".csv":
        return _rows(path, text)
    whole = parse_json(text, path)
    if isinstance(whole, dict):
        return [(f"{path} {name}", {"path": name, "caption": caption}) for name, caption in whole.items()]
    if not isinstance(whole, list):
        raise DataError("bad-captions", path, "must hold a list of objects, or one object from file to caption")
    return [(f"{path} [{i}]", _object(entry, f"{path} [{i}]")) for i, entry in enumerate(whole)]


def _rows(path: Path, text: str) -> Iterable[tuple[str, dict | DataError]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=_TOO_MANY)
    try:
        names = reader.fieldnames or []
        separator = next((mark for mark in ";\t" if len(names) == 1 and mark in names[0]), None)
        if separator:
            raise DataError(
                "bad-captions", f"{path}:1", f"columns are separated by {separator!r}; separate them by commas"
            )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError("repeated-key", f"{path}:1", f"the column {twice!r} is there twice; keep one of the two")
        return [(f"{path}:{reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise DataError("bad-captions", path, f"not CSV after line {reader.line_num} ({error})") from error


def _paired_lines(path: Path, text: str) -> Iterable[tuple[str, dict | DataError]]:
    prompts = next((path.with_name(n) for n in ("prompts.txt", "prompt.txt") if path.with_name(n).is_file()), None)
    if prompts is None:
        raise DataError("bad-captions", path, "needs prompts.txt beside it, a line for each video")
    videos, captions = _lines(text), _lines(read_text(prompts))
    if len(videos) != len(captions):
        raise DataError("bad-captions", prompts, f"{len(captions)} lines for the {len(videos)} of {path.name}")
    pairs = zip(videos, captions, strict=True)
    return [(f"{path}:{n}", {"path": video, "caption": caption}) for n, (video, caption) in enumerate(pairs, start=1)]


def _lines(text: str) -> list[str]:
    """Splits a text at its line feeds; str.splitlines would split it at U+2028, U+0085 and others too, which captions
    hold."""
    return [line.removesuffix("\n") for line in io.StringIO(text)]


def _object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise DataError("not-an-object", where, f"an entry is an object, got {type(value).__name__}")
    return value


def _locate(root: Path, name: str) -> str:
    """Returns the path under `root` that a name means: as it stands, or in videos/ or images/."""
    for folder in _MEDIA_FOLDERS:
        relative = (Path(folder) / name).as_posix()
        with suppress(DataError):
            resolve(root, relative, name)
            return relative
    return name


def _caption(value: object, where: str) -> Caption:
    """Returns the caption. A list holds its lengths, as FastVideo's `cap`; a list of one is a plain caption."""
    checked = check_caption(value, f"{where} caption")
    return checked[0] if isinstance(checked, tuple) and len(checked) == 1 else checked


def _shot_captions(fields: dict, where: str) -> list[Caption]:
    """Returns a caption for each true cut: StoryMem's prompts of shots that go on without one are joined."""
    scenes = fields.get("scenes")
    if not isinstance(scenes, list):
        texts: list = next((fields[name] for name in _SHOT_CAPTIONS if isinstance(fields.get(name), list)), [])
        return [_caption(text, f"{where} shot {i}") for i, text in enumerate(texts)]
    joined: list[str] = []
    for prompt, cut in prompts_and_cuts(scenes, f"{where} scenes", "bad-captions"):
        if joined and not cut:
            joined[-1] += f" {prompt}"
        else:
            joined.append(str(prompt))
    return [_caption(text, f"{where} shot {i}") for i, text in enumerate(joined)]


def _shots(fields: dict, texts: list[Caption], where: str) -> tuple[ShotRecord, ...]:
    """Returns shots where the entry gives their frames (HoloCine's shot_cut_frames and num_frames), else none."""
    cuts, num_frames = fields.get("shot_cut_frames"), fields.get("num_frames")
    if not texts or cuts is None:
        return ()
    where = f"{where} shot_cut_frames"
    spans = spans_between(cuts, num_frames, len(texts), where, "bad-shot")
    if not all(isinstance(frame, int) for span in spans for frame in span):
        raise DataError("bad-shot", where, f"{cuts} of {num_frames} frames are not whole numbers")
    return tuple(ShotRecord(int(start), int(end), text) for (start, end), text in zip(spans, texts, strict=True))
