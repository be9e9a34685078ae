"""From routes to work lists, on the device: for each (head, chunk) the queries that chose it, in stream order.

A stable counting sort in two kernels: count the routes of each chunk span by span, then place each route behind those
of earlier spans and earlier routes of its own span. No atomics decide an order, so the lists are the same every time,
and nothing waits for the host.

Shape letters: L packed tokens, N heads, M chunks, K routes a query.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # routes ranked against each other at a time
SPAN_BLOCKS = 16  # blocks a program walks through, at least
MAX_COUNTERS = 1 << 24  # bounds the table of counts


@dataclass(frozen=True)
class Lists:
    """The routed queries by (head, chunk), int32; list h * M + c belongs to head h and chunk c.

    entries [N * L * K]: token * K + slot of each routed query; those of list i are [starts[i], starts[i + 1]).
    starts [N * M + 1]. tile_starts [N * M + 1]: a list is cut into tiles of `tile` queries; list i has the tiles
    [tile_starts[i], tile_starts[i + 1]). tile_list: the list of each tile, as many as there can be.
    """

    entries: Tensor
    starts: Tensor
    tile_starts: Tensor
    tile_list: Tensor
    tile: int

    def max_tiles(self, num_heads: int, num_entries: int) -> int:
        """The most tiles that `num_heads` heads can have, of `num_entries` table entries a head."""
        num_lists = self.starts.numel() - 1
        total_heads = max(1, self.entries.numel() // max(1, num_entries))
        return num_heads * (num_entries // self.tile + num_lists // total_heads)


@triton.jit
def _ranks(chunk, chunk_again):
    """For each of `chunk` how many before it are equal, and how many are equal in all; negative ones count for none."""
    place = tl.arange(0, chunk.shape[0])
    same = (chunk[:, None] == chunk_again[None, :]).to(tl.int32)
    before = tl.where(place[None, :] < place[:, None], same, 0)
    return tl.sum(before, axis=1), tl.sum(same, axis=1)


@triton.jit
def _count_kernel(routes, counts, num_entries, num_chunks, num_spans, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    span, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = counts + (head * num_spans + span) * num_chunks
    for block in range(SPAN):
        entry = (span * SPAN + block) * BLOCK + tl.arange(0, BLOCK)
        chunk = tl.load(routes + head * num_entries + entry, mask=entry < num_entries, other=-1)
        rank, total = _ranks(chunk, chunk)
        tl.atomic_add(row + chunk, total, mask=(chunk >= 0) & (rank == 0), sem="relaxed")


@triton.jit
def _place_kernel(routes, places, entries, num_entries, num_chunks, num_spans, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    span, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = places + (head * num_spans + span) * num_chunks  # where the next route of each chunk goes; ours alone
    for block in range(SPAN):
        entry = (span * SPAN + block) * BLOCK + tl.arange(0, BLOCK)
        chunk = tl.load(routes + head * num_entries + entry, mask=entry < num_entries, other=-1)
        rank, total = _ranks(chunk, chunk)
        place = tl.load(row + chunk, mask=chunk >= 0, other=0, volatile=True)
        tl.debug_barrier()
        tl.store(entries + place + rank, entry, mask=chunk >= 0)
        tl.store(row + chunk, place + total, mask=(chunk >= 0) & (rank == 0))
        tl.debug_barrier()


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def build_lists(routes: Tensor, num_chunks: int, tile: int) -> Lists:
    """Sorts routes int32 [N, L, K] (-1 = empty) into lists."""
    num_heads, num_tokens, num_routes = routes.shape
    num_entries = num_tokens * num_routes
    blocks = triton.cdiv(num_entries, BLOCK)
    span = max(SPAN_BLOCKS, triton.next_power_of_2(triton.cdiv(num_heads * blocks * num_chunks, MAX_COUNTERS)))
    num_spans = triton.cdiv(blocks, span)
    sizes = (num_entries, num_chunks, num_spans, span, BLOCK)

    counts = torch.zeros(num_heads, num_spans, num_chunks, dtype=torch.int32, device=routes.device)
    _count_kernel[(num_spans, num_heads)](routes, counts, *sizes)
    so_far = counts.cumsum(1, dtype=torch.int32)
    starts = _starts(so_far[:, -1].flatten())
    places = so_far.sub_(counts).add_(starts[:-1].view(num_heads, 1, num_chunks))
    entries = torch.empty(num_heads * num_entries, dtype=torch.int32, device=routes.device)
    _place_kernel[(num_spans, num_heads)](routes, places, entries, *sizes)
    return with_tiles(entries, starts, tile)


def with_tiles(entries: Tensor, starts: Tensor, tile: int) -> Lists:
    """Lists from their entries and starts; the tiles follow from those."""
    tile_starts = _starts((starts.diff() + (tile - 1)) // tile)
    most = entries.numel() // tile + starts.numel() - 1
    numbers = torch.arange(most, dtype=torch.int32, device=entries.device)
    tile_list = torch.searchsorted(tile_starts, numbers, right=True, out_int32=True) - 1
    return Lists(entries, starts, tile_starts, tile_list, tile)
