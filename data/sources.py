"""What a folder offers: its manifest, or its videos and images with captions beside them."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import DataError
from data.manifest import CUT_PREFIX, SceneRecord, captions, read_manifest, resolve
from data.video import VIDEO_SUFFIXES

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MANIFEST, VOCABULARY = "manifest.jsonl", "vocabulary.txt"


@dataclass
class Found:
    """Scenes of a folder, and what was wrong with the others."""

    root: Path
    scenes: list[SceneRecord] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)

    def add(self, entry: SceneRecord | DataError) -> None:
        (self.problems if isinstance(entry, DataError) else self.scenes).append(entry)


def find_scenes(root: str | Path) -> Found:
    """Scenes of the folder's manifest.jsonl if it has one, else one for each video and image in it.

    Raises DataError: missing-input, empty-input.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError("missing-input", root, "no such folder")
    manifest = root / MANIFEST
    found = Found(root)
    for entry in read_manifest(manifest) if manifest.is_file() else _from_files(root):
        found.add(entry)
    if not found.scenes and not found.problems:
        raise DataError(
            "empty-input",
            root,
            f"holds no {MANIFEST} and no video ({', '.join(sorted(VIDEO_SUFFIXES))}) or image",
        )
    return found


def _from_files(root: Path) -> Iterator[SceneRecord | DataError]:
    for path in sorted(root.rglob("*")):
        suffix = path.suffix.lower()
        if suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        relative = path.relative_to(root).as_posix()
        try:
            resolve(root, relative, relative)
            caption = _sidecar(path)
        except DataError as error:
            yield error
            continue
        if suffix in IMAGE_SUFFIXES:
            yield SceneRecord(id=relative, image=relative, caption=caption)
        else:
            yield SceneRecord(id=relative, video=relative, caption=caption)


def _sidecar(path: Path) -> str:
    """The caption in NAME.txt beside NAME.mp4, or ""."""
    sidecar = path.with_suffix(".txt")
    if not sidecar.is_file():
        return ""
    try:
        return sidecar.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError("not-utf-8", sidecar, f"byte {error.start} is not UTF-8; save it as UTF-8") from error


def vocabulary(found: Found, limit: int = 8000) -> list[str]:
    """Words for a tokenizer made for this data: the folder's vocabulary.txt (one word a line) where it has one,
    else the `limit` most frequent words of the captions."""
    file = found.root / VOCABULARY
    if file.is_file():
        return file.read_text(encoding="utf-8").split()
    counts: Counter[str] = Counter()
    for scene in found.scenes:
        for caption in (scene.caption, CUT_PREFIX, *(shot.caption for shot in scene.shots)):
            for text in captions(caption):
                counts.update(re.findall(r"\w+", text.lower()))
    return [word for word, _ in counts.most_common(limit)]
