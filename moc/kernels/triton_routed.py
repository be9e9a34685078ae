"""This module launches routed attention: partial results for a few heads, gathered queries for a few tiles at a time.

Shape letters: L packed tokens, N heads, D head dim, M chunks, K slots of a query.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moc.kernels import triton_kernels as kernels
from moc.kernels.dense import capability
from moc.kernels.sizes import Blocks, cdiv, next_power_of_2, padded
from moc.kernels.triton_index import Lists, max_tiles

# So many times q are held as partial results and gathered queries, or so many numbers where q is small and every
# launch counts.
PARTIAL_SIZE = 1.25
PARTIAL_NUMBERS = 3 << 27


def use_tma(x: Tensor) -> bool:
    """Returns whether keys are read by tensor descriptors (Hopper and on; rows of whole 16 bytes)."""
    fits = x.shape[-1] * x.element_size() % 16 == 0
    return fits and (capability(x.device) or (0, 0)) >= (9, 0)


def _key_source(x: Tensor, rows: int, tma: bool) -> Tensor | TensorDescriptor:
    """Returns what a kernel reads keys or values [L, N, D] from, `rows` tokens of one head at a time."""
    return TensorDescriptor.from_tensor(x, [rows, 1, padded(x.shape[-1])]) if tma else x


def _list_source(x: Tensor, rows: int, tma: bool) -> Tensor | TensorDescriptor:
    """Returns what a kernel reads queries in list order [rows, D] from."""
    return TensorDescriptor.from_tensor(x, [rows, padded(x.shape[-1])]) if tma else x


def _head_blocks(q: Tensor, num_slots: int) -> Iterator[tuple[int, int]]:
    """Yields runs of heads whose partial results stay within the bound."""
    num_heads = q.shape[1]
    size = max(1, min(num_heads, _partial_numbers(q) * num_heads // (num_slots * q.numel())))
    size = cdiv(num_heads, cdiv(num_heads, size))
    for first in range(0, num_heads, size):
        yield first, min(first + size, num_heads)


def _partial_numbers(q: Tensor) -> int:
    return max(PARTIAL_NUMBERS, int(PARTIAL_SIZE * q.numel()))


def _list_args(lists: Lists) -> tuple[Tensor, ...]:
    return lists.entries, lists.starts, lists.tile_starts, lists.tile_list


def routed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    routes: Tensor,
    chunk_starts: Tensor,
    blocks: Blocks,
) -> Tensor:
    """Adds the routed attention to `out` [L, N, D], in place; returns `lse` [N, L] with it."""
    num_tokens, _, head_dim = q.shape
    num_chunks, num_slots, stride = chunk_starts.numel() - 1, routes.shape[-1], q.stride(0)
    shape, tma = {"D": head_dim, "DP": padded(head_dim)}, use_tma(k)
    key_sources = [_key_source(x, blocks.forward["BN"], tma) for x in (k, v)]
    partial_lse = torch.empty(routes.shape, dtype=torch.float32, device=q.device)
    merged_lse = torch.empty_like(lse)
    for first, last in _head_blocks(q, num_slots):
        partial = q.new_empty(last - first, num_tokens, num_slots, head_dim)
        bounds = (first * num_chunks, last * num_chunks)
        kernels.forward_kernel[(max_tiles(partial.numel() // head_dim, bounds[1] - bounds[0], lists.tile),)](
            q, *key_sources, *_list_args(lists), chunk_starts, partial, partial_lse, *bounds,
            num_tokens, num_chunks, num_slots, stride, head_dim**-0.5 * kernels.LOG2E.value,
            **shape, BM=lists.tile, TMA=tma, **blocks.forward,
        )  # fmt: skip
        # The kernel has at least 8 slots, so that few routes are one variant, with drop-in and without.
        kernels.merge_kernel[(cdiv(num_tokens, 8), last - first)](
            out, lse, merged_lse, partial, partial_lse, routes, first, num_tokens, num_slots, stride,
            **shape, SLOTS=max(8, next_power_of_2(num_slots)), BT=8,
        )  # fmt: skip
    return merged_lse


def routed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grads: Sequence[Tensor], lists: Lists,
    routes: Tensor, chunk_starts: Tensor, blocks: Blocks, max_chunk_tokens: int,
) -> None:  # fmt: skip
    """Adds the routed attention's gradients to `grads` (dq, dk, dv), in place."""
    num_tokens, num_heads, head_dim = q.shape
    dq, dk, dv = grads
    delta = torch.empty_like(lse)
    kernels.delta_kernel[(cdiv(num_tokens, 64), num_heads)](
        out, dout, delta, num_tokens, q.stride(0), D=head_dim, DP=padded(head_dim), BT=64
    )
    _add_dkv(dout, q, k, v, lse, delta, dk, dv, lists, routes, chunk_starts, blocks.dkv, max_chunk_tokens)
    _add_dq(dout, q, k, v, lse, delta, dq, lists, routes, chunk_starts, blocks.dq)


