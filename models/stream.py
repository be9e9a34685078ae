"""Both models share this forward over the packed stream, with its self-attention.

Usually a forward computes the whole stream. In context-causal generation finished shots are history: their keys and
values stay in a `KVCache`, and a forward computes the tokens after them only.

Shape letters: L packed tokens, N heads, D head dim, G groups, S shots; latents C T H W.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from moc import Descriptor, DropKey, Execution, MoCConfig, Routes, ShotLayout, StreamSpec, moc_attention, route
from moc.batch import Alike, each_shape, joined, laid_out
from moc.exchange import Exchange
from moc.execution import AUTO
from moc.kept import Kept
from moc.shot import Grid
from models.kv_cache import KVCache
from models.lora import Trainable
from models.part import Part, Table
from models.recompute import RecomputedSublayers
from models.rope import rotate


@dataclass
class StreamAttention:
    """This is the self-attention of one forward: rotate, route, attend. Where a block `recomputes` in backward, routes
    are kept by layer, so that it attends to the same chunks and does not route twice.

    table: rotations of the tokens computed. cache, remember: see the module; attention must then be strictly forward.
    exchange: the processes that hold the tokens; each attends with its share of the heads. execution: how it computes.
    keeps_outputs: whether what attention computed is kept by layer too, so that it is not computed again either.
    on_distances: where it is given, layers that route also attend densely, with the same q, k and v, and `distances`
    holds how far that is, fp32 [L, 2].
    """

    layout: ShotLayout
    config: MoCConfig
    table: Table
    drops: DropKey | None = None
    on_routes: Callable[[int, Tensor], None] | None = None
    cache: KVCache | None = None
    remember: bool = False
    exchange: Exchange | None = None
    execution: Execution = AUTO
    on_distances: Callable[[Tensor], None] | None = None
    recomputes: bool = False
    keeps_outputs: bool = False
    routes: dict[int, Routes] = field(default_factory=dict)
    outputs: dict[int, Kept] = field(default_factory=dict)
    distances: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotated: bool = False) -> Tensor:
        """Returns the attention [L, N, D] of the part's tokens, given their q, k, v [L, N, D], `rotated` or not yet."""
        config, first = self.config.at_layer(layer), self.cache.num_tokens if self.cache else 0
        if self.exchange:
            q, k, v = (self.exchange.to_heads(x, self.layout.num_tokens - first) for x in (q, k, v))
        pre_rope = config.descriptor is Descriptor.pre_rope
        queries, turned = (q, k) if rotated else (rotate(q, self.table), rotate(k, self.table))
        kept: tuple[Tensor, ...] = (turned, v, *((k,) if pre_rope else ()))
        if self.cache is not None:
            kept = self.cache.extended(layer, kept, self.remember)
        keys, values, *unrotated = kept
        scored = (q, unrotated[0]) if pre_rope else (queries, keys)
        routes = None if config.dense else self._route(layer, *scored)
        output = self.outputs.setdefault(layer, Kept()) if self.keeps_outputs else None
        out = moc_attention(queries, keys, values, self.layout, config, routes, self.execution, kept=output)
        if self.on_distances and not config.dense:
            self._compare(layer, out, queries, keys, values)
        return self.exchange.to_tokens(out) if self.exchange else out

    def _compare(self, layer: int, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keeps the squared difference of each token and head from dense attention, and the square of the latter."""
        with torch.no_grad():
            dense = moc_attention(q, k, v, self.layout, replace(self.config, dense=True), None, self.execution)
        squares = [x.float().square().sum(2, keepdim=True) for x in (out - dense, dense)]
        distance = torch.cat(squares, dim=2)
        distance = self.exchange.to_tokens(distance) if self.exchange else distance
        self.distances.setdefault(layer, distance.sum(1))  # recomputing a layer must not add it again

    def tell_distances(self, part: Part) -> None:
        """Tells those of the video tokens of all processes, if any layer routes."""
        if self.on_distances and self.distances:
            distances = torch.cat([self.distances[layer] for layer in sorted(self.distances)], dim=1)
            self.on_distances(part.gather(distances[part.video_index]).unflatten(1, (-1, 2)))

    def _route(self, layer: int, q: Tensor, k: Tensor) -> Routes:
        if layer in self.routes:
            return Routes(self.routes[layer].indices.int())
        first_head = self.exchange.rank * q.shape[1] if self.exchange else 0
        drops = replace(self.drops, layer=layer, first_head=first_head) if self.drops else None
        routes = Routes(route(q, k, self.layout, self.config, drops, self.execution))
        if self.on_routes:
            self.on_routes(layer, routes.whole(self.layout))
        if self.recomputes:
            few = self.layout.num_chunks <= torch.iinfo(torch.int16).max
            self.routes[layer] = Routes(routes.indices.short()) if few else routes
        return routes


class Attend:
    """This is the attention of one layer, as its block is given it. It is no tuple, which FSDP would copy, with what
    the attention remembers."""

    def __init__(self, stream: StreamAttention, layer: int) -> None:
        self.stream, self.layer = stream, layer

    @property
    def table(self) -> Table | None:
        """Returns the rotations that a block may give the part's q and k; None where attention needs them unrotated."""
        early = self.stream.config.descriptor is Descriptor.post_rope and self.stream.exchange is None
        return self.stream.table if early else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rotated: bool = False) -> Tensor:
        """Does as `StreamAttention`."""
        return self.stream(self.layer, q, k, v, rotated)


class Embedded(NamedTuple):
    """This is what the blocks of a model work on.

    tokens: what a block takes first and returns changed, a tensor or a tuple of them. inputs: what every block is given
    besides.
    condition: the vector of each group that modulates the output, fp32 [G, dim].
    """

    tokens: Any
    inputs: tuple[Any, ...]
    condition: Tensor


