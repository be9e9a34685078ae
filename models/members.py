"""`Members` says which group of the stream each token belongs to, as the work around attention asks for it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.move import move

TILE = 64


class Members(NamedTuple):
    """Holds the group of each token of one modality, and the same as tiles of up to `TILE` tokens of one group.

    group: int [Lx]. tiles: int64 [n, TILE], rows of a tile's tokens, -1 past its end. tile_group: int64 [n].
    starts: int32 [G + 1], each group's first row.
    """

    group: Tensor
    tiles: Tensor
    tile_group: Tensor
    starts: Tensor

    @classmethod
    def build(cls, group: Tensor, lengths: Sequence[int] | Tensor) -> "Members":
        """Tabulates groups of `lengths` tokens, in order; group: int [Lx] of each token, on the device."""
        sizes = torch.as_tensor(lengths)
        num_tiles = (sizes + TILE - 1) // TILE
        tile_group = torch.arange(len(sizes)).repeat_interleave(num_tiles)
        first_tile, start = num_tiles.cumsum(0) - num_tiles, sizes.cumsum(0) - sizes
        within = (torch.arange(len(tile_group)) - first_tile[tile_group])[:, None] * TILE + torch.arange(TILE)
        inside = within < sizes[tile_group, None]
        tiles = (start[tile_group, None] + within).masked_fill(~inside, -1)
        starts = F.pad(sizes.cumsum(0), (1, 0)).int()
        return cls(group, *(move(table, group.device) for table in (tiles, tile_group, starts)))