def _add_dkv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, lists: Lists,
    routes: Tensor, chunk_starts: Tensor, block: dict[str, int], max_chunk_tokens: int,
) -> None:  # fmt: skip
    num_tokens, num_heads, head_dim = q.shape
    num_chunks, num_slots, stride, scale = chunk_starts.numel() - 1, routes.shape[-1], q.stride(0), head_dim**-0.5
    shape, tma = {"D": head_dim, "DP": padded(head_dim)}, use_tma(k)
    num_lists, num_blocks = num_heads * num_chunks, cdiv(max_chunk_tokens, block["BN"])
    all_tiles = max_tiles(routes.numel(), num_lists, lists.tile)
    num_tiles = min(all_tiles, cdiv(_partial_numbers(q) // head_dim, lists.tile))

    terms = 3 if capability(q.device) else 1  # interpreted kernels take fp32
    q_list, dout_list = (q.new_empty(num_tiles * lists.tile, head_dim) for _ in range(2))
    terms_dtype = torch.bfloat16 if terms == 3 else torch.float32
    terms_list = torch.empty(num_tiles * lists.tile, 16, dtype=terms_dtype, device=q.device)
    sources = [_list_source(x, block["BM"], tma) for x in (q_list, dout_list, terms_list)]
    for first_tile in range(0, all_tiles, num_tiles):
        kernels.gather_kernel[(num_tiles,)](
            q, dout, lse, delta, q_list, dout_list, terms_list, *_list_args(lists), first_tile, num_lists,
            num_tokens, num_chunks, num_slots, stride, scale, TERMS=terms, **shape, BM=lists.tile,
        )  # fmt: skip
        kernels.dkv_kernel[(num_lists * num_blocks,)](
            *sources, k, v, dk, dv, lists.starts, lists.tile_starts, chunk_starts, first_tile, num_tiles, num_blocks,
            num_chunks, stride, scale, TERMS=terms, **shape, TILE=lists.tile, TMA=tma, **block,
        )  # fmt: skip


def _add_dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, lists: Lists,
    routes: Tensor, chunk_starts: Tensor, block: dict[str, int],
) -> None:  # fmt: skip
    num_tokens, _, head_dim = q.shape
    num_chunks, num_slots, stride, scale = chunk_starts.numel() - 1, routes.shape[-1], q.stride(0), head_dim**-0.5
    shape, tma = {"D": head_dim, "DP": padded(head_dim)}, use_tma(k)
    key_sources = [_key_source(x, block["BN"], tma) for x in (k, v)]
    for first, last in _head_blocks(q, num_slots):
        partial = q.new_empty(last - first, num_tokens, num_slots, head_dim)
        bounds = (first * num_chunks, last * num_chunks)
        kernels.dq_kernel[(max_tiles(partial.numel() // head_dim, bounds[1] - bounds[0], lists.tile),)](
            q, *key_sources, dout, lse, delta, *_list_args(lists), chunk_starts, partial, *bounds,
            num_tokens, num_chunks, num_slots, stride, scale, **shape, BM=lists.tile, TMA=tma, **block,
        )  # fmt: skip
        kernels.add_dq_kernel[(cdiv(num_tokens, 16), last - first)](
            dq, partial, routes, first, num_tokens, num_slots, stride, **shape, BT=16
        )
