"""From routes to work lists, on the device: for each (head, chunk) the queries that chose it, in stream order.

A counting sort with bit masks. `mark` sets one bit for each (token, chunk) chosen, 32 tokens a word; `count` scans the
numbers of bits along the stream; then a route's place in its list is the number of bits before its own. Or-ing bits
knows no order, so the lists are the same every time; nothing waits for the host.

Shape letters: L packed tokens, N heads, M chunks, K routes a query, W = ceil(L / 32) words.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WORDS = 1 << 26  # bounds the bit masks held at a time
BLOCK = 1024


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


def max_tiles(num_entries: int, num_lists: int, tile: int) -> int:
    """The most tiles that `num_lists` lists over `num_entries` slots of the route table can have."""
    return num_entries // tile + num_lists


@triton.jit
def _popcount(x):
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _route(routes, first_head, num_entries, num_slots, num_words, num_chunks, BLOCK: tl.constexpr):
    """Of BLOCK slots of the route table: index, chunk, place of the word in the masks, bit in the word, validity."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.load(routes + (first_head + head) * num_entries + entry, mask=entry < num_entries, other=-1)
    token = entry // num_slots
    return entry, chunk, (head * num_words + token // 32) * num_chunks + chunk, token % 32, chunk >= 0


@triton.jit(do_not_specialize=["first_head", "num_entries", "num_slots", "num_words", "num_chunks"])
def mark_kernel(
    routes, masks, first_head, num_entries, num_slots, num_words, num_chunks, BLOCK: tl.constexpr
):  # fmt: skip
    _, _, word, bit, valid = _route(routes, first_head, num_entries, num_slots, num_words, num_chunks, BLOCK)
    tl.atomic_or(masks + word, tl.full([BLOCK], 1, tl.int32) << bit, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["first_head", "num_words", "num_chunks"])
def count_kernel(
    masks, before, counts, first_head, num_words, num_chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """before [G, W, M]: how many tokens of earlier words chose the chunk; counts [N, M]: how many in all."""
    chunk = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(1).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, num_words, ROWS):
        word = start + tl.arange(0, ROWS)
        place = (head * num_words + word)[:, None] * num_chunks + chunk[None, :]
        inside = (word < num_words)[:, None] & (chunk < num_chunks)[None, :]
        bits = _popcount(tl.load(masks + place, mask=inside, other=0))
        tl.store(before + place, total[None, :] + tl.cumsum(bits, 0) - bits, mask=inside)
        total += tl.sum(bits, 0)
    tl.store(counts + (first_head + head) * num_chunks + chunk, total, mask=chunk < num_chunks)


@triton.jit(do_not_specialize=["first_head", "num_entries", "num_slots", "num_words", "num_chunks"])
def place_kernel(
    routes, masks, before, starts, entries, first_head, num_entries, num_slots, num_words, num_chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    entry, chunk, word, bit, valid = _route(routes, first_head, num_entries, num_slots, num_words, num_chunks, BLOCK)
    start = tl.load(starts + (first_head + tl.program_id(1)) * num_chunks + chunk, mask=valid, other=0)
    earlier = tl.load(masks + word, mask=valid, other=0) & ((tl.full([BLOCK], 1, tl.int32) << bit) - 1)
    place = start + tl.load(before + word, mask=valid, other=0) + _popcount(earlier)
    tl.store(entries + place, entry, mask=valid)


def build_lists(routes: Tensor, num_chunks: int, tile: int) -> Lists:
    """Sorts routes int32 [N, L, K] (-1 = empty, no chunk twice for a query) into lists."""
    num_heads, num_tokens, num_slots = routes.shape
    num_entries, num_words = num_tokens * num_slots, triton.cdiv(num_tokens, 32)
    group = max(1, min(num_heads, MAX_WORDS // (num_words * num_chunks)))
    masks = routes.new_empty(group, num_words, num_chunks)
    before = torch.empty_like(masks)
    counts = routes.new_empty(num_heads, num_chunks)
    starts = routes.new_zeros(num_heads * num_chunks + 1)
    entries = routes.new_zeros(num_heads * num_entries)
    sizes = (num_entries, num_slots, num_words, num_chunks)
    for first in range(0, num_heads, group):
        heads = min(group, num_heads - first)
        grid = (triton.cdiv(num_entries, BLOCK), heads)
        masks.zero_()
        mark_kernel[grid](routes, masks, first, *sizes, BLOCK)
        count_kernel[(triton.cdiv(num_chunks, 32), heads)](
            masks, before, counts, first, num_words, num_chunks, ROWS=128, COLUMNS=32
        )
        lists = slice(first * num_chunks, (first + heads) * num_chunks)
        so_far = counts.view(-1)[lists].cumsum(0, dtype=torch.int32)
        torch.add(so_far, starts[lists.start], out=starts[lists.start + 1 : lists.stop + 1])
        place_kernel[grid](routes, masks, before, starts, entries, first, *sizes, BLOCK)
    tiles = (starts.diff() + (tile - 1)) // tile
    tile_starts = torch.nn.functional.pad(tiles.cumsum(0, dtype=torch.int32), (1, 0))
    numbers = torch.arange(max_tiles(len(entries), len(starts) - 1, tile), dtype=torch.int32, device=entries.device)
    tile_list = torch.searchsorted(tile_starts, numbers, right=True, out_int32=True) - 1
    return Lists(entries, starts, tile_starts, tile_list, tile)
