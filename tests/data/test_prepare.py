"""These tests are about preparing: exact latents, captions, shots and report, and data that loads."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import moc
from data.cache.reader import open_cache
from data.errors import DataError
from data.loading.dataset import DataConfig, open_dataset
from data.loading.loader import build_loader
from data.manifest import SceneRecord, ShotRecord, load_manifest
from data.media.write import write_video
from data.prepare.report import Report
from tests.encoders import numbers_in
from tests.preparing import film_folder, run, scene, scenes


@pytest.fixture
def folder(tmp_path):
    return film_folder(tmp_path)


def test_latents_are_the_frames_that_were_asked_for(folder):
    scenes(folder, scene("a", (3, 20), (20, 29), (31, 33), (33, 60)))
    prepared = run(folder)
    cache = open_cache(prepared.cache)
    assert [s.id for s in cache.scenes] == ["a#0000", "a#0001"]
    numbers = [[numbers_in(latent) for latent in cache.latents(s)] for s in cache.scenes]
    assert numbers == [[[3, 7, 11, 15, 19], [20, 24, 28]], [[33, 37, 41, 45, 49, 53, 57]]]
    lines = load_manifest(prepared.manifest, root=folder)
    assert [(shot.start, shot.end, shot.cut) for shot in lines[0].shots] == [(3, 20, True), (20, 29, True)]
    assert [p["kind"] for p in prepared.report.problems] == ["short-shot"]


def test_long_shots_become_continuations_and_fps_is_kept(folder):
    scenes(folder, scene("a", (0, 60)))
    prepared = run(folder, max_frames=12, shots_per_sample=9)
    (line,) = load_manifest(prepared.manifest, root=folder)
    assert [(s.start, s.end, s.cut) for s in line.shots[:2]] == [(0, 9, True), (9, 18, False)]
    (sample,) = open_dataset(DataConfig(str(prepared.cache)))
    ((_, shots),) = moc.make_layout(sample, moc.StreamSpec(), 64).samples
    assert [shot.cut for shot in shots] == [True] + [False] * 6
    slow = run(folder, fps=12.5)
    (stored,) = open_cache(slow.cache).scenes
    assert numbers_in(open_cache(slow.cache).latents(stored)[0])[:4] == [0, 8, 16, 24]


def test_no_two_samples_have_one_id(folder):
    """The parts of a long scene are numbered, and another scene may be called as one of them."""
    scenes(folder, scene("a", (3, 20), (20, 29), (33, 60)), scene("a#0001", (0, 20)), scene("b", (0, 20)))
    prepared = run(folder)
    assert [s.id for s in open_cache(prepared.cache).scenes] == ["a#0000", "a#0001", "b"]
    assert [line.id for line in load_manifest(prepared.manifest, root=folder)] == ["a#0000", "a#0001", "b"]
    (problem,) = prepared.report.problems
    assert (problem["kind"], problem["action"]) == ("duplicate-id", "skipped")
    assert problem["where"].endswith("manifest.jsonl:2")
    assert "'a#0001'" in problem["message"]


def test_a_sample_has_the_rate_of_its_film_whatever_the_manifest_says(folder):
    scenes(folder, replace(scene("a", (0, 60)), fps=60.0), scene("b", (0, 60)))
    lines = load_manifest(run(folder).manifest, root=folder)
    assert {line.fps for line in lines} == {25.0}


def test_a_later_window_that_goes_on_with_a_shot_begins_without_a_cut(folder):
    """Nothing cuts there: neither the manifest, nor the layout, nor the caption's prefix may say so."""
    scenes(folder, scene("a", (0, 45), (45, 60)))
    prepared = run(folder, max_frames=9, shots_per_sample=2)
    windows = load_manifest(prepared.manifest, root=folder)
    expected = [[(0, True), (9, False)], [(18, False), (27, False)], [(36, False), (45, True)]]
    assert [[(shot.start, shot.cut) for shot in window.shots] for window in windows[:3]] == expected
    cache = open_cache(prepared.cache)
    assert [list(stored.cuts) for stored in cache.scenes[:3]] == [[cut for _, cut in window] for window in expected]
    rows = [cache.text_rows(stored.text_keys[0][1]) for stored in cache.scenes[:3]]
    assert rows == [6, 4, 4]  # "[SHOT CUT] shot at 0" and its end, then "shot at 0" and its end


