"""These tests are about Storyworld: plans, captions, frames against their ground truth, readers, files."""

import json
import re
from dataclasses import astuple, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.manifest import load_manifest
from data.media.decode import open_video
from data.storyworld import Mode, StoryworldConfig, generate, name_looks, name_place, world_files
from data.storyworld.characters import COLOURS
from data.storyworld.motion import pose_at
from data.storyworld.places import PLACES
from data.storyworld.render import Renderer
from data.storyworld.scenes import Scene, place_of_caption, plan_scene, view_at, vocabulary, words_of
from film.script import load_script
from moc.errors import UserError

SIZE = (64, 96)
SCRIPTS = sorted((Path(__file__).parents[2] / "configs/scripts").glob("storyworld*.yaml"))


def settings(**changes) -> StoryworldConfig:
    return StoryworldConfig(**{"output": "unused", "characters": 3, "workers": 1} | changes)


def recall_settings(**changes) -> StoryworldConfig:
    return settings(**{"mode": Mode.recall, "characters": 4, "shots": [6]} | changes)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> list[Path]:
    """Returns a described world and a recall world, written whole; 4 x 10 and 6 x 8 shots."""
    root = tmp_path_factory.mktemp("worlds")
    described = settings(output=str(root / "described"), scenes=10, frames_per_shot=[2], characters_per_shot=2)
    recall = recall_settings(output=str(root / "recall"), scenes=8, frames_per_shot=[2], seed=1)
    return [generate(config).parent for config in (described, recall)]


def shots_of(world: Path):
    """Yields (frames uint8 [F, H, W, 3], the shot's truth, the scene's truth) of every shot."""
    for line in (world / "truth.jsonl").read_text().splitlines():
        truth = json.loads(line)
        video = open_video(world / "videos" / f"{truth['id']}.mp4")
        for shot in truth["shots"]:
            yield video.read(shot["start"], shot["end"]).numpy(), shot, truth


# Plans


def test_same_seed_same_plan_and_other_seed_other_plan():
    assert repr(plan_scene(settings(), 3)) == repr(plan_scene(settings(), 3))
    assert repr(plan_scene(settings(), 3)) != repr(plan_scene(settings(seed=1), 3))
    assert repr(plan_scene(settings(), 3)) != repr(plan_scene(settings(), 4))


@pytest.mark.parametrize("config", [settings(characters_per_shot=2), recall_settings()])
def test_captions_are_short_and_in_the_vocabulary(config):
    words = set(vocabulary())
    assert len(words) < 100
    for scene in (plan_scene(config, i) for i in range(100)):
        assert set(words_of(scene.caption)) <= words
        assert sum(word.isalpha() for word in words_of(scene.caption)) <= 40
        for shot in scene.shots:
            assert set(words_of(shot.caption)) <= words
            assert sum(word.isalpha() for word in words_of(shot.caption)) <= 20
            assert shot.caption.startswith("[SHOT CUT]") == shot.cut
            assert place_of_caption(shot.caption) == shot.place


def test_described_captions_tell_the_looks_and_recall_captions_do_not():
    for scene in (plan_scene(settings(), i) for i in range(20)):
        shown = {actor.look for shot in scene.shots for actor in shot.actors}
        for look in shown:
            told = f"{look.pattern} {look.outfit} coat, {look.accessory}"
            assert f"{look.name}: {look.size} {look.fur}" in scene.caption
            assert told in scene.caption
    for scene in (plan_scene(recall_settings(), i) for i in range(20)):
        said = {word for text in (scene.caption, *(s.caption for s in scene.shots)) for word in words_of(text)}
        assert not said & set(COLOURS)


