"""The filmmaker with a small trained model: films that are killed, films that are repeated."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from data.errors import DataError
from film.filmmaker import Filmmaker, FilmmakerConfig
from film.folder import METADATA, FilmFolder
from film.script import load_script
from moc.diffusion import SamplingConfig

SHOT = {"prompt": "Mia walks.", "seconds": 4 / 12}
STORY = {"size": [32, 48], "fps": 12, "global": "A journey.", "shots": [SHOT, SHOT | {"cut": False}, SHOT]}


@pytest.fixture
def write(tmp_path):
    def write(story: dict, name: str = "story.yaml") -> Path:
        (tmp_path / name).write_text(yaml.safe_dump(story))
        return tmp_path / name

    return write


def open_filmmaker(trained: Path, **sampler) -> Filmmaker:
    config = SamplingConfig(**{"steps": 2, "guidance_scale": 2.0} | sampler)
    return Filmmaker(FilmmakerConfig(str(trained), device="cpu", sampler=config, keep_every=1))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a film; what its metadata say of time left out."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files[METADATA])
    return files | {METADATA: json.dumps({key: value for key, value in record.items() if key != "seconds"}).encode()}


def killed_at(replacement: int, work) -> bool:
    """Whether `work`, in a process of its own, is killed where it would give its n-th file its name."""
    child = os.fork()
    if child == 0:
        replace, count = Path.replace, 0

        def counting(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == replacement:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = counting  # type: ignore[method-assign]
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("lag", [0.0, 0.5, 1.0])
def test_a_film_that_is_killed_again_and_again_is_the_film_that_never_was(trained, write, tmp_path, lag):
    """Each process is killed before one more file gets its name than the one before it gave."""
    filmmaker = open_filmmaker(trained, lag=lag)
    plan = filmmaker.plan(load_script(write(STORY)))
    filmmaker.film(plan, FilmFolder(tmp_path / "whole"))
    kills = 0
    while killed_at(1 + kills, lambda: filmmaker.film(plan, FilmFolder(tmp_path / "killed"))):
        kills += 1
    assert kills > 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_film_is_repeated_from_its_metadata(trained, write, tmp_path):
    filmmaker = open_filmmaker(trained, seed=3)
    filmmaker.film(filmmaker.plan(load_script(write(STORY))), FilmFolder(tmp_path / "film"))
    other_seed = open_filmmaker(trained)
    script = load_script(tmp_path / "film" / METADATA)
    other_seed.film(other_seed.plan(script), FilmFolder(tmp_path / "again"))
    first, again = contents(tmp_path / "film"), contents(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(again[name] == payload for name, payload in first.items() if name != METADATA)
    assert json.loads(again[METADATA])["script"] == json.loads(first[METADATA])["script"]


def test_a_whole_film_is_left_as_it_is_and_another_one_is_refused(trained, write, tmp_path):
    filmmaker = open_filmmaker(trained)
    folder = FilmFolder(tmp_path / "film")
    filmmaker.film(filmmaker.plan(load_script(write(STORY))), folder)
    times = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()}
    filmmaker.film(filmmaker.plan(load_script(write(STORY))), folder)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()} == times
    other = filmmaker.plan(load_script(write(STORY | {"shots": [SHOT, SHOT | {"prompt": "Gus waves."}, SHOT]})))
    with pytest.raises(DataError, match=r"another film: its script\.shots\[1\]\.prompt is \"Mia walks\.\", not \"Gus"):
        filmmaker.film(other, folder)
