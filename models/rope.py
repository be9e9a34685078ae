"""This module gives the rotary positions of a packed multi-shot stream, and rotates by them.

mmdit: interleaved 3D RoPE of Long Context Tuning (arXiv 2503.10589, section 3). A text token has one coordinate on all
three axes; a shot's video starts where its text ends, along the space-time diagonal; the next text starts past the
largest coordinate of that video. Offsets inside a shot are therefore those of the single-shot model.
wan: space as in the base model; time runs on over the shots of a sample, with a gap at each true cut.

Shape letters: L packed tokens, N heads, D head dim.
"""

from functools import lru_cache

import torch
from torch import Tensor

from moc import ShotLayout
from moc.layout import Grid
from moc.move import move
from models.fuse import fused


@lru_cache(64)
def grid_coordinates(grid: Grid) -> Tensor:
    """Returns (t, h, w) of every token of a grid in stream order: float64 [T * H * W, 3], on the CPU."""
    axes = [torch.arange(size, dtype=torch.float64) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


@lru_cache(1024)
def _group_coordinates(text_tokens: int, grid: Grid | None) -> Tensor:
    """Returns a group's own positions in mmdit's stream: its text, then its video from the end of the text on."""
    text = torch.arange(text_tokens, dtype=torch.float64)[:, None].expand(-1, 3)
    return text if grid is None else torch.cat([text, grid_coordinates(grid) + text_tokens])


def interleaved_positions(layout: ShotLayout) -> Tensor:
    """Returns positions of mmdit's stream: float64 [L, 3], made on the CPU and moved to the layout's device at once."""
    pieces, starts, start = [], [], 0.0
    for group in layout.groups:
        start = 0.0 if group.shot < 0 else start  # each sample starts anew
        pieces.append(_group_coordinates(group.text_tokens, group.grid))
        starts.append(start)
        start += group.text_tokens + max(group.grid or (0,))
    return move(_shifted(pieces, torch.tensor(starts, dtype=torch.float64)[:, None]), layout.device)


def running_positions(layout: ShotLayout, gap: float = 0.0) -> Tensor:
    """Returns positions of wan's stream of video only: float64 [L, 3]. Time runs on over the shots of a sample; `gap`
    latent frames are left out at each true cut, so that with gap 0, or one shot, it is the base model's."""
    pieces, starts = [], []
    for _, shots in layout.samples:
        start = 0.0
        for index, shot in enumerate(shots):
            start += gap if index and shot.cut else 0.0
            pieces.append(grid_coordinates(shot.grid))
            starts.append((start, 0.0, 0.0))
            start += shot.grid[0]
    return move(_shifted(pieces, torch.tensor(starts, dtype=torch.float64)), layout.device)


def _shifted(pieces: list[Tensor], starts: Tensor) -> Tensor:
    """Lays pieces one after another, the rows of each moved by its start: starts [pieces, 3 or 1]. A stream may have a
    thousand pieces, so that operations on each of them would take longer than a step."""
    lengths = torch.tensor([len(piece) for piece in pieces])
    return torch.cat(pieces) + starts.repeat_interleave(lengths, dim=0)


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
