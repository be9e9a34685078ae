"""This module takes the trainer's own steps without a run: on films of random latents, and nothing is written."""

import time
from pathlib import Path
from typing import Any

import torch

from moc import Execution, MoCConfig
from moc.batch import Batch, Sample
from moc.diffusion import Flow
from moc.kernels import dense
from moc.kernels.dense import DenseKernel
from moc.schedule import MoCSchedule
from moc.training import OptimConfig, Parallel, Trainer, TrainerConfig
from models import ModelConfig

TEXT_TOKENS = 64  # of each caption
CAPTIONS = 8  # the most that have text, with the global one: Wan takes 512 rows of it


def bare_trainer(
    parallel: Parallel, model: Any, moc: MoCConfig, flow: Flow | None = None, optim: OptimConfig | None = None
) -> Trainer:
    """Returns a trainer of a model that has no run. flow: null has no history in training, so that every shot is a
    target."""
    chosen = flow or Flow(history_rate=0), moc, MoCSchedule(), optim or OptimConfig(), TrainerConfig()
    return Trainer(parallel, model, *chosen, Path("no run"), 0, lambda _: None)


def dense_kernels(model: ModelConfig, execution: Execution, device: torch.device) -> tuple[DenseKernel, DenseKernel]:
    """Returns the dense kernel that a model's attention takes in bf16, and the one that it takes for runs of different
    lengths."""
    q = torch.empty(0, 1, model.dim // model.num_heads, dtype=torch.bfloat16, device=device)
    kernel = dense.choose(q, execution.dense_kernel, execution.deterministic)
    return kernel, dense.choose_varlen(kernel, q) or kernel


def random_film(shots: int, latent: list[int], text_dim: int, position: int = 0) -> Sample:
    """Returns a film of random latents and captions, fp32.

    latent: channels, frames, height and width of each shot. position: the sample's in a run, which keys its noise.
    """
    tokens = [TEXT_TOKENS if index < CAPTIONS else 0 for index in range(shots + 1)]
    text = [torch.randn(number, text_dim) for number in tokens]
    return Sample([torch.randn(*latent) for _ in range(shots)], text, position)


def timed_step(trainer: Trainer, batch: Batch) -> tuple[float, float]:
    """Takes a step, which all processes begin together; returns its seconds and its loss."""
    trainer.parallel.wait()
    start = time.perf_counter()
    trainer._train_step([batch])
    loss = trainer._look(None).loss  # waits for the device
    trainer.parallel.wait()
    return time.perf_counter() - start, loss
