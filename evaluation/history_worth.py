"""This module measures what a shot's history is worth: its loss at fixed noise after the shots before it, beside its
loss alone.

The last shot of each scene is the target; the shots before it are given true and clean. The same noise is added to it
three times: `alone`, without any history; after its own `history`; and after that of an `other` scene. The last helps
a model that takes only the style of a film from its history; it cannot help one that remembers what was shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import moc
from moc import MoCConfig, Sample, StreamSpec
from moc.batch import stream_of
from moc.diffusion import Flow
from moc.expected_cost import GLOBAL_TEXT, ExpectedCosts
from moc.training import Parallel

SIGMAS = (0.5, 0.8, 0.95)
SCENES_AT_ONCE = 16


@dataclass(frozen=True)
class HistoryLosses:
    """These are losses of target shots, fp32 [targets, draws, sigmas] each: without a history, after their own, and
    after that of another sample."""

    alone: Tensor
    history: Tensor
    other: Tensor


@torch.no_grad()
def history_losses(
    model: Any,
    config: MoCConfig,
    flow: Flow,
    samples: Sequence[Sample],
    parallel: Parallel,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 4,
) -> HistoryLosses:
    """Returns the losses of the last shots of `samples`, of two shots at least each.

    The histories of others are those of the sample half the list away. draws: of the noise, which is keyed by the
    draw's number and the target's index in the list, whatever the model.
    """
    model.eval()
    samples = [replace(sample, position=index) for index, sample in enumerate(samples)]
    others = [samples[(index + len(samples) // 2) % len(samples)] for index in range(len(samples))]
    kinds = [
        [_after(sample, None) for sample in samples],
        [_after(sample, sample) for sample in samples],
        [_after(sample, other) for sample, other in zip(samples, others, strict=True)],
    ]
    losses = []
    for kind in kinds:
        errors = [
            _errors(model, config, flow, kind[at : at + SCENES_AT_ONCE], parallel, sigmas, draws)
            for at in range(0, len(kind), SCENES_AT_ONCE)
        ]
        losses.append(torch.cat(errors))
    return HistoryLosses(*losses)


def expected_sparsity(samples: Sequence[Sample], spec: StreamSpec, config: MoCConfig) -> float:
    """Returns the sparsity of attention over all these scenes together, by `moc.expected_cost`."""
    pairs = dense = 0.0
    for global_text, shots in (stream_of(sample, spec) for sample in samples):
        costs = ExpectedCosts(global_text, shots, config)
        cost = costs.of(range(GLOBAL_TEXT, len(shots)), range(len(shots)))
        pairs, dense = pairs + cost.pairs, dense + cost.dense
    return 1 - pairs / dense


def _after(sample: Sample, history: Sample | None) -> Sample:
    """Returns the last shot of a sample under its captions, after the history of another, or after none."""
    given = (history.latents[:-1], history.text[1:-1], list(history.cuts)[:-1]) if history else ([], [], [])
    latents, text, cuts = given
    return replace(
        sample,
        latents=[*latents, sample.latents[-1]],
        text=[sample.text[0], *text, sample.text[-1]],
        cuts=[*cuts, True] if len(cuts) == len(latents) else (),
    )


def _errors(
    model: Any,
    config: MoCConfig,
    flow: Flow,
    samples: list[Sample],
    parallel: Parallel,
    sigmas: Sequence[float],
    draws: int,
) -> Tensor:
    """Returns mean squared velocity errors of the last shots: fp32 [targets, draws, sigmas], on the CPU."""
    batch = moc.make_batch(samples, model.stream, config.chunk_tokens).to(parallel.device)
    alone = moc.make_batch([_after(sample, None) for sample in samples], model.stream, config.chunk_tokens)
    alone = alone.to(parallel.device)
    ends = torch.tensor([len(sample.latents) for sample in samples]).cumsum(0) - 1
    is_last = torch.zeros(batch.num_shots, device=parallel.device)
    is_last[ends.to(parallel.device)] = 1
    found = torch.empty(len(samples), draws, len(sigmas))
    for draw in range(draws):
        noise = flow.draw_noise(alone, draw)
        for level, sigma in enumerate(sigmas):
            shots = list(batch.latents)
            for end, latent, n in zip(ends.tolist(), alone.latents, noise, strict=True):
                shots[end] = flow.add_noise(latent, n, sigma)
            with parallel.autocast():
                out = model(shots, sigma * is_last, batch.text, batch.layout, config)
            for index, (end, latent, n) in enumerate(zip(ends.tolist(), alone.latents, noise, strict=True)):
                found[index, draw, level] = (out[end].float() - flow.velocity(latent, n)).square().mean()
    return found
