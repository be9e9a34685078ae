"""The MMDiT's layers have two token streams, text and video, each with its own weights, joined in one attention.

- modulation: one vector for each group (the global text or a shot) gives shift, scale and gate (AdaLN-zero)
- norms, modulation and rotation are computed in fp32, whatever autocast or the weights' dtype; the linear that makes
  the modulation follows autocast
- on a GPU each of the pointwise functions is one kernel (`models.fuse`, `models.pointwise`)

Shape letters: L packed tokens, Lx tokens of one stream, N heads, D head dim, G groups; latents C T H W.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from moc.shot import Grid
from models.fuse import fused
from models.linear import Linear, Product, left_bias, product
from models.members import Members
from models.part import Part, Table
from models.recompute import RecomputedSublayers
from models.rope import rotate
from models.stream import Attend


class _Spread(torch.autograd.Function):
    """This function gives rows[group], whose gradient sums tiles of tokens and then the tiles of each group: indexing's
    own adds 10^5 tokens into a few rows one by one."""

    @staticmethod
    def forward(ctx, rows: Tensor, members: Members) -> Tensor:
        ctx.members, ctx.num_rows = members, rows.shape[0]
        return rows.index_select(0, members.group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        if grad.is_cpu:
            return grad.new_zeros(ctx.num_rows, grad.shape[1]).index_add_(0, ctx.members.group, grad), None
        tiles, tile_group = ctx.members.tiles
        sums = (grad[tiles.clamp(min=0)] * (tiles >= 0)[..., None]).sum(1)
        member = torch.arange(ctx.num_rows, device=grad.device)[:, None] == tile_group
        return member.to(sums.dtype) @ sums, None


def spread(rows: Tensor, members: Members) -> Tensor:
    """Gives each token its group's row: [G, C] -> [Lx, C]."""
    return _Spread.apply(rows, members)


@fused
def modulate(x: Tensor, shift: Tensor, scale: Tensor, members: Members, eps: float = 1e-6) -> Tensor:
    """Applies layer norm without parameters, then the group's scale and shift ([G, dim]) to x [Lx, dim], in fp32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + spread(scale, members)) + spread(shift, members)).to(x.dtype)


@fused
def fork(x: Tensor, shift: Tensor, scale: Tensor, members: Members, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Returns x, to go on with, and `modulate` of it: on a GPU the gradients of the two meet in one kernel."""
    return x, modulate(x, shift, scale, members, eps)


@fused
def add_gated(x: Tensor, change: Tensor, gate: Tensor, members: Members, bias: Tensor | None = None) -> Tensor:
    """Returns x + gate * (change + bias), the gate being the group's; it is computed in fp32, returned in x's dtype."""
    return (x.float() + spread(gate, members) * biased(change.float(), bias)).to(x.dtype)


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """Adds a bias that a linear left (`models.linear.left_bias`), if any."""
    return x if bias is None else (x + bias).to(x.dtype)


