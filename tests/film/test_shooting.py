"""A film is made shot by shot into its folder, which is tied to its request, and goes on where it was stopped."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import film.folder
from data.errors import DataError
from data.media.decode import open_video
from film.folder import FILES, PROGRESS, FilmFolder
from film.plan import plan_film
from film.script import ScriptShot
from film.shooting import Shooting, pictures
from film.storyboard import page_size, pick_frames
from moc.diffusion import Progress
from moc.files import LOCK, HeldError
from moc.statistics import RoutingMap
from tests.film.filming import STORY, film_of, open_filmmaker
from tests.film.made_up import FlatCodec, latent, plays, script


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


REQUEST = {
    "script": {"shots": [{"seed": 1}]},
    "moc": {},
    "flow": {},
    "sampler": {},
    "precision": "",
    "fingerprints": {},
}


def shooting(folder: Path, num_shots: int = 2, keep_every: int = 100) -> Shooting:
    """Its shots have 4 frames, and their latents hold 5."""
    plan = plan_film(script(*[ScriptShot("a", 4 / 12)] * num_shots), FlatCodec())
    return Shooting(FilmFolder(folder), plan, FlatCodec(), REQUEST, RoutingMap(num_shots), keep_every)


def test_pictures_are_kept_as_bytes():
    video = torch.zeros(3, 2, 4, 6)
    video[0, 0, 1, 2], video[1, 1, 0, 0], video[2, 0, 0, 0] = 1.0, -1.0, 7.0
    frames = pictures(video, "shot 1")
    assert (frames.shape, frames.dtype) == ((2, 4, 6, 3), np.uint8)
    assert frames[0, 1, 2].tolist() == [255, 128, 128]
    assert frames[1, 0, 0].tolist() == [128, 0, 128]
    assert frames[0, 0, 0, 2] == 255


def test_a_film_is_made_shot_by_shot(tmp_path):
    """Each shot's files are there before the next shot is sampled."""
    seen = []

    def sampling(on_step, start):
        for index, item in plays(latent(), latent(0.2))(on_step, start):
            seen.append(files(tmp_path))
            yield index, item

    first = {"latents/01.safetensors", "shots/01.mp4"}
    assert shooting(tmp_path).run(sampling) == 8
    assert seen == [{PROGRESS}, {*first, PROGRESS}]
    assert files(tmp_path) == {*first, "latents/02.safetensors", "shots/02.mp4", "video.mp4", PROGRESS}
    reader = open_video(tmp_path / "video.mp4")
    assert reader.num_frames == 8
    frames = reader.read(0, 8)
    assert (frames[:4].float() - 191).abs().max() <= 2
    assert (frames[4:].float() - 153).abs().max() <= 2
    rows = FilmFolder(tmp_path).frames(1, pick_frames, lambda height, width: (height, width))
    assert rows.shape == (4, 32, 48, 3)
    assert np.array_equal(rows, frames[:4].numpy())
    assert FilmFolder(tmp_path).frames(2, lambda n: [0, n - 1], page_size).shape == (2, 220, 330, 3)


def test_pictures_that_are_not_finite_are_no_film(tmp_path):
    with pytest.raises(FloatingPointError, match=r"shot 2.*not; the codec"):
        shooting(tmp_path).run(plays(latent(), latent(float("nan"))))
    assert files(tmp_path) == {"latents/01.safetensors", "shots/01.mp4", "latents/02.safetensors", PROGRESS}


