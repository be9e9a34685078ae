"""These tests are about what a script gives a film: last pictures of shots, shots that are videos already, guidance of
a shot's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.errors import DataError
from data.media.decode import open_video
from data.media.write import write_video
from film.folder import METADATA, FilmFolder
from film.footage import Footage, seconds_after
from film.plan import plan_film
from film.script import load_script
from moc.diffusion.solvers import SolverKind
from moc.errors import UserError
from moc.files import LOCK
from models import load_model
from tests.film.filming import SHOT, STORY, contents, film_of, open_filmmaker, times_killed
from tests.film.made_up import MeanCodec
from tests.pipeline import command, sample

COLOURS = [(200, 40, 40)] * 12 + [(40, 40, 200)] * 12  # a second of red, a second of blue


@pytest.fixture
def take(tmp_path) -> Path:
    """Returns two seconds at 12 frames a second, of the size of the films."""
    frames = [np.full((32, 48, 3), colour, np.uint8) for colour in COLOURS]
    write_video(tmp_path / "take.mp4", frames, 12)
    return tmp_path / "take.mp4"


def given(seconds=5 / 12, **fields) -> dict:
    return {"prompt": "A wall.", "video": "take.mp4", "seconds": seconds, **fields}


def colour(video: Path, frame: int) -> list[int]:
    reader = open_video(video)
    picture = reader.read(frame % reader.num_frames, frame % reader.num_frames + 1)
    reader.close()
    return picture.float().mean((0, 1, 2)).tolist()


def test_a_part_of_a_video_in_frames_of_the_film(take):
    assert seconds_after(take, 0.5) == pytest.approx(1.5)
    assert Footage(take, 0.0, 0.5, 12).frames == list(range(6))
    assert Footage(take, 0.0834, 0.25, 12).frames == [1, 2, 3]  # a start is rounded: 1 / 12 is 0.08333
    assert Footage(take, 1.0, 0.5, 6).frames == [12, 14, 16]
    assert Footage(take, 1.0, 1.0, 24).frames == [12 + n // 2 for n in range(24)]
    (piece,) = Footage(take, 1.5, 0.5, 12).pieces(9, (32, 48), "cpu")
    assert piece.shape == (3, 9, 32, 48)  # the last frame is held
    assert piece[:, -1].mean((1, 2)).tolist() == pytest.approx([40 / 127.5 - 1] * 2 + [200 / 127.5 - 1], abs=0.05)
    with pytest.raises(DataError, match=r"lasts 2\.00 s; start=2 is at its end"):
        seconds_after(take, 2.0)
    with pytest.raises(DataError, match=r"has 1\.00 s after start=1; 1\.5 are asked"):
        Footage(take, 1.0, 1.5, 12)


def test_a_film_goes_on_from_a_video(trained, write, take, tmp_path):
    """The first shot is the video as the codec gives it back; the next one depends on it."""
    films = {}
    for start in (0.0, 1.0):
        story = STORY | {"shots": [given(start=start), SHOT | {"cut": False}, SHOT]}
        films[start] = film_of(open_filmmaker(trained), write(story), tmp_path / f"film{start}")
        expected = COLOURS[0] if not start else COLOURS[-1]
        assert colour(tmp_path / f"film{start}/shots/01.mp4", 2) == pytest.approx(expected, abs=25)
    record = json.loads((tmp_path / "film0.0" / METADATA).read_text())
    assert record["num_frames"] == 5 + 4 + 4
    assert record["script"]["shots"][0]["video"].startswith("given/")
    assert len([name for name in films[0.0] if name.startswith("given/")]) == 1
    assert films[0.0]["latents/02.safetensors"] != films[1.0]["latents/02.safetensors"]
    again = film_of(open_filmmaker(trained), tmp_path / "film0.0" / METADATA, tmp_path / "again")
    assert {name: again[name] for name in again if name != METADATA} == {
        name: films[0.0][name] for name in films[0.0] if name != METADATA
    }


def test_a_film_with_a_video_that_fails_at_its_start_leaves_nothing(trained, write, take, tmp_path, monkeypatch):
    """Another film can then be made in its folder."""
    filmmaker = open_filmmaker(trained)
    with monkeypatch.context() as patch:
        patch.setattr(filmmaker, "_sample", lambda *_: (_ for _ in ()).throw(FloatingPointError("nan")))
        with pytest.raises(FloatingPointError, match="nan"):
            film_of(filmmaker, write(STORY | {"shots": [given(), SHOT]}), tmp_path / "film")
    assert [path.name for path in (tmp_path / "film").rglob("*") if path.is_file()] == [LOCK]
    film_of(filmmaker, write(STORY), tmp_path / "film")


@pytest.mark.parametrize("lag", [0.0, 1.0])
def test_a_video_may_stand_anywhere_and_is_never_made(trained, write, take, tmp_path, lag):
    story = STORY | {"shots": [SHOT, given(start=1), SHOT, given(4 / 12)]}
    filmmaker = open_filmmaker(trained, lag=lag)
    film_of(filmmaker, write(story), tmp_path / "film")
    assert colour(tmp_path / "film/shots/02.mp4", 0) == pytest.approx(COLOURS[-1], abs=25)
    assert colour(tmp_path / "film/shots/04.mp4", -1) == pytest.approx(COLOURS[0], abs=25)
    other = open_filmmaker(trained, lag=lag, seed=9)
    film_of(other, write(story), tmp_path / "film", redo=[3])
    with pytest.raises(UserError, match=r"redo=\[2\]: shot 2 is a given video"):
        film_of(other, write(story), tmp_path / "film", redo=[2])


def test_a_film_with_conditions_is_killed_and_goes_on(trained, write, take, tmp_path):
    Image.new("RGB", (96, 64), (20, 180, 60)).save(tmp_path / "end.png")
    story = STORY | {"shots": [given(), SHOT | {"cut": False, "last_image": "end.png"}, SHOT | {"guidance": 1.5}]}
    filmmaker = open_filmmaker(trained, steps=3, solver=SolverKind.unipc)
    plan = filmmaker.plan(load_script(write(story)))
    filmmaker.film(plan, FilmFolder(tmp_path / "whole"))
    assert times_killed(lambda: filmmaker.film(plan, FilmFolder(tmp_path / "killed"))) > 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("lag", [0.0, 0.5, 1.0])
def test_a_shot_ends_in_its_last_image(trained, write, tmp_path, lag):
    """The last frame is the picture's, and what comes before is another film than without it."""
    Image.new("RGB", (48, 32), (20, 180, 60)).save(tmp_path / "end.png")
    shots = [SHOT, {"prompt": "Mia walks.", "seconds": 9 / 12}]
    filmmaker = open_filmmaker(trained, lag=lag)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # after three training steps attention changes velocities by less than their last bit
        for weight in filmmaker.model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    plain = film_of(filmmaker, write(STORY | {"shots": shots}), tmp_path / "plain")
    shots[1] = shots[1] | {"last_image": "end.png"}
    ended = film_of(filmmaker, write(STORY | {"shots": shots}), tmp_path / "ended")
    assert colour(tmp_path / "ended/shots/02.mp4", -1) == pytest.approx((20, 180, 60), abs=25)
    assert colour(tmp_path / "plain/shots/02.mp4", -1) != pytest.approx((20, 180, 60), abs=25)
    one, other = (load_file(tmp_path / name / "latents/02.safetensors")["latent"] for name in ("plain", "ended"))
    assert not torch.equal(one[:, :-1], other[:, :-1])
    assert plain["latents/01.safetensors"] == ended["latents/01.safetensors"]  # attention is causal
    shots[0] = shots[0] | {"seed": 5}
    anew = film_of(filmmaker, write(STORY | {"shots": shots}), tmp_path / "ended", redo=[1])
    changed = {name for name in anew if name.startswith(("latents", "shots")) and anew[name] != ended[name]}
    assert changed == {"latents/01.safetensors", "shots/01.mp4"}