def test_last_shot_of_a_recall_scene_returns_a_name_shown_once_at_every_distance():
    distances = set()
    for scene in (plan_scene(recall_settings(), i) for i in range(120)):
        last = [recall for recall in scene.recalls if recall.shot == 5 and len(recall.shown_in) == 1]
        name = scene.shots[-1].actors[0].look.name
        assert [recall.name for recall in last] == [name]
        assert last[0].distance == 5 - last[0].shown_in[0]
        assert [name in [a.look.name for a in shot.actors] for shot in scene.shots].count(True) == 2
        distances.add(last[0].distance)
    assert distances == {1, 2, 3, 4, 5}


def test_look_alikes_share_the_returning_names_colours():
    for scene in (plan_scene(recall_settings(look_alikes=True), i) for i in range(20)):
        returning, fur_twin, outfit_twin, _ = scene.looks
        assert scene.shots[-1].actors[0].look == returning
        assert fur_twin.fur == returning.fur
        assert outfit_twin.outfit == returning.outfit


def test_looks_stay_through_a_scene_and_change_between_scenes():
    scenes = [plan_scene(recall_settings(), i) for i in range(60)]
    for scene in scenes:
        assert all(actor.look in scene.looks for shot in scene.shots for actor in shot.actors)
    mias = {look for scene in scenes for look in scene.looks if look.name == "Mia"}
    assert len({look.fur for look in mias}) == len({look.outfit for look in mias}) == 6


def test_true_cut_changes_place_and_continuation_goes_on_from_rest():
    for scene in (plan_scene(settings(continuation=0.5, characters_per_shot=2), i) for i in range(30)):
        for before, after in zip(scene.shots[:-1], scene.shots[1:], strict=True):
            if after.cut:
                assert after.place != before.place
                continue
            assert after.place == before.place
            end = before.timing.seconds
            assert astuple(view_at(after, 0)) == pytest.approx(astuple(view_at(before, end)), abs=1e-9)
            for was, now in zip(before.actors, after.actors, strict=True):
                ended, begun = astuple(pose_at(was, before.timing, end)), astuple(pose_at(now, after.timing, 0.0))
                assert begun == pytest.approx(ended, abs=1e-6)


# Frames


def one_actor_scene() -> Scene:
    return plan_scene(settings(characters_per_shot=1, shots=[1], continuation=0.0), 0)


def test_box_holds_the_character_tightly():
    """A frame with the character differs from one without it only inside the box and at its shadow."""
    scene = one_actor_scene()
    shot = scene.shots[0]
    renderer = Renderer(scene, (256, 384), 12)
    (frame, (sighting,)) = next(renderer.render(shot))
    empty, _ = next(renderer.render(replace(shot, actors=())))
    changed = np.abs(frame.astype(int) - empty).max(axis=2) > 40
    x0, y0, x1, y1 = (round(edge) for edge in sighting.box)
    assert not changed[: y0 - 1].any()
    body = changed[y0:y1]
    assert body[:2].any()
    feet = y1 - (y1 - y0) // 4  # above the shadow, all changed pixels lie between the sides
    columns = np.flatnonzero(changed[y0:feet].any(axis=0))
    assert x0 - 1 <= columns[0]
    assert columns[-1] <= x1
    outline = np.flatnonzero(changed[:, max(x0 - 2, 0) : x1 + 2].any(axis=0))
    assert outline[0] <= 4
    assert outline[-1] >= x1 - x0 - 3


def test_nearer_character_hides_the_farther_one():
    scene = plan_scene(settings(characters_per_shot=2, shots=[1]), 1)
    first, second = scene.shots[0].actors
    near = replace(first, action="stands", y=0.89, x=0.0)
    for x, hidden in ((0.0, True), (0.5, False)):
        far = replace(second, action="stands", y=0.83, x=x)
        shot = replace(scene.shots[0], actors=(far, near))
        _, (behind, before) = next(Renderer(scene, SIZE, 12).render(shot))
        assert (behind.visible < 0.6) == hidden
        assert before.visible > 0.7
        assert before.box is not None