def test_what_is_kept_is_what_sampling_goes_on_from(tmp_path):
    """A shot takes two steps and is kept after each; a shot that is finished is read from its own file."""
    counts = [torch.eye(2, dtype=torch.float64) * step for step in range(5)]
    noisy = {step: latent(step / 10) for step in range(1, 5)}

    def first(on_step, start):
        assert start is None
        filmed.routing_map.counts = counts[1]
        on_step(Progress(1, 4, {0: noisy[1]}))
        yield 0, noisy[2]
        filmed.routing_map.counts = counts[3]
        on_step(Progress(2, 4, {0: noisy[2]}))
        on_step(Progress(3, 4, {0: noisy[2], 1: noisy[3]}))
        raise KeyboardInterrupt

    filmed = shooting(tmp_path, keep_every=1)
    with pytest.raises(KeyboardInterrupt):
        filmed.run(first)

    def second(on_step, start):
        assert start.step == 3
        assert torch.equal(start.latents[0], noisy[2])
        assert torch.equal(start.latents[1], noisy[3])
        assert torch.equal(filmed.routing_map.counts, counts[3])
        yield 1, noisy[4]
        on_step(Progress(4, 4, {0: noisy[2], 1: noisy[4]}))

    filmed = shooting(tmp_path, keep_every=1)
    assert filmed.run(second) == 8
    assert torch.equal(FilmFolder(tmp_path).read_latent(2), noisy[4])


def test_steps_after_a_finished_shot_are_kept_no_more_often_than_others(tmp_path):
    steps = []

    def sampling(on_step, start):
        yield 0, latent()
        for step in (1, 2, 3):
            on_step(Progress(step, 4, {0: latent(), 1: latent(step / 10)}))
            steps.append(FilmFolder(tmp_path).kept().step)
        yield 1, latent()
        on_step(Progress(4, 4, {}))

    shooting(tmp_path, keep_every=3).run(sampling)
    assert steps == [1, 1, 3]


