"""This module composes recall scenes as they are asked for, on the trainer's device: endless, and nothing is read from
a disk.

Position p of a run is scene p of the world, so that ranks, packs and resumed runs agree. The pixels go straight to the
codec: unlike films of `scripts/make_storyworld.py` they were never H.264.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import moc
from data.errors import DataError
from data.interfaces import Codec, TextEncoder
from data.loading.dataset import DataConfig, ShotDataset
from data.loading.loader import Loader
from data.loading.order import DRAW, uniforms
from data.storyworld.filmed import build_stock
from data.storyworld.recall_scenes import HELD_OUT, RecallConfig, RecallScenes, captions, draw_scenes

HELD_OUT_AT_ONCE = 16


@dataclass(frozen=True)
class EncodedScenes:
    """These are scenes as a model sees them, B scenes of S shots. latents: fp32 [B, S, C, T, H, W]. text: of each
    scene 1 + S features [T_i, text_dim]. cover: [B, S, T, H, W], the character's share of what a value of the latent
    holds."""

    scenes: RecallScenes
    latents: Tensor
    text: list[list[Tensor]]
    cover: Tensor

    def samples(self, positions: list[int]) -> list[moc.Sample]:
        ids = [f"recall_{position}" for position in positions]
        return [
            moc.Sample(list(latents.unbind()), text, position, name)
            for latents, text, position, name in zip(self.latents, self.text, positions, ids, strict=True)
        ]


class RecallWorld:
    """This world gives recall scenes as one codec's latents and one text encoder's features, on `device`."""

    def __init__(
        self,
        config: RecallConfig,
        codec: Codec,
        text: TextEncoder,
        save_encoders: Callable[[Path], None],
        device: torch.device | str = "cpu",
    ) -> None:
        """Takes a codec and a text encoder on `device`. save_encoders: writes both where sampling looks for them.
        Raises DataError where the codec cannot take such shots."""
        if codec.whole_frames(config.frames) != config.frames or any(n % codec.spatial_factor for n in config.size):
            raise DataError(
                "unfit-size",
                "data.recall",
                f"shots of {config.frames} frames of {config.size[0]}x{config.size[1]} are not whole latents of the "
                f"codec: take {codec.nearest_frames(config.frames)} frames, and sizes that {codec.spatial_factor} "
                "divides",
            )
        self.config, self.codec, self.text_encoder, self.save_encoders = config, codec, text, save_encoders
        self.stock = build_stock(config, device)
        self.latent_frames = codec.latent_frames(config.frames)
        self._features: dict[str, Tensor] = {}

    @property
    def latent_channels(self) -> int:
        return self.codec.latent_channels

    @property
    def text_dim(self) -> int:
        return self._texts([""])[0].shape[1]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(self.config.size[0], self.config.size[1])]

    @property
    def frame_rates(self) -> list[float]:
        return [float(self.config.fps)]

    @property
    def max_shots(self) -> int:
        return self.config.shots

    def encode(self, scenes: RecallScenes, captioned: Sequence[bool] | None = None) -> EncodedScenes:
        """Returns scenes as a model sees them. captioned: whether each has its captions; None means that all have."""
        composed, shape = self.stock.compose(scenes), scenes.cast.shape
        latents = torch.vmap(self.codec.encode)(composed.frames)
        cover = self._pooled(composed.cover, latents.shape)
        none, captioned = [""] * (1 + shape[1]), captioned or [True] * len(scenes)
        told = [captions(self.config, scenes, i) if has else none for i, has in enumerate(captioned)]
        texts = iter(self._texts([caption for of_scene in told for caption in of_scene]))
        text = [[next(texts) for _ in of_scene] for of_scene in told]
        return EncodedScenes(scenes, latents.unflatten(0, shape), text, cover.unflatten(0, shape))

    def encode_latents(self, scenes: RecallScenes) -> Tensor:
        """Returns the latents alone: fp32 [B, S, C, T, H, W]."""
        latents = torch.vmap(self.codec.encode)(self.stock.compose(scenes).frames)
        return latents.unflatten(0, scenes.cast.shape)

    def _texts(self, captions: list[str]) -> list[Tensor]:
        """Returns features that a resumed run repeats to the bit: those encoded at once are a step's."""
        if self.config.described:  # described captions seldom repeat, so keeping features would not help
            return self._encoded(captions)
        for caption in captions:
            if caption not in self._features:
                self._features[caption] = self._encoded([caption])[0]
        return [self._features[caption] for caption in captions]

    def _encoded(self, captions: list[str]) -> list[Tensor]:
        return [x.to(self.stock.device).float() for x in self.text_encoder.encode_each(captions)]

    def _pooled(self, cover: Tensor, latents: torch.Size) -> Tensor:
        """Pools [N, F, H, W] of pixels to [N, T, H', W'] of latents: the first frame is a latent frame of its own."""
        first, rest = cover[:, :1], cover[:, 1:]
        later = rest.unflatten(1, (latents[2] - 1, -1)).mean(2) if latents[2] > 1 else rest
        return torch.nn.functional.adaptive_avg_pool2d(torch.cat([first, later], 1), (latents[-2], latents[-1]))


