"""A `ShotLayout` describes the packed token stream: who stands where, and how it is cut into chunks.

One sample is `[global text][text 1][video 1][text 2][video 2]...`; samples of a batch follow one another. A *group* is
the global text of a sample or one shot (its text, then its video); groups tile the stream, chunks tile the groups.
Everything is computed from plain ints on the CPU, once, and moved to the device in one go: no attention kernel needs a
device sync to know the stream.

Source: arXiv 2508.21058, section 3 (content-aligned chunks); chunks never cross a shot or a modality.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.errors import UserError
from moc.move import move
from moc.shot import Grid, Shot, chunk_lengths, is_whole

_Laid = list[tuple[Tensor, list[tuple[str, int, int]]]]  # tensors; name, length and padded length of the tables in each
T = TypeVar("T")


@dataclass(frozen=True)
class Segment:
    """A segment is a run of tokens of one kind, "text" or "video"; shot counts within the sample, -1 for its global
    text."""

    kind: str
    sample: int
    shot: int
    group: int
    start: int
    length: int
    grid: Grid | None


class Group(NamedTuple):
    """A group is the global text of a sample (shot -1) or a shot: text_tokens, then video_tokens, from `start` on."""

    sample: int
    shot: int
    start: int
    text_tokens: int
    video_tokens: int
    grid: Grid | None
    first_chunk: int
    num_chunks: int

    @property
    def end(self) -> int:
        return self.start + self.text_tokens + self.video_tokens


@dataclass(frozen=True)
class Chunk:
    """A chunk, the unit of routing, is a run of tokens inside one segment."""

    kind: str
    sample: int
    group: int
    start: int
    length: int


class ShotLayout:
    """A layout describes a packed stream and never changes. Build it with `ShotLayout.build`, join samples with `pack`.

    Python side (plain ints): segments, groups, chunks, sample_ranges, num_*; positions, which say where in the run each
    sample stands and key its random draws.
    Tensors, int32 on `device` unless said, M chunks, G groups, B samples, L tokens:
        sample_position [B], sample_cu_seqlens [B + 1], group_cu_seqlens [G + 1], chunk_cu_seqlens [M + 1]
        chunk_group [M], chunk_sample [M], chunk_is_text [M] (bool)
        group_sample [G], group_shot [G], group_first_chunk [G + 1], sample_first_chunk [B + 1]
        token_chunk [L], token_group [L], token_sample [L], token_is_text [L] (bool)
        token_shot_chunk [L]: token_chunk, but -1 for global text; token_video_chunk [L]: but -1 for all text
        text_index [Lt], video_index [Lv] (int64): the positions of text and of video tokens in the stream
    """

    sample_position: Tensor
    sample_cu_seqlens: Tensor
    group_cu_seqlens: Tensor
    chunk_cu_seqlens: Tensor
    chunk_group: Tensor
    chunk_sample: Tensor
    chunk_is_text: Tensor
    group_sample: Tensor
    group_shot: Tensor
    group_first_chunk: Tensor
    sample_first_chunk: Tensor
    token_chunk: Tensor
    token_shot_chunk: Tensor
    token_video_chunk: Tensor
    token_group: Tensor
    token_sample: Tensor
    token_is_text: Tensor
    text_index: Tensor
    video_index: Tensor

    # Layouts with other positions share the tables.
    _TABLES = tuple(name for name in __annotations__ if name != "sample_position")

    def __init__(
        self, samples: Sequence[tuple[int, tuple[Shot, ...]]], chunk_tokens: int, positions: Sequence[int]
    ) -> None:
        """Takes (global text tokens, shots) of each sample. Prefer `build` and `pack`."""
        if not is_whole(chunk_tokens, 1):
            raise ValueError(f"chunk_tokens={chunk_tokens!r} must be a whole number of at least 1")
        if not samples or any(not shots for _, shots in samples):
            raise ValueError("a stream needs at least one sample, and each sample at least one shot")
        alike: dict[Shot, Shot] = {}  # equal shots become one object, which is pickled once
        self.samples = tuple((text, tuple(alike.setdefault(s, s) for s in shots)) for text, shots in samples)
        self.chunk_tokens = chunk_tokens
        self._set_positions(positions)
        num_tokens = sum(text + sum(s.text_tokens + math.prod(s.grid) for s in shots) for text, shots in self.samples)
        if num_tokens >= 1 << 31:
            raise UserError(f"{num_tokens} tokens are no stream, which has under 2**31: name fewer or smaller shots")
        self._memo: dict[Hashable, Any] = {}
        self._tile()
        self._tabulate()

    @classmethod
    def build(
        cls, shots: Iterable[Shot], global_text_tokens: int = 0, chunk_tokens: int = 1280, position: int = 0
    ) -> "ShotLayout":
        """Returns the stream of one sample; `chunk_tokens` is the target size of a chunk, in tokens. position: the
        sample's in the run, below 2**31; it keys the sample's draws of context drop-off and drop-in."""
        if not is_whole(global_text_tokens, 0):
            raise ValueError(f"global_text_tokens={global_text_tokens!r} must be a whole number of at least 0")
        return cls([(global_text_tokens, tuple(shots))], chunk_tokens, [position])

    @classmethod
    def pack(cls, layouts: Sequence["ShotLayout"]) -> "ShotLayout":
        """Returns the samples of several layouts, one after another; all must have the same `chunk_tokens`."""
        sizes = {layout.chunk_tokens for layout in layouts}
        if not sizes:
            raise ValueError("a pack needs at least one layout")
        if len(sizes) > 1:
            raise ValueError(f"layouts to pack have chunk_tokens {sorted(sizes)}; rechunk them to one size first")
        samples = [sample for layout in layouts for sample in layout.samples]
        return cls(samples, sizes.pop(), [position for layout in layouts for position in layout.positions])

    def rechunk(self, chunk_tokens: int) -> "ShotLayout":
        """Returns the same stream, on the same device, cut into chunks of another size."""
        if chunk_tokens == self.chunk_tokens:
            return self
        return self.memo(
            ("rechunk", chunk_tokens),
            lambda: ShotLayout(self.samples, chunk_tokens, self.positions).to(self.device),
        ).at(self.positions)

    def at(self, positions: Sequence[int]) -> "ShotLayout":
        """Returns the same stream, of samples at other positions; both share all tables but `sample_position`."""
        if tuple(positions) == self.positions:
            return self
        other = self.copied()
        other._set_positions(positions)
        other.sample_position = move(other.sample_position, self.device)
        return other

    def copied(self, sample_position: Tensor | None = None) -> "ShotLayout":
        """Returns the same layout with another `sample_position`, by default a copy, in which others can be written."""
        other = self._alike()
        other.sample_position = self.sample_position.clone() if sample_position is None else sample_position
        return other

    def is_stream_of(self, samples: tuple[tuple[int, tuple[Shot, ...]], ...], chunk_tokens: int) -> bool:
        """Returns whether it has the texts, shots and chunks that a layout of these `samples` would have; see
        `ShotLayout`."""
        return (self.chunk_tokens, self.samples) == (chunk_tokens, samples)

    def _set_positions(self, positions: Sequence[int]) -> None:
        for position in positions:
            if not is_whole(position, 0) or position >= 1 << 31:
                raise ValueError(f"position={position!r} must be a whole number in [0, 2**31)")
        if len(positions) != len(self.samples):
            raise ValueError(f"{len(positions)} positions for {len(self.samples)} samples")
        self.positions = tuple(positions)
        self.sample_position = torch.tensor(self.positions, dtype=torch.int32)

    def to(self, device: torch.device | str) -> "ShotLayout":
        """Returns this layout with its tensors on `device`: a copy for each dtype of tables, none when it is there."""
        device = torch.device(device)
        if device.type == self.device.type and device.index in (None, self.device.index):
            return self
        moved = self._alike()
        moved._memo, moved.sample_position = {}, move(self.sample_position, device)
        moved._take_tables([(move(laid, device), tables) for laid, tables in self._laid])
        return moved

    def _alike(self) -> "ShotLayout":
        """Returns a layout of its own that shares everything with this one."""
        other = object.__new__(ShotLayout)
        other.__dict__.update(self.__dict__)
        return other

    @cached_property
    def _laid(self) -> _Laid:
        """Returns the tables of each dtype one after another in one tensor, as which they travel. Each begins at 16
        bytes, as a tensor of its own would: for others Triton compiles other kernels."""
        by_dtype: dict[torch.dtype, list[tuple[str, Tensor, int]]] = {}
        for name in self._TABLES:
            table = getattr(self, name)
            size = -(-table.nbytes // 16) * 16 // table.itemsize
            by_dtype.setdefault(table.dtype, []).append((name, table, size))
        return [
            (
                torch.cat([F.pad(table, (0, size - len(table))) for _, table, size in tables]),
                [(name, len(table), size) for name, table, size in tables],
            )
            for tables in by_dtype.values()
        ]

    def _take_tables(self, laid: _Laid) -> None:
        """Takes the tables out of tensors in which they are laid."""
        self._laid = laid
        for tensor, tables in laid:
            for (name, length, _), table in zip(tables, tensor.split([size for *_, size in tables]), strict=True):
                self.__dict__[name] = table[:length]

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled: tables as they are laid, not one by one, and no plans, which are made anew."""
        left_out = {*self._TABLES, "segments", "chunks", "_memo"}
        return {name: value for name, value in self.__dict__.items() if name not in left_out} | {"_laid": self._laid}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _memo={})
        self._take_tables(state["_laid"])

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns what `make` derives from this layout, made once for each key: plans that all layers share."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def table(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns what `make` computes from this layout's tensors, made once for each key. Within torch.compile it is
        made each time: the next run of a CUDA graph writes over what the graph left."""
        return make() if torch.compiler.is_compiling() else self.memo(key, make)

    @property
    def device(self) -> torch.device:
        return self.chunk_cu_seqlens.device

    @property
    def num_tokens(self) -> int:
        return self.groups[-1].end

    @property
    def num_chunks(self) -> int:
        return self.groups[-1].first_chunk + self.groups[-1].num_chunks

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @cached_property
    def shot_groups(self) -> tuple[int, ...]:
        """Returns the group of each shot of the pack, in order."""
        return tuple(index for index, group in enumerate(self.groups) if group.shot >= 0)

    @property
    def num_shots(self) -> int:
        return len(self.shot_groups)

    @cached_property
    def max_chunk_tokens(self) -> int:
        return max(chunk.length for chunk in self.chunks)

    @cached_property
    def sample_ranges(self) -> tuple[tuple[int, int], ...]:
        """Returns (start, end) of each sample in the stream."""
        starts = [group.start for group in self.groups if group.shot < 0]
        return tuple(zip(starts, [*starts[1:], self.num_tokens], strict=True))

    def __repr__(self) -> str:
        return (
            f"ShotLayout({self.num_samples} samples, {self.num_shots} shots, {self.num_tokens} tokens, "
            f"{self.num_chunks} chunks of {self.chunk_tokens})"
        )

    def _tile(self) -> None:
        """Lays groups out along the stream."""
        groups: list[Group] = []
        start = first_chunk = 0
        by_grid = self._chunks_by_grid()
        for sample, (global_text_tokens, shots) in enumerate(self.samples):
            members = [(-1, global_text_tokens, None), *((i, s.text_tokens, s.grid) for i, s in enumerate(shots))]
            for shot, text_tokens, grid in members:
                video = by_grid[grid]
                num_chunks = (text_tokens > 0) + len(video)
                groups.append(Group(sample, shot, start, text_tokens, sum(video), grid, first_chunk, num_chunks))
                start, first_chunk = groups[-1].end, first_chunk + num_chunks
        self.groups = tuple(groups)

    def _chunks_by_grid(self) -> dict[Grid | None, list[int]]:
        """Returns the lengths of the chunks of a video, by its grid: hundreds of shots may be alike."""
        grids = {shot.grid for _, shots in self.samples for shot in shots}
        return {None: [], **{grid: chunk_lengths(grid, self.chunk_tokens) for grid in grids}}

    # Segments and chunks follow from the groups, so they do not travel with a layout.

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        found = []
        for index, group in enumerate(self.groups):
            owner = (group.sample, group.shot, index)
            if group.text_tokens:
                found.append(Segment("text", *owner, group.start, group.text_tokens, None))
            if group.grid is not None:
                video = (group.start + group.text_tokens, group.video_tokens)
                found.append(Segment("video", *owner, *video, group.grid))
        return tuple(found)

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        found, by_grid = [], self._chunks_by_grid()
        for index, group in enumerate(self.groups):
            start = group.start
            text = [("text", group.text_tokens)] if group.text_tokens else []
            for kind, length in (*text, *(("video", length) for length in by_grid[group.grid])):
                found.append(Chunk(kind, group.sample, index, start, length))
                start += length
        return tuple(found)

    def _tabulate(self) -> None:
        """Makes the index tensors from the tiled stream."""

        def ints(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32)

        chunk_lengths_ = torch.tensor([chunk.length for chunk in self.chunks])
        first_groups = [index for index, group in enumerate(self.groups) if group.shot < 0]
        self.chunk_cu_seqlens = ints(accumulate((chunk.length for chunk in self.chunks), initial=0))
        self.group_cu_seqlens = ints([*(group.start for group in self.groups), self.num_tokens])
        self.sample_cu_seqlens = ints([*(self.groups[g].start for g in first_groups), self.num_tokens])
        self.chunk_group = ints(chunk.group for chunk in self.chunks)
        self.chunk_sample = ints(chunk.sample for chunk in self.chunks)
        self.chunk_is_text = torch.tensor([chunk.kind == "text" for chunk in self.chunks])
        self.group_sample = ints(group.sample for group in self.groups)
        self.group_shot = ints(group.shot for group in self.groups)
        self.group_first_chunk = ints([*(group.first_chunk for group in self.groups), self.num_chunks])
        self.sample_first_chunk = ints([*(self.groups[g].first_chunk for g in first_groups), self.num_chunks])
        self.token_chunk = torch.arange(self.num_chunks, dtype=torch.int32).repeat_interleave(chunk_lengths_)
        self.token_group = self.chunk_group[self.token_chunk]
        self.token_shot_chunk = self.token_chunk.masked_fill(self.group_shot[self.token_group] < 0, -1)
        self.token_sample = self.chunk_sample[self.token_chunk]
        self.token_is_text = self.chunk_is_text[self.token_chunk]
        self.token_video_chunk = self.token_chunk.masked_fill(self.token_is_text, -1)
        self.text_index = self.token_is_text.nonzero().squeeze(1)
        self.video_index = (~self.token_is_text).nonzero().squeeze(1)
