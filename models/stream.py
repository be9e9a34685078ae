"""What both models share about the packed stream: which of its tokens a forward computes, and their self-attention.

Usually a forward computes the whole stream. In context-causal generation (Long Context Tuning, arXiv 2503.10589,
section 3.4) finished shots are history: their keys and values stay in a `KeyValueCache`, and a forward computes the
tokens after them only.

Shape letters: L packed tokens, N heads, D head dim, G groups, S shots; latents C T H W.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moc import Descriptor, DropKey, MoCConfig, ShotLayout, StreamSpec, moc_attention, route
from moc.errors import UserError
from moc.layout import Grid, Group
from models.rope import rotate

TILE = 64


@dataclass
class KeyValueCache:
    """Keys and values of the shots generated so far, by layer; one for each prompt and sample."""

    num_tokens: int = 0
    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def extended(self, layer: int, new: tuple[Tensor, ...], remember: bool) -> tuple[Tensor, ...]:
        """Keys, values and the like [L, N, D] of history and of new tokens together; the latter become history if
        `remember`."""
        if layer in self.layers:
            new = tuple(torch.cat(pair) for pair in zip(self.layers[layer], new, strict=True))
        if remember:
            self.layers[layer] = tuple(x.detach() for x in new)
        return new


class Members(NamedTuple):
    """Which group each token of one modality belongs to, and the same as tiles of up to `TILE` tokens of one group.

    group: int [Lx]. tiles: int64 [n, TILE], places of a tile's tokens, -1 past its end. tile_group: int64 [n].
    """

    group: Tensor
    tiles: Tensor
    tile_group: Tensor

    @classmethod
    def build(cls, group: Tensor, lengths: Sequence[int]) -> "Members":
        """lengths: tokens of each group, in order; group: int [Lx] of each token, on the device."""
        sizes = torch.tensor(lengths)
        num_tiles = (sizes + TILE - 1) // TILE
        tile_group = torch.arange(len(sizes)).repeat_interleave(num_tiles)
        first_tile, start = num_tiles.cumsum(0) - num_tiles, sizes.cumsum(0) - sizes
        within = (torch.arange(len(tile_group)) - first_tile[tile_group])[:, None] * TILE + torch.arange(TILE)
        inside = within < sizes[tile_group, None]
        tiles = (start[tile_group, None] + within).masked_fill(~inside, -1)
        return cls(group, tiles.to(group.device, non_blocking=True), tile_group.to(group.device, non_blocking=True))


class Part:
    """The tokens of a stream that a forward computes: those of the groups from `first_group` on.

    text_index, video_index: their places within the part. text_members, video_members: which of the part's groups they
    belong to. text_starts: int64 [G + 1], each group's first row of the text.
    """

    def __init__(self, layout: ShotLayout, start: int = 0) -> None:
        """start: tokens before the part; they end a group of a stream of one sample, or there are none."""
        firsts = [index for index, group in enumerate(layout.groups) if group.start == start]
        if start and (layout.num_samples > 1 or not firsts):
            raise ValueError(
                f"the cache holds {start} tokens, which are not the first shots of {layout}: keep one cache for each "
                "story, and add shots in order"
            )
        # Empty groups share their start with the next one; only the first global text can be empty, and it is first.
        self.layout, self.start, self.first_group = layout, start, firsts[0]
        done = layout.groups[: self.first_group]
        text_before = sum(group.text_tokens for group in done)
        self.num_tokens = layout.num_tokens - start
        self.text_index = layout.text_index[text_before:] - start
        self.video_index = layout.video_index[start - text_before :] - start
        self.text_members, self.video_members, self.text_starts = layout.memo(("part", start), self._tables)

    def _tables(self) -> tuple[Members, Members, Tensor]:
        group = self.layout.token_group[self.start :] - self.first_group
        texts, videos = ([getattr(g, kind) for g in self.groups] for kind in ("text_tokens", "video_tokens"))
        starts = torch.tensor([0, *accumulate(texts)]).to(self.layout.device, non_blocking=True)
        return Members.build(group[self.text_index], texts), Members.build(group[self.video_index], videos), starts

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.layout.groups[self.first_group :]

    @cached_property
    def grids(self) -> list[Grid]:
        """Token grids of the part's shots."""
        return [group.grid for group in self.groups if group.grid is not None]

    def group_sigma(self, sigma: Tensor) -> Tensor:
        """[S] -> [G]: each shot's sigma, 0 for global text; without a device sync."""
        is_shot = self.layout.group_shot[self.first_group :] >= 0
        with_global = torch.cat([sigma.new_zeros(1), sigma])
        return with_global[is_shot.cumsum(0) * is_shot]

    def check(
        self,
        latents: list[Tensor],
        sigma: Tensor,
        text: list[Tensor],
        spec: StreamSpec,
        channels: int,
        text_dim: int,
    ) -> None:
        """Raises ValueError where a forward's inputs and its layout describe different shots, or another model's."""
        shots, groups = len(self.grids), self.layout.num_groups
        if (len(latents), len(sigma), len(text)) != (shots, shots, groups):
            raise ValueError(
                f"{len(latents)} latents, {len(sigma)} sigmas and {len(text)} texts for {shots} shots to compute in a "
                f"stream of {groups} groups: build the layout from this batch (moc.make_batch)"
            )
        for grid, latent in zip(self.grids, latents, strict=True):
            if latent.shape[0] != channels:
                raise UserError(
                    f"latent has {latent.shape[0]} channels, this model takes {channels}: "
                    "encode with the codec that the model was trained with"
                )
            if spec.grid(latent) != grid:
                raise ValueError(f"latent of {tuple(latent.shape)} is not the layout's {grid}")
        for group, features in zip(self.layout.groups, text, strict=True):
            expected = (group.text_tokens if spec.text_in_stream else len(features), text_dim)
            if tuple(features.shape) != expected:
                raise UserError(
                    f"text features are {tuple(features.shape)}, expected {expected}: "
                    "encode with the text encoder that the model was trained with"
                )


