"""These tests are about recall scenes composed of painted things: against the CPU renderer, their story, and the loader
for training."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.loading.endless import EndlessLoader, RecallWorld
from data.storyworld import vocabulary
from data.storyworld.characters import COLOURS
from data.storyworld.filmed import build_stock
from data.storyworld.motion import CAMERAS
from data.storyworld.recall_scenes import ACTION_NAMES, NAMES, RecallConfig, captions, draw_scenes, make_scene
from data.storyworld.render import SHUTTER, Renderer
from data.storyworld.scenes import words_of
from data.storyworld.stock import Composed
from moc import Batch, StreamSpec
from moc.errors import UserError
from models import EncodersConfig, build_encoders

CONFIG = RecallConfig(size=[32, 48], frames=5, shots=4, paintings=2)
FILMED = replace(CONFIG, paintings=1, frames=3, described=True, cameras=list(CAMERAS), travel=0.5)


@pytest.fixture(scope="module")
def world() -> RecallWorld:
    encoders = build_encoders(EncodersConfig(), vocabulary())
    return RecallWorld(CONFIG, encoders.codec, encoders.text, encoders.save)


def pixels(composed: Composed) -> np.ndarray:
    """Returns pixels [N, F, H, W, 3] in 0 .. 255."""
    return ((composed.frames + 1) * 127.5).permute(0, 2, 3, 4, 1).numpy()


def test_composed_shots_are_those_of_the_renderer(world):
    """They are the same within rounding where nobody moves in an open shutter; where somebody does, drift alone
    differs."""
    scenes = draw_scenes(CONFIG, range(6))
    composed = pixels(world.stock.compose(scenes)).reshape(6, CONFIG.shots, CONFIG.frames, *CONFIG.size, 3)
    half, still_frames = SHUTTER / 2 / CONFIG.fps, 0
    for i in range(len(scenes)):
        scene = make_scene(CONFIG, scenes, i)
        renderer = Renderer(scene, (32, 48), CONFIG.fps)
        for shot, found in zip(scene.shots, composed[i], strict=True):
            for number, (frame, _) in enumerate(renderer.render(shot)):
                time = (number + 0.5) / CONFIG.fps
                still = renderer.count_samples(shot, time - half, time + half) == 1
                difference = np.abs(found[number] - frame)
                assert difference.max() < (1.01 if still else 40)
                assert difference.mean() < (0.05 if still else 0.3)
                still_frames += still
    assert still_frames > 60


def test_shots_of_moving_cameras_are_those_of_the_renderer():
    """They are the same within rounding where nothing moves in an open shutter; a renderer's moving camera blurs edges
    a little.

    What drifts across the frame's edge is cut there before it is blurred, by the renderer alone."""
    scenes = draw_scenes(FILMED, range(6))
    composed = pixels(build_stock(FILMED, "cpu").compose(scenes)).reshape(6, FILMED.shots, FILMED.frames, 32, 48, 3)
    half, compared = SHUTTER / 2 / FILMED.fps, Counter()
    for i in range(len(scenes)):
        scene = make_scene(FILMED, scenes, i)
        renderer = Renderer(scene, (32, 48), FILMED.fps)
        for shot, found in zip(scene.shots, composed[i], strict=True):
            frames = np.stack([frame for frame, _ in renderer.render(shot)])
            times = (np.arange(FILMED.frames) + 0.5) / FILMED.fps
            still = [renderer.count_samples(shot, time - half, time + half) == 1 for time in times]
            difference = np.abs(found - frames)[:, 2:-2, 2:-2]
            if shot.camera == "static":
                assert difference[still].max(initial=0) < 6  # OpenCV may round its sampling points to 1/32 of a pixel
                assert difference.mean() < 0.3
            else:
                assert difference.mean() < 0.25 * np.abs(frames[-1].astype(float) - frames[0]).mean()
            compared[shot.camera] += 1
    assert compared.keys() == set(CAMERAS)


@pytest.mark.parametrize("config", [CONFIG, FILMED], ids=["static", "moving"])
def test_shots_coloured_in_half_precision_are_the_same_within_a_level(config):
    scenes, stock = draw_scenes(config, range(4)), build_stock(config)
    stock.dtype = torch.float32
    exact = stock.compose(scenes)
    stock.dtype = torch.float16  # the dtype on a GPU
    half = stock.compose(scenes)
    difference = np.abs(pixels(half) - pixels(exact))
    assert difference.max() < 1.01
    assert difference.mean() < 0.05
    torch.testing.assert_close(half.cover, exact.cover, rtol=0, atol=2e-3)


