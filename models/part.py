"""A `Part` says which tokens of the packed stream a forward computes: those of every group, of the last ones, or a run.

Shape letters: L packed tokens, D head dim, G groups, S shots.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from moc import ShotLayout, StreamSpec
from moc.batch import shapes
from moc.errors import UserError
from moc.exchange import Exchange
from moc.layout import Group
from moc.move import move
from moc.shot import Grid
from models.members import Members

Table = tuple[Tensor, Tensor]  # cosine and sine of each token's rotation, fp32 [L, D / 2]


class Part:
    """A part is the tokens that a forward computes: those of the groups from `first_group` on, or, where several
    processes share a stream, this one's run of them.

    start, end: of the run in the stream. text_rows, video_rows: which rows of the groups' text and video it holds.
    first_text: text tokens of the stream before the groups.
    text_index, video_index: their offsets in the run. text_members, video_members: which of the groups they belong
    to. text_starts: int64 [G + 1], each group's first row of the text of all groups.
    """

    def __init__(self, layout: ShotLayout, start: int = 0, exchange: Exchange | None = None) -> None:
        """Leaves out the first `start` tokens, which end where a group of a stream of one sample ends, or are none."""
        self.layout, self.exchange = layout, exchange
        self.first_group = _group_after(layout, start) if start else 0
        end = layout.num_tokens
        self._bounds = exchange.bounds(start, end) if exchange else [start, end]
        rank = exchange.rank if exchange else 0
        self.start, self.end = self._bounds[rank : rank + 2]
        self.num_tokens = self.end - self.start
        self.first_text, first, last = (self._text_before(token) for token in (start, self.start, self.end))
        self.text_rows = slice(first - self.first_text, last - self.first_text)
        self.video_rows = slice(self.start - start - self.text_rows.start, self.end - start - self.text_rows.stop)
        self.text_index = layout.text_index[first:last] - self.start
        self.video_index = layout.video_index[self.start - first : self.end - last] - self.start
        tables = layout.memo(("part", self.first_group, self.start, self.end), self._tables)
        self.text_members, self.video_members, self.text_starts = tables

    def _text_before(self, token: int) -> int:
        """Returns text tokens of the stream before one of its tokens."""
        return sum(min(max(token - group.start, 0), group.text_tokens) for group in self.layout.groups)

    def _tables(self) -> tuple[Members, Members, Tensor]:
        group = self.layout.token_group[self.start : self.end] - self.first_group
        bounds = torch.tensor([(g.start, g.start + g.text_tokens, g.end) for g in self.groups])
        texts, videos = bounds.clamp(self.start, self.end).diff(dim=1).unbind(1)
        return (
            Members(group[self.text_index], texts),
            Members(group[self.video_index], videos),
            move(torch.tensor([0, *accumulate(g.text_tokens for g in self.groups)]), self.layout.device),
        )

    def gather(self, video: Tensor) -> Tensor:
        """Returns all rows, on every process of the exchange, of what is computed of the run's video rows [Lr, C]."""
        if self.exchange is None:
            return video
        rows = [token - self._text_before(token) for token in self._bounds]
        return self.exchange.gather(video, [b - a for a, b in pairwise(rows)])

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.layout.groups[self.first_group :]

    @cached_property
    def grids(self) -> list[Grid]:
        """Returns the token grids of the part's shots."""
        return [group.grid for group in self.groups if group.grid is not None]

    def group_sigma(self, sigma: Tensor) -> Tensor:
        """Returns each group's sigma [G], that of its shot in sigma [S], 0 for global text; without a device sync."""
        is_shot = self.layout.group_shot[self.first_group :] >= 0
        with_global = torch.cat([sigma.new_zeros(1), sigma])
        return with_global[is_shot.cumsum(0) * is_shot]

    def check(
        self, latents: Sequence[Tensor], sigma: Tensor, text: Sequence[Tensor], spec: StreamSpec, channels: int,
        text_dim: int,
    ) -> None:  # fmt: skip
        """Raises ValueError where a forward's inputs and its layout describe different shots, UserError where latents
        or text are of another codec or text encoder than the model's."""
        shots, groups = len(self.grids), self.layout.num_groups
        if (len(latents), len(sigma), len(text)) != (shots, shots, groups):
            raise ValueError(
                f"{len(latents)} latents, {len(sigma)} sigmas and {len(text)} texts for {shots} shots to compute in a "
                f"stream of {groups} groups: build the layout from this batch (moc.make_batch)"
            )
        # Most of hundreds of shots are alike: each kind is looked at once.
        for grid, shape in dict.fromkeys(zip(self.grids, shapes(latents), strict=True)):
            if shape[0] != channels:
                raise _encoded_by_another("codec", f"latent has {shape[0]} channels, this model takes {channels}")
            if spec.grid(shape) != grid:
                raise ValueError(f"latent of {tuple(shape)} is not the layout's {grid}")
        texts = zip((group.text_tokens for group in self.layout.groups), shapes(text), strict=True)
        for tokens, shape in dict.fromkeys(texts):
            expected = (tokens if spec.text_in_stream else shape[0], text_dim)
            if tuple(shape) != expected:
                raise _encoded_by_another("text encoder", f"text features are {tuple(shape)}, expected {expected}")


def _group_after(layout: ShotLayout, tokens: int) -> int:
    """Returns the group that begins after so many cached tokens, which must be the first shots of one story."""
    found = [index for index, group in enumerate(layout.groups) if group.start == tokens]
    if layout.num_samples > 1 or not found:
        raise ValueError(
            f"the cache holds {tokens} tokens, which are not the first shots of {layout}: keep one cache for each "
            "story, and add shots in order"
        )
    return found[0]


def _encoded_by_another(encoder: str, reason: str) -> UserError:
    return UserError(f"{reason}: encode with the {encoder} that the model was trained with")
