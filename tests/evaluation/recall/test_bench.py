"""These tests are about the recall bench: models whose memory is known score as they must."""

import pytest
import torch

from data.loading.endless import RecallWorld
from data.storyworld import vocabulary
from data.storyworld.recall_scenes import HELD_OUT, RecallConfig, draw_scenes
from evaluation.recall.bench import ATTRIBUTES, Reader, RecallBench, attributes, read, summary, train_reader
from moc import MoCConfig, StreamSpec
from moc.diffusion import Flow
from moc.training import Parallel, ParallelConfig
from models import EncodersConfig, ModelConfig, build_encoders, build_model
from models.mmdit import MMDiT

CONFIG = RecallConfig(size=[32, 48], frames=1, shots=3, paintings=1, characters=3)
CPU = Parallel(ParallelConfig("cpu"))
SCENES = 12


@pytest.fixture(scope="module")
def world() -> RecallWorld:
    encoders = build_encoders(EncodersConfig(), vocabulary())
    return RecallWorld(CONFIG, encoders.codec, encoders.text, encoders.save)


@pytest.fixture(scope="module")
def reader(world) -> Reader:
    """It has barely learned, which is enough to tell whether a shot is read as its true one is."""
    return train_reader(world, steps=3, batch=4)


class Oracle(torch.nn.Module):
    """An oracle knows the true last shot of each held-out scene, or takes the shot before it for that."""

    stream = StreamSpec()

    def __init__(self, world: RecallWorld, copies: bool = False) -> None:
        super().__init__()
        self.world, self.copies = world, copies

    def forward(self, latents, sigma, text, layout, config, drops=None, on_routes=None):
        scenes = draw_scenes(CONFIG, [HELD_OUT + position for position in layout.positions])
        truth = self.world.encode_latents(scenes)
        out = [torch.zeros_like(x) for x in latents]
        for scene, shots in enumerate(truth):
            last = (scene + 1) * CONFIG.shots - 1
            assert all(torch.equal(latents[last - 2 + i], shots[i]) for i in range(2))  # the history is clean
            assert not sigma[last - 2 : last].any()
            out[last] = (latents[last] - shots[-2 if self.copies else -1]) / sigma[last]
        return out


def run(world, reader, model, config=None):
    bench = RecallBench(world, reader, CPU, steps=3, batch=5)
    return bench.run(model, config or MoCConfig(dense=True), Flow(), SCENES)


def test_a_model_that_knows_the_truth_is_read_as_the_truth_and_has_no_loss(world, reader):
    tally = run(world, reader, Oracle(world))
    scenes = draw_scenes(CONFIG, range(HELD_OUT, HELD_OUT + SCENES))
    seen = read(reader, world.encode_latents(scenes)[:, -1])
    for name, right in zip(ATTRIBUTES, tally.right.unbind(1), strict=True):
        assert torch.equal(right, seen[name] == attributes(scenes)[name][:, -1])
    assert tally.loss.max() < 1e-6
    assert tally.region_loss.max() < 1e-6
    assert tally.distance.tolist() == scenes.distance.tolist()


def test_a_model_that_copies_the_shot_before_is_told_from_one_that_remembers(world, reader):
    tally = run(world, reader, Oracle(world, copies=True))
    scenes = draw_scenes(CONFIG, range(HELD_OUT, HELD_OUT + SCENES))
    seen = read(reader, world.encode_latents(scenes)[:, -2])
    for name, right in zip(ATTRIBUTES, tally.right.unbind(1), strict=True):
        assert torch.equal(right, seen[name] == attributes(scenes)[name][:, -1])
    for name, copied in zip(("fur", "outfit"), tally.copied.unbind(1), strict=True):
        looks = getattr(scenes, name)  # the first character is the one that returns
        pairs = zip(seen[name].tolist(), looks, strict=True)
        expected = [shown != own and shown in others for shown, (own, *others) in pairs]
        assert copied.tolist() == expected
    assert tally.loss.min() > 0.01
    assert (tally.region_loss > tally.loss).float().mean() > 0.5  # characters differ more than places do


def test_routes_of_the_returning_character_are_counted(world, reader):
    sizes = ModelConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=32)
    model = build_model(sizes, world.latent_channels, world.text_dim)
    assert isinstance(model, MMDiT)
    everything = MoCConfig(chunk_tokens=6, top_k=2, text_anchor="global_and_own")
    tally = run(world, reader, model, everything)
    found = summary(tally)
    # Both earlier shots, one chunk each, are routed to, and one of them shows the character.
    assert found["precision"] == [[0.5, 0.5], [0.5, 0.5]]
    assert found["reached"] == [[1.0, 1.0], [1.0, 1.0]]
    # Among 3 x 3 pairs of shots, 6 do not look ahead.
    assert found["sparsity"] == pytest.approx(1 - 6 / 9, abs=1e-4)
    assert found["readings"] == 2 * SCENES
    assert "precision" not in summary(run(world, reader, model))


def test_mass_kept_by_all_routes_is_all_there_is(world, reader):
    sizes = ModelConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=32)
    model = build_model(sizes, world.latent_channels, world.text_dim)
    bench = RecallBench(world, reader, CPU)
    dense, few, all_of_it = MoCConfig(dense=True), MoCConfig(chunk_tokens=6, top_k=1), MoCConfig(chunk_tokens=6)
    whole = bench.mass(model, dense, all_of_it, Flow(), scenes=8)
    assert whole["kept"] == whole["best"] == [[1.0, 1.0], [1.0, 1.0]]
    some = bench.mass(model, dense, few, Flow(), scenes=8)
    assert some["elsewhere"] == whole["elsewhere"]
    kept, best = (torch.tensor(some[name]) for name in ("kept", "best"))
    assert (kept > 0.3).all()
    assert (kept <= best).all()
    assert (best < 0.9).all()
