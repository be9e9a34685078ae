"""Backend `triton`: the anchored part by the fastest dense kernel, the routed part by own kernels, merged exactly.

Routes become lists of queries by (head, chunk) on the device; nothing waits for the host. Partial results of the
routed part are held for a few heads at a time. The whole attention is one `torch.library` operator with a backward, so
it goes through `torch.compile(fullgraph=True)` and activation checkpointing unchanged.

Shape letters: L packed tokens, N heads, D head dim, M chunks, K slots of a query, G heads of a group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moc.config import MoCConfig, OwnAnchor, TextAnchor
from moc.kernels import anchors, dense
from moc.kernels import triton_kernels as kernels
from moc.kernels.anchors import AnchorCall
from moc.kernels.triton_index import Lists, build_lists, with_tiles
from moc.kernels.triton_routing import route
from moc.layout import ShotLayout

__all__ = ["attend", "route"]

PARTIAL_SIZE = 1.25  # partial results held at a time, in units of the size of q
CALL_INTS = 8


@dataclass(frozen=True)
class Blocks:
    """Block sizes of the attention kernels: BM queries, BN keys, num_warps and num_stages of each."""

    tile: int
    forward: dict[str, int]
    dq: dict[str, int]
    dkv: dict[str, int]


HALF = Blocks(
    tile=128,
    forward={"BN": 64, "num_warps": 4, "num_stages": 2},
    dq={"BN": 64, "num_warps": 8, "num_stages": 3},
    dkv={"BM": 64, "BN": 128, "num_warps": 8, "num_stages": 2},
)
FULL = Blocks(
    tile=64,
    forward={"BN": 32, "num_warps": 4, "num_stages": 2},
    dq={"BN": 32, "num_warps": 4, "num_stages": 1},
    dkv={"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1},
)


def blocks_for(q: Tensor) -> Blocks:
    return FULL if q.dtype == torch.float32 else HALF


def use_tma(x: Tensor) -> bool:
    """Whether keys are read by tensor descriptors (Hopper and on; rows of whole 16 bytes)."""
    fits = x.shape[-1] * x.element_size() % 16 == 0
    return fits and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def _key_source(x: Tensor, rows: int) -> Tensor | TensorDescriptor:
    """What a kernel reads keys or values [L, N, D] from, `rows` tokens of one head at a time."""
    if not use_tma(x):
        return x
    return TensorDescriptor.from_tensor(x, [rows, 1, _padded(x.shape[-1])])


def _list_source(x: Tensor, rows: int) -> Tensor | TensorDescriptor:
    """What a kernel reads queries in list order [rows, D] from."""
    return TensorDescriptor.from_tensor(x, [rows, _padded(x.shape[-1])]) if use_tma(x) else x


def attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Attention over anchors and routed chunks together: q, k, v [L, N, D] -> [L, N, D], same dtype.

    routes: int [N, L, K], no chunk twice in a row and none that the anchors cover; None (or K = 0) for anchors alone.
    Head dims up to 128, fp32, fp16 and bf16.
    """
    if routes is not None and not config.dense:
        routes = with_own_chunk(routes, layout, config).int().contiguous()
    if config.dense or routes is None or routes.shape[-1] == 0:
        routes = torch.empty(0, 0, 0, dtype=torch.int32, device=q.device)
    calls = [number for call in anchors.anchor_calls(layout, config) for number in call.as_ints()]
    out, *_ = _attend(
        q.contiguous(), k.contiguous(), v.contiguous(), routes, layout.chunk_cu_seqlens, layout.text_index, calls,
        layout.max_chunk_tokens, config.dense_kernel, config.deterministic,
    )  # fmt: skip
    return out


