"""This module tests whether a model remembers: a returning name's looks are read from the shot it makes after a true
history.

The last shot of a recall scene (data/storyworld/recall_scenes.py) returns to a name that one earlier shot showed. Its
history is given clean and it alone is sampled, or its loss is taken at set noise; a reader then tells fur and outfit.
The reader is a small network of its own, trained on true latents of the same world, which knows no history; its
accuracy on true shots is the ceiling of every score.

Shape letters: B scenes, S shots, C T H W of a latent, M layers, N heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moc
from data.loading.endless import EncodedScenes, RecallWorld
from data.storyworld.recall_scenes import (
    COLOUR_NAMES,
    HELD_OUT,
    NAMES,
    PLACE_NAMES,
    RecallConfig,
    RecallScenes,
    draw_scenes,
)
from evaluation.estimates import half_width, share_interval
from evaluation.recall.mass import Mass, watched
from moc import MoCConfig, ShotLayout
from moc.config import DropKey
from moc.cost import attention_cost
from moc.diffusion import Flow
from moc.errors import UserError
from moc.files import beside
from moc.training import Parallel

LOOKS = ("fur", "outfit")
ATTRIBUTES = {"fur": len(COLOUR_NAMES), "outfit": len(COLOUR_NAMES), "name": len(NAMES), "place": len(PLACE_NAMES)}
SIGMAS = (0.8, 0.95)
COVERED = 0.5  # a latent value is in the recalled region where the character covers more of its pixels
MASS_AT_ONCE = 8  # scenes at once, since their attention is computed as whole matrices
BLOCK = 64  # scenes in one mean loss; models are compared by the means of the same scenes and noise
READER_SCENES = 1 << 41  # the first index of the scenes that readers learn from
READER_SIGMA, READER_LR = 0.3, 1e-3  # the highest noise level and the learning rate of a reader's training


class Reader(nn.Module):
    """The reader reads a shot's attributes from its latent [N, C, T, H, W]: it returns logits by attribute, each [N,
    values]."""

    def __init__(self, channels: int, width: int = 256) -> None:
        """Builds the network. channels: of all latent frames together."""
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(4)
        )
        self.heads = nn.ModuleDict({name: nn.Linear(2 * width, count) for name, count in ATTRIBUTES.items()})

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        x = self.enter(latents.flatten(1, 2))
        for block in self.blocks:
            x = x + block(x)
        x = F.silu(x)
        pooled = torch.cat([x.amax((2, 3)), x.mean((2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}


def attributes(scenes: RecallScenes) -> dict[str, Tensor]:
    """Returns what each shot shows: int64 [B, S] by attribute."""
    found = {name: scenes.of_shots(getattr(scenes, name)) for name in (*LOOKS, "name")} | {"place": scenes.place}
    return {name: torch.from_numpy(values) for name, values in found.items()}


def kept_reader(world: RecallWorld, file: Path, steps: int, width: int = 256, batch: int = 32) -> Reader:
    """Returns the reader that a file holds, on the world's device; where there is none, trains it and writes it."""
    if not file.exists():
        reader = train_reader(world, steps, width, batch)
        with beside(file) as partial:
            save_file(reader.state_dict(), partial)
    weights = load_file(file)
    reader = Reader(world.latent_channels * world.latent_frames, len(weights["enter.weight"])).to(world.stock.device)
    reader.load_state_dict(weights)
    return reader.eval().requires_grad_(False)


