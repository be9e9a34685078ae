"""These tests are about which micro-batches have a CUDA graph, and where those compute, with a graph played by what it
captures."""

from contextlib import contextmanager

import pytest
import torch

from moc import MoCConfig
from moc.batch import Sample, make_batch
from moc.diffusion import Flow, NoiseLevels
from moc.schedule import Stage
from moc.training.passes import Passes
from models.wan import WanTransformer3DModel
from tests.caches import CHANNELS, TEXT_DIM
from tests.runs import make_trainer


def test_a_shot_that_is_no_target_has_no_loss_and_adds_no_gradient(tmp_path):
    trainer = make_trainer(tmp_path)
    one = batch(trainer.bare_model.stream, (1, 2))
    found = {}
    for targets in ([True, True], [False, True], [False, False]):
        levels = NoiseLevels(torch.tensor([0.3, 0.8]), torch.tensor(targets))
        losses = trainer._pass(one, levels, torch.tensor(0.5), 0, trainer.moc, None, lambda phase: None)
        assert (losses != 0).tolist() == targets
        found[sum(targets)] = [weight.grad for weight in trainer.bare_model.parameters()]
        trainer.optimizer.zero_grad()
    assert not any(grad.any() for grad in found[0])
    assert any(not torch.equal(*pair) for pair in zip(found[1], found[2], strict=True))


@pytest.fixture
def pools(monkeypatch):
    """Yields the pool of each graph that is captured."""
    used, handles = [], iter(range(9))

    @contextmanager
    def capture(graph, pool=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"  # so other threads, such as a loader's, may use CUDA
        used.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {"replay": lambda self: None}))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return used


def batch(stream, frames):
    latents = [torch.randn(CHANNELS, length, 4, 4) for length in frames]
    return make_batch([Sample(latents, [torch.randn(2, TEXT_DIM)] * (len(frames) + 1))], stream, 6)


def make_trainer_with_graphs(tmp_path, monkeypatch, **settings):
    trainer = make_trainer(tmp_path, **settings)
    passes = Passes(trainer.parallel, trainer.model, trainer.flow, seed=0, graphs=2)
    monkeypatch.setattr(passes, "_most", 2)
    monkeypatch.setattr(trainer, "_pass", passes)
    return trainer, passes


def test_graphs_of_one_setting_share_their_memory_and_go_with_it(pools, tmp_path, monkeypatch):
    schedule = [Stage(step=6, top_k=2)]
    trainer, passes = make_trainer_with_graphs(tmp_path, monkeypatch, schedule=schedule, log_every=100)
    streams = ((1, 2), (2, 1), (1, 1))  # two of them get a graph, when they come again
    captured = []
    for frames in (*streams, *streams, streams[0], streams[0]):
        trainer._train_step([batch(trainer.bare_model.stream, frames)])
        captured.append(len(pools))
    assert captured == [0, 0, 0, 1, 2, 2, 2, 3]
    assert pools == [0, 0, 1]
    assert len(passes._kinds) == 1


def test_a_kind_is_of_one_length_of_text_outside_the_stream_too(pools, tmp_path, monkeypatch):
    """A Wan model's layout says nothing of its text; one row, copied to memory for more of them, would fill it all."""
    sizes = {"num_attention_heads": 1, "attention_head_dim": 6, "num_layers": 1, "ffn_dim": 8, "text_dim": TEXT_DIM}
    model = WanTransformer3DModel(in_channels=CHANNELS, out_channels=CHANNELS, **sizes)
    passes = Passes(make_trainer(tmp_path).parallel, model, Flow(), seed=0, graphs=2)
    monkeypatch.setattr(passes, "_most", 2)
    captured = []
    for rows in (3, 1, 3, 1, 2):
        text = [torch.randn(2, TEXT_DIM), torch.randn(rows, TEXT_DIM)]
        one = make_batch([Sample([torch.randn(CHANNELS, 1, 4, 4)], text)], model.stream, 6)
        levels, config = NoiseLevels.equal(0.5, 1), MoCConfig(chunk_tokens=6)
        passes(one, levels, torch.tensor(1.0), 0, config, None, lambda phase: None)
        captured.append(len(pools))
    assert captured == [0, 0, 1, 2, 2]


def test_a_surveyed_step_drops_graphs_of_earlier_settings_and_takes_none(pools, tmp_path, monkeypatch):
    """Every third step is surveyed, and the third is the first of other settings."""
    schedule = [Stage(step=2, top_k=2)]
    trainer, passes = make_trainer_with_graphs(tmp_path, monkeypatch, schedule=schedule, log_every=3)
    kinds = []
    for _ in range(5):
        trainer._train_step([batch(trainer.bare_model.stream, (1, 2))])
        kinds.append((len(passes._kinds), len(pools)))
    assert kinds == [(1, 0), (1, 1), (0, 1), (1, 1), (1, 2)]
