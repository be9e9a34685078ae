"""`Members` says which group of the stream each token belongs to, as the work around attention asks for it."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.move import move

TILE = 64


class Members:
    """This object holds the group of each token of one modality: int [Lx] on the device; groups follow one another.

    starts: int32 [G + 1], each group's first row, and the end of the last.
    """

    def __init__(self, group: Tensor, lengths: Tensor) -> None:
        """Takes int [Lx] on the device, and int64 [G] on the CPU, the number of each group's tokens."""
        self.group, self._lengths = group, lengths
        self.starts = move(F.pad(lengths.cumsum(0), (1, 0)).int(), group.device)

    @cached_property
    def tiles(self) -> tuple[Tensor, Tensor]:
        """Returns tiles of up to `TILE` tokens of one group: int64 [n, TILE], rows of a tile's tokens, -1 past its end,
        and int64 [n], each tile's group."""
        num_tiles = (self._lengths + TILE - 1) // TILE
        group = torch.arange(len(num_tiles)).repeat_interleave(num_tiles)
        within = torch.arange(len(group)) - (num_tiles.cumsum(0) - num_tiles)[group]
        ends = self._lengths.cumsum(0)[group]
        first = ends - self._lengths[group] + within * TILE
        first, ends, group = (move(table, self.group.device) for table in (first, ends, group))
        rows = first[:, None] + torch.arange(TILE, device=first.device)
        return rows.masked_fill(rows >= ends[:, None], -1), group
