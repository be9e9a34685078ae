"""Backend `triton` merges, exactly, anchored attention of the fastest dense kernel and routed attention of its own.

Routes become lists of queries by (head, chunk) on the device; nothing waits for the host. Compiled, the whole attention
is one `torch.library` operator with a backward, so it goes through `torch.compile(fullgraph=True)`; eager, it is the
same two functions in an autograd function, since calling an operator takes longer than a short stream's kernels.

Shape letters: L packed tokens, Lq queries, N heads, D head dim, M chunks, K slots of a query.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moc.config import MoCConfig
from moc.execution import AUTO, Execution
from moc.kept import Kept
from moc.kernels import anchors, dense, triton_masked
from moc.kernels.anchors import AnchorCall, AnchorPlan
from moc.kernels.packed import Packed
from moc.kernels.sizes import blocks_for
from moc.kernels.triton_index import Lists, build_lists, max_tiles
from moc.kernels.triton_routed import routed_backward, routed_forward
from moc.kernels.triton_routing import route
from moc.layout import ShotLayout

__all__ = ["attend", "route"]

CALL_INTS = len(AnchorCall._fields)


def attend(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, layout: ShotLayout, config: MoCConfig,
    execution: Execution = AUTO, kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """Attends to anchors and routed chunks together: q [Lq, N, D], k, v [L, N, D] -> [Lq, N, D], same dtype.

    routes: int [N, Lq, K], no chunk twice in a row and none that the anchors cover; None (or K = 0) for anchors alone.
    Takes head dims up to 128, fp32, fp16 and bf16. Has no second derivative.
    """
    whole = len(q) == len(k)
    if routes is not None and routes.shape[-1] and whole and not (config.dense or torch.compiler.is_compiling()):
        plan = triton_masked.masked_plan(q, layout, config)
        if plan is not None:
            return triton_masked.attend(q, k, v, routes.int(), plan)
    if routes is not None and not config.dense:
        routes = anchors.with_own_chunk(routes, layout, config).int().contiguous()
    if config.dense or routes is None or routes.shape[-1] == 0:
        routes = torch.empty(0, 0, 0, dtype=torch.int32, device=q.device)
    tables, numbers = _flat(anchors.anchor_plan(layout, config, len(q)))
    inputs = (
        q.contiguous(), k.contiguous(), v.contiguous(), routes, layout.chunk_cu_seqlens, tables, numbers,
        layout.chunk_tokens, layout.max_chunk_tokens, execution.dense_kernel, execution.deterministic,
    )  # fmt: skip
    return _operator(*inputs)[0] if torch.compiler.is_compiling() else _Attend.apply(kept, *inputs)


def _flat(plan: AnchorPlan) -> tuple[list[Tensor], list[int]]:
    """Returns a plan as an operator takes it."""
    if plan.packed is None:
        return [plan.text_index], [number for call in plan.calls for number in call]
    *tables, max_queries, max_keys = plan.packed
    return [plan.text_index, *tables], [max_queries, max_keys]


def _plan(tables: Sequence[Tensor], numbers: Sequence[int]) -> AnchorPlan:
    """Returns the inverse of `_flat`."""
    text_index, *packed = tables
    if packed:
        return AnchorPlan(text_index, [], Packed._make([*packed, *numbers]))
    calls = [AnchorCall(*numbers[i : i + CALL_INTS]) for i in range(0, len(numbers), CALL_INTS)]
    return AnchorPlan(text_index, calls, None)


# Forward and backward, the same for the operator and for the autograd function


def _forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, chunk_starts: Tensor, tables: Sequence[Tensor],
    numbers: Sequence[int], chunk_tokens: int, max_chunk_tokens: int, dense_kernel: str, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns out [Lq, N, D], lse [N, Lq], and the tensors of the `Lists` for the backward."""
    kernel = dense.choose(q, dense_kernel, deterministic)
    out, lse = anchors.forward(kernel, q, k, v, _plan(tables, numbers))
    if not routes.numel():
        none = [routes.new_empty(0) for _ in range(4)]
        return out, lse, none[0], none[1], none[2], none[3]
    blocks = blocks_for(q, chunk_tokens)
    lists = build_lists(routes, chunk_starts.numel() - 1, blocks.tile)
    lse = routed_forward(q, k, v, out, lse, lists, routes, chunk_starts, blocks)
    return out, lse, lists.entries, lists.starts, lists.tile_starts, lists.tile_list


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, entries: Tensor, starts: Tensor,
    tile_starts: Tensor, tile_list: Tensor, routes: Tensor, chunk_starts: Tensor, tables: Sequence[Tensor],
    numbers: Sequence[int], chunk_tokens: int, max_chunk_tokens: int, dense_kernel: str, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = dense.choose(q, dense_kernel, deterministic)
    grads = anchors.backward(kernel, dout, q, k, v, out, lse, _plan(tables, numbers), deterministic)
    if routes.numel():
        blocks = blocks_for(q, chunk_tokens)
        lists = Lists(entries, starts, tile_starts, tile_list, blocks.tile)
        routed_backward(dout, q, k, v, out, lse, grads, lists, routes, chunk_starts, blocks, max_chunk_tokens)
    return grads


def _save(ctx, inputs, output) -> None:
    q, k, v, routes, chunk_starts, tables, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, routes, chunk_starts, *tables)


def _arguments(ctx) -> list[Any]:
    """Returns what `_save` kept, as `_backward` takes it after dout."""
    saved = ctx.saved_tensors  # is read once: checkpointing unpacks no tensor twice
    return [*saved[:11], list(saved[11:]), *ctx.settings]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept, *inputs):
        output = kept.of(lambda: _forward(*inputs)) if kept else _forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, dout):
        dense.refuse_second_derivative()
        return None, *_backward(dout.contiguous(), *_arguments(ctx)), *(None,) * 8


_operator = torch.library.custom_op("moc::attend", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("moc::attend_backward", _backward, mutates_args=())


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, chunk_starts: Tensor, *args) -> tuple[Tensor, ...]:
    num_lists = (chunk_starts.shape[0] - 1) * q.shape[1]
    num_tiles = max_tiles(routes.numel(), num_lists, blocks_for(q, args[2]).tile)
    sizes = (routes.numel(), num_lists + 1, num_lists + 1, num_tiles) if routes.numel() else (0, 0, 0, 0)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q), lse, *(routes.new_empty(size) for size in sizes)


@_backward_operator.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _differentiate(ctx, dout: Tensor, *_):
    arguments = _arguments(ctx)
    no_tables = [None] * len(arguments[11])
    return *_backward_operator(dout.contiguous(), *arguments), None, None, no_tables, *(None,) * 5


_operator.register_autograd(_differentiate, setup_context=_save)
