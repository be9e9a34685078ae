"""Routes become work lists on the device: for each (head, chunk) the queries that chose it, in stream order.

This is a counting sort with bit masks. `mark` sets one bit for each (token, chunk) chosen, 32 tokens a word; `count`
scans the numbers of bits along the stream, `scan` the lengths of the lists; then a route's offset in its list is the
number of bits before its own. Bits may be or-ed in any order, so the lists are the same every time; nothing waits for
the host.

Shape letters: L packed tokens, N heads, M chunks, K routes a query, W = ceil(L / 32) words,
Nb heads of a head block.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moc.kernels.sizes import cdiv

MAX_WORDS = 1 << 26  # the most words of bit masks held at a time
BLOCK = 1024


@dataclass(frozen=True)
class Lists:
    """These are the routed queries by (head, chunk), int32; list h * M + c belongs to head h and chunk c.

    entries [N * L * K]: token * K + slot of each routed query; those of list i are [starts[i], starts[i + 1]).
    starts [N * M + 1]. tile_starts [N * M + 1]: a list is cut into tiles of `tile` queries; list i has the tiles
    [tile_starts[i], tile_starts[i + 1]). tile_list: the list of each tile, room for as many as there can be.
    What lies past the last entry and the last tile is 0, so that the same routes give the same tensors.
    """

    entries: Tensor
    starts: Tensor
    tile_starts: Tensor
    tile_list: Tensor
    tile: int


def max_tiles(num_entries: int, num_lists: int, tile: int) -> int:
    """Returns the most tiles that `num_lists` lists over `num_entries` slots of the route table can have."""
    return num_entries // tile + num_lists


@triton.jit
def _popcount(x):
    """Counts the bits set in each int32."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _route(routes, first_head, num_entries, num_slots, num_words, num_chunks, BLOCK: tl.constexpr):
    """Reads BLOCK slots of one head's route table: their index, chunk, offset of the mask word, bit in it, validity."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.load(routes + (first_head + head) * num_entries + entry, mask=entry < num_entries, other=-1)
    token = entry // num_slots
    return entry, chunk, (head * num_words + token // 32) * num_chunks + chunk, token % 32, chunk >= 0


@triton.jit(do_not_specialize=["first_head", "num_entries", "num_slots", "num_words", "num_chunks"])
def mark_kernel(
    routes, masks, first_head, num_entries, num_slots, num_words, num_chunks, BLOCK: tl.constexpr
):  # fmt: skip
    """A program sets the bits of BLOCK slots of one head in masks [Nb, W, M]: bit t % 32 of word t // 32 of a chunk."""
    _, _, word, bit, valid = _route(routes, first_head, num_entries, num_slots, num_words, num_chunks, BLOCK)
    tl.atomic_or(masks + word, tl.full([BLOCK], 1, tl.int32) << bit, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["first_head", "num_words", "num_chunks"])