class EndlessLoader:
    """This loader gives endless optimizer steps of one rank, as `data.loading.loader.Loader` does."""

    def __init__(
        self,
        world: RecallWorld,
        spec: moc.StreamSpec,
        chunk_tokens: int,
        batch_tokens: int,
        validation: int = 0,
        drop_captions: float = 0.0,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start_position: int = 0,
    ) -> None:
        """Takes the share of one rank, as `Loader` does. validation: how many scenes are held out. drop_captions:
        the rate at which a scene loses all its captions, drawn by (seed, position). Raises DataError where a step
        cannot hold a scene for each rank and accumulation."""
        self.world, self.spec, self.chunk_tokens = world, spec, chunk_tokens
        self.position, self.rank, self.stride = start_position, rank, world_size
        self.bins, self.validation = world_size * accumulation, validation
        self.drop_captions, self.seed = drop_captions, seed
        self._layouts: dict[int, moc.ShotLayout] = {}  # by how many scenes have captions; later batches share them
        tokens = self._batch([0]).layout.num_tokens
        self.scenes = batch_tokens // tokens
        if self.scenes < self.bins:
            raise DataError(
                "batch-too-small",
                "data.batch_tokens",
                f"{batch_tokens} tokens hold {self.scenes} scenes of {tokens}, but ranks x accumulation is "
                f"{self.bins}; raise the budget to {self.bins * tokens}",
            )

    def state(self) -> dict[str, int]:
        return {"position": self.position, "epoch": 0}

    def __iter__(self) -> Iterator[list[moc.Batch]]:
        while True:
            captioned = {self.position + i: self._is_captioned(self.position + i) for i in range(self.scenes)}
            self.position += self.scenes
            # Scenes without captions come last: packs then differ in how many they hold, not in which ones.
            dealt = sorted(captioned, key=captioned.__getitem__, reverse=True)
            packs = [dealt[first :: self.bins] for first in range(self.rank, self.bins, self.stride)]
            yield [self._batch(pack, captioned=[captioned[position] for position in pack]) for pack in packs]

    def held_out(self, at_once: int = HELD_OUT_AT_ONCE) -> Iterator[moc.Batch]:
        """Yields this rank's share of the scenes that no training sees, `at_once` in a batch."""
        positions = list(range(self.rank, self.validation, self.stride))
        for start in range(0, len(positions), at_once):
            yield self._batch(positions[start : start + at_once], HELD_OUT)

    def _is_captioned(self, position: int) -> bool:
        return not self.drop_captions or bool(uniforms(self.seed, DRAW, position, 1)[0] >= self.drop_captions)

    def _batch(self, positions: list[int], first: int = 0, captioned: Sequence[bool] | None = None) -> moc.Batch:
        scenes = draw_scenes(self.world.config, [first + position for position in positions])
        samples = self.world.encode(scenes, captioned).samples(positions)
        kind = len(positions) if captioned is None else sum(captioned)
        batch = moc.make_batch(samples, self.spec, self.chunk_tokens, self._layouts.get(kind))
        layout = self._layouts[kind] = batch.layout.to(self.world.stock.device)
        return replace(batch, layout=layout)


def open_loader(
    dataset: ShotDataset | RecallWorld,
    config: DataConfig,
    spec: moc.StreamSpec,
    chunk_tokens: int,
    **share: int,
) -> Loader | EndlessLoader:
    """Returns the loader of one rank's `share`, as `Loader` takes it, of an open dataset or world."""
    if isinstance(dataset, RecallWorld):
        limits = config.batch_tokens, config.validation, config.drop_captions, config.seed
        return EndlessLoader(dataset, spec, chunk_tokens, *limits, **share)
    return Loader(dataset.reopened(), config, spec, chunk_tokens, **share)
