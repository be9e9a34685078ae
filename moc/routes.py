"""Routes are the chunks that queries of a stream attend to besides their anchors, from `moc.route` or from a caller.

Shape letters: L packed tokens, Lq queries, N heads, K routes a query.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.config import MoCConfig
from moc.context import is_anchor
from moc.layout import ShotLayout


@dataclass(frozen=True)
class Routes:
    """`Routes` are chunk indices that attention takes as they are: int [N, Lq, K], -1 where a slot is empty, of the
    last Lq queries of the stream.

    No query has a chunk twice, a chunk that its anchors cover or one of another sample. `moc.route` makes such indices
    for the same layout and config; those of a caller go through `checked`.
    """

    indices: Tensor

    @classmethod
    def checked(cls, indices: Tensor, layout: ShotLayout, config: MoCConfig) -> "Routes":
        """Returns a caller's indices, int [N, Lq, K], without those that do not count: repeats, chunks that anchors
        cover and those of other samples. Raises ValueError for another shape or type and, but within torch.compile,
        for chunks that the layout has not: a GPU would fail later, without a word of them. Waits for the device."""
        if indices.dim() != 3 or not 0 < indices.shape[1] <= layout.num_tokens:
            raise ValueError(f"routes must be [N, Lq, K], Lq at most {layout.num_tokens}; got {tuple(indices.shape)}")
        if indices.dtype not in (torch.int16, torch.int32, torch.int64):
            raise ValueError(f"routes must be chunk indices of an int type; got {indices.dtype}")
        if indices.numel() and not torch.compiler.is_compiling():
            lowest, highest = torch.stack(indices.aminmax()).tolist()
            if lowest < -1 or highest >= layout.num_chunks:
                raise ValueError(
                    f"routes hold chunks from {lowest} to {highest}; this layout has those from 0 to "
                    f"{layout.num_chunks - 1}, and -1 is an empty slot: route for this layout"
                )
        return cls(drop_covered(indices, layout, config))

    def whole(self, layout: ShotLayout) -> Tensor:
        """Returns the indices of all queries of the stream, int [N, L, K]; earlier queries have none."""
        missing = layout.num_tokens - self.indices.shape[1]
        return F.pad(self.indices, (0, 0, missing, 0), value=-1) if missing else self.indices


@torch.no_grad()
def drop_covered(routes: Tensor, layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Returns a caller's routes int [N, Lq, K] as attention takes them: repeats, chunks that anchors cover and those of
    other samples become -1."""
    return torch.stack([_drop_covered(of_head.long(), layout, config) for of_head in routes.unbind()])


def _drop_covered(routes: Tensor, layout: ShotLayout, config: MoCConfig) -> Tensor:
    routes = routes.sort(dim=-1).values
    query = layout.token_chunk[-len(routes) :, None]
    covered = (routes < 0) | (layout.chunk_sample[routes] != layout.chunk_sample[query])
    covered[:, 1:] |= routes[:, 1:] == routes[:, :-1]
    return routes.masked_fill(covered | is_anchor(layout, config, query, routes), -1).int()


def check_whole(routes: Tensor, layout: ShotLayout) -> None:
    """Raises ValueError unless routes [N, L, K] hold a row for every token of the stream."""
    if routes.dim() != 3 or routes.shape[1] != layout.num_tokens:
        raise ValueError(
            f"routes must be [N, {layout.num_tokens}, K], of the whole stream; got {tuple(routes.shape)}: "
            "pad those of the last queries alone by `Routes(routes).whole(layout)`"
        )
