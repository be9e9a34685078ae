"""`MMDiT` is the multi-shot diffusion transformer of Long Context Tuning (arXiv 2503.10589) with Mixture of Contexts.

- MMDiT: separate text and video weights, joint attention over the packed stream of all shots, q/k norm by head
- interleaved 3D RoPE: [text 1][video 1][text 2][video 2]... along the space-time diagonal
- a sigma for each shot; a shot's text takes its shot's, the global text takes 0
- the pooled caption of a token's own group joins the timestep in the modulation
- context-causal generation: finished shots stay as cached keys and values (`models.kv_cache.KVCache`)
- dense attention is the same code under `MoCConfig(dense=True)`; one shot is the single-shot model

Shape letters: L packed tokens (Lt text, Lv video), N heads, D head dim, G groups, S shots; latents C T H W.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from moc import MoCConfig, ShotLayout, StreamSpec
from moc.batch import joined
from models.layers import Condition, FramePlace, JointBlock, Output
from models.part import Part
from models.rope import check_heads, interleaved_positions, rotary_table
from models.stream import Embedded, StreamModel


class MMDiT(StreamModel):
    """This is the multi-shot transformer that is trained from nothing; its forward is `models.stream.StreamModel`'s.

    latent_channels, text_dim: widths of the codec's latents and of the text encoder's features.
    patch_size: latent (frames, height, width) of a token. input_skip: see `models.layers.Output`.
    frame_place: see `models.layers.FramePlace`.
    """

    _keep_in_fp32_modules: ClassVar = ["condition", "modulation", "gain", "norm_q", "norm_k"]
    _no_split_modules: ClassVar = ["JointBlock"]
    _repeated_blocks: ClassVar = ["JointBlock"]

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 64,
        text_dim: int = 128,
        dim: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        ffn_dim: int = 512,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        freq_dim: int = 256,
        rope_theta: float = 10000.0,
        input_skip: bool = False,
        frame_place: bool = False,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        frames, rows, columns = patch_size
        self.stream = StreamSpec(patch=(frames, rows, columns), text_in_stream=True)
        self.latent_channels, self.attention_dim = latent_channels, dim
        patch_dim = latent_channels * frames * rows * columns
        self.video_in = nn.Linear(patch_dim, dim)
        self.place = FramePlace(dim) if frame_place else None
        self.text_in = nn.Linear(text_dim, dim)
        self.condition = Condition(dim, text_dim, freq_dim)
        last = num_layers - 1
        self.blocks = nn.ModuleList(JointBlock(dim, num_heads, ffn_dim, last=i == last) for i in range(num_layers))
        self.output = Output(dim, patch_dim, input_skip)

    def embed(self, patches: Tensor, sigma: Tensor, text: Sequence[Tensor], part: Part, config: MoCConfig) -> Embedded:
        words = joined(text)[part.first_text :]
        video = self.video_in(patches.to(self.video_in.weight.dtype))
        if self.place is not None:
            video = video + self.place(part.grids, video.dtype)[part.video_rows]
        condition = self.condition(sigma, pooled(words, part.text_starts))
        words = self.text_in(words[part.text_rows].to(self.text_in.weight.dtype))
        return Embedded((words, video), (F.silu(condition), part), condition)

    def rotations(self, layout: ShotLayout) -> tuple[Tensor, Tensor]:
        sizes = (self.config.dim // self.config.num_heads, self.config.rope_theta)
        return layout.table(("interleaved", *sizes), lambda: rotary_table(interleaved_positions(layout), *sizes))

    def project(self, tokens: tuple[Tensor, Tensor], patches: Tensor, condition: Tensor, part: Part) -> Tensor:
        return self.output(tokens[1], patches, condition, part.video_members)


def pooled(text: Tensor, starts: Tensor) -> Tensor:
    """Returns the mean feature of each group's text, zero where there is none: [Lt, text_dim] -> fp32 [G, text_dim].

    starts: int64 [G + 1], each group's first row.
    """
    sums = torch.segment_reduce(text.float(), "sum", offsets=starts, unsafe=True, initial=0)
    return sums / starts.diff().clamp(min=1)[:, None]
