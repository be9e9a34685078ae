"""From script to stream, and from latents to pictures, storyboard and routing map."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.manifest import CUT_PREFIX
from data.media.decode import open_video
from film import lettering
from film.folder import FILES, PROGRESS, FilmFolder
from film.plan import plan_film
from film.script import Reference, Script, ScriptShot
from film.shooting import Shooting, pictures
from film.storyboard import Panel, draw_routing_map, draw_storyboard, page_size, pick_frames
from moc.diffusion import Progress, noise_key
from moc.files import HeldError
from moc.statistics import RoutingMap
from models.encoders.codec import Codec


class MeanCodec(Codec):
    """Latents are block means; time is taken every fourth frame."""

    latent_channels, spatial_factor = 3, 8

    def __init__(self, continuous=False):
        super().__init__()
        self.continuous = continuous

    def encode_piece(self, frames, memory, first):
        assert -1 <= frames.min() <= frames.max() <= 1
        return torch.nn.functional.avg_pool3d(frames, (1, 8, 8))[:, ::4]


def echo(global_caption, shot_captions):
    """Features that are the captions."""
    return [global_caption, *shot_captions]


def script(*shots: ScriptShot, size=(64, 96), fps=12.0) -> Script:
    return Script("t", "whole story", size, fps, "ugly", shots)


@pytest.fixture
def picture(tmp_path) -> Path:
    """Left half red, right half blue."""
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
    lengths = [codec.pixel_frames(plan.shapes[at][1], place) for place, at in enumerate(plan.filmed)]
    for place in range(1, 9):
        made = sum(lengths[:place])
        assert abs(made - place * 5 * 16.3) <= 2
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
    assert plan.cuts == [True, True, True, False]  # the picture stands between a shot and what it continues
    assert list(plan.given) == [1]
    plan.encode_texts(echo)
    assert plan.text == ["whole story", f"{CUT_PREFIX} a", "b", "b", "c"]
    latent = plan.given[1]
    assert latent.shape == (3, 1, 8, 12)
    assert latent[:, 0, :, :5].mean((1, 2)).tolist() == pytest.approx([1, -1, -1], abs=0.05)
    assert latent[:, 0, :, 7:].mean((1, 2)).tolist() == pytest.approx([-1, -1, 1], abs=0.05)


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


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "ref.png").write_text("no picture")
    with pytest.raises(DataError, match=r"ref\.png.*cannot be read as an image"):
        plan_film(script(ScriptShot("a", 1.0, image=tmp_path / "ref.png")), MeanCodec())


def test_a_size_the_codec_cannot_take_is_refused():
    with pytest.raises(DataError, match=r"60x96 is not a multiple of 8"):
        plan_film(script(ScriptShot("a", 1.0), size=(60, 96)), MeanCodec())


def test_pictures_are_bytes_in_their_place():
    video = torch.zeros(3, 2, 4, 6)
    video[0, 0, 1, 2], video[1, 1, 0, 0], video[2, 0, 0, 0] = 1.0, -1.0, 7.0
    frames = pictures(video, "shot 1")
    assert (frames.shape, frames.dtype) == ((2, 4, 6, 3), np.uint8)
    assert frames[0, 1, 2].tolist() == [255, 128, 128]
    assert frames[1, 0, 0].tolist() == [128, 0, 128]
    assert frames[0, 0, 0, 2] == 255


@pytest.mark.parametrize(
    ("num_frames", "expected"), [(1, [0]), (3, [0, 1, 2]), (9, [0, 2, 4, 6, 8]), (21, [0, 5, 10, 15, 20])]
)
def test_thumbnails_are_spread_over_the_shot(num_frames, expected):
    assert pick_frames(num_frames) == expected


def colour_share(image: Image.Image, colour) -> float:
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return float((np.abs(pixels - colour).max(-1) < 12).mean())


def panels(captions, rows) -> list[Panel]:
    pairs = zip(captions, rows, strict=True)
    return [Panel(number, caption, 5.0, number != 2, frames) for number, (caption, frames) in enumerate(pairs, start=1)]


def test_a_panel_tells_its_length_and_its_cut():
    first, second = panels(["a", "b"], [None, None])
    assert (first.head, second.head) == ("1 · 5.0 s · cut", "2 · 5.0 s · goes on from 1")


def test_the_storyboard_shows_a_row_for_each_shot(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    rows = [np.full((5, 36, 64, 3), colour, np.uint8) for colour in colours]
    rows[1] = rows[1][:2]  # a short shot
    draw_storyboard(tmp_path / "board.png", "A story", panels(["one", "two " * 90, "three"], rows))
    image = Image.open(tmp_path / "board.png")
    assert image.width > image.height > 300
    shares = [colour_share(image, colour) for colour in colours]
    assert shares[0] == pytest.approx(shares[2], rel=0.1)
    assert shares[1] == pytest.approx(2 / 5 * shares[0], rel=0.2)
    assert 0.1 < shares[0] < 5 / 18
    heights = [
        np.where((np.abs(np.asarray(image.convert("RGB")).astype(int) - c).max(-1) < 12).any(1))[0].mean()
        for c in colours
    ]
    assert heights == sorted(heights)


@pytest.mark.parametrize(
    "text",
    [
        "costs $5 or $x_1",
        r"\frac{$a",
        "\N{RABBIT} runs \N{SNOWMAN}",
        "兔子在草地上" * 60,
        "\ud83d",
        "",
        "a\nb\t\x00c",
        "w" * 2000,
    ],
)
def test_any_text_can_be_drawn(tmp_path, recwarn, text):
    """Nothing is taken for a formula, and a character that the font lacks is drawn as a box, without a warning."""
    rows = [np.zeros((5, 36, 64, 3), np.uint8)] * 2
    draw_storyboard(tmp_path / "board.png", text, panels([text, "plain"], rows))
    image = np.asarray(Image.open(tmp_path / "board.png").convert("L"))
    top, bottom = image[48 : 48 + 186, :330], image[48 + 194 :, :330]  # the two captions
    assert (top < 128).any()
    assert (bottom < 128).any()
    assert (image[:48] < 128).any() == bool(text)
    assert (image[:, 330:338] == 255).all()  # no caption reaches the pictures
    assert not recwarn


def test_a_long_caption_is_cut_where_its_cell_ends(tmp_path):
    rows = [np.full((5, 18, 64, 3), 255, np.uint8)] * 2
    draw_storyboard(tmp_path / "board.png", "", panels(["word " * 300, ""], rows))
    dark = (np.asarray(Image.open(tmp_path / "board.png").convert("L")) < 128).any(axis=1)
    assert dark[48:141].sum() > 40
    assert not dark[141:149].any()


def test_a_map_of_many_shots_stays_small(tmp_path):
    for num_shots in (12, 13, 80):
        shares = torch.tril(torch.ones(num_shots, num_shots, dtype=torch.float64), -1) / num_shots
        draw_routing_map(tmp_path / "routing.png", shares)
        assert max(Image.open(tmp_path / "routing.png").size) < 1500


@pytest.mark.parametrize("num_shots", [1, 3, 40])
def test_a_map_has_a_thumbnail_of_each_shot_on_both_axes(tmp_path, num_shots):
    """Their colours are all different, and stand in the order of the shots."""
    blues = np.linspace(60, 240, num_shots).round().astype(int)
    pictures = [np.full((36, 64, 3), (0, 60, blue), np.uint8) for blue in blues]
    draw_routing_map(tmp_path / "routing.png", torch.zeros(num_shots, num_shots, dtype=torch.float64), pictures)
    image = np.asarray(Image.open(tmp_path / "routing.png").convert("RGB")).astype(int)
    green = (image[..., 0] < 8) & (abs(image[..., 1] - 60) < 8)
    rows, columns = np.nonzero(green)
    left, below = (
        green & (np.arange(image.shape[1]) < columns.mean()),
        green & (np.arange(len(image))[:, None] > rows.max() - 2),
    )
    down = image[np.nonzero(left.any(1))[0], columns.min() + 1, 2]
    along = image[rows.max() - 1, np.nonzero(below.any(0))[0], 2]
    for line in (down[: len(down) // 2], along):
        assert (np.diff(line) >= -2).all()
    assert len(np.unique(along)) >= num_shots


def test_fonts_that_have_the_characters_are_taken(tmp_path, monkeypatch, caplog):
    """A font of mathematics, with its script capitals, stands for one of the system that has Chinese."""
    fonts = Path(matplotlib.get_data_path(), "fonts/ttf")
    text, usual = "a \N{SCRIPT CAPITAL L} \N{MATHEMATICAL SCRIPT CAPITAL A}b", fonts / "DejaVuSans.ttf"
    lettering._fonts.cache_clear()
    system = [str(tmp_path / "broken.ttf"), str(fonts / "STIXGeneral.ttf")]
    monkeypatch.setattr(lettering, "_system_fonts", lambda: system)
    assert lettering._fonts("abc", False) == (str(usual),)
    chosen = lettering._fonts(text, False)
    assert chosen == (str(usual), system[1])
    runs = list(lettering._runs(text, chosen))
    assert [run for run, _ in runs] == ["a \N{SCRIPT CAPITAL L} ", "\N{MATHEMATICAL SCRIPT CAPITAL A}", "b"]
    assert [Path(file).stem for _, file in runs] == ["DejaVuSans", "STIXGeneral", "DejaVuSans"]
    assert not caplog.messages
    lettering._tell_missing.cache_clear()
    for caption in ("兔子 a", "草地 a"):
        lettering._fonts(caption, False)
    assert len(caplog.messages) == 1
    assert "fonts-noto-cjk" in caplog.text
    lettering._fonts.cache_clear()


def test_what_changes_a_character_stays_with_it():
    """A variation selector or an accent is drawn in the font of the character before it."""
    usual = lettering._fonts("a", False)
    assert list(lettering._runs("\N{SNOWMAN}\ufe0f e\u0301", usual)) == [("\N{SNOWMAN}\ufe0f e\u0301", usual[0])]


@pytest.mark.skipif(not Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf").exists(), reason="needs the font")
def test_emoji_have_colours():
    picture = np.asarray(lettering.draw_text("a \N{RABBIT FACE} \N{FIRE}", (200, 30), 16)).astype(int)
    assert (np.ptp(picture, axis=2) > 80).sum() > 20


@pytest.mark.parametrize("num_shots", [1, 6])
def test_the_routing_map_sets_own_shots_apart(tmp_path, num_shots):
    shares = torch.zeros(num_shots, num_shots, dtype=torch.float64)
    for shot in range(1, num_shots):
        shares[shot, :shot] = 1 / shot
    draw_routing_map(tmp_path / "routing.png", shares)
    image = Image.open(tmp_path / "routing.png")
    assert min(image.size) > 300
    diagonal = colour_share(image, (0xB8, 0xC4, 0xD6))
    square = colour_share(image, tuple(int(255 * c) for c in (0.001462, 0.000466, 0.013866)))  # a share of 1
    assert diagonal > 0.01
    if num_shots == 6:
        assert square > 0.2 * diagonal / num_shots


# The folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def latent(value: float = 0.5) -> torch.Tensor:
    return torch.full((3, 2, 2, 2), value)


class FlatCodec(MeanCodec):
    """Decodes a latent to frames of one colour, its mean."""

    def decode_piece(self, latent, memory, first):
        return latent.mean().expand(3, 4 * latent.shape[1] - 3 * first, 32, 48)

    latents_at_once = 1000


REQUEST = {
    "script": {"shots": [{"seed": 1}]},
    "moc": {},
    "flow": {},
    "sampler": {},
    "precision": "",
    "fingerprints": {},
}


def shooting(folder: Path, num_shots: int = 2, keep_every: int = 100) -> Shooting:
    """Of shots of 4 frames, whose latents hold 5."""
    plan = plan_film(script(*[ScriptShot("a", 4 / 12)] * num_shots), FlatCodec())
    return Shooting(FilmFolder(folder), plan, FlatCodec(), REQUEST, RoutingMap(num_shots), keep_every)


def plays(*latents: torch.Tensor):
    """Sampling that finishes a shot at each step."""

    def sampling(on_step, start):
        done = start.step if start else 0
        for index, made in enumerate(latents[done:], start=done):
            yield index, made
            on_step(Progress(index + 1, len(latents), dict(enumerate(latents[: index + 1]))))

    return sampling


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


# A film that was stopped


def test_what_is_kept_is_what_sampling_goes_on_from(tmp_path):
    """Two steps a shot, kept after each; a shot that is finished is read from its own file."""
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
    folder.write_metadata(REQUEST | {"moc": earlier})
    FilmFolder(tmp_path).check_request(REQUEST)
    with pytest.raises(DataError, match="holds another film"):
        folder.check_request(other | {"sampler": {"steps": 3}})


def test_one_process_at_a_time_has_a_folder(tmp_path):
    with FilmFolder(tmp_path).held():
        with pytest.raises(HeldError, match="in use by another process"), FilmFolder(tmp_path).held():
            pass
        assert files(tmp_path) == set()
    with FilmFolder(tmp_path).held():
        pass


@pytest.mark.parametrize("pattern", FILES)
def test_a_folder_with_any_part_of_a_film_is_not_written_to(tmp_path, pattern):
    part = tmp_path / pattern.replace("*", "03")
    part.parent.mkdir(exist_ok=True)
    part.touch()
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
