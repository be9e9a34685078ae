"""These tests are about how a film is written, and what is written beside it if asked."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.media.write import join_videos, write_video
from film.filmmaker import Filmmaker, FilmmakerConfig
from film.folder import FilmFolder
from film.plan import FilmPlan
from film.script import ScriptShot
from film.video import CODECS, VideoConfig, _clock, write_preview, write_subtitles
from moc.diffusion import SamplingConfig
from moc.errors import UserError
from tests.film import made_up

STORY = {
    "size": [64, 96],
    "fps": 12,
    "shots": [{"prompt": "Mia <walks>\n & waves.", "seconds": 0.42}, {"prompt": "海の上に光。", "seconds": 0.34}],
}


def colours(path) -> list[int]:
    with av.open(str(path)) as container:
        return [int(frame.to_ndarray(format="gray").mean()) for frame in container.decode(video=0)]


@pytest.mark.parametrize("codec", CODECS)
def test_shots_of_any_codec_are_joined_frame_by_frame(tmp_path, codec):
    """Every shot's frames come in order, and a chapter begins with each."""
    shots, grey = [], []
    for number in range(3):
        levels = [30 + 60 * number + 6 * i for i in range(5 + number)]
        frames = [np.full((64, 96, 3), level, np.uint8) for level in levels]
        shots.append(tmp_path / f"{number}.mp4")
        assert write_video(shots[-1], frames, 12, codec, 20, bt709=True) == len(levels)
        grey += levels
    assert join_videos(tmp_path / "all.mp4", shots, ["a", "b", "海"]) == len(grey)
    seen = colours(tmp_path / "all.mp4")
    assert len(seen) == len(grey)
    assert np.corrcoef(seen, grey)[0, 1] > 0.99
    assert (np.diff(seen) > 0).all() == (np.diff(grey) > 0).all()
    with av.open(str(tmp_path / "all.mp4")) as container:
        chapters = container.chapters()
    assert [chapter["metadata"]["title"] for chapter in chapters] == ["a", "b", "海"]
    starts = [float(chapter["start"] * chapter["time_base"]) for chapter in chapters]
    assert starts == pytest.approx([0, 5 / 12, 11 / 12], abs=1e-3)  # seconds; chapters are told in milliseconds


def test_what_is_asked_for_stands_beside_the_film(trained, tmp_path, capfd):
    (tmp_path / "story.json").write_text(json.dumps(STORY))
    video = VideoConfig(codec="libx265", crf=30, chapters=True, subtitles=True, preview=True)
    sampler = SamplingConfig(steps=1, guidance_scale=1.0)
    config = FilmmakerConfig(str(trained), device="cpu", sampler=sampler, video=video)
    filmmaker, film = Filmmaker(config), FilmFolder(tmp_path / "film")
    script = filmmaker.read(tmp_path / "story.json")
    filmmaker.make([(script, film)])
    with av.open(str(film.path / "video.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.codec_tag) == ("hevc", "hvc1")
        assert [chapter["metadata"]["title"] for chapter in container.chapters()][1] == "海の上に光。"
    assert "x265" not in capfd.readouterr().err
    assert (film.path / "video.srt").read_text() == (
        "1\n00:00:00,000 --> 00:00:00,417\nMia <walks> & waves.\n\n2\n00:00:00,417 --> 00:00:00,750\n海の上に光。\n"
    )
    vtt = (film.path / "video.vtt").read_text()
    assert vtt.startswith("WEBVTT\n\n1\n00:00:00.000 --> 00:00:00.417\nMia &lt;walks&gt; &amp; waves.\n")
    preview = Image.open(film.path / "preview.webp")
    assert (preview.size, preview.n_frames) == ((96, 64), 5)
    assert {"video.srt", "preview.webp"} <= {path.name for path in film.files()}
    filmmaker.make([(script, film)])  # the film is whole and stays as it is
    other = Filmmaker(replace(config, video=VideoConfig()))
    with pytest.raises(DataError, match=r"another film: its video"):
        other.make([(script, film)])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"codec": "libsvtav1"}, "must be one of libx264, libx265"),
        ({"crf": -1}, "video.crf=-1 must be from 0"),
        ({"crf": 52}, "video.crf=52 must be from 0"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        VideoConfig(**settings)


def test_pictures_too_small_for_hevc_are_refused(tmp_path):
    """x265 itself would abort the process."""
    with pytest.raises(UserError, match="at least 64x64, got 32x96"):
        write_video(tmp_path / "a.mp4", [np.zeros((32, 96, 3), np.uint8)], 12, "libx265")
    assert not list(tmp_path.iterdir())


def test_only_settings_that_change_a_films_bytes_are_kept_with_it():
    """A film that was made before there were such settings has none."""
    assert VideoConfig(subtitles=True, preview=True).record() == {}
    assert VideoConfig(crf=20).record() == {"codec": "libx264", "crf": 20, "chapters": False}


def test_subtitles_and_a_preview_of_many_shots(tmp_path):
    """Subtitles run on from shot to shot. However many shots there are, the preview has two frames of each."""
    shots = [ScriptShot(f"shot {number}", 0.25) for number in range(1, 146)]
    plan = FilmPlan(made_up.script(*shots, fps=12), filmed=list(range(145)), num_frames=[3] * 145)
    write_subtitles(tmp_path / "video.srt", plan)
    assert "\n3\n00:00:00,500 --> 00:00:00,750\nshot 3\n" in (tmp_path / "video.srt").read_text()

    class Folder:
        def frames(self, number, pick, fit):
            greys = np.linspace(0, 255, len(pick(3)))  # a WebP joins frames that are alike
            return np.zeros((len(greys), 16, 16, 3), np.uint8) + greys[:, None, None, None].astype(np.uint8)

    write_preview(tmp_path / "preview.webp", Folder(), plan)
    assert Image.open(tmp_path / "preview.webp").n_frames == 2 * 145


def test_clocks_carry():
    assert _clock(3599.9996, ",") == "01:00:00,000"
    assert _clock(61.5, ".") == "00:01:01.500"
