"""These tests are about training through CUDA graphs: pytest -m gpu tests/moc/test_graphs_gpu.py"""

from collections.abc import Iterator

import pytest
import torch

from moc import MoCConfig
from moc.batch import Batch, Sample, make_batch
from moc.diffusion import Flow
from moc.schedule import MoCSchedule, Stage
from moc.training import Trainer, TrainerConfig
from moc.training.optim import OptimConfig
from moc.training.parallel import Parallel
from models import ModelConfig, build_model

pytestmark = pytest.mark.gpu

CONFIG = MoCConfig(chunk_tokens=16, top_k=2)
BY_MASS = MoCConfig(chunk_tokens=16, top_k=2, descriptor_subchunks=2)
LENGTHS = ((3, 2, 4), (3, 2, 4), (2, 5), (3, 2, 4), (2, 5), (2, 5), (3, 2, 4), (2, 5))  # latent frames of each step


def sample(position: int, frames: tuple[int, ...]) -> Sample:
    generator = torch.Generator().manual_seed(position)
    latents = [torch.randn(8, length, 8, 8, generator=generator) for length in frames]
    text = [torch.randn(5, 32, generator=generator) for _ in range(len(frames) + 1)]
    return Sample(latents, text, position)


class Packs:
    """This is a step of two samples of some lengths each, in one micro-batch or in two."""

    def __init__(self, stream, micro_batches: int) -> None:
        self.stream, self.micro_batches = stream, micro_batches

    def __iter__(self) -> Iterator[list[Batch]]:
        for step, frames in enumerate(LENGTHS):
            samples = [sample(2 * step + n, frames) for n in range(2)]
            batches = [samples] if self.micro_batches == 1 else [[x] for x in samples]
            yield [make_batch(batch, self.stream, CONFIG.chunk_tokens) for batch in batches]

    def state(self) -> dict:
        return {"position": 0}


@pytest.mark.parametrize("family", ["mmdit", "wan"])
@pytest.mark.parametrize("moc", [CONFIG, BY_MASS, MoCConfig(dense=True)], ids=["moc", "log-sum-exp", "dense"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_steps_through_graphs_are_those_without(tmp_path, family, moc, micro_batches):
    """Drops are on, streams are of two kinds, chunks have another size from step 5 on, and one step in three is
    surveyed and takes no graph."""

    def losses(graphs: int) -> list[float]:
        torch.manual_seed(0)
        model = build_model(
            ModelConfig(family=family, dim=96, num_layers=2, num_heads=3, ffn_dim=192), latent_channels=8, text_dim=32
        )
        length = TrainerConfig(num_steps=len(LENGTHS), log_every=3, cuda_graphs=graphs, checkpoint_every=0)
        schedule = MoCSchedule([Stage(step=5, chunk_tokens=32, top_k=1)] if not moc.dense else [])
        optim = OptimConfig(lr=1e-2, warmup_steps=1)
        folder = tmp_path / f"{graphs}"
        trainer = Trainer(Parallel(), model, Flow(), moc, schedule, optim, length, folder, 0, lambda _: None)
        found: list[float] = []
        captured: list[int] = []  # the number of graphs after each step
        for packs in Packs(model.stream, micro_batches):
            trainer._train_step(packs)
            found.append(trainer._look(None).loss)
            captured.append(sum(kind.graph is not None for kind in trainer._pass._kinds))
        if schedule.stages:
            assert not captured[5]  # graphs of earlier settings are dropped
        if graphs:
            assert max(captured) == (1 if schedule.stages and micro_batches == 1 else 2)
        else:
            assert not any(captured)
        return found

    assert losses(8) == pytest.approx(losses(0), rel=1e-3)
