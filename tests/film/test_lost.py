"""A whole film that has lost files gets them back by the command that made it, as they were."""

import json
from pathlib import Path

import pytest
import torch

from data.errors import DataError
from film.filmmaker import Filmmaker
from film.folder import METADATA, FilmFolder
from film.plan import plan_film
from film.script import ScriptShot
from film.shooting import Shooting
from moc.errors import UserError
from moc.statistics import RoutingMap
from tests.film.filming import SHOT, STORY, contents, film_of, open_filmmaker
from tests.film.made_up import FlatCodec, latent, plays, script


def lose(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def sampling_fails(*_, **__):
    raise AssertionError("a shot is sampled again")


@pytest.mark.parametrize(
    "names",
    [
        ("video.mp4",),
        ("shots/02.mp4",),
        ("index.html", "storyboard.png"),
        ("shots/01.mp4", "shots/02.mp4", "shots/03.mp4", "video.mp4", "index.html", "storyboard.png", "routing.png"),
    ],
)
def test_what_a_whole_film_has_lost_is_made_from_its_latents(trained, write, tmp_path, monkeypatch, names):
    filmmaker, folder = open_filmmaker(trained), tmp_path / "film"
    whole = film_of(filmmaker, write(STORY), folder)
    lose(folder, *names)
    monkeypatch.setattr(Filmmaker, "_sample", sampling_fails)
    assert film_of(filmmaker, write(STORY), folder) == whole


DAMAGES = {
    "empty": lambda video: b"",
    "cut off": lambda video: video[: len(video) // 2],
    "without its last bytes": lambda video: video[:-200],
    "of zeros": lambda video: bytes(len(video)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_videos_are_written_again_from_the_latents(trained, write, tmp_path, monkeypatch, damage):
    """A hard link to a shot, which has the name of its scene, is as damaged as the shot."""
    filmmaker, folder = open_filmmaker(trained), tmp_path / "film"
    story = write(STORY | {"shots": [SHOT | {"scene": [1, 1]}, SHOT | {"scene": [1, 2]}]})
    whole = film_of(filmmaker, story, folder)
    for name in ("shots/02.mp4", "001_002.mp4", "video.mp4"):
        (folder / name).write_bytes(damage(whole[name]))
    monkeypatch.setattr(Filmmaker, "_sample", sampling_fails)
    assert film_of(filmmaker, story, folder) == whole


def test_a_film_goes_on_though_a_finished_shot_is_damaged(trained, write, tmp_path):
    filmmaker, story = open_filmmaker(trained, lag=1.0), write(STORY)
    whole, folder = film_of(filmmaker, story, tmp_path / "whole"), tmp_path / "film"

    def stop(progress) -> None:
        if (folder / "shots/01.mp4").exists():
            raise InterruptedError

    with pytest.raises(InterruptedError):
        filmmaker.make([(filmmaker.read(story), FilmFolder(folder))], watch=stop)
    (folder / "shots/01.mp4").write_bytes(b"")
    assert film_of(filmmaker, story, folder) == whole


def test_a_damaged_shot_is_named_with_what_to_do(trained, write, tmp_path):
    filmmaker, folder = open_filmmaker(trained), tmp_path / "film"
    film_of(filmmaker, write(STORY), folder)
    (folder / "shots/02.mp4").write_bytes(b"")
    said = r"shots/02.mp4: is not what was written; the command that made the film writes it again"
    with pytest.raises(DataError, match=said):
        FilmFolder(folder).num_frames(2)
    lose(folder, "latents/02.safetensors")
    with pytest.raises(DataError, match=r"has lost shot 2, of which neither a whole video nor a latent .* redo=\[2\]"):
        film_of(filmmaker, write(STORY), folder)


def test_a_whole_film_of_a_given_video_gets_its_files_back(trained, write, tmp_path, monkeypatch):
    """The latent of a given video is encoded again, and the script's files are copied again."""
    filmmaker, folder = open_filmmaker(trained), tmp_path / "film"
    film_of(filmmaker, write(STORY), tmp_path / "before")
    (tmp_path / "take.mp4").write_bytes((tmp_path / "before/video.mp4").read_bytes())
    story = write(STORY | {"shots": [{"prompt": "Mia.", "video": "take.mp4", "seconds": 0.75}, SHOT]})
    whole = film_of(filmmaker, story, folder)
    (copy,) = (name for name in whole if name.startswith("given/"))
    lose(folder, copy, "latents/01.safetensors", "shots/01.mp4", "shots/02.mp4", "video.mp4")
    monkeypatch.setattr(Filmmaker, "_sample", sampling_fails)
    assert film_of(filmmaker, story, folder) == whole


def test_a_shot_that_is_lost_with_its_latent_is_refused_and_made_anew_as_it_was(trained, write, tmp_path):
    filmmaker, folder = open_filmmaker(trained), tmp_path / "film"
    whole = film_of(filmmaker, write(STORY), folder)
    lose(folder, "latents/03.safetensors", "shots/03.mp4", "shots/01.mp4")
    with pytest.raises(DataError, match=r"film: has lost shot 3, .*; make anew with redo=\[3\], name another") as error:
        film_of(filmmaker, write(STORY), folder)
    assert "\n" not in str(error.value)
    again = film_of(filmmaker, write(STORY), folder, redo=[3])
    assert all(again[name] == payload for name, payload in whole.items() if name not in (METADATA, "index.html"))
    assert json.loads(again[METADATA])["redone"] == [3]
    lose(folder, "latents/02.safetensors", "shots/02.mp4", "latents/03.safetensors", "shots/03.mp4")
    with pytest.raises(UserError, match=r"has lost shots \[2, 3\]"):
        film_of(filmmaker, write(STORY), folder)


def test_a_lost_latent_alone_is_missed_by_nothing(trained, write, tmp_path):
    """A film is looked at without its latents, which take most of its folder."""
    filmmaker, folder = open_filmmaker(trained), tmp_path / "film"
    film_of(filmmaker, write(STORY), folder)
    lose(folder, "latents/02.safetensors", "video.mp4")
    there = contents_but(folder, "video.mp4")
    film_of(filmmaker, write(STORY), folder)
    assert contents_but(folder, "video.mp4") == there
    assert (folder / "video.mp4").exists()


def contents_but(folder: Path, name: str) -> dict[str, bytes]:
    return {file: payload for file, payload in contents(folder).items() if file != name}


class RunningCodec(FlatCodec):
    """This codec decodes a latent to a third of the sum of the means of the video's latents so far."""

    def decode_piece(self, latent, memory, first):
        memory["seen"] = [*memory.get("seen", ()), latent.mean()]
        return super().decode_piece(torch.full_like(latent, float(sum(memory["seen"])) / 3), memory, first)


def test_a_codec_of_one_video_decodes_the_shots_before_a_lost_one(tmp_path):
    empty: dict = {name: {} for name in ("moc", "flow", "sampler", "precision", "fingerprints")}
    request = empty | {"script": {"shots": []}}

    def shooting() -> Shooting:
        codec = RunningCodec(continuous=True)
        plan = plan_film(script(*[ScriptShot("a", 4 / 12)] * 3), codec)
        return Shooting(FilmFolder(tmp_path), plan, codec, request, RoutingMap(3), keep_every=100)

    shooting().run(plays(latent(0.1), latent(0.4), latent(0.7)))
    folder = FilmFolder(tmp_path)
    folder.write_metadata(request)
    folder.forget()
    there = contents(tmp_path)
    lose(tmp_path, "shots/02.mp4", "video.mp4")
    shooting().restore()
    assert contents(tmp_path) == there