def test_cover_is_where_the_character_is(world):
    scenes = draw_scenes(CONFIG, [3])
    cover = world.stock.compose(scenes).cover
    scene = make_scene(CONFIG, scenes, 0)
    renderer = Renderer(scene, (CONFIG.size[0], CONFIG.size[1]), CONFIG.fps)
    for shot, of_shot in zip(scene.shots, cover, strict=True):
        boxes = [sighting.box for _, (sighting,) in renderer.render(shot)]
        for (x0, y0, x1, y1), mask in zip(boxes, of_shot > 0.5, strict=True):
            rows, columns = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
            found = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
            assert found == pytest.approx([x0, y0, x1, y1], abs=1.01)


def test_a_scene_is_the_same_whatever_is_drawn_with_it():
    many, few = draw_scenes(CONFIG, range(50)), draw_scenes(CONFIG, [41, 7])
    for number, index in enumerate((41, 7)):
        assert repr(make_scene(CONFIG, many, index)) == repr(make_scene(CONFIG, few, number))
    other = draw_scenes(RecallConfig(**{**vars(CONFIG), "seed": 1}), [7])
    assert repr(make_scene(CONFIG, few, 1)) != repr(make_scene(CONFIG, other, 0))


def test_the_last_shot_returns_to_a_name_that_one_shot_showed():
    scenes = draw_scenes(CONFIG, range(300))
    names = scenes.of_shots(scenes.name)
    assert ((names == names[:, -1:]).sum(1) == 2).all()
    assert (names[np.arange(300), scenes.shown] == names[:, -1]).all()
    assert set(scenes.distance.tolist()) == {1, 2, 3}
    assert (scenes.place[:, 1:] != scenes.place[:, :-1]).all()
    for values, count in ((scenes.fur, len(COLOURS)), (scenes.action, len(ACTION_NAMES)), (scenes.name, len(NAMES))):
        assert set(values.ravel().tolist()) == set(range(count))
    last = [recall for recall in make_scene(CONFIG, scenes, 5).recalls if recall.shot == CONFIG.shots - 1]
    assert [(recall.name, recall.distance) for recall in last] == [(NAMES[names[5, -1]], scenes.distance[5])]


def test_captions_tell_no_looks_and_have_one_length(world):
    scenes = draw_scenes(CONFIG, range(40))
    told = [captions(CONFIG, scenes, i) for i in range(40)]
    words = {word for texts in told for text in texts for word in words_of(text)}
    assert not words & set(COLOURS)
    assert words <= set(vocabulary())
    lengths = {tuple(len(world.text_encoder.encode(text, [])[0]) for text in texts) for texts in told}
    assert len(lengths) == 1


def test_described_captions_tell_each_shots_looks_in_one_length(world):
    scenes = draw_scenes(FILMED, range(40))
    lengths = set()
    for i in range(40):
        whole, *shots = captions(FILMED, scenes, i)
        lengths.add(tuple(len(world.text_encoder.encode(text, [])[0]) for text in (whole, *shots)))
        for caption, shot in zip(shots, make_scene(FILMED, scenes, i).shots, strict=True):
            look = shot.actors[0].look
            assert f"{look.name} the {look.fur} " in caption
            assert f" in the {look.outfit} coat {shot.actors[0].action}. {CAMERAS[shot.camera]}" in caption
            assert f"{look.name}: big {look.fur} " in whole
    assert len(lengths) == 1


def test_a_scene_loses_all_its_captions_by_its_position_alone(world):
    null = world.text_encoder.encode("", [])[0]

    def captioned(*batches: Batch) -> dict[int, bool]:
        """Returns which positions have captions."""
        found = {}
        for batch in batches:
            texts = iter(torch.equal(text, null) for text in batch.text)
            for position, (_, shots) in zip(batch.layout.positions, batch.layout.samples, strict=True):
                (is_null,) = {next(texts) for _ in range(1 + len(shots))}
                found[position] = not is_null
        return found

    def scenes(steps: int, batch_tokens: int = 1000, seed: int = 7, **share: int) -> dict[int, bool]:
        loader = EndlessLoader(world, StreamSpec(), 6, batch_tokens, 0, 0.3, seed, **share)
        return captioned(*(batch for step in islice(loader, steps) for batch in step))

    one = scenes(6)
    assert set(one.values()) == {True, False}
    assert scenes(6, rank=0, world_size=2) | scenes(6, rank=1, world_size=2) == one
    assert scenes(6, accumulation=3) == one
    small = scenes(10, 500)
    assert small == {position: one[position] for position in small}
    later = scenes(2, start_position=9)
    assert all(later[position] == one[position] for position in later.keys() & one.keys())
    assert scenes(6, seed=8) != one
    many = scenes(1, 40_000)
    assert 0.2 < sum(not has for has in many.values()) / len(many) < 0.4
    (held_out,) = EndlessLoader(world, StreamSpec(), 6, 1000, 5, 0.9).held_out()
    assert all(captioned(held_out).values())