def test_a_given_video_is_as_long_as_whole_latent_frames_where_a_shot_goes_on_from_it(tmp_path, take, write):
    """MeanCodec takes 1, 5, 9, ... frames; before a cut the rest is left out."""
    for cut, frames, latents in ((True, 7, 3), (False, 5, 2)):
        story = STORY | {"shots": [given(7 / 12, start=17 / 12), SHOT | {"cut": cut}]}
        plan = plan_film(load_script(write(story)), MeanCodec())
        assert (plan.num_frames[0], plan.shapes[0][1]) == (frames, latents)
        assert plan.given[0].shape == plan.shapes[0]


def test_videos_of_one_continuous_video_come_first(take, write):
    """Each is encoded as going on from the one before."""
    story = STORY | {"shots": [given(), given(8 / 12, start=1), SHOT]}
    plan = plan_film(load_script(write(story)), MeanCodec(continuous=True))
    assert [shape[1] for shape in plan.shapes[:2]] == [2, 2]
    assert plan.given.keys() == {0, 1}
    for before in ([SHOT], [given(), SHOT]):
        late = STORY | {"shots": [*before, given(), SHOT]}
        with pytest.raises(DataError, match=rf"shots\[{len(before)}\]\.video.*given ones come first"):
            plan_film(load_script(write(late)), MeanCodec(continuous=True))