def test_fast_motion_is_blurred_and_rest_is_not():
    scene = one_actor_scene()
    actor = replace(scene.shots[0].actors[0], phase=0.0)
    renderer = Renderer(scene, (480, 720), 12)
    view = scene.shots[0].start_view
    for action, blurred in (("stands", False), ("jumps", True)):
        shot = replace(scene.shots[0], actors=(replace(actor, action=action),), start_view=view, end_view=view)
        assert (renderer.count_samples(shot, 0.1, 0.14) > 2) == blurred


@pytest.mark.parametrize("size", [(480, 832), (96, 64), (32, 32)])
def test_any_size_renders(size):
    scene = plan_scene(settings(size=list(size), characters_per_shot=3, shots=[1]), 0)
    frame, sightings = next(Renderer(scene, size, 24).render(scene.shots[0]))
    assert frame.shape == (*size, 3)
    assert frame.dtype == np.uint8
    assert frame.std() > 10
    assert len(sightings) == 3


def test_returning_place_looks_as_before():
    scene = plan_scene(settings(shots=[4], continuation=0.0), 2)
    shot = replace(scene.shots[0], actors=())
    again = Renderer(scene, SIZE, 12)
    assert np.array_equal(next(Renderer(scene, SIZE, 12).render(shot))[0], next(again.render(shot))[0])


# Readers


def test_place_reader_on_real_and_on_spoilt_frames(worlds):
    rng = np.random.default_rng(0)
    clean, spoilt, faded = [], [], []
    for world in worlds:
        for frames, shot, _ in shots_of(world):
            blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in frames])
            noisy = np.clip(blurred + rng.normal(0, 20, blurred.shape), 0, 255).astype(np.uint8)
            clean.append(name_place(frames) == shot["place"])
            spoilt.append(name_place(noisy) == shot["place"])
            faded.append(name_place((0.7 * blurred + 0.3 * 128).astype(np.uint8)) == shot["place"])
    assert len(clean) == 88
    assert np.mean(clean) >= 0.99
    assert np.mean(spoilt) >= 0.95
    assert np.mean(faded) >= 0.9


def test_looks_reader_names_fur_and_outfit(worlds):
    right = []
    for frames, shot, truth in shots_of(worlds[1]):
        for actor in shot["actors"]:
            looks = truth["characters"][actor["name"]]
            read = name_looks(frames, actor["boxes"])
            right += [read["fur"] == looks["fur"], read["outfit"] == looks["outfit"]]
    assert len(right) == 96
    assert np.mean(right) >= 0.98


def test_looks_reader_needs_a_box():
    with pytest.raises(ValueError, match="no box"):
        name_looks(np.zeros((1, 8, 8, 3), np.uint8), [None])


@pytest.mark.parametrize("prompt", ["Mia walks.", "From the cave to the town, Mia walks."])
def test_caption_without_one_place_is_refused(prompt):
    with pytest.raises(ValueError, match="name one of meadow, desert"):
        place_of_caption(prompt)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_prompt_script_speaks_the_worlds_language(path):
    script = load_script(path)
    words = set(vocabulary())
    assert len(script.shots) >= 4
    assert set(words_of(script.global_caption)) <= words
    for shot in script.shots:
        assert set(words_of(shot.caption)) <= words
        assert place_of_caption(shot.prompt) in PLACES


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_prompt_script_tells_the_looks_of_a_familiar_world_of_any_seed(path):
    told = looks_told(load_script(path).global_caption)
    for seed in range(3):
        config = settings(familiar=True, names=["Mia", "Gus"], characters=2, seed=seed)
        assert told == set().union(*(looks_told(plan_scene(config, index).caption) for index in range(4)))


def looks_told(caption: str) -> set[str]:
    return set(re.findall(r"\w+: [^.]+", caption))


# Files


