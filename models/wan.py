"""The Wan family of video transformers has Mixture of Contexts in self-attention here, under diffusers' names.

- Wan2.1-T2V-1.3B and 14B, Wan2.2-TI2V-5B, each expert of Wan2.2-T2V-A14B, HoloCine: the same code, other sizes
- the stream is video only; text comes by cross-attention, windowed by `text_anchor` to the global and own-shot caption
- a timestep for each shot (every token takes its shot's); time runs on over shots, with `cut_gap` at each true cut
- context-causal generation: finished shots stay as cached keys and values (`models.kv_cache.KVCache`)
- no parameters are added: the state dict is that of diffusers' class of the same name, and config.json too, but for a
  `cut_gap` above 0

Shape letters: L packed tokens, N heads, D head dim, G groups, R text rows, S shots; latents C T H W.
"""

import json
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models import attention
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from einops import rearrange
from torch import Tensor, nn

from moc import MoCConfig, ShotLayout, StreamSpec, TextAnchor
from moc.errors import UserError
from moc.kernels import packed
from moc.kernels.packed import Packed
from models.earlier import cut_gap
from models.frozen import Rounded, taken_by
from models.layers import LayerNorm, RMSNorm, add_gated, modulate
from models.members import Members
from models.part import Part
from models.recompute import RecomputedSublayers
from models.rope import rotary_table, running_positions
from models.stream import Attend, Embedded, StreamModel

TEXT_TOKENS = 512  # positions of a prompt; those past its end are zero features, and visible


class Window(NamedTuple):
    """A window lets stream tokens [start, end) see the text rows of `ranges` (of all samples' prompts, in order)."""

    start: int
    end: int
    ranges: tuple[tuple[int, int], ...]


class Attention(nn.Module):
    """These are the projections and norms of one attention; q and k are normed over the full width, before the head
    split."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def project(self, x: Tensor | Rounded, context: Tensor | Rounded) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q of x [L, dim], and k and v of context [Lc, dim], as [.., N, D]."""
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context))
        return self.heads(q), self.heads(k), self.heads(self.to_v(context))

    def output(self, attended: Tensor) -> Tensor:
        return self.to_out[0](attended.flatten(-2))


class FeedForward(attention.FeedForward):
    """This is diffusers' network of a linear, GELU by its tanh, and a linear."""

    def forward(self, x: Tensor) -> Tensor:
        up, _, down = self.net
        return down(taken_by(down, up.proj(x), gelu=True))  # type: ignore[operator]


class Block(RecomputedSublayers):
    """A block is self-attention over the stream, cross-attention to the text and an FFN, modulated by each token's
    shot."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.attn1 = Attention(dim, num_heads, eps)
        self.attn2 = Attention(dim, num_heads, eps)
        self.norm2 = LayerNorm(dim, eps)
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, dim))
        nn.init.normal_(self.scale_shift_table, std=dim**-0.5)
        self.eps = eps

    def forward(
        self, x: Tensor, context: Tensor, time: Tensor, members: Members, windows: Packed, attend: Attend
    ) -> Tensor:
        """Returns x [L, dim]. context: text rows of all samples [R, dim], of which `windows` says who sees what; time:
        fp32 [G, 6, dim]; members: the tokens of each group."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table.float() + time).unbind(1)

        def with_stream(x: Tensor) -> Tensor:
            normed = taken_by(self.attn1.to_q, modulate(x, shift, scale, members, self.eps))  # also for to_k and to_v
            return add_gated(x, self.attn1.output(attend(*self.attn1.project(normed, normed))), gate, members)

        def with_text(x: Tensor) -> Tensor:
            q, k, v = self.attn2.project(self.norm2(x), context)
            return x + self.attn2.output(packed.attend(q, k, v, windows)).to(x.dtype)

        x = self.apart(with_text, self.apart(with_stream, x))
        normed = modulate(x, ffn_shift, ffn_scale, members, self.eps)
        return add_gated(x, self.by_rows(self.ffn, normed), ffn_gate, members)


def pack_windows(windows: list[Window], num_rows: int, device: torch.device) -> Packed:
    """Returns the windows, which tile the queries, as one variable-length call over `num_rows` rows of text."""
    lengths, keys = [window.end - window.start for window in windows], [window.ranges for window in windows]
    return Packed.build(lengths, keys, num_rows, device)


class TextTimeEmbedding(nn.Module):
    """This layer embeds timesteps (once for the output, six times for the blocks) and text features."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.frequencies = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")

    def forward(self, sigma: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeds sigma [G] and text rows [R, text_dim]: returns fp32 [G, dim], fp32 [G, 6, dim], [R, dim]."""
        with torch.autocast(sigma.device.type, enabled=False):
            frequencies = self.frequencies(1000 * sigma.float())
            time = self.time_embedder(frequencies.to(self.time_embedder.linear_1.weight.dtype))
            vectors = self.time_proj(F.silu(time).to(self.time_proj.weight.dtype))
        rows = self.text_embedder(text.to(self.text_embedder.linear_1.weight.dtype))
        return time.float(), vectors.float().unflatten(1, (6, -1)), rows


