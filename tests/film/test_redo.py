"""These tests are about shots of a finished film that are made anew while the others stay."""

import json

import pytest
from PIL import Image

from data.errors import DataError
from film.folder import METADATA, FilmFolder
from film.redo import with_seeds_of
from moc.errors import UserError
from tests.film.filming import SHOT, STORY, contents, film_of, killed_at, open_filmmaker, times_killed


@pytest.mark.parametrize("lag", [0.0, 1.0])
def test_one_shot_is_made_anew_and_the_others_stay(trained, write, tmp_path, lag):
    before = film_of(open_filmmaker(trained, lag=lag), write(STORY), tmp_path / "film")
    after = film_of(open_filmmaker(trained, lag=lag, seed=8), write(STORY), tmp_path / "film", redo=[2])
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    of_shot = {"latents/02.safetensors", "shots/02.mp4", "video.mp4", "storyboard.png", "index.html", METADATA}
    assert changed - {"routing.png", "routing.safetensors"} == of_shot  # the maps of routes may stay the same
    old, new = (json.loads(film[METADATA]) for film in (before, after))
    assert [shot["seed"] for shot in new["script"]["shots"]] == [0, 8, 0]
    assert new["redone"] == [2]
    assert new["routing"][2] == pytest.approx(old["routing"][2])
    prompt = STORY | {"shots": [SHOT, SHOT | {"cut": False, "seed": 8}, SHOT | {"prompt": "Gus waves."}]}
    last = film_of(open_filmmaker(trained, lag=lag), write(prompt), tmp_path / "film", redo=[3])
    assert last["latents/02.safetensors"] == after["latents/02.safetensors"]
    assert last["latents/03.safetensors"] != after["latents/03.safetensors"]
    assert json.loads(last[METADATA])["redone"] == [2, 3]


def test_a_shot_made_anew_in_another_length_leaves_the_others_theirs(trained, write, tmp_path):
    """0.45 s are 5.4 frames. Carried over, the rest would give the last shot 6 after a new one."""
    filmmaker, film, shot = open_filmmaker(trained), tmp_path / "film", SHOT | {"seconds": 0.45}
    before = film_of(filmmaker, write(STORY | {"shots": [shot] * 3}), film)
    after = film_of(filmmaker, write(STORY | {"shots": [shot, shot | {"seconds": 0.75}, shot]}), film, redo=[2])
    assert [FilmFolder(film).num_frames(number) for number in (1, 2, 3)] == [5, 9, 5]
    assert all(after[name] == before[name] for name in ("shots/01.mp4", "shots/03.mp4", "latents/03.safetensors"))


@pytest.mark.parametrize("number", [2, 3])
def test_a_shot_is_made_anew_with_a_picture_and_again_without_it(trained, write, tmp_path, number):
    """The picture moves the later shots of the stream, and what is known of their routes with them."""
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    filmmaker, film, shots = open_filmmaker(trained), tmp_path / "film", [SHOT] * 3
    story = write(STORY | {"title": "A walk", "shots": shots})
    before = film_of(filmmaker, story, film)
    pictured = [SHOT | {"image": "red.png"} if index == number else SHOT for index in (1, 2, 3)]
    other = write(STORY | {"title": "A walk", "shots": pictured}, "pictured.yaml")
    now = film_of(filmmaker, other, film, redo=[number])
    assert now[f"latents/0{number}.safetensors"] != before[f"latents/0{number}.safetensors"]
    assert {"index.html", "routing.png"} <= now.keys()
    old, new = (json.loads(files[METADATA])["routing"] for files in (before, now))
    of_shots = [index for index in range(4) if index != number - 1]
    stay = [index for index in range(3) if index != number - 1]
    assert [[new[of_shots[row]][of_shots[column]] for column in range(3)] for row in stay] == [old[row] for row in stay]
    again = film_of(filmmaker, story, film, redo=[number])
    assert again["routing.safetensors"] == before["routing.safetensors"]
    assert again["video.mp4"] == before["video.mp4"]


def test_a_film_with_shots_made_anew_is_told_to_be_another_when_filmed_at_once(trained, write, tmp_path, caplog):
    """The shots after one that was made anew saw what it was before."""
    filmmaker, film = open_filmmaker(trained), tmp_path / "film"
    film_of(filmmaker, write(STORY), film)
    filmmaker.read(film / METADATA)
    assert "made anew" not in caplog.text
    film_of(open_filmmaker(trained, seed=8), write(STORY), film, redo=[2])
    filmmaker.read(film / METADATA)
    assert "metadata.json: shots [2] were made anew" in caplog.text
    assert "but for what the shots made anew change" in (film / "index.html").read_text()