class StreamModel(Trainable):
    """A stream model predicts the velocity (noise - latent) of every shot of a packed batch.

    A family sets `stream`, `latent_channels`, `attention_dim` (the width of all heads together) and `blocks`, and says
    how tokens are embedded, rotated and projected. exchange: set from outside where processes share a stream; all of
    them are then given, and give, whole latents. anyone: as in `KVCache`, set from outside too. execution: how
    attention is computed; set from outside, and not saved.
    """

    stream: StreamSpec
    latent_channels: int
    attention_dim: int
    blocks: nn.ModuleList
    exchange: Exchange | None = None
    anyone: Callable[[bool], bool] = bool
    execution: Execution = AUTO
    gradient_checkpointing = False
    keeps_attention = False  # whether gradient checkpointing keeps the attention's outputs
    _supports_gradient_checkpointing = True

    def embed(self, patches: Tensor, sigma: Tensor, text: Sequence[Tensor], part: Part, config: MoCConfig) -> Embedded:
        """Embeds the part's patches [Lv, patch_dim]; sigma [G] of its groups, text [T_i, text_dim] of all groups."""
        raise NotImplementedError

    def rotations(self, layout: ShotLayout) -> Table:
        """Returns the rotary table of the whole stream (see `models.rope.rotary_table`)."""
        raise NotImplementedError

    def project(self, tokens: Any, patches: Tensor, condition: Tensor, part: Part) -> Tensor:
        """Maps tokens after the last block to the velocity of their patches, fp32 [Lv, patch_dim]."""
        raise NotImplementedError

    def forward(
        self,
        latents: Sequence[Tensor],
        sigma: Tensor,
        text: Sequence[Tensor],
        layout: ShotLayout,
        config: MoCConfig,
        drops: DropKey | None = None,
        on_routes: Callable[[int, Tensor], None] | None = None,
        cache: KVCache | None = None,
        remember: bool = False,
        on_distances: Callable[[Tensor], None] | None = None,
    ) -> Sequence[Tensor]:
        """Returns the velocity of each shot, fp32, in the form of `latents`.

        latents: noisy [C, T, H, W] of each shot of the pack. sigma: [S] in [0, 1], their noise levels.
        text: text-encoder features [T_i, text_dim] of each group: of each sample the global caption's, then its shots'.
        layout: the stream of exactly these (`moc.make_batch` builds it), on the model's device.
        config: what attention attends to. drops: seed and step of context drop-off and drop-in, in training.
        on_routes: told each layer's index and the routes of this process's heads, int [N, L, K], for statistics.
        cache: of a story generated shot by shot; latents and sigma are then those of the shots after it, text and
            layout the whole stream's, config must flow strictly forward, and no gradient reaches keys and values.
        remember: keep these shots in the cache too (once, when they are finished, at the noise level to be seen at).
        on_distances: told the squared difference, at each video token, of the attention of layers that route from dense
            attention with the same q, k and v, and the square of the latter: fp32 [Lv, layers, 2].
        Raises ValueError where latents or text do not fit the layout, UserError where they do not fit the model.
        """
        first = cache.tokens_for(config) if cache else 0
        part = Part(layout, first, self.exchange)
        part.check(latents, sigma, text, self.stream, self.latent_channels, self.config.text_dim)
        patches = patchify(latents, self.stream.patch)[part.video_rows]
        tokens, inputs, condition = self.embed(patches, part.group_sigma(sigma), text, part, config)
        cos, sin = self.rotations(layout)
        table, spread = (cos[first:], sin[first:]), (self.exchange, self.execution)
        attend = StreamAttention(layout, config, table, drops, on_routes, cache, remember, *spread, on_distances)
        attend.recomputes = recomputes = self.gradient_checkpointing and torch.is_grad_enabled()
        attend.keeps_outputs = recomputes and self.keeps_attention
        for layer, block in enumerate(self.blocks):
            args = (*(tokens if isinstance(tokens, tuple) else (tokens,)), *inputs, Attend(attend, layer))
            tokens = self._gradient_checkpointing_func(block, *args) if recomputes else block(*args)
        if cache is not None and remember:
            cache.num_tokens = layout.num_tokens
        if on_distances:
            attend.tell_distances(part)
        velocity = part.gather(self.project(tokens, patches, condition, part))
        return unpatchify(velocity, part.grids, self.stream.patch)

    def recompute_sublayers(self) -> None:
        """Has each block's sublayers computed once more in backward, one at a time."""
        for module in self.modules():
            if isinstance(module, RecomputedSublayers):
                module.recomputes_sublayers = True

    def new_cache(self, capacity: int, offload: bool = False) -> KVCache:
        """Returns the empty cache of a story. capacity, offload: as in `KVCache`."""
        return KVCache(capacity, len(self.blocks), offload, self.anyone)


def patchify(latents: Sequence[Tensor], patch: Grid) -> Tensor:
    """Returns the tokens of shots [C, T, H, W], in order: [sum of T/a * H/b * W/c, C a b c] for a patch (a, b, c)."""
    a, b, c = patch
    tokens = partial(rearrange, pattern="n ch (t a) (h b) (w c) -> n (t h w) (ch a b c)", a=a, b=b, c=c)
    return joined(each_shape(tokens, latents))


def unpatchify(tokens: Tensor, grids: Sequence[Grid], patch: Grid) -> Alike:
    """Returns the inverse of `patchify`; grids are the (T, H, W) of each shot's tokens."""
    a, b, c = patch
    shots = laid_out(tokens.flatten(), [torch.Size((*grid, tokens.shape[-1])) for grid in grids])
    return each_shape(lambda x: rearrange(x, "n t h w (ch a b c) -> n ch (t a) (h b) (w c)", a=a, b=b, c=c), shots)
