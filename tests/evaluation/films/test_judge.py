"""These tests are about the demo's judge: it must pass films of the world itself, and fail what is not the script."""

import json

import numpy as np
import pytest

from data.loading.dataset import DataConfig
from data.media.decode import open_video
from data.media.write import write_video
from data.prepare.shots import build_detector
from data.storyworld import StoryworldConfig, generate
from evaluation.films.judge import held_out_floors, judge_film, ratio_to_line
from film.folder import FilmFolder
from film.request import REQUEST
from film.script import Script, ScriptShot


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Returns a world's own film, laid out as sample.py would, with the script it films."""
    root = tmp_path_factory.mktemp("judge")
    generate(StoryworldConfig(output=str(root / "world"), scenes=1, frames_per_shot=[17], continuation=0.0, workers=1))
    scene = json.loads((root / "world/manifest.jsonl").read_text())
    reader = open_video(root / "world" / scene["video"])
    frames = reader.read(0, reader.num_frames).numpy()
    FilmFolder(root / "film").write_metadata(dict.fromkeys(REQUEST) | {"moc": {}, "sampler": {}})
    write_video(root / "film/video.mp4", frames, 12)
    for number, shot in enumerate(scene["shots"], start=1):
        write_video(root / f"film/shots/{number:02d}.mp4", frames[shot["start"] : shot["end"]], 12)
    shots = tuple(ScriptShot(shot["caption"], 17 / 12, shot["cut"]) for shot in scene["shots"])
    return root / "film", Script("a world's own", scene["caption"], (64, 96), 12.0, "", shots)


def test_a_true_film_passes(film):
    verdict = judge_film(*film, build_detector("adaptive"))
    assert verdict.places_right == len(verdict.places) == 4
    assert verdict.scripted_cuts == [17, 34, 51]
    assert verdict.found_cuts == [17, 34, 51]
    assert verdict.accuracy.score == pytest.approx(1.0)


def test_another_story_is_seen(film):
    folder, script = film
    places = [seen for _, seen in judge_film(folder, script, build_detector("adaptive")).places]
    others = {"meadow": "volcano"}
    swapped = tuple(
        ScriptShot(f"In the {others.get(place, 'meadow')}, Mia walks.", shot.seconds, shot.cut)
        for place, shot in zip(places, script.shots, strict=True)
    )
    wrong = Script(script.title, script.global_caption, script.size, script.fps, "", swapped)
    assert judge_film(folder, wrong, build_detector("adaptive")).places_right == 0


def test_floors_fall_with_what_can_be_known(prepared):
    mean, linear = held_out_floors(DataConfig(path=str(prepared), validation=1, workers=0), [0.05, 0.5, 1.0])
    assert mean > 1.0  # the variance of the noise plus that of the latents
    assert linear[1] < mean
    assert np.isfinite(linear).all()
    assert linear[1] < linear[0]  # small noise is harder to predict


def test_the_demo_s_verdict_is_of_the_levels_that_tell():
    sigmas, linear = [0.2, 0.5, 0.8, 0.95], [0.2, 0.16, 0.1, 0.05]
    ratio = ratio_to_line(sigmas, [0.19, 0.152, 0.095, 0.5], linear)
    assert ratio == pytest.approx(0.95)
    assert ratio_to_line(sigmas, [0.22, 0.176, 0.11, 0.01], linear) == pytest.approx(1.1)