def test_a_film_that_differs_in_a_shot_is_told_how_to_make_it_anew(trained, write, tmp_path):
    filmmaker, film = open_filmmaker(trained), tmp_path / "film"
    film_of(filmmaker, write(STORY), film)
    waves, quick = SHOT | {"prompt": "Gus waves."}, {"fps": 24}
    with pytest.raises(
        DataError, match=r"its script\.shots\[2\]\.prompt is .*; make anew with redo=\[3\], name another"
    ):
        film_of(filmmaker, write(STORY | {"shots": [SHOT, SHOT | {"cut": False}, waves]}), film)
    for other in ({"shots": [waves] * 3}, {"shots": [SHOT, SHOT | {"cut": False}, waves]} | quick, quick):
        with pytest.raises(DataError, match=r"holds another film: [^;]*; name another folder"):
            film_of(filmmaker, write(STORY | other), film)


def test_a_shot_made_anew_shot_by_shot_is_the_one_a_film_of_that_seed_has(trained, write, tmp_path):
    """The last shot sees the same history in both."""
    seeded = STORY | {"shots": [SHOT, SHOT | {"cut": False}, SHOT | {"seed": 5}]}
    filmmaker = open_filmmaker(trained)
    whole = film_of(filmmaker, write(seeded), tmp_path / "whole")
    film_of(filmmaker, write(STORY), tmp_path / "film")
    redone = film_of(filmmaker, write(seeded), tmp_path / "film", redo=[3])
    assert all(redone[name] == payload for name, payload in whole.items() if name.split("/")[0] in ("latents", "shots"))


def test_making_anew_is_killed_and_goes_on(trained, write, tmp_path):
    first, second = open_filmmaker(trained), open_filmmaker(trained, seed=8)
    for name in ("whole", "killed"):
        film_of(first, write(STORY), tmp_path / name)
    whole = film_of(second, write(STORY), tmp_path / "whole", redo=[2])
    script = second.read(write(STORY))
    plan = second.plan(with_seeds_of(FilmFolder(tmp_path / "killed"), script, [2], second.encoders.codec))
    assert times_killed(lambda: second.film(plan, FilmFolder(tmp_path / "killed"), [2])) > 3
    assert contents(tmp_path / "killed") == whole


def test_a_whole_film_stays_where_making_it_anew_fails_at_its_start(trained, write, tmp_path, monkeypatch):
    story, film = write(STORY | {"shots": [SHOT]}), tmp_path / "film"
    before, other = film_of(open_filmmaker(trained), story, film), open_filmmaker(trained, seed=8)
    monkeypatch.setattr(other, "_sample", lambda *_: (_ for _ in ()).throw(FloatingPointError("nan")))
    with pytest.raises(FloatingPointError, match="nan"):
        film_of(other, story, film, redo=[1])
    assert (film / "shots/01.mp4").read_bytes() == before["shots/01.mp4"]


def test_other_shots_are_made_anew_once_a_film_is_whole(trained, write, tmp_path):
    """A film that goes on would else pass for one whose shot was made anew."""
    filmmaker, film, story = open_filmmaker(trained), tmp_path / "film", write(STORY)
    assert killed_at(3, lambda: film_of(filmmaker, story, film))
    with pytest.raises(DataError, match=r"is not finished, .* redo=\[2\]: leave out redo, and finish it first"):
        film_of(filmmaker, story, film, redo=[2])
    before, other = film_of(filmmaker, story, film), open_filmmaker(trained, seed=8)
    assert killed_at(2, lambda: film_of(other, story, film, redo=[2, 2]))
    for redo in ([3], [2, 3]):
        with pytest.raises(DataError, match=r"shots \[2\] of it are being made anew; say redo=\[2\], and finish"):
            film_of(other, story, film, redo=redo)
    with pytest.raises(DataError, match=r"seed is 8, not 0; shots \[2\] of it are being made anew; finish that as"):
        film_of(filmmaker, story, film)
    after = film_of(other, story, film, redo=[2])
    assert json.loads(after[METADATA])["redone"] == [2]
    assert after["latents/03.safetensors"] == before["latents/03.safetensors"]


def test_what_cannot_be_made_anew_is_refused(trained, write, tmp_path):
    filmmaker = open_filmmaker(trained)
    with pytest.raises(DataError, match="holds no film"):
        film_of(filmmaker, write(STORY), tmp_path / "film", redo=[2])
    film_of(filmmaker, write(STORY), tmp_path / "film")
    for redo in ([4], [0], [2, -1]):
        with pytest.raises(UserError, match="the film has shots 1 to 3"):
            film_of(filmmaker, write(STORY), tmp_path / "film", redo=redo)
    with pytest.raises(DataError, match=r"shot 2 is asked to be what it is; change its prompt, its seed"):
        film_of(filmmaker, write(STORY), tmp_path / "film", redo=[2])
    other = STORY | {"shots": [SHOT, SHOT | {"prompt": "Gus waves."}, SHOT | {"prompt": "Gus waves."}]}
    with pytest.raises(DataError, match=r"another film: its script\.shots\[1\]"):
        film_of(filmmaker, write(other), tmp_path / "film", redo=[3])