def test_a_given_video_shorter_than_a_latent_frame_takes_its_time_from_the_next_one(take, write):
    """In one continuous video cuts then stay where the script has them, to a latent frame."""
    story = STORY | {"shots": [given(), given(1 / 12, start=1), given(1.0, start=1), SHOT]}
    plan = plan_film(load_script(write(story)), MeanCodec(continuous=True))
    assert plan.num_frames[:3] == [5, 4, 8]


def test_what_is_of_another_size_is_told_in_one_line(tmp_path, write, caplog):
    write_video(tmp_path / "take.mp4", [np.zeros((64, 64, 3), np.uint8)] * 12, 12)
    for name, size in (("end.png", (96, 64)), ("ref.png", (48, 32))):
        Image.new("RGB", size).save(tmp_path / name)
    story = STORY | {"shots": [given(), SHOT | {"last_image": "end.png", "image": "ref.png"}]}
    plan_film(load_script(write(story)), MeanCodec())
    assert [message.partition(" is ")[2] for message in caplog.messages] == [
        "64x64; it is resized and cropped about its middle to 32x48",
        "64x96; it is resized to 32x48",
    ]


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        ([given(image="end.png"), SHOT], r"shots\[0\]\.image: has no use beside video"),
        ([given(guidance=3), SHOT], r"shots\[0\]\.guidance: has no use beside video"),
        ([SHOT | {"start": 1}], r"shots\[0\]\.start: 1 says where a video begins"),
        ([given(start=-1), SHOT], r"shots\[0\]\.start: -1 is not a number of at least 0"),
        ([SHOT | {"guidance": True}], r"shots\[0\]\.guidance: True is not a number"),
        ([given()], "every shot is a given video"),
        ([SHOT | {"last_image": "../end.png"}], r"shots\[0\]\.last_image.*leads outside"),
        ([SHOT | {"video": "/etc/passwd"}], r"shots\[0\]\.video.*leads outside"),
        ([SHOT | {"video": "none.mp4"}], r"shots\[0\]\.video.*'none\.mp4' is not in"),
    ],
)
def test_conditions_that_mean_nothing_are_refused(shots, message, write, take, tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "end.png")
    with pytest.raises(DataError, match=message):
        load_script(write(STORY | {"shots": shots}))


def test_a_lora_makes_another_film(trained, write, tmp_path, capsys):
    """It is merged where the model is loaded, and its weights tell the films apart."""
    weights = load_model(trained).state_dict()
    layer = next(name for name in weights if name.endswith("to_qkv.weight"))
    rows, columns = weights[layer].shape
    stem = f"transformer.{layer.removesuffix('.weight')}"
    lora = {f"{stem}.lora_A.weight": torch.randn(1, columns), f"{stem}.lora_B.weight": torch.randn(rows, 1)}
    save_file(lora, tmp_path / "lora.safetensors")
    arguments = ("device=cpu", "sampler.guidance_scale=1")
    story = STORY | {"shots": [SHOT]}
    for name, settings in (("plain", ()), ("lora", (f"lora={tmp_path / 'lora.safetensors'}",))):
        sample(trained, write(story), tmp_path / name, *arguments, *settings)
    records = [json.loads((tmp_path / name / METADATA).read_text()) for name in ("plain", "lora")]
    assert records[0]["fingerprints"]["model"] != records[1]["fingerprints"]["model"]
    plain, lora_film = contents(tmp_path / "plain"), contents(tmp_path / "lora")
    assert plain["latents/01.safetensors"] != lora_film["latents/01.safetensors"]
    paths = (f"checkpoint={trained}", f"script={write(story)}", f"out={tmp_path / 'plain'}", *arguments)
    with pytest.raises(SystemExit, match=r"another film: its fingerprints\.model"):
        command(
            "sample.py", *paths, "sampler.steps=2", f"lora=[{{path: {tmp_path / 'lora.safetensors'}, weight: 0.5}}]"
        )
