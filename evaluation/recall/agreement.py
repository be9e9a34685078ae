"""This module measures whether names keep their looks over whole stories that a model makes of their captions alone.

No caption tells looks, so a model is free to choose them, and what counts is agreement: how often a shot shows the fur
and outfit of the last shot before that showed its name, minus how often shots of different names show the same. One
look copied everywhere agrees with everything, which is a difference of 0.

Shape letters: B stories, S shots, A looks (fur and outfit), Q distances in shots.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.loading.endless import EncodedScenes, RecallWorld
from data.storyworld.recall_scenes import HELD_OUT, draw_scenes
from evaluation.recall.bench import LOOKS, Reader, attributes, read
from moc import MoCConfig
from moc.diffusion import Flow, SamplingConfig, Story, noise_key, sample_shots
from moc.training import Parallel

RESAMPLES = 2000


def make_stories(
    world: RecallWorld, count: int, shots: int, model: Any, moc: MoCConfig, flow: Flow, sampling: SamplingConfig,
    parallel: Parallel,
) -> tuple[EncodedScenes, Tensor]:  # fmt: skip
    """Has a model make so many stories of the captions of scenes that no training saw. Returns the true scenes and the
    stories' latents, fp32 [B, S, C, T, H, W]."""
    true = world.encode(draw_scenes(replace(world.config, shots=shots), range(HELD_OUT, HELD_OUT + count)))
    shapes = [tuple(shot.shape) for shot in true.latents[0]]
    made = []
    for number, text in enumerate(true.text):
        keys = [noise_key(sampling.seed, number * shots + shot) for shot in range(shots)]
        story = Story(shapes, text, text, noise_keys=keys)
        with parallel.autocast():
            done = dict(sample_shots(model, model.stream, moc, flow, story, sampling))
        made.append(torch.stack([done[shot] for shot in range(shots)]))
    return true, torch.stack(made)


def story_scores(true: EncodedScenes, made: Tensor, reader: Reader) -> dict[str, Any]:
    """Returns how the looks that a reader sees in stories [B, S, C, T, H, W] agree, as plain numbers. name, place: the
    shares of shots that show what their caption says."""
    seen = {name: values.view(made.shape[:2]) for name, values in read(reader, made.flatten(0, 1)).items()}
    asked = attributes(true.scenes)
    looks = torch.stack([seen[name] for name in LOOKS], dim=-1).numpy()
    shares = {name: round(float((seen[name] == asked[name]).float().mean()), 4) for name in ("name", "place")}
    return {"stories": len(made), "shots": made.shape[1], **shares} | agreement(asked["name"].numpy(), looks)


def agreement(names: np.ndarray, looks: np.ndarray) -> dict[str, Any]:
    """Compares looks [B, S, A] of shots by their names [B, S].

    Returns the share of equal looks of `same` names, each with the last shot before of its name, and of `different`
    ones, and the `difference` of both as [mean, low, high], a 95 % interval from stories drawn anew; over all distances
    and `by_distance` in shots, with the number of same pairs. A distance at which no name returns is left out.
    """
    counts = np.stack([_counts(*story) for story in zip(names, looks, strict=True)])  # [B, Q, 4]
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    of_draws = np.einsum("rb,bqc->rqc", draws, counts)
    by_distance = {
        distance + 1: _told(counts[:, distance].sum(0), of_draws[:, distance])
        for distance in range(counts.shape[1])
        if counts[:, distance, 1].any() and counts[:, distance, 3].any()
    }
    return _told(counts.sum((0, 1)), of_draws.sum(1)) | {"by_distance": by_distance}


def _counts(names: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """Counts the looks of one story that agree, and all looks, by distance: float64 [Q, 4], of the same name and then
    of different ones."""
    shots, num_looks = looks.shape
    counts = np.zeros((shots - 1, 4))
    for shot in range(1, shots):
        before = np.arange(shot)
        equal = (looks[shot] == looks[:shot]).sum(-1)
        same = names[:shot] == names[shot]
        last = before[same][-1:]
        for pairs, column in ((last, 0), (before[~same], 2)):
            np.add.at(counts, (shot - pairs - 1, column), equal[pairs])
            np.add.at(counts, (shot - pairs - 1, column + 1), num_looks)
    return counts


def _told(counts: np.ndarray, of_draws: np.ndarray) -> dict[str, Any]:
    """Returns what the record tells of counts [4], as `_counts` has them. of_draws: [R, 4], of stories drawn anew."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may have no pair of a kind
        shares, of_draws = (np.stack([c[..., 0] / c[..., 1], c[..., 2] / c[..., 3]]) for c in (counts, of_draws))
    low, high = np.nanpercentile(of_draws[0] - of_draws[1], (2.5, 97.5))
    return {
        "same": round(float(shares[0]), 4),
        "different": round(float(shares[1]), 4),
        "difference": [round(float(value), 4) for value in (shares[0] - shares[1], low, high)],
        "pairs": int(counts[1]) // len(LOOKS),
    }