def with_own_chunk(routes: Tensor, layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Routes with the own chunk as one more slot, for `own_anchor: chunk`: [N, L, K] -> [N, L, K + 1].

    Global text has no own chunk, and the own chunk of a text token is left out where its text anchors cover it.
    """
    if config.own_anchor is not OwnAnchor.chunk:
        return routes
    absent = layout.group_shot[layout.token_group] < 0
    if config.text_anchor is not TextAnchor.none:
        absent = absent | layout.token_is_text
    own = layout.token_chunk.masked_fill(absent, -1)
    return torch.cat([routes, own[None, :, None].expand(len(routes), -1, 1)], dim=-1)


def _unpack(calls: Sequence[int]) -> list[AnchorCall]:
    return [AnchorCall(*calls[i : i + CALL_INTS]) for i in range(0, len(calls), CALL_INTS)]


def _head_groups(q: Tensor, num_slots: int) -> Iterator[tuple[int, int]]:
    """Runs of heads whose partial results stay within PARTIAL_SIZE."""
    num_heads = q.shape[1]
    size = max(1, min(num_heads, int(PARTIAL_SIZE * num_heads / num_slots)))
    size = triton.cdiv(num_heads, triton.cdiv(num_heads, size))
    for first in range(0, num_heads, size):
        yield first, min(first + size, num_heads)


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _list_args(lists: Lists) -> tuple[Tensor, ...]:
    return lists.entries, lists.starts, lists.tile_starts, lists.tile_list


def routed_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: Lists, num_slots: int, chunk_starts: Tensor
) -> None:
    """Adds the routed part to `out` [L, N, D] and `lse` [N, L], in place."""
    num_tokens, num_heads, head_dim = q.shape
    num_chunks, stride = len(chunk_starts) - 1, q.stride(0)
    shape = {"D": head_dim, "DP": _padded(head_dim)}
    blocks = blocks_for(q)
    key_sources = [_key_source(x, blocks.forward["BN"]) for x in (k, v)]
    partial_lse = torch.full((num_heads, num_tokens, num_slots), -torch.inf, device=q.device)
    for first, last in _head_groups(q, num_slots):
        partial = q.new_empty(last - first, num_tokens, num_slots, head_dim)
        tiles = lists.max_tiles((last - first) * num_chunks, (last - first) * num_tokens * num_slots)
        kernels.forward_kernel[(tiles,)](
            q, *key_sources, *_list_args(lists), chunk_starts, partial, partial_lse, first * num_chunks, last * num_chunks,
            num_tokens, num_chunks, num_slots, stride, head_dim**-0.5 * kernels.LOG2E.value,
            **shape, BM=lists.tile, TMA=use_tma(q), **blocks.forward,
        )  # fmt: skip
        kernels.merge_kernel[(triton.cdiv(num_tokens, 32), last - first)](
            out, lse, partial, partial_lse, first, num_tokens, num_slots, stride,
            **shape, SLOTS=triton.next_power_of_2(num_slots), BT=32,
        )  # fmt: skip


def routed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grads: Sequence[Tensor], lists: Lists,
    routes: Tensor, chunk_starts: Tensor, max_chunk_tokens: int,
) -> None:  # fmt: skip
    """Adds the routed part's gradients to `grads` (dq, dk, dv), in place."""
    num_tokens, num_heads, head_dim = q.shape
    num_slots, num_chunks, stride = routes.shape[-1], len(chunk_starts) - 1, q.stride(0)
    shape, scale = {"D": head_dim, "DP": _padded(head_dim)}, head_dim**-0.5
    dq, dk, dv = grads
    delta = torch.empty_like(lse)
    kernels.delta_kernel[(triton.cdiv(num_tokens, 64), num_heads)](out, dout, delta, num_tokens, stride, **shape, BT=64)
    blocks = blocks_for(q)
    num_blocks = triton.cdiv(max_chunk_tokens, blocks.dkv["BN"])
    num_entries = num_tokens * num_slots
    terms = 3 if q.is_cuda and q.dtype != torch.float32 else 1
    key_sources = [_key_source(x, blocks.dq["BN"]) for x in (k, v)]
    for first, last in _head_groups(q, num_slots):
        heads = (first * num_chunks, last * num_chunks)
        tiles = (lists.max_tiles(heads[1] - heads[0], (last - first) * num_entries),)
        rows = tiles[0] * lists.tile
        q_list, dout_list = q.new_empty(rows, head_dim), q.new_empty(rows, head_dim)
        terms_list = torch.zeros(rows, 16, dtype=torch.bfloat16 if terms == 3 else torch.float32, device=q.device)
        kernels.gather_kernel[tiles](
            q, dout, lse, delta, q_list, dout_list, terms_list, *_list_args(lists), *heads,
            num_tokens, num_chunks, num_slots, stride, scale, TERMS=terms, **shape, BM=lists.tile,
        )  # fmt: skip
        sources = [_list_source(x, blocks.dkv["BM"]) for x in (q_list, dout_list, terms_list)]
        kernels.dkv_kernel[((heads[1] - heads[0]) * num_blocks,)](
            *sources, k, v, dk, dv, lists.starts, lists.tile_starts, chunk_starts,
            heads[0], num_blocks, num_chunks, stride, scale, TERMS=terms, **shape, TILE=lists.tile, TMA=use_tma(q), **blocks.dkv,
        )  # fmt: skip
        del sources, dout_list
        partial = q_list[: num_entries * (last - first)].view(last - first, num_tokens, num_slots, head_dim)
        kernels.dq_kernel[tiles](
            q, *key_sources, dout, lse, delta, *_list_args(lists), chunk_starts, partial, *heads,
            num_tokens, num_chunks, num_slots, stride, scale, **shape, BM=lists.tile, TMA=use_tma(q), **blocks.dq,
        )  # fmt: skip
        kernels.add_dq_kernel[(triton.cdiv(num_tokens, 32), last - first)](
            dq, partial, routes, first, num_tokens, num_slots, stride, **shape, BT=32
        )


# The operator


@torch.library.custom_op("moc::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, chunk_starts: Tensor, text_index: Tensor, calls: Sequence[int],
    max_chunk_tokens: int, dense_kernel: str, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out [L, N, D], lse [N, L], and the lists' entries and starts for the backward."""
    kernel = dense.choose(q, dense_kernel, deterministic)
    out, lse = anchors.forward(kernel, q, k, v, text_index, _unpack(calls))
    if not routes.numel():
        return out, lse, routes.new_empty(0), routes.new_empty(0)
    lists = build_lists(routes, len(chunk_starts) - 1, blocks_for(q).tile)
    routed_forward(q, k, v, out, lse, lists, routes.shape[-1], chunk_starts)
    return out, lse, lists.entries, lists.starts


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, chunk_starts: Tensor, *args) -> tuple[Tensor, ...]:
    num_lists = (chunk_starts.shape[0] - 1) * q.shape[1] + 1 if routes.numel() else 0
    return (
        torch.empty_like(q),
        q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
        routes.new_empty(routes.numel()),
        routes.new_empty(num_lists),
    )


@torch.library.custom_op("moc::attend_backward", mutates_args=())
def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, routes: Tensor, entries: Tensor,
    starts: Tensor, chunk_starts: Tensor, text_index: Tensor, calls: Sequence[int], max_chunk_tokens: int,
    dense_kernel: str, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = dense.choose(q, dense_kernel, deterministic)
    grads = anchors.backward(kernel, dout, q, k, v, out, lse, text_index, _unpack(calls), deterministic)
    if routes.numel():
        lists = with_tiles(entries, starts, blocks_for(q).tile)
        routed_backward(dout, q, k, v, out, lse, grads, lists, routes, chunk_starts, max_chunk_tokens)
    return grads


@_attend_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, routes, chunk_starts, text_index, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, routes, chunk_starts, text_index)


def _differentiate(ctx, dout: Tensor, *_):
    q, k, v, out, lse, entries, starts, routes, chunk_starts, text_index = ctx.saved_tensors
    grads = _attend_backward(
        dout.contiguous(), q, k, v, out, lse, routes, entries, starts, chunk_starts, text_index, *ctx.settings
    )
    return *grads, *(None,) * 7


_attend.register_autograd(_differentiate, setup_context=_save)