def test_written_world_is_a_whole_dataset(worlds):
    for world in worlds:
        scenes = load_manifest(world / "manifest.jsonl")
        truths = [json.loads(line) for line in (world / "truth.jsonl").read_text().splitlines()]
        assert [scene.id for scene in scenes] == [truth["id"] for truth in truths]
        assert (world / "vocabulary.txt").read_text().split() == vocabulary()
        for scene, truth in zip(scenes, truths, strict=True):
            video = open_video(world / scene.video)
            assert video.num_frames == scene.shots[-1].end
            assert (video.height, video.width) == SIZE
            for record, shot in zip(scene.shots, truth["shots"], strict=True):
                assert (record.start, record.end, record.cut) == (shot["start"], shot["end"], shot["cut"])
                assert all(len(actor["boxes"]) == record.end - record.start for actor in shot["actors"])
        assert not [path for path in world.rglob("*") if "partial" in path.name]


def test_recall_truth_says_what_must_return(worlds):
    for line in (worlds[1] / "truth.jsonl").read_text().splitlines():
        truth = json.loads(line)
        assert any(recall["shot"] == 5 for recall in truth["recalls"])
        for recall in truth["recalls"]:
            looks = truth["characters"][recall["name"]]
            assert recall["looks"] == {"fur": looks["fur"], "outfit": looks["outfit"]}
            cast = {actor["name"]: actor for actor in truth["shots"][recall["shot"]]["actors"]}
            assert cast[recall["name"]]["boxes"][0]


def test_same_bytes_whatever_the_number_of_workers(tmp_path):
    files = []
    for workers in (1, 2):
        root = tmp_path / str(workers)
        generate(settings(output=str(root), scenes=3, frames_per_shot=[12], workers=workers))
        files.append({path.name: path.read_bytes() for path in sorted(root.rglob("*.*"))})
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


def test_failed_run_leaves_no_manifest(tmp_path, monkeypatch):
    def fail_at_two(config, index):
        if index == 2:
            raise OSError("disk full")
        return {}

    monkeypatch.setattr(world_files, "write_scene", fail_at_two)
    with pytest.raises(OSError, match="disk full"):
        generate(settings(output=str(tmp_path), scenes=4))
    assert not (tmp_path / "manifest.jsonl").exists()
    assert not (tmp_path / "truth.jsonl").exists()


def test_existing_world_is_replaced_only_when_told(tmp_path):
    config = settings(output=str(tmp_path), scenes=2, shots=[1], frames_per_shot=[1])
    generate(config)
    with pytest.raises(FileExistsError, match="overwrite=true"):
        generate(config)
    mine = tmp_path / "videos" / "scene_mine.mp4"
    mine.touch()
    mine.with_name(".scene_000001.partial.mp4").touch()  # a killed process leaves such a file
    generate(replace(config, scenes=1, overwrite=True))
    assert {file.name for file in (tmp_path / "videos").iterdir()} == {"scene_000000.mp4", mine.name}
    (tmp_path / "truth.jsonl").unlink()
    with pytest.raises(FileExistsError, match="no storyworld"):
        generate(replace(config, overwrite=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": 0}, "scenes=0"),
        ({"size": [65, 96]}, "even"),
        ({"frames_per_shot": []}, "frames_per_shot"),
        ({"shots": [0]}, "shots"),
        ({"characters": 9}, "from 1 to 8"),
        ({"characters_per_shot": 4}, "at most `characters`"),
        ({"places": ["moon"]}, "names among meadow"),
        ({"places": ["cave", "cave"], "places_per_scene": 2}, r"places=\['cave', 'cave'\]: must be .* each once"),
        ({"names": ["Mia", "Mia"]}, r"names=\['Mia', 'Mia'\]: must be .* each once"),
        ({"places": ["reef"], "places_per_scene": 2}, "number of places"),
        ({"continuation": 1.5}, "from 0 to 1"),
        ({"mode": Mode.recall, "characters": 1}, "raise characters"),
        ({"mode": Mode.recall, "shots": [1]}, "from 2 in this mode"),
    ],
)
def test_bad_settings_are_refused_with_the_rule(changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)