def train_reader(world: RecallWorld, steps: int, width: int = 256, batch: int = 32) -> Reader:
    """Trains a reader of the world's true shots; noise of a level up to `READER_SIGMA` on them teaches it to bear a
    sampled shot's flaws."""
    device, shots = world.stock.device, world.config.shots
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        reader = Reader(world.latent_channels * world.latent_frames, width).to(device)
        optimizer = torch.optim.AdamW(reader.parameters(), READER_LR)
        decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, READER_LR, total_steps=max(steps, 2))
        for step in range(steps):
            first = READER_SCENES + step * batch
            scenes = draw_scenes(world.config, range(first, first + batch))
            latents = world.encode_latents(scenes).flatten(0, 1)
            sigma = READER_SIGMA * torch.rand(batch * shots, 1, 1, 1, 1, device=device)
            logits = reader((1 - sigma) * latents + sigma * torch.randn_like(latents))
            truth = {name: values.flatten().to(device) for name, values in attributes(scenes).items()}
            loss = torch.stack([F.cross_entropy(logits[name], truth[name]) for name in ATTRIBUTES]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def read(reader: Reader, latents: Tensor) -> dict[str, Tensor]:
    """Returns the values seen in shots [N, C, T, H, W]: int64 [N] by attribute, on the CPU."""
    return {name: logits.argmax(-1).cpu() for name, logits in reader(latents).items()}


def accuracy(reader: Reader, world: RecallWorld, scenes: int = 512, batch: int = 64) -> dict[str, float]:
    """Returns the share of true shots, of scenes that nobody trained on, that the reader reads right."""
    right: dict[str, list[Tensor]] = {name: [] for name in ATTRIBUTES}
    for first in range(HELD_OUT, HELD_OUT + scenes, batch):
        drawn = draw_scenes(world.config, range(first, first + batch))
        seen = read(reader, world.encode_latents(drawn).flatten(0, 1))
        for name, values in attributes(drawn).items():
            right[name].append(seen[name] == values.flatten())
    return {name: float(torch.cat(lists).float().mean()) for name, lists in right.items()}


@dataclass
class Tally:
    """A tally collects what was found in many scenes. All tensors but those of the routes have a row for each scene.

    distance [B]: in shots. right: bool [B, 4], by ATTRIBUTES. copied: bool [B, 2], whether the answer is wrong and the
    look of another of the scene. loss, region_loss: fp32 [B, sigmas], for the whole last shot and for its character.
    sparsity [B]: of video-video pairs, the mean over layers of the scene's batch.
    hits, routed, reached, asked: [M, N], how many routes of the character's tokens lead to the shot which shows it, how
    many routes they have, how many of these tokens have such a route, and how many tokens there are.
    """

    distance: Tensor
    right: Tensor
    copied: Tensor
    loss: Tensor
    region_loss: Tensor
    sparsity: Tensor
    hits: Tensor
    routed: Tensor
    reached: Tensor
    asked: Tensor

    @classmethod
    def join(cls, tallies: Sequence["Tally"]) -> "Tally":
        sums = ("hits", "routed", "reached", "asked")
        return cls(**{
            f.name: (sum if f.name in sums else torch.cat)([getattr(tally, f.name) for tally in tallies])
            for f in fields(cls)
        })  # fmt: skip


def check_shots(shots: Sequence[int]) -> None:
    """Raises UserError where a number of shots is too small for a scene of the bench."""
    if any(number < 2 for number in shots):
        raise UserError(f"shots={list(shots)} must each be at least 2: one to show looks, one to recall them")


class LastShots:
    """This object samples the last shots of recall scenes after their true history, of the same noise by all models."""

    def __init__(self, world: RecallWorld, parallel: Parallel, steps: int = 10, seed: int = 0) -> None:
        """Sets the Euler steps of a shot and the seed of the noise."""
        self.world, self.parallel, self.steps, self.seed = world, parallel, steps, seed
        self._layout: ShotLayout | None = None  # kept for the next batch, which mostly has the same layout

    @torch.no_grad()
    def sample(self, model: Any, config: MoCConfig, flow: Flow, encoded: EncodedScenes, positions: list[int]) -> Tensor:
        """Returns the last shots of scenes as a model makes them: fp32 [B, C, T, H, W]."""
        _, noise, velocity = self._asked(model, config, flow, encoded, positions)
        return self._sampled(flow, noise, velocity)

    def _asked(
        self, model: Any, config: MoCConfig, flow: Flow, encoded: EncodedScenes, positions: list[int]
    ) -> tuple[moc.Batch, Tensor, Callable[..., Tensor]]:
        """Returns scenes as a batch, the noise of their last shots, and a function from these shots at a noise level to
        their velocity."""
        samples = encoded.samples(positions)
        batch = moc.make_batch(samples, model.stream, config.chunk_tokens, self._layout).to(self.parallel.device)
        self._layout = batch.layout
        noise = flow.draw_noise(batch, self.seed).stacked().unflatten(0, encoded.latents.shape[:2])[:, -1]
        # Routes that are drawn at random are drawn in tests too.
        drops = DropKey(self.seed, 0) if config.top_k == 0 and config.drop_in_rate and not config.dense else None

        def velocity(last: Tensor, sigma: float, on_routes=None) -> Tensor:
            return self._velocity(model, encoded, batch, config, last, sigma, drops=drops, on_routes=on_routes)

        return batch, noise, velocity

    def _sampled(self, flow: Flow, noise: Tensor, velocity: Callable[..., Tensor]) -> Tensor:
        shots = noise
        for now, after in pairwise(flow.shifted(1 - torch.arange(self.steps + 1) / self.steps).tolist()):
            shots = shots + (after - now) * velocity(shots, now)
        return shots

    def _velocity(
        self,
        model: Any,
        encoded: EncodedScenes,
        batch: moc.Batch,
        config: MoCConfig,
        last: Tensor,
        sigma: float,
        **more,
    ) -> Tensor:
        """Returns the velocity of the last shots [B, C, T, H, W] at a noise level, after clean history."""
        shots = [x for history, x in zip(encoded.latents, last, strict=True) for x in (*history[:-1], x)]
        sigmas = torch.zeros(encoded.latents.shape[:2], device=last.device)
        sigmas[:, -1] = sigma
        with self.parallel.autocast():
            out = model(shots, sigmas.flatten(), batch.text, batch.layout, config, **more)
        return torch.stack(out[encoded.latents.shape[1] - 1 :: encoded.latents.shape[1]]).float()


class RecallBench(LastShots):
    """A bench tests one model on the scenes of a world that no training saw."""

    def __init__(
        self, world: RecallWorld, reader: Reader, parallel: Parallel, steps: int = 10, batch: int = 64
    ) -> None:
        """Sets up the tests. steps: as in `LastShots`. batch: scenes at once."""
        super().__init__(world, parallel, steps)
        self.reader, self.batch = reader, batch

    @torch.no_grad()
    def run(
        self, model: Any, config: MoCConfig, flow: Flow, scenes: int, look_alikes: bool = False,
        shots: int | None = None,
    ) -> Tally:  # fmt: skip
        """Samples the last shots of so many scenes by a model and tallies what they show. shots: those of a scene,
        where they are not the world's."""
        model.eval()
        recall = replace(self.world.config, look_alikes=look_alikes, shots=shots or self.world.config.shots)
        tallies = []
        for first in range(0, scenes, self.batch):
            positions = list(range(first, min(first + self.batch, scenes)))
            tallies.append(self._run(model, config, flow, recall, positions))
        return Tally.join(tallies)

    def _run(self, model: Any, config: MoCConfig, flow: Flow, recall: RecallConfig, positions: list[int]) -> Tally:
        scenes = draw_scenes(recall, [HELD_OUT + position for position in positions])
        encoded = self.world.encode(scenes)
        batch, noise, velocity = self._asked(model, config, flow, encoded, positions)
        truth, seen = encoded.latents[:, -1], self._sampled(flow, noise, velocity)
        routes = RouteCount(encoded, batch.layout, model.stream, config)
        losses = []
        for sigma in SIGMAS:
            predicted = velocity(flow.add_noise(truth, noise, sigma), sigma, routes if sigma == SIGMAS[-1] else None)
            losses.append((predicted - flow.velocity(truth, noise)).square().mean(1))  # [B, T, H, W]
        error = torch.stack(losses, dim=1)
        region = (encoded.cover[:, -1] > COVERED).float()[:, None]
        of_region = (error * region).flatten(2).sum(2) / region.flatten(2).sum(2).clamp(min=1)
        values = read(self.reader, seen)
        wanted = {name: shown[:, -1] for name, shown in attributes(scenes).items()}
        others = {name: torch.from_numpy(getattr(scenes, name))[:, 1:] for name in LOOKS}
        return Tally(
            distance=torch.from_numpy(scenes.distance),
            right=torch.stack([values[name] == wanted[name] for name in ATTRIBUTES], dim=1),
            copied=torch.stack(
                [(values[n] != wanted[n]) & (values[n][:, None] == others[n]).any(1) for n in LOOKS], dim=1
            ),
            loss=error.flatten(2).mean(2).cpu(),
            region_loss=of_region.cpu(),
            sparsity=torch.tensor(routes.sparsity or [0.0]).mean().expand(len(scenes)),
            **routes.counts(),
        )

    @torch.no_grad()
    def mass(self, model: Any, config: MoCConfig, routing: MoCConfig, flow: Flow, scenes: int = 64) -> dict:
        """Returns what routes by `routing` would keep of dense attention, for the returning characters
        (evaluation/recall/mass.py)."""
        model.eval()
        mass = Mass()
        for first in range(0, scenes, MASS_AT_ONCE):
            positions = list(range(first, first + MASS_AT_ONCE))
            encoded = self.world.encode(draw_scenes(self.world.config, [HELD_OUT + n for n in positions]))
            batch = moc.make_batch(encoded.samples(positions), model.stream, routing.chunk_tokens)
            batch = batch.to(self.parallel.device)
            noise = flow.draw_noise(batch, self.seed).stacked().unflatten(0, encoded.latents.shape[:2])[:, -1]
            last = flow.add_noise(encoded.latents[:, -1], noise, SIGMAS[-1])
            queries = returning_tokens(encoded, batch.layout, model.stream)
            with watched(model, batch.layout, queries, routing, mass):
                self._velocity(model, encoded, batch, config, last, SIGMAS[-1])
        return mass.table()


def returning_tokens(encoded: EncodedScenes, layout: ShotLayout, spec: moc.StreamSpec) -> Tensor:
    """Returns the video tokens of the last shots that hold the returning character, int64."""
    patches = F.avg_pool3d(encoded.cover[:, -1], spec.patch).flatten(1) > COVERED  # [B, tokens of a shot]
    is_last = layout.group_shot[layout.token_group[layout.video_index]] == encoded.latents.shape[1] - 1
    return layout.video_index[is_last][patches.flatten()]


class RouteCount:
    """Counts, layer by layer, where the tokens of the returning characters route to."""

    def __init__(self, encoded: EncodedScenes, layout: ShotLayout, spec: moc.StreamSpec, config: MoCConfig) -> None:
        self.layout, self.config = layout, config
        device = layout.device
        self.tokens = returning_tokens(encoded, layout, spec)
        self.shown = torch.from_numpy(encoded.scenes.shown).to(device)[layout.token_sample[self.tokens]]
        self.chunk_shot = layout.group_shot[layout.chunk_group]
        self.rows: list[Tensor] = []
        self.sparsity: list[float] = []  # the sparsity of video-video pairs in each layer

    def __call__(self, layer: int, routes: Tensor) -> None:
        self.sparsity.append(attention_cost(self.layout, self.config, routes, num_heads=1, head_dim=1).video_sparsity)
        of_tokens = routes[:, self.tokens].long()  # [N, tokens, K]
        valid = of_tokens >= 0
        hit = valid & (self.chunk_shot[of_tokens.clamp(min=0)] == self.shown[:, None])
        counts = [hit.sum((1, 2)), valid.sum((1, 2)), hit.any(2).sum(1), torch.full_like(hit.sum((1, 2)), hit.shape[1])]
        self.rows.append(torch.stack(counts))

    def counts(self) -> dict[str, Tensor]:
        rows = torch.stack(self.rows).cpu() if self.rows else torch.zeros(1, 4, 1, dtype=torch.long)
        return dict(zip(("hits", "routed", "reached", "asked"), rows.unbind(1), strict=True))


def summary(tally: Tally) -> dict:
    """Returns a tally as plain numbers: recall is the share of looks (fur and outfit) that reappear right."""
    looks = tally.right[:, : len(LOOKS)]
    by_distance = {}
    for distance in tally.distance.unique().tolist():
        of_it = looks[tally.distance == distance]
        bounds = map(_rounded, share_interval(of_it))
        by_distance[distance] = [_rounded(float(of_it.float().mean())), *bounds, of_it.numel()]
    found = {
        "readings": looks.numel(),
        "recall": _rounded(float(looks.float().mean())),
        "interval": [_rounded(bound) for bound in share_interval(looks)],
        "sparsity": _rounded(float(tally.sparsity.mean())),
        "copied": _rounded(float(tally.copied.float().mean())),
        "by_attribute": {
            name: _rounded(float(right.float().mean()))
            for name, right in zip(ATTRIBUTES, tally.right.unbind(1), strict=True)
        },
        "by_distance": by_distance,
        # There is one bit for each look of each scene, so that rows can be compared.
        "right": np.packbits(looks.flatten().numpy()).tobytes().hex(),
    }
    for name, loss in (("loss", tally.loss), ("region_loss", tally.region_loss)):
        found[name] = {
            str(sigma): [_rounded(float(of.mean()), 5), _rounded(half_width(of), 5)]
            for sigma, of in zip(SIGMAS, loss.unbind(1), strict=True)
        }
        found[f"{name}_of_blocks"] = {
            str(sigma): [_rounded(float(block.mean()), 6) for block in of.split(BLOCK)]
            for sigma, of in zip(SIGMAS, loss.unbind(1), strict=True)
        }
    if tally.routed.any():
        found["precision"] = (tally.hits / tally.routed.clamp(min=1)).mul(1000).round().div(1000).tolist()
        found["reached"] = (tally.reached / tally.asked.clamp(min=1)).mul(1000).round().div(1000).tolist()
    return found


def _rounded(value: float, digits: int = 4) -> float:
    return round(value, digits)