def count_kernel(
    masks, before, counts, first_head, num_words, num_chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program counts along the stream, for COLUMNS chunks of one head, the tokens that chose each.

    before [Nb, W, M]: how many tokens of earlier words did. counts [N, M]: how many did in all.
    """
    chunk = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(1).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, num_words, ROWS):
        word = start + tl.arange(0, ROWS)
        offset = (head * num_words + word)[:, None] * num_chunks + chunk[None, :]
        inside = (word < num_words)[:, None] & (chunk < num_chunks)[None, :]
        bits = _popcount(tl.load(masks + offset, mask=inside, other=0))
        tl.store(before + offset, total[None, :] + tl.cumsum(bits, 0) - bits, mask=inside)
        total += tl.sum(bits, 0)
    tl.store(counts + (first_head + head) * num_chunks + chunk, total, mask=chunk < num_chunks)


@triton.jit(do_not_specialize=["first_list", "last_list"])
def scan_kernel(counts, starts, tile_starts, first_list, last_list, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """One program sums counts to starts and tile_starts of lists [first_list, last_list), from earlier ones on."""
    entries = tl.load(starts + first_list, mask=first_list > 0, other=0)
    tiles = tl.load(tile_starts + first_list, mask=first_list > 0, other=0)
    tl.store(starts + first_list, entries)
    tl.store(tile_starts + first_list, tiles)
    for first in range(first_list, last_list, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < last_list
        count = tl.load(counts + index, mask=inside, other=0)
        tile_count = (count + (TILE - 1)) // TILE
        tl.store(starts + 1 + index, entries + tl.cumsum(count, 0), mask=inside)
        tl.store(tile_starts + 1 + index, tiles + tl.cumsum(tile_count, 0), mask=inside)
        entries += tl.sum(count, 0)
        tiles += tl.sum(tile_count, 0)


@triton.jit(do_not_specialize=["first_head", "num_entries", "num_slots", "num_words", "num_chunks"])
def fill_kernel(
    routes, masks, before, starts, tile_starts, entries, tile_list, first_head, num_entries, num_slots, num_words,
    num_chunks, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program writes BLOCK entries of one head to the lists, and the list of each tile.

    An entry's offset is the number of entries before it: earlier words' from `before`, its own word's by its bits.
    """
    entry, chunk, word, bit, valid = _route(routes, first_head, num_entries, num_slots, num_words, num_chunks, BLOCK)
    first_list = (first_head + tl.program_id(1)) * num_chunks
    start = tl.load(starts + first_list + chunk, mask=valid, other=0)
    earlier = tl.load(masks + word, mask=valid, other=0) & ((tl.full([BLOCK], 1, tl.int32) << bit) - 1)
    offset = start + tl.load(before + word, mask=valid, other=0) + _popcount(earlier)
    tl.store(entries + offset, entry, mask=valid)
    for index in range(first_list + tl.program_id(0), first_list + num_chunks, tl.num_programs(0)):
        last_tile = tl.load(tile_starts + index + 1)
        for first in range(tl.load(tile_starts + index), last_tile, BLOCK):
            tile = first + tl.arange(0, BLOCK)
            tl.store(tile_list + tile, index + tl.zeros([BLOCK], tl.int32), mask=tile < last_tile)


def build_lists(routes: Tensor, num_chunks: int, tile: int) -> Lists:
    """Sorts routes int32 [N, L, K] (-1 = empty, no chunk twice for a query) into lists."""
    num_heads, num_tokens, num_slots = routes.shape
    num_entries, num_words, num_lists = num_tokens * num_slots, cdiv(num_tokens, 32), num_heads * num_chunks
    head_block = max(1, min(num_heads, MAX_WORDS // (num_words * num_chunks)))
    masks = routes.new_empty(head_block, num_words, num_chunks)
    before = torch.empty_like(masks)
    counts = routes.new_empty(num_lists)
    starts, tile_starts = (routes.new_empty(num_lists + 1) for _ in range(2))
    entries = routes.new_zeros(num_heads * num_entries)
    tile_list = routes.new_zeros(max_tiles(num_heads * num_entries, num_lists, tile))
    sizes = (num_entries, num_slots, num_words, num_chunks)
    for first in range(0, num_heads, head_block):
        heads = min(head_block, num_heads - first)
        grid = (cdiv(num_entries, BLOCK), heads)
        masks.zero_()
        mark_kernel[grid](routes, masks, first, *sizes, BLOCK)
        count_kernel[(cdiv(num_chunks, 32), heads)](
            masks, before, counts, first, num_words, num_chunks, ROWS=128, COLUMNS=32
        )
        scan_kernel[(1,)](counts, starts, tile_starts, first * num_chunks, (first + heads) * num_chunks, tile, BLOCK)
        fill_kernel[grid](routes, masks, before, starts, tile_starts, entries, tile_list, first, *sizes, BLOCK)
    return Lists(entries, starts, tile_starts, tile_list, tile)