@fused
def add_modulate(
    x: Tensor, change: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, members: Members,
    bias: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns `add_gated` of x, change, gate and bias, and `modulate` of that."""
    x = add_gated(x, change, gate, members, bias)
    return x, modulate(x, shift, scale, members, eps)


@fused
def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Applies the GELU, in its approximation with tanh, to x + bias; returns x's dtype."""
    return F.gelu(biased(x, bias), approximate="tanh")


@fused
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Applies layer norm over the last axis in fp32 and returns x's dtype."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """Applies RMS norm over the last axis in fp32 and returns x's dtype."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class _Join(torch.autograd.Function):
    """This function joins text [Lt, N, D] and video [Lv, N, D] -> the stream [L, N, D]; each is the other's gradient,
    with `_Split`, where indexing's own would fill and add up a whole stream for each of the two."""

    @staticmethod
    def forward(ctx, text: Tensor, video: Tensor, part: Part) -> Tensor:
        ctx.part, stream = part, video.new_empty(part.num_tokens, *video.shape[1:])
        return stream.index_copy_(0, part.text_index, text.to(video.dtype)).index_copy_(0, part.video_index, video)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_Split.apply(grad, ctx.part), None


class _Split(torch.autograd.Function):
    """This function splits the stream [L, N, D] -> its text [Lt, N, D] and its video [Lv, N, D]."""

    @staticmethod
    def forward(ctx, stream: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        ctx.part = part
        return stream.index_select(0, part.text_index), stream.index_select(0, part.video_index)

    @staticmethod
    def backward(ctx, text: Tensor, video: Tensor) -> tuple[Tensor, None]:
        return _Join.apply(text, video, ctx.part), None


@fused
def join(
    text: Tensor, video: Tensor, norms: Sequence[tuple[Tensor, Tensor]], part: Part, table: Table | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None), eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns q, k, v of the stream, each [L, N, D], from those of text [Lt, 3 N D] and of video [Lv, 3 N D].

    norms: of text and of video, the weights [D] of q's and of k's norm, by head. biases: of text and of video, those
    that their linears left. table: where it is given, q and k are rotated.
    """
    found = []
    for qkv, (norm_q, norm_k), bias in zip((text, video), norms, biases, strict=True):
        q, k, v = (x.unflatten(-1, (-1, len(norm_q))) for x in biased(qkv, bias).chunk(3, dim=-1))
        found.append((rms_norm(q, norm_q, eps), rms_norm(k, norm_k, eps), v))
    q, k, v = (_Join.apply(of_text, of_video, part) for of_text, of_video in zip(*found, strict=True))
    return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)


@fused
def split(stream: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Returns the text [Lt, N, D] and the video [Lv, N, D] of a stream [L, N, D]."""
    return _Split.apply(stream, part)


class LayerNorm(nn.LayerNorm):
    """This layer norm computes in fp32 and returns its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """This RMS norm computes in fp32 and returns its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Modulation(nn.Module):
    """This layer makes `count` vectors for each group, fp32, of its condition [G, dim] after SiLU; zero at the start
    (AdaLN-zero)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = Linear(dim, count * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, activated: Tensor) -> tuple[Tensor, ...]:
        # A pack of short shots has a thousand groups: fp32 would cost as much as half of the attention.
        rows, bias = product(self.linear, activated.to(self.linear.weight.dtype))
        return (rows if bias is None else rows + bias).float().chunk(self.count, dim=-1)


class TokenStream(RecomputedSublayers):
    """These are a modality's weights in a block: q, k, v for the joint attention, then the output projection and the
    FFN.

    update=False leaves out what follows attention: the last block's text feeds keys and values only.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, update: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = Modulation(dim, 6 if update else 2)
        self.to_qkv = Linear(dim, 3 * dim)
        self.norm_q = RMSNorm(dim // num_heads, eps=1e-6)
        self.norm_k = RMSNorm(dim // num_heads, eps=1e-6)
        if update:
            self.to_out = Linear(dim, dim)
            self.ffn = nn.Sequential(Linear(dim, ffn_dim), nn.GELU("tanh"), Linear(ffn_dim, dim))

    def project(self, x: Tensor, modulation: Sequence[Tensor], members: Members) -> tuple[Tensor, Product]:
        """Returns x [Lx, dim], to go on with, and its q, k and v side by side, [Lx, 3 dim], with the bias they lack."""
        shift, scale = modulation[:2]
        x, normed = fork(x, shift, scale, members)
        return x, product(self.to_qkv, normed)

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Returns the weights of q's and of k's norm, each [D]."""
        return self.norm_q.weight, self.norm_k.weight

    def update(self, x: Tensor, attended: Tensor, modulation: Sequence[Tensor], members: Members) -> Tensor:
        """Adds the attention output [Lx, N, D] and the FFN to x [Lx, dim]."""
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        change, bias = product(self.to_out, attended.flatten(1))
        x, normed = add_modulate(x, change, gate, ffn_shift, ffn_scale, members, bias)
        return add_gated(x, self.by_rows(self._feed, normed), ffn_gate, members, left_bias(self.ffn[2], x))

    def _feed(self, x: Tensor) -> Tensor:
        """Returns the FFN of rows [.., dim], without the bias that its last layer leaves."""
        first, _, last = self.ffn
        return product(last, gelu(*product(first, x)))[0]


class JointBlock(RecomputedSublayers):
    """A joint block has separate text and video weights around one attention over the packed stream (MMDiT)."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, last: bool = False) -> None:
        super().__init__()
        self.text = TokenStream(dim, num_heads, ffn_dim, update=not last)
        self.video = TokenStream(dim, num_heads, ffn_dim)
        self.last = last

    def forward(
        self, text: Tensor, video: Tensor, activated: Tensor, part: Part, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Returns text [Lt, dim], video [Lv, dim]; activated: the condition after SiLU, fp32 [G, dim]."""
        text_mod, video_mod = self.text.modulation(activated), self.video.modulation(activated)

        def attended(text: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            text, (text_qkv, text_bias) = self.text.project(text, text_mod, part.text_members)
            video, (video_qkv, video_bias) = self.video.project(video, video_mod, part.video_members)
            norms, biases = (self.text.norms, self.video.norms), (text_bias, video_bias)
            q, k, v = join(text_qkv, video_qkv, norms, part, attend.table, biases)
            return text, video, attend(q, k, v, rotated=attend.table is not None)

        text, video, stream = self.apart(attended, text, video)
        of_text, of_video = split(stream, part)
        video = self.video.update(video, of_video, video_mod, part.video_members)
        if not self.last:
            text = self.text.update(text, of_text, text_mod, part.text_members)
        return text, video


class FramePlace(nn.Module):
    """This layer says where in the frame a token stands, by a linear map of the lowest 2D cosines of its position, fp32
    [Lv, dim].

    RoPE tells tokens their distances only; a small model learns what belongs where much sooner when it is told.
    """

    num_cosines = 8

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(self.num_cosines**2, dim, bias=False)

    def forward(self, grids: Sequence[Grid], dtype: torch.dtype) -> Tensor:
        cosines = {grid: self._cosines(grid) for grid in set(grids)}
        return self.linear(torch.cat([cosines[grid] for grid in grids]).to(dtype))

    def _cosines(self, grid: Grid) -> Tensor:
        """Returns the cosines [T * H * W, 64] of one shot."""
        frames, height, width = grid
        rows, columns = (self._axis(size) for size in (height, width))
        plane = torch.einsum("ha,wb->hwab", rows, columns)
        return plane.flatten(2).flatten(0, 1).repeat(frames, 1)

    def _axis(self, size: int) -> Tensor:
        device = self.linear.weight.device
        centre = (torch.arange(size, device=device) + 0.5) / size
        return torch.cos(torch.pi * centre[:, None] * torch.arange(self.num_cosines, device=device))


class Condition(nn.Module):
    """This layer maps timestep and pooled caption of each group to the vector that modulates its tokens, fp32 [G,
    dim]."""

    def __init__(self, dim: int, text_dim: int, freq_dim: int) -> None:
        super().__init__()
        self.frequencies = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(freq_dim, dim)
        self.caption = nn.Sequential(nn.Linear(text_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, sigma: Tensor, captions: Tensor) -> Tensor:
        """Maps sigma [G] in [0, 1] and captions [G, text_dim] to fp32 [G, dim]."""
        dtype = self.time.linear_1.weight.dtype
        with torch.autocast(sigma.device.type, enabled=False):
            time = self.time(self.frequencies(1000 * sigma.float()).to(dtype))
            return (time + self.caption(captions.to(dtype))).float()


class Output(nn.Module):
    """The output is a modulated norm, then a linear to patches [Lv, patch_dim], zero at the start.

    with_skip adds the noisy patch times a gain of the condition, channel by channel: the best linear predictor of the
    velocity then costs the network nothing, which a small model needs and a wide one does not.
    """

    def __init__(self, dim: int, patch_dim: int, with_skip: bool) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 2)
        self.linear = nn.Linear(dim, patch_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.gain = nn.Linear(dim, patch_dim) if with_skip else None
        if self.gain is not None:
            nn.init.zeros_(self.gain.weight)
            nn.init.zeros_(self.gain.bias)

    def forward(self, x: Tensor, patches: Tensor, condition: Tensor, members: Members) -> Tensor:
        """Returns fp32 [Lv, patch_dim] of x; condition: [G, dim] of each group; members: the video tokens of each."""
        shift, scale = self.modulation(F.silu(condition))
        out = self.linear(modulate(x, shift, scale, members)).float()
        if self.gain is None:
            return out
        with torch.autocast(x.device.type, enabled=False):
            gain = self.gain(condition.to(self.gain.weight.dtype)).float()
        return out + spread(gain, members) * patches.float()