def test_look_alikes_share_the_returning_names_colours():
    config = RecallConfig(**{**vars(CONFIG), "look_alikes": True})
    scenes = draw_scenes(config, range(20))
    assert (scenes.fur[:, 1] == scenes.fur[:, 0]).all()
    assert (scenes.outfit[:, 2] == scenes.outfit[:, 0]).all()


def test_described_captions_are_encoded_as_each_alone():
    encoders = build_encoders(EncodersConfig(), vocabulary())
    config = replace(CONFIG, frames=1, paintings=1, described=True)
    world = RecallWorld(config, encoders.codec, encoders.text, encoders.save)
    scenes = draw_scenes(config, [3, 5])
    text = world.encode(scenes).text
    for i, of_scene in enumerate(text):
        alone = [encoders.text.encode(caption, [])[0] for caption in captions(config, scenes, i)]
        torch.testing.assert_close(of_scene, alone, rtol=0, atol=1e-5)


def test_latents_are_the_codecs_of_each_shot(world):
    scenes = draw_scenes(CONFIG, [9])
    encoded, composed = world.encode(scenes), world.stock.compose(scenes)
    one_by_one = torch.stack([world.codec.encode(frames) for frames in composed.frames])
    torch.testing.assert_close(encoded.latents[0], one_by_one)
    assert encoded.cover.shape == (1, CONFIG.shots, *one_by_one.shape[2:])
    shown = composed.cover.mean((-2, -1))  # the character's share of each frame, the first of which is a latent frame
    torch.testing.assert_close(encoded.cover[0].mean((-2, -1)), torch.stack([shown[:, 0], shown[:, 1:].mean(1)], 1))


def test_scenes_may_have_more_shots_than_the_worlds(world):
    scenes = draw_scenes(replace(CONFIG, shots=7), [9, 2])
    encoded = world.encode(scenes)
    assert encoded.latents.shape[:2] == encoded.cover.shape[:2] == (2, 7)
    assert [len(of_scene) for of_scene in encoded.text] == [8, 8]
    second = world.encode(draw_scenes(replace(CONFIG, shots=7), [2]))
    torch.testing.assert_close(encoded.latents[1:], second.latents)


def test_ranks_together_and_a_resumed_loader_give_the_same_scenes(world):
    def steps(count: int, **share: int) -> list[list[tuple[int, ...]]]:
        loader = EndlessLoader(world, StreamSpec(), 6, 1000, **share)
        return [[batch.layout.positions for batch in step] for step, _ in zip(loader, range(count), strict=False)]

    one = steps(3)
    assert one[0][0] == tuple(range(len(one[0][0])))
    ranks = [steps(3, rank=rank, world_size=2) for rank in range(2)]
    for whole, first, second in zip(one, *ranks, strict=True):
        assert sorted(whole[0]) == sorted(sum(first + second, ()))  # in whatever packs
    assert steps(2, start_position=len(one[0][0])) == one[1:]
    accumulated = steps(1, accumulation=2)
    assert sorted(sum(accumulated[0], ())) == sorted(one[0][0])


def test_held_out_scenes_are_no_training_scenes(world):
    loader = EndlessLoader(world, StreamSpec(), 6, 1000, validation=3)
    (batch,) = loader.held_out()
    assert batch.num_shots == 3 * CONFIG.shots
    trained = next(iter(loader))[0].latents
    assert not any(torch.equal(a, b) for a, b in zip(batch.latents, trained, strict=False))
    ranks = [EndlessLoader(world, StreamSpec(), 6, 1000, validation=3, rank=n, world_size=2) for n in range(2)]
    shares = [[position for batch in rank.held_out() for position in batch.layout.positions] for rank in ranks]
    assert shares == [[0, 2], [1]]


def test_what_does_not_fit_is_told(world):
    with pytest.raises(DataError, match="batch_tokens"):
        EndlessLoader(world, StreamSpec(), 6, 100)
    encoders = build_encoders(EncodersConfig(), vocabulary())
    with pytest.raises(DataError, match="take 5 frames"):
        RecallWorld(RecallConfig(frames=6), encoders.codec, encoders.text, encoders.save)
    with pytest.raises(UserError, match=r"recall\.characters=1"):
        RecallConfig(characters=1)
    RecallConfig(seed=2**64 - 1)
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=rf"recall\.seed={seed} must be a whole number from 0 to {2**64 - 1}"):
            RecallConfig(seed=seed)


def test_the_largest_seed_draws_scenes():
    assert len(draw_scenes(RecallConfig(seed=2**64 - 1), range(3))) == 3