def test_a_picture_that_the_script_gives_is_not_kept_with_the_steps(tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    plan = plan_film(script(ScriptShot("a", 4 / 12, image=tmp_path / "a.png")), FlatCodec())
    folder = FilmFolder(tmp_path / "film")

    def sampling(on_step, start):
        on_step(Progress(1, 2, {0: plan.given[0], 1: latent()}))
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        Shooting(folder, plan, FlatCodec(), REQUEST, RoutingMap(2), keep_every=1).run(sampling)
    assert {name for name in folder.kept().tensors if name.isdigit()} == {"1"}


def test_a_lost_video_of_a_shot_is_made_again_from_its_latent(tmp_path):
    shooting(tmp_path).run(plays(latent(0.1), latent(0.2)))
    there = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    for name in ("shots/01.mp4", "video.mp4"):
        (tmp_path / name).unlink()
    assert shooting(tmp_path).run(plays(latent(0.1), latent(0.2))) == 8
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == there


@pytest.mark.parametrize("name", ["latents/01.safetensors", PROGRESS])
@pytest.mark.parametrize("damage", [lambda x: x[:-1], lambda x: x[:-1] + bytes([x[-1] ^ 1]), lambda x: b""])
def test_what_is_kept_and_is_not_as_written_is_refused(tmp_path, name, damage):
    shooting(tmp_path).run(plays(latent(), latent(0.2)))
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(DataError, match=rf"{name}: is not what was written; name another folder"):
        shooting(tmp_path)


def test_a_folder_is_tied_to_what_its_film_is_asked_to_be(tmp_path):
    folder = FilmFolder(tmp_path)
    folder.check_request(REQUEST)
    other = REQUEST | {"script": {"shots": [{"seed": 2}]}}
    shooting(tmp_path).run(plays(latent(), latent(0.2)))
    assert not folder.is_finished
    folder.check_request(REQUEST)
    with pytest.raises(DataError, match=r"holds another film: its script\.shots\[0\]\.seed is 1, not 2; name another"):
        folder.check_request(other)
    folder.write_metadata(REQUEST | {"seconds": 3})
    folder.forget()
    assert folder.is_finished
    FilmFolder(tmp_path).check_request(REQUEST)
    earlier = REQUEST["moc"] | {"backend": "auto", "dense_kernel": "auto", "deterministic": False, "cut_gap": 0.0}
    sampler = {"context_shots": 0, "high_noise_guidance_scale": 0.0}
    folder.write_metadata(REQUEST | {"moc": earlier, "sampler": sampler})
    FilmFolder(tmp_path).check_request(REQUEST)
    with pytest.raises(DataError, match="holds another film"):
        folder.check_request(other | {"sampler": {"steps": 3}})


def test_a_whole_film_says_which_shots_can_be_made_anew(tmp_path):
    """A given video cannot, nor all shots together."""
    given, one, other = {"video": "given/a.mp4", "start": 0}, {"seed": 1}, {"seed": 2}
    folder = FilmFolder(tmp_path)

    def remedy(before, now):
        folder.write_metadata(REQUEST | {"script": {"shots": before}})
        with pytest.raises(DataError, match="holds another film: its script") as error:
            folder.check_request(REQUEST | {"script": {"shots": now}})
        return error.value.message.partition("; ")[2]

    elsewhere = "name another folder, or remove this one"
    assert remedy([given, one, one], [given, one, other]) == f"make anew with redo=[3], {elsewhere}"
    assert remedy([given, one, one], [given | {"start": 1}, one, one]) == elsewhere
    assert remedy([one, one], [other, other]) == elsewhere
    assert remedy([one, one], [one]) == elsewhere


def test_one_process_at_a_time_has_a_folder(tmp_path):
    with FilmFolder(tmp_path).held():
        with pytest.raises(HeldError, match="in use by another process"), FilmFolder(tmp_path).held():
            pass
        assert files(tmp_path) == {LOCK}
    with FilmFolder(tmp_path).held():
        pass


@pytest.mark.parametrize("pattern", FILES)
def test_a_folder_with_any_part_of_a_film_is_not_written_to(tmp_path, pattern):
    shot = tmp_path / pattern.replace("*", "03")
    shot.parent.mkdir(exist_ok=True)
    shot.touch()
    with pytest.raises(DataError, match=rf"already holds {pattern.replace('*', '03')} of a film; name another folder"):
        FilmFolder(tmp_path)


def test_a_folder_may_hold_other_things_but_must_be_one(tmp_path):
    (tmp_path / "story.yaml").touch()
    FilmFolder(tmp_path).write_metadata({"path": Path("a")})
    assert (tmp_path / "metadata.json").read_text() == '{\n  "path": "a"\n}\n'
    with pytest.raises(DataError, match=r"story\.yaml: is a file; name a folder"):
        FilmFolder(tmp_path / "story.yaml")


def test_a_picture_that_fails_costs_itself_alone(tmp_path, caplog):
    def bad(path):
        raise RuntimeError("no such glyph")

    folder = FilmFolder(tmp_path)
    folder.draw("storyboard.png", bad)
    folder.draw("routing.png", lambda path: path.write_bytes(b"picture"))
    assert folder.files() == [tmp_path / "routing.png"]
    (record,) = caplog.records
    assert "storyboard.png is left out, the film is whole (RuntimeError: no such glyph)" in record.getMessage()


@pytest.mark.parametrize(("writes", "at"), [("write_video", 2), ("join_videos", 1)])
def test_a_disk_that_fills_up_costs_nothing_that_was_made(writes, at, trained, write, tmp_path, monkeypatch):
    """The same command then goes on, and gives the film of a disk that never was full."""
    filmmaker, story = open_filmmaker(trained), write(STORY)
    whole = film_of(filmmaker, story, tmp_path / "whole")
    written, calls = getattr(film.folder, writes), []

    def failing(path, *arguments, **others):
        calls.append(path)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return written(path, *arguments, **others)

    monkeypatch.setattr(film.folder, writes, failing)
    with pytest.raises(OSError, match="No space left on device"):
        film_of(filmmaker, story, tmp_path / "film")
    assert (tmp_path / "film/shots/01.mp4").read_bytes() == whole["shots/01.mp4"]
    assert film_of(filmmaker, story, tmp_path / "film")["video.mp4"] == whole["video.mp4"]