class WanTransformer3DModel(StreamModel):
    """This is Wan's transformer under diffusers' name and settings; its forward is `models.stream.StreamModel`'s.

    cut_gap: latent frames left out of the running time at each true cut; the one setting that diffusers does not know.
    Raises UserError for the family's image-to-video variants, whose extra inputs are not known here, and for a
    negative `cut_gap`.
    """

    _keep_in_fp32_modules: ClassVar = ["time_embedder", "scale_shift_table", "norm2", "norm_q", "norm_k"]
    _no_split_modules: ClassVar = ["Block"]
    _repeated_blocks: ClassVar = ["Block"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        cut_gap: float = 0.0,
    ) -> None:
        super().__init__()
        if image_dim or added_kv_proj_dim or pos_embed_seq_len or out_channels != in_channels:
            raise UserError("this is an image-to-video Wan model; only the text-to-video models are supported")
        if not cross_attn_norm or qk_norm != "rms_norm_across_heads":
            raise UserError(f"cross_attn_norm={cross_attn_norm}, qk_norm={qk_norm!r} is no Wan model that is supported")
        if not 0 <= cut_gap < math.inf:
            raise UserError(f"cut_gap={cut_gap} must be finite and at least 0")
        dim = num_attention_heads * attention_head_dim
        self.latent_channels, self.attention_dim = in_channels, dim
        frames, rows, columns = patch_size
        self.stream = StreamSpec(patch=(frames, rows, columns), text_in_stream=False)
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=self.stream.patch, stride=self.stream.patch)
        self.condition_embedder = TextTimeEmbedding(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_attention_heads, eps) for _ in range(num_layers))
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, dim))
        nn.init.normal_(self.scale_shift_table, std=dim**-0.5)

    def embed(self, patches: Tensor, sigma: Tensor, text: Sequence[Tensor], part: Part, config: MoCConfig) -> Embedded:
        """Takes as text the features of each group's span of its sample's prompt; see `text_windows`."""
        weight = self.patch_embedding.weight.flatten(1)
        x = F.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)
        layout = part.layout
        rows, windows = text_windows(text, layout, config)
        windows = [
            Window(max(w.start, part.start) - part.start, min(w.end, part.end) - part.start, w.ranges)
            for w in windows
            if w.start < part.end and w.end > part.start
        ]
        key = ("windows", len(rows), *windows)  # a run of the stream has windows of the first rows alone
        packed_windows = layout.memo(key, lambda: pack_windows(windows, len(rows), layout.device))
        time, block_time, context = self.condition_embedder(sigma, rows)
        return Embedded(x, (context, block_time, part.video_members, packed_windows), time)

    def rotations(self, layout: ShotLayout) -> tuple[Tensor, Tensor]:
        head_dim, gap = self.config.attention_head_dim, self.config.cut_gap
        return layout.table(("running", head_dim, gap), lambda: rotary_table(running_positions(layout, gap), head_dim))

    def to_json_string(self) -> str:
        """Returns diffusers' text without a `cut_gap` of 0, so that a public model's config.json stays what it was."""
        config = json.loads(super().to_json_string())
        if not config["cut_gap"]:
            del config["cut_gap"]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def completed(config: dict[str, Any], folder: Path | None) -> dict[str, Any]:
        """Returns the settings of a config.json with the `cut_gap` that it leaves out. folder: where it lies."""
        return config | {"cut_gap": cut_gap(config, folder)}

    def project(self, tokens: Tensor, patches: Tensor, condition: Tensor, part: Part) -> Tensor:
        shift, scale = (self.scale_shift_table.float() + condition[:, None]).unbind(1)
        out = self.proj_out(modulate(tokens, shift, scale, part.video_members, self.config.eps)).float()
        # The family's output has a patch's channels last, its input has them first.
        return rearrange(out, "l (p ch) -> l (ch p)", p=math.prod(self.stream.patch))


def text_windows(text: Sequence[Tensor], layout: ShotLayout, config: MoCConfig) -> tuple[Tensor, list[Window]]:
    """Returns text rows of all samples [R, text_dim], and which of them the tokens of each shot see.

    text_anchor all: the sample's prompt, padded to 512 rows. global_and_own: the global caption's rows, the own shot's,
    and the padding; that of the whole prompt, as HoloCine was trained, or, where text flows strictly forward, as much
    as fills these two up to 512, so that no later caption counts. A single shot sees the same in all cases. Raises
    UserError where what counts is more than 512 rows.
    """
    if config.text_anchor == TextAnchor.none:
        raise UserError("text_anchor=none leaves a Wan model without text; use all or global_and_own")
    rows: list[Tensor] = []
    windows: list[Window] = []
    for sample in range(layout.num_samples):
        members = [pair for pair in zip(layout.groups, text, strict=True) if pair[0].sample == sample]
        base = sum(len(x) for x in rows)
        ends = list(accumulate((len(features) for _, features in members), initial=base))
        whole, *shots = pairwise(ends)
        for (group, _), own in zip(members[1:], shots, strict=True):
            seen = [(base, ends[-1])] if config.text_anchor == TextAnchor.all else [whole, own]
            counted = seen if config.text_flows_forward else [(base, ends[-1])]
            num_rows = sum(end - start for start, end in counted)
            if num_rows > TEXT_TOKENS:
                raise UserError(f"a prompt of {num_rows} text rows exceeds Wan's {TEXT_TOKENS}: shorten its captions")
            padding = TEXT_TOKENS - num_rows
            windows.append(Window(group.start, group.end, (*seen, (ends[-1], ends[-1] + padding))))
        zeros = max(window.ranges[-1][1] for window in windows[-len(shots) :]) - ends[-1]
        rows += [*(features for _, features in members), text[0].new_zeros(zeros, text[0].shape[1])]
    return torch.cat(rows), windows
