"""These tests are about the list of who appears in the example film: a sound list, and scenes of which a block can be
held out."""

import json
from fnmatch import fnmatchcase
from itertools import pairwise

import pytest

from data.manifest import load_manifest, write_manifest
from data.media import example_film
from data.media.example_shots import BLOCK, LIST, LONGEST, block, film_shots, last_seen, scenes
from moc.errors import UserError


def test_the_list_is_sound():
    known = json.loads(LIST.read_text())["characters"]
    shots = film_shots()
    assert [shot.number for shot in shots] == [n for n in range(1, 136) if n not in (76, 123, 132, 133, 134)]
    assert all(0 <= shot.start < shot.end for shot in shots)
    assert all(shot.end <= after.start for shot, after in pairwise(shots))
    assert {name for shot in shots for name in shot.characters} == set(known)
    for shot in shots:
        said = shot.caption.lower()
        assert said.endswith(".")
        assert {name for name in known if name in said} <= set(shot.characters), shot


def test_when_characters_were_last_seen():
    shots = film_shots()
    assert last_seen(shots, 0) == {}
    assert last_seen(shots, 2) == {"bird": None}
    index = next(i for i, shot in enumerate(shots) if shot.number == 93)
    assert last_seen(shots, index) == {"flying squirrel": 1, "bird": 89}


def test_scenes_are_all_windows_and_a_block_names_all_that_show_it(tmp_path):
    (tmp_path / "film.mp4").touch()
    write_manifest(tmp_path / "manifest.jsonl", scenes("film.mp4", "A film.", [1, 8]))
    found = load_manifest(tmp_path / "manifest.jsonl")
    shots = film_shots()
    assert len(found) == 2 * len(shots) - 1  # the first shot alone is the first scene at both lengths
    assert {len(scene.shots) for scene in found} == set(range(1, 9))
    assert max(shot.end - shot.start for scene in found for shot in scene.shots) == LONGEST
    ends = {shot.end: index for index, shot in enumerate(shots)}
    for number in (0, 3, block(len(shots) - 1)):
        for scene in found:
            shown = [ends[shot.end] for shot in scene.shots]
            assert shown == list(range(shown[0], shown[-1] + 1))
            assert fnmatchcase(scene.id, f"*b{number:02d}*") == any(i // BLOCK == number for i in shown)


def test_the_film_comes_with_its_manifest_or_without(tmp_path, monkeypatch):
    monkeypatch.setattr(example_film, "_download", lambda folder: folder)
    monkeypatch.setattr(example_film, "_unpack", lambda archive: b"the film")
    example_film.fetch(tmp_path / "bare")
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == [
        "CREDIT", "big_buck_bunny.mp4", "big_buck_bunny.txt",
    ]  # fmt: skip
    example_film.fetch(tmp_path / "whole", [2])
    assert len(load_manifest(tmp_path / "whole/manifest.jsonl")) == len(film_shots())
    with pytest.raises(UserError, match="lengths in shots"):
        example_film.ExampleFilmConfig("FILM", scenes=[0])


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_fetched(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        example_film.fetch(tmp_path / "file/film")
