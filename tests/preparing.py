"""This module prepares a numbered film with the exact codec of tests/encoders.py."""

from pathlib import Path

from data.manifest import SceneRecord, ShotRecord, write_manifest
from data.prepare.pipeline import Prepared, prepare
from data.prepare.ranks import Process
from data.prepare.settings import PrepareConfig
from tests.encoders import PoolCodec, WordText
from tests.films import write_numbered

SIZE = [64, 160]


def film_folder(folder: Path) -> Path:
    """Returns a folder with film.mkv of 60 frames in it."""
    write_numbered(folder / "film.mkv", 60)
    return folder


def run(folder: Path, codec: PoolCodec | None = None, process: Process | None = None, **changes) -> Prepared:
    """Prepares the folder into its `out`, with what `changes` sets."""
    settings = {"input": str(folder), "output": str(folder / "out"), "size": SIZE, "detector": "adaptive"}
    settings |= {"min_frames": 5, "max_frames": 25, "shots_per_sample": 2}
    return prepare(PrepareConfig(**settings | changes), codec or PoolCodec(), WordText(), process)


def scenes(folder: Path, *records: SceneRecord) -> None:
    write_manifest(folder / "manifest.jsonl", records)


def scene(name: str, *spans: tuple[int, int], caption: str = "a film", video: str = "film.mkv") -> SceneRecord:
    shots = tuple(ShotRecord(start, end, f"shot at {start}") for start, end in spans)
    return SceneRecord(id=name, video=video, caption=caption, shots=shots)
