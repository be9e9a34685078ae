"""These tests are about whole stories: agreement of looks by name and distance, and stories that a known model
makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.loading.endless import RecallWorld
from data.storyworld import vocabulary
from data.storyworld.recall_scenes import HELD_OUT, RecallConfig, draw_scenes
from evaluation.recall.agreement import agreement, make_stories, story_scores
from evaluation.recall.bench import Reader, attributes, read
from moc import MoCConfig, StreamSpec
from moc.diffusion import Flow, SamplingConfig
from moc.training import Parallel, ParallelConfig
from models import EncodersConfig, build_encoders

CONFIG = RecallConfig(size=[32, 48], frames=1, shots=3, paintings=1, characters=3)


def test_agreement_is_of_a_name_with_its_last_shot_and_of_others_with_all():
    """The shots show A, B, A, A: A keeps its fur always and its outfit once; B has the first A's fur."""
    names = np.array([[0, 1, 0, 0]])
    looks = np.array([[[1, 1], [1, 2], [1, 3], [1, 3]]])
    found = agreement(names, looks)
    assert found["same"] == 0.75  # the pairs of shots (0, 2) and (2, 3)
    assert found["different"] == 0.5  # the pairs of shot 1 with 0, 2 and 3
    assert found["difference"] == [0.25, 0.25, 0.25]  # drawing from one story gives that story again
    assert found["pairs"] == 2
    assert {distance: (of["same"], of["pairs"]) for distance, of in found["by_distance"].items()} == {
        1: (1.0, 1),
        2: (0.5, 1),
    }


def test_one_look_everywhere_and_looks_at_random_differ_by_nothing():
    generator = np.random.default_rng(0)
    names = generator.integers(0, 4, (200, 8))
    assert agreement(names, np.ones((200, 8, 2), int))["difference"] == [0.0, 0.0, 0.0]
    middle, low, high = agreement(names, generator.integers(0, 6, (200, 8, 2)))["difference"]
    assert low < 0 < high
    assert abs(middle) < 0.05
    looks = np.repeat(names[..., None], 2, axis=-1)
    assert agreement(names, looks)["difference"] == [1.0, 1.0, 1.0]


def test_the_interval_of_stories_is_of_95_percent():
    """Of 400 stories every second one keeps its looks, so that their mean has a standard error of 0.5 / 20."""
    names, looks = np.array([[0, 1, 0]] * 400), np.zeros((400, 3, 2), int)
    looks[:, 1], looks[::2, 2] = 2, 1
    middle, low, high = agreement(names, looks)["difference"]
    assert middle == 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / 20, rel=0.08)


class Oracle(torch.nn.Module):
    """An oracle draws every shot of its stories as it truly is: it knows them by their texts."""

    stream = StreamSpec()

    def __init__(self) -> None:
        super().__init__()
        self.shots: dict[bytes, torch.Tensor] = {}
        self.noise: list[torch.Tensor] = []

    def forward(self, latents, sigma, text, layout, config, drops=None, on_routes=None):
        self.noise += [x for x, s in zip(latents, sigma, strict=True) if s == 1]
        truth = [self.shots[text[0].numpy().tobytes() + one.numpy().tobytes()] for one in text[1:]]
        return [(x - true) / s if s else torch.zeros_like(x) for x, true, s in zip(latents, truth, sigma, strict=True)]


@pytest.mark.parametrize("lag", [0.0, 0.3, 1.0])
def test_stories_are_made_of_their_captions_whatever_the_way(lag):
    encoders = build_encoders(EncodersConfig(), vocabulary())
    world = RecallWorld(CONFIG, encoders.codec, encoders.text, encoders.save)
    reader = Reader(world.latent_channels * world.latent_frames, 16).eval()
    model, count, shots = Oracle(), 3, 4
    sampling = SamplingConfig(steps=2, guidance_scale=1.0, lag=lag, history_sigma=0)
    known = world.encode(draw_scenes(replace(CONFIG, shots=shots), range(HELD_OUT, HELD_OUT + count)))
    for text, latents in zip(known.text, known.latents, strict=True):
        for one, latent in zip(text[1:], latents, strict=True):
            model.shots[text[0].numpy().tobytes() + one.numpy().tobytes()] = latent
    true, made = make_stories(
        world, count, shots, model, MoCConfig(dense=True), Flow(), sampling, Parallel(ParallelConfig("cpu"))
    )
    torch.testing.assert_close(made, true.latents, atol=1e-5, rtol=1e-5)
    assert len({noise.sum().item() for noise in model.noise}) == count * shots  # each shot of each story has its own
    found = story_scores(true, made, reader)
    assert (found["stories"], found["shots"]) == (count, shots)
    seen = read(reader, true.latents.flatten(0, 1))["place"].view(count, shots)
    assert found["place"] == pytest.approx(float((seen == attributes(true.scenes)["place"]).float().mean()), abs=1e-4)