@dataclass
class StreamAttention:
    """The self-attention of one forward: rotate, route, attend. Routes are kept by layer while gradients are taken, so
    that recomputation under activation checkpointing attends to the same chunks and does not route twice.

    table: rotations of the tokens computed. cache, remember: see the module; attention must then be strictly forward.
    """

    layout: ShotLayout
    config: MoCConfig
    table: tuple[Tensor, Tensor]
    drops: DropKey | None = None
    on_routes: Callable[[int, Tensor], None] | None = None
    cache: KeyValueCache | None = None
    remember: bool = False
    routes: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cache is not None and not self.config.flows_forward:
            raise UserError(
                "cached keys and values need a strict forward flow: moc.causal=true, moc.own_anchor=shot, "
                "moc.text_anchor=global_and_own, and no dense layers"
            )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [L, N, D] of the tokens computed, before rotation -> [L, N, D]."""
        config = self.config.at_layer(layer)
        first = self.cache.num_tokens if self.cache else 0
        pre_rope = config.descriptor is Descriptor.pre_rope
        queries = rotate(q, self.table)
        kept = (rotate(k, self.table), v, k) if pre_rope else (rotate(k, self.table), v)
        if self.cache is not None:
            kept = self.cache.extended(layer, kept, self.remember)
        routes = None
        if not config.dense:
            routes = self._route(layer, q if pre_rope else queries, kept[2 if pre_rope else 0], first)
        return moc_attention(queries, *kept[:2], self.layout, config, routes=routes, first_query=first, checked=True)

    def _route(self, layer: int, q: Tensor, k: Tensor, first: int) -> Tensor:
        if layer in self.routes:
            return self.routes[layer]
        drops = replace(self.drops, layer=layer) if self.drops else None
        routes = route(q, k, self.layout, self.config, drops, first_query=first)
        if self.on_routes:
            self.on_routes(layer, F.pad(routes, (0, 0, first, 0), value=-1))
        if torch.is_grad_enabled():
            self.routes[layer] = routes
        return routes