def test_captions_of_several_lengths_and_images(folder):
    Image.fromarray(np.full((100, 90, 3), 200, np.uint8)).save(folder / "still.png")
    shots = (ShotRecord(0, 9, ("one", "one two")), ShotRecord(9, 18, "three", cut=False))
    scenes(
        folder,
        SceneRecord(id="a", video="film.mkv", caption=("x", "x y", "x y z"), shots=shots),
        SceneRecord(id="b", image="still.png", caption="grey"),
    )
    cache = open_cache(run(folder, buckets=[[96, 96]]).cache)
    film, still = cache.scenes
    rows = [[cache.text_rows(key) for key in keys] for keys in film.text_keys]
    assert rows == [[2, 4, 2], [3, 5, 2], [4, 5, 2]]  # a cut's caption begins with [SHOT CUT]
    assert still.kind == "image"
    assert still.latent_shapes == ((3, 1, 12, 12),)


def moving_texture(seed, num_frames):
    """Returns a picture sliding by a pixel a frame."""
    texture = np.random.default_rng(seed).integers(0, 255, (8, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.roll(texture, i, axis=1)[:, :160] for i in range(num_frames)]


def test_detected_shots_of_a_folder(tmp_path):
    write_video(tmp_path / "a.mp4", moving_texture(0, 30) + moving_texture(1, 22), fps=25)
    (tmp_path / "a.txt").write_text("two textures slide")
    prepared = run(tmp_path, shots_per_sample=3)
    (line,) = load_manifest(prepared.manifest, root=tmp_path)
    assert line.caption == "two textures slide"
    spans = [(shot.start, shot.end, shot.cut) for shot in line.shots]
    assert spans == [(0, 25, True), (25, 30, False), (30, 51, True)]
    assert set(prepared.report.speed()) == {"decode", "shot detection", "encode"}


def test_report_shows_every_shot(folder):
    scenes(folder, scene("a", (0, 9), (9, 18), caption="<b>bold</b> & more"))
    run(folder)
    out = folder / "out"
    page, report = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    assert report["summary"]["samples"] == 1
    assert report["summary"]["shots"] == 2
    assert report["summary"]["frames"] == {"decoded": 60, "taken": 18}
    assert "60 frames decoded, 18 taken" in page
    for name in report["samples"][0]["thumbnails"]:
        assert name in page
        assert Image.open(out / "thumbnails" / name).size[1] == 64
    assert "&lt;b&gt;bold" in page
    assert page.count("<figure>") == 2
    assert all(span in page for span in ("[0, 9) ", "[9, 18) "))


def test_a_report_tells_of_each_kind_of_problem_how_many_and_the_first():
    report = Report()
    for kind, where in (("broken", "a.mp4"), ("hdr", "b.mp4"), ("broken", "c.mp4")):
        report.add_problem(DataError(kind, where, f"what is wrong with {where}"))
    assert report.told() == [
        "2 broken, the first: a.mp4: what is wrong with a.mp4",
        "1 hdr: b.mp4: what is wrong with b.mp4",
    ]


def test_prepared_data_loads(folder):
    scenes(folder, *(scene(f"s{n}", (n, n + 9), (n + 9, n + 14)) for n in range(0, 40, 10)))
    run(folder)
    loader = build_loader(DataConfig(path=str(folder / "out"), batch_tokens=600, workers=0), moc.StreamSpec(), 64)
    step = next(iter(loader))
    assert step[0].layout.num_samples >= 1
    assert step[0].latents[0].shape == (3, 3, 8, 20)
