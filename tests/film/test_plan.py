"""A script becomes a plan: the length, the noise and the condition of each shot."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.manifest import CUT_PREFIX
from film.plan import counts_that_stay, plan_film
from film.script import Reference, ScriptShot
from moc.diffusion import noise_key
from tests.film.made_up import MeanCodec, echo, script


@pytest.fixture
def picture(tmp_path) -> Path:
    """Returns left half red, right half blue."""
    pixels = np.zeros((128, 192, 3), np.uint8)
    pixels[:, :96, 0] = pixels[:, 96:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "ref.png")
    return tmp_path / "ref.png"


@pytest.mark.parametrize(
    ("frames", "latents"),
    [(1, 1), (2, 1), (3.5, 2), (5, 2), (6.5, 2), (7.5, 3), (9, 3), (81, 21), (80, 21), (0.2, 1)],
)
def test_a_shot_that_another_goes_on_from_gets_the_nearest_whole_length(frames, latents):
    plan = plan_film(script(ScriptShot("a", frames / 16), ScriptShot("b", 1.0, cut=False), fps=16), MeanCodec())
    assert plan.shapes[0][1] == latents
    assert plan.num_frames[0] == 4 * (latents - 1) + 1
    assert abs(plan.num_frames[0] - frames) <= 2


@pytest.mark.parametrize(
    ("frames", "latents"),
    [(1, 1), (2, 2), (3.6, 2), (5, 2), (6.4, 3), (61, 16), (62, 17), (81, 21), (80, 21), (0.2, 1)],
)
def test_a_shot_before_a_cut_is_as_long_as_the_script_says(frames, latents):
    shots = [ScriptShot("a", frames / 16), ScriptShot("b", frames / 16)]
    plan = plan_film(script(*shots, fps=16), MeanCodec())
    assert [shape[1] for shape in plan.shapes] == [latents] * 2
    assert plan.num_frames == [max(1, round(frames))] * 2


def test_cuts_of_one_video_do_not_drift(picture):
    shots = [ScriptShot("a", 5.0, image=picture if i == 3 else None) for i in range(8)]
    codec = MeanCodec(continuous=True)
    plan = plan_film(script(*shots, fps=16.3), codec)
    lengths = [codec.pixel_frames(plan.shapes[at][1], number) for number, at in enumerate(plan.filmed)]
    for number in range(1, 9):
        made = sum(lengths[:number])
        assert abs(made - number * 5 * 16.3) <= 2
        assert made % 4 == 1
    assert plan.num_frames[:-1] == lengths[:-1]
    assert sum(plan.num_frames) == round(8 * 5 * 16.3)
    assert plan.given.keys() == {3}


def test_a_plan_has_a_latent_for_each_shot():
    what = script(ScriptShot("a", 5 / 12), ScriptShot("b", 1.4, cut=False))
    plan = plan_film(what, MeanCodec())
    assert plan.shapes == [(3, 2, 8, 12), (3, 5, 8, 12)]
    assert plan.filmed == [0, 1]
    assert plan.given == {}
    assert plan.cuts == [True, False]
    plan.encode_texts(echo)
    assert plan.text == ["whole story", f"{CUT_PREFIX} a", "b"]
    assert plan.negative == ["ugly", "", ""]


def test_a_reference_picture_is_a_still_shot_before_its_shot(picture):
    what = script(ScriptShot("a", 1.0), ScriptShot("b", 1.0, cut=False, image=picture), ScriptShot("c", 1.0, cut=False))
    plan = plan_film(what, MeanCodec())
    assert plan.shapes == [(3, 4, 8, 12), (3, 1, 8, 12), (3, 4, 8, 12), (3, 4, 8, 12)]
    assert plan.filmed == [0, 2, 3]
    assert plan.cuts == [True, True, True, False]  # shot 2 is a cut, since the picture stands before it
    assert list(plan.given) == [1]
    plan.encode_texts(echo)
    assert plan.text == ["whole story", f"{CUT_PREFIX} a", "b", "b", "c"]
    latent = plan.given[1]
    assert latent.shape == (3, 1, 8, 12)
    assert latent[:, 0, :, :5].mean((1, 2)).tolist() == pytest.approx([1, -1, -1], abs=0.05)
    assert latent[:, 0, :, 7:].mean((1, 2)).tolist() == pytest.approx([-1, -1, 1], abs=0.05)


def test_a_shots_guidance_is_its_own_where_a_picture_stands_before_it(picture):
    plan = plan_film(script(ScriptShot("a", 1.0, image=picture), ScriptShot("b", 1.0, guidance=3.0)), MeanCodec())
    plan.encode_texts(lambda _, captions: [torch.zeros(1, 2)] * (1 + len(captions)))
    assert plan.story().guidance == [None, None, 3.0]


def test_the_first_shots_of_a_plan_are_the_plan_of_these_alone(picture):
    shots = [ScriptShot("a", 1.0, image=picture), ScriptShot("b", 1.0), ScriptShot("c", 1.0)]
    whole, alone = (plan_film(script(*some), MeanCodec()) for some in (shots, shots[:2]))
    for plan in (whole, alone):
        plan.encode_texts(echo)
    first = whole.first(2)
    assert torch.equal(first.given.pop(0), alone.given.pop(0))
    assert first == alone


def test_references_stand_before_all_shots_and_are_never_filmed(picture):
    shots = [ScriptShot("a", 1.0), ScriptShot("b", 1.0)]
    plain, what = script(*shots), replace(script(*shots), references=(Reference("Ann", picture),))
    plan = plan_film(what, MeanCodec(), seed=7)
    assert (plan.filmed, list(plan.given)) == ([1, 2], [0])
    assert plan.noise_keys[1:] == plan_film(plain, MeanCodec(), seed=7).noise_keys
    plan.encode_texts(lambda _, captions: [torch.zeros(1, 2)] * (1 + len(captions)))
    assert plan.story().num_references == 1
    (name,) = plan.pictures.values()
    assert plan.record()["references"] == [{"prompt": "Ann", "image": name}]
    assert plan.captions[0] == "Ann"


def test_a_picture_leaves_the_noise_of_the_shots_as_it_is(picture):
    shots = [ScriptShot("a", 1.0), ScriptShot("b", 1.0, seed=4), ScriptShot("c", 1.0)]
    plain = plan_film(script(*shots), MeanCodec(), seed=7)
    assert plain.noise_keys == [noise_key(7, 0), noise_key(4, 1), noise_key(7, 2)]
    shots[0] = ScriptShot("a", 1.0, image=picture)
    plan = plan_film(script(*shots), MeanCodec(), seed=7)
    assert [plan.noise_keys[index] for index in plan.filmed] == plain.noise_keys
    assert plan.noise_keys[0] not in plain.noise_keys


def test_a_reference_picture_is_encoded_on_the_codecs_device(picture):
    """The meta device stands for a GPU: what is on it meets nothing that is not."""

    class MetaCodec(MeanCodec):
        def encode_piece(self, frames, memory, first):
            return torch.nn.functional.conv3d(frames, torch.ones(3, 3, 1, 8, 8, device="meta"), stride=(1, 8, 8))

    plan = plan_film(script(ScriptShot("a", 1.0, image=picture)), MetaCodec(), "meta")
    assert plan.given[0].device.type == "meta"
    assert plan.given[0].shape == (3, 1, 8, 12)


@pytest.mark.parametrize(("frames", "still"), [(1, 1), (5, 5), (81, 9)])
def test_a_last_image_is_encoded_as_the_end_of_a_still_video(picture, frames, still):
    """A latent frame depends on the two before it, where the shot has so many."""
    lengths = []

    class CountingCodec(MeanCodec):
        def encode(self, video):
            lengths.append(video.shape[1])
            return super().encode(video)

    shot = ScriptShot("a", frames / 16, last_image=picture)
    plan = plan_film(script(shot, fps=16), CountingCodec())
    assert lengths == [still]
    assert plan.ends[0].shape == (3, 1, 8, 12)


def test_counts_of_routes_stay_where_a_shot_is_made_anew():
    """Its own routes are counted again, and its picture leaves the stream."""
    references, others = {"references": [{}]}, [{"prompt": "a"}, {"prompt": "c"}]
    before = references | {"shots": [others[0], {"prompt": "b", "image": "b.png"}, others[1]]}
    now = references | {"shots": [others[0], {"prompt": "b"}, others[1]]}
    counts = torch.arange(25.0).view(1, 1, 5, 5)
    rows, columns = torch.tensor([0, 1, 3, 4])[:, None], torch.tensor([0, 1, 3, 4])
    stay = counts[:, :, rows, columns]
    stay[:, :, 2] = 0
    torch.testing.assert_close(counts_that_stay(counts, before, now, [2]), stay)


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "ref.png").write_text("no picture")
    with pytest.raises(DataError, match=r"ref\.png.*cannot be read as an image"):
        plan_film(script(ScriptShot("a", 1.0, image=tmp_path / "ref.png")), MeanCodec())


def test_a_size_the_codec_cannot_take_is_refused():
    with pytest.raises(DataError, match=r"60x96 is not a multiple of 8, as this codec needs; take \[64, 96\]"):
        plan_film(script(ScriptShot("a", 1.0), size=(60, 96)), MeanCodec())
