"""These tests are about what a history is worth: nothing to own-shot attention, at equal noise for every history."""

from dataclasses import replace

import pytest
import torch

import moc
from evaluation.history_worth import expected_sparsity, history_losses
from moc import MoCConfig, Sample, make_batch
from moc.cost import attention_cost
from moc.diffusion import Flow
from moc.training import Parallel, ParallelConfig, rivals
from models import ModelConfig, build_model
from tests.caches import CHANNELS, TEXT_DIM
from tests.weights import randomized

CPU = ParallelConfig("cpu")


def samples(lengths: list[int]) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            [torch.randn(CHANNELS, 1 + shot % 2, 4, 4, generator=generator) for shot in range(length)],
            # There is no global caption, since a history would move the last shot away from it.
            [torch.randn(2 if group else 0, TEXT_DIM, generator=generator) for group in range(1 + length)],
            cuts=[True] * length,
        )
        for length in lengths
    ]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomized(build_model(ModelConfig(dim=24, num_layers=2, num_heads=1, ffn_dim=32), CHANNELS, TEXT_DIM))


def test_a_history_is_worth_something_only_to_what_looks_at_it(model):
    found = {
        name: history_losses(model, config, Flow(), samples([3, 2, 4, 3]), Parallel(CPU), sigmas=(0.8,), draws=2)
        for name, config in rivals(MoCConfig(chunk_tokens=4, top_k=2)).items()
    }
    for name, losses in found.items():
        assert losses.alone.shape == losses.history.shape == losses.other.shape == (4, 2, 1)
        close = [torch.allclose(losses.alone, x, rtol=1e-4) for x in (losses.history, losses.other)]
        assert close == [name == "own shot only"] * 2
    # A shot alone has nothing to route to, so dense attention and MoC are the same.
    assert torch.allclose(found["dense"].alone, found["MoC"].alone, rtol=1e-4)


class Recorder(torch.nn.Module):
    """This model notes the last shot, the texts and the cuts of each call, and predicts nothing."""

    stream = moc.StreamSpec()

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def forward(self, latents, sigma, text, layout, config):
        cuts = [shot.cut for _, shots in layout.samples for shot in shots]
        self.calls.append((latents[-1], list(text), cuts))
        return [torch.zeros_like(x) for x in latents]


def test_a_shot_comes_after_a_history_with_its_captions_at_the_same_noise():
    """At sigma 1 the last shot is its noise."""
    recorder, (one, other) = Recorder(), samples([3, 3])
    other = replace(other, cuts=[True, False, True])
    config = MoCConfig(chunk_tokens=4)
    history_losses(recorder, config, Flow(), [one, other], Parallel(CPU), sigmas=(1.0,), draws=2)
    alone, history, after_other = (recorder.calls[at : at + 2] for at in (0, 2, 4))
    for kind in (alone, history, after_other):
        assert [torch.equal(a[0], b[0]) for a, b in zip(kind, alone, strict=True)] == [True, True]
        assert not torch.equal(kind[0][0], kind[1][0])
    for (_, text, cuts), histories in ((history[0], [one, other]), (after_other[0], [other, one])):
        for scene, given, at in zip((one, other), histories, (0, 4), strict=True):
            expected = [scene.text[0], *given.text[1:3], scene.text[3]]
            assert all(torch.equal(a, b) for a, b in zip(text[at : at + 4], expected, strict=True))
        assert cuts == [cut for given in histories for cut in (*given.cuts[:2], True)]
    again = Recorder()
    history_losses(again, config, Flow(), [other], Parallel(CPU), sigmas=(1.0,), draws=1)
    assert not torch.equal(again.calls[0][0], alone[0][0])  # noise belongs to a target's index in the list


def test_sparsity_is_that_of_all_scenes_together(model):
    """It is `moc.cost`'s where chunks are of one length: long scenes have more pairs, so they count for more."""
    scenes, config = samples([6, 1, 2]), MoCConfig(chunk_tokens=4, top_k=2, text_anchor="none")
    layout = make_batch(scenes, model.stream, config.chunk_tokens).layout
    tensors = torch.randn(2, layout.num_tokens, 1, 8)
    cost = attention_cost(layout, config, moc.route(*tensors, layout, config), 1, 8)
    assert expected_sparsity(scenes, model.stream, config) == pytest.approx(cost.sparsity)
    assert expected_sparsity(scenes, model.stream, MoCConfig(dense=True)) == 0


def test_losses_are_those_of_the_last_shot_at_its_own_noise(model):
    """A scene tested alone, and beside others in a pack, has the losses that Flow gives."""
    scenes, flow, config = samples([3, 2]), Flow(), MoCConfig(chunk_tokens=4, top_k=2)
    losses = history_losses(model, config, flow, scenes, Parallel(CPU), sigmas=(0.5, 0.8), draws=2)
    alone = history_losses(model, config, flow, scenes[:1], Parallel(CPU), sigmas=(0.5, 0.8), draws=2)
    assert torch.allclose(losses.history[:1], alone.history, rtol=1e-4)
    assert torch.equal(alone.history, alone.other)  # one scene has no other scene, so its own history is used
    shown = [replace(sample, latents=[10 * x for x in sample.latents[:-1]] + sample.latents[-1:]) for sample in scenes]
    changed = history_losses(model, config, flow, shown, Parallel(CPU), sigmas=(0.5, 0.8), draws=2)
    assert torch.equal(changed.alone, losses.alone)
    assert not torch.allclose(changed.history, losses.history, rtol=1e-5)
