"""This module finds what a folder offers: its manifest, or its videos and images with captions beside them."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.documents import read_text
from data.errors import DataError, DataWarning
from data.manifest import CUT_PREFIX, SceneRecord, captions, read_manifest, resolve
from data.media.index import VIDEO_SUFFIXES
from data.prepare.captions import find_caption_file, read_captions, read_sidecar

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MANIFEST, VOCABULARY = "manifest.jsonl", "vocabulary.txt"


@dataclass
class Found:
    """This is what a folder offers: its scenes, what is wrong with others, and what a person should look at."""

    root: Path
    scenes: list[SceneRecord] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)
    warnings: list[DataWarning] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)

    def add(self, entry: SceneRecord | DataError) -> None:
        """Sorts an entry to where it belongs; a second one of the same id is a problem."""
        if isinstance(entry, DataWarning):
            self.warnings.append(entry)
        elif isinstance(entry, DataError):
            self.problems.append(entry)
        elif entry.id in self._ids:
            self.problems.append(
                DataError("duplicate-id", entry.where, f"{entry.id!r} is there twice; the first is taken")
            )
        else:
            self._ids.add(entry.id)
            self.scenes.append(entry)


def find_scenes(root: str | Path, output: str | Path | None = None) -> Found:
    """Returns scenes of the folder's manifest.jsonl, or of a caption file of another tool (data/prepare/captions.py);
    without either, one for each video and image in it, but for those under `output` (thumbnails of an earlier run).

    Raises DataError: missing-input, empty-input.
    """
    root = Path(root)
    if root.is_file():
        raise DataError("missing-input", root, f"is a file; name the folder that holds it, {root.parent}")
    if not root.is_dir():
        raise DataError("missing-input", root, "no such folder")
    found = Found(root)
    manifest, captions_file = root / MANIFEST, find_caption_file(root)
    if manifest.is_file():
        entries = read_manifest(manifest)
    elif captions_file:
        entries = read_captions(captions_file, IMAGE_SUFFIXES)
    else:
        entries = _from_files(root, Path(output).resolve() if output else None)
    for entry in entries:
        found.add(entry)
    if not found.scenes and not found.problems:
        also = "".join(f"; {warning.message}" for warning in found.warnings)
        raise DataError(
            "empty-input",
            root,
            f"holds no {MANIFEST} and no video ({', '.join(sorted(VIDEO_SUFFIXES))}) or image{also}",
        )
    return found


def _from_files(root: Path, output: Path | None) -> Iterator[SceneRecord | DataError]:
    """Yields a scene for each video and image, and at last a warning that counts all other files by their
    endings, but for captions beside them."""
    media, other = [], []
    for path in sorted(root.rglob("*")):
        if path.name.startswith(".") or (output and path.parent.resolve().is_relative_to(output)):
            continue
        if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not path.is_dir():
            media.append(path)
        elif path.is_file() and not any(folder.startswith(".") for folder in path.relative_to(root).parts):
            other.append(path)  # hidden folders hold files of download tools and git
    for path in media:
        suffix, relative = path.suffix.lower(), path.relative_to(root).as_posix()
        try:
            resolve(root, relative, relative)
            caption = read_sidecar(root, relative)
        except DataError as error:
            yield error
            continue
        if suffix in IMAGE_SUFFIXES:
            yield SceneRecord(id=relative, image=relative, caption=caption)
        else:
            yield SceneRecord(id=relative, video=relative, caption=caption)
    captions_files = {path.with_suffix(".txt") for path in media} | {root / VOCABULARY}
    passed_over = Counter(path.suffix.lower() or path.name for path in other if path not in captions_files)
    if passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
        yield DataWarning("passed-over", root, f"files of kinds that are not read: {kinds}")


def vocabulary(found: Found, limit: int = 8000) -> list[str]:
    """Returns words for a tokenizer made for this data: the folder's vocabulary.txt (one word a line) where it has one,
    else the `limit` most frequent words of the captions. Raises DataError (not-utf-8)."""
    file = found.root / VOCABULARY
    if file.is_file():
        return read_text(file).split()
    counts: Counter[str] = Counter()
    for scene in found.scenes:
        for caption in (scene.caption, CUT_PREFIX, *scene.shot_captions, *(shot.caption for shot in scene.shots)):
            for text in captions(caption):
                counts.update(re.findall(r"\w+", text.lower()))
    return [word for word, _ in counts.most_common(limit)]
