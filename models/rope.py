"""This module gives the rotary positions of a packed multi-shot stream, and rotates by them.

mmdit: interleaved 3D RoPE of Long Context Tuning (arXiv 2503.10589, section 3). A text token has one coordinate on all
three axes; a shot's video starts where its text ends, along the space-time diagonal; the next text starts past the
largest coordinate of that video. Offsets inside a shot are therefore those of the single-shot model.
wan: space as in the base model; time runs on over the shots of a sample, with a gap at each true cut.

Shape letters: L packed tokens, N heads, D head dim.
"""

import torch
from torch import Tensor

from moc import ShotLayout
from moc.errors import UserError
from moc.move import move
from models.fuse import fused


def interleaved_positions(layout: ShotLayout) -> Tensor:
    """Returns positions of mmdit's stream: float64 [L, 3]."""
    starts, start = [], 0
    for group in layout.groups:
        start = 0 if group.shot < 0 else start  # the global text begins a new sample
        starts.append(start)
        start += group.text_tokens + max(group.grid or (0,))
    start_of_token, text, grid = _within_groups(layout, torch.tensor(starts))
    return (grid + (start_of_token + text)[:, None]).double()


def running_positions(layout: ShotLayout, gap: float = 0.0) -> Tensor:
    """Returns positions of wan's stream of video only: float64 [L, 3]. Time runs on over the shots of a sample; `gap`
    latent frames are left out at each true cut, so that with gap 0, or one shot, it is the base model's."""
    starts: list[float] = []
    for _, shots in layout.samples:
        start = 0.0
        starts.append(start)  # the global text's start; it has no tokens in this stream
        for index, shot in enumerate(shots):
            start += gap if index and shot.cut else 0.0
            starts.append(start)
            start += shot.grid[0]
    time, _, grid = _within_groups(layout, torch.tensor(starts, dtype=torch.float64))
    positions = grid.double()
    positions[:, 0] += time
    return positions


def _within_groups(layout: ShotLayout, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the start of each token's group [L], how much of the group's text is before the token [L], and its
    (t, h, w) in the shot's grid [L, 3], 0 for text. starts [G].

    It is computed on the layout's device, since work on every token on the CPU would keep the GPU waiting.
    """
    rows = [(group.start, group.text_tokens, *(group.grid or (1, 1, 1))[1:]) for group in layout.groups]
    own = move(torch.tensor(rows), layout.device)[layout.token_group]
    first, text, height, width = own.unbind(1)
    token = torch.arange(layout.num_tokens, device=layout.device) - first
    video = (token - text).clamp(min=0)
    grid = torch.stack([video // (height * width), video // width % height, video % width], dim=1)
    return move(starts, layout.device)[layout.token_group], torch.minimum(token, text), grid


def check_heads(dim: int, num_heads: int) -> None:
    """Raises UserError where heads do not share `dim` channels evenly, or a head cannot be rotated: each of the three
    axes takes a channel pair or more."""
    if dim % num_heads or (dim // num_heads) % 2 or dim // num_heads < 6:
        raise UserError(f"dim={dim} over num_heads={num_heads} must give an even head width of at least 6")


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Shares a head's channels between time, height and width (128 -> 44, 42, 42, as in Wan)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rotary_table(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of the rotation of each channel pair: two fp32 [L, head_dim / 2].

    positions: float64 [L, 3]. Angles are taken in float64: at position 10^4 a float32 angle is off by 1e-3.
    """
    angles = []
    for axis, dim in enumerate(axis_dims(head_dim)):
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
        angles.append(positions[:, axis, None] * theta**-exponents)
    table = torch.cat(angles, dim=1)
    return table.cos().float(), table.sin().float()


@fused
def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates neighbouring channel pairs of x [L, N, D] in fp32; returns x's dtype."""
    cos, sin = (values[:, None] for values in table)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
