"""`moc_attention` and `route` are the two calls that a model makes; this module alone chooses a backend.

A backend is a module with `attend(q, k, v, routes, layout, config, execution, kept)`, differentiable in q, k and v, and
`route(q, k, layout, config, drops)`; both take q as the last queries of the stream, as many as it holds. It is imported
when it is first chosen.

Shape letters: L packed tokens, Lq queries (the last ones of the stream, or all L), N heads, D head dim, K routes.
"""

import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from moc import reference, routing
from moc.config import Candidates, Descriptor, DropKey, MoCConfig
from moc.errors import UserError
from moc.execution import Backend, Execution
from moc.kept import Kept
from moc.kernels import HAS_TRITON, torch_backend
from moc.kernels.dense import capability
from moc.layout import ShotLayout
from moc.routes import Routes

logger = logging.getLogger(__name__)


def resolve_backend(q: Tensor, chosen: Backend) -> ModuleType:
    """Returns the module that will compute this call. Raises UserError where the backend does not fit q."""
    if chosen is Backend.auto:
        chosen = Backend.triton if q.is_cuda and _triton_fits(q) else Backend.torch
    elif chosen is Backend.triton and not _triton_fits(q):
        raise UserError(
            f"backend='triton' needs Triton, a CUDA GPU of compute capability 8.0 or more, fp16, bf16 or fp32 and head "
            f"dims from 16 to 128; q is {q.dtype}, head dim {q.shape[-1]}, on {q.device}: use backend='torch'"
        )
    if not torch.compiler.is_compiling():
        _log(chosen, q.device.type, q.dtype, q.shape[-1])
    if chosen is Backend.triton:
        from moc.kernels import triton_backend  # imports Triton

        return triton_backend
    return reference if chosen is Backend.reference else torch_backend


@cache
def _log(backend: Backend, device: str, dtype: torch.dtype, head_dim: int) -> None:
    """Logs once for each kind of call."""
    logger.info("attention on %s, %s, head dim %d: backend %s", device, dtype, head_dim, backend)


def _triton_fits(q: Tensor) -> bool:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    if not HAS_TRITON or q.dtype not in dtypes or not 16 <= q.shape[-1] <= 128:
        return False
    interpreted = q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted or (q.is_cuda and (capability(q.device) or (0, 0)) >= (8, 0))


def route(
    q: Tensor,
    k: Tensor,
    layout: ShotLayout,
    config: MoCConfig,
    drops: DropKey | None = None,
    backend: Execution | str | None = None,
) -> Tensor:
    """Returns each query's and head's chunks: q [Lq, N, D], k [L, N, D] -> int32 [N, Lq, K], -1 where a slot is empty.

    A query's chunks come in no set order. K = top_k; where drops apply (`drops` given and the config has any), top_k +
    drop_in_max. Not differentiable. Fewer queries than keys, backend and errors: as in `moc_attention`.
    """
    _check("q, k", (q, k), layout)
    return _router(q, config, Execution.of(backend)).route(q, k, layout, config, drops)


def _router(q: Tensor, config: MoCConfig, execution: Execution) -> ModuleType:
    """Returns the module that will route; Triton's kernels know no candidates but all."""
    return resolve_backend(q, execution.backend) if config.candidates is Candidates.all else routing


def moc_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ShotLayout,
    config: MoCConfig,
    routes: Routes | Tensor | None = None,
    backend: Execution | str | None = None,
    route_qk: tuple[Tensor, Tensor] | None = None,
    drops: DropKey | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Attends by Mixture of Contexts over a packed stream: q [Lq, N, D], k and v [L, N, D] -> [Lq, N, D], same dtype.

    Each query attends, by one softmax with scale D**-0.5, to its anchors and to its routed chunks. Fewer queries than
    keys are the last ones of the stream; the keys and values before them are those of an earlier call.

    layout: describes the stream; on the device of q. config: what to attend to; `config.dense` is plain attention.
    routes: to use instead of routing here. `Routes` are taken as they are (those of `route`, in recomputation);
        int [N, Lq, K] are the caller's own, which go through `Routes.checked`.
    backend: a name, an `Execution`, or None for the fastest. route_qk: the (q, k) to score with `descriptor: pre_rope`.
    drops: the key of context drop-off and drop-in, in training; None leaves them out.
    kept: of the same call before, which is now recomputed. A backend may compute short samples again all the same.

    Raises ValueError where shapes, dtypes, the layout or `route_qk` do not fit, UserError where the backend does not
    fit q. Source: arXiv 2508.21058, section 3.
    """
    _check("q, k, v", (q, k, v), layout)
    execution = Execution.of(backend)
    module = resolve_backend(q, execution.backend)
    if config.dense:
        indices = None
    elif routes is not None:
        indices = (Routes.checked(routes, layout, config) if isinstance(routes, Tensor) else routes).indices
        if indices.shape[:2] != (q.shape[1], len(q)):
            raise ValueError(f"routes must be [{q.shape[1]}, {len(q)}, K] for this q; got {tuple(indices.shape)}")
    else:
        _check_route_qk(route_qk, q, layout, config)
        indices = _router(q, config, execution).route(*(route_qk or (q, k)), layout, config, drops)
    return module.attend(q, k, v, indices, layout, config, execution, kept)


def _check(names: str, given: tuple[Tensor, ...], layout: ShotLayout) -> None:
    """Checks `given`, which is q, k and perhaps v; messages call them `names`."""
    q, k, *others = given
    alike = all(x.shape == k.shape for x in others) and q.shape[1:] == k.shape[1:]
    if q.dim() != 3 or not alike or not 0 < len(q) <= len(k):
        raise ValueError(
            f"{names} must share one shape [L, N, D], of which q may have the last tokens alone; got "
            f"{[tuple(x.shape) for x in given]}"
        )
    if not q.is_floating_point() or any(x.dtype != q.dtype for x in given):
        raise ValueError(f"{names} must share one floating dtype; got {[x.dtype for x in given]}: cast them alike")
    if len(k) != layout.num_tokens:
        raise ValueError(f"k has {len(k)} tokens, its layout {layout.num_tokens}: they describe different streams")
    if layout.device != q.device:
        raise ValueError(f"the layout is on {layout.device}, q on {q.device}: call layout.to(q.device) once a batch")


def _check_route_qk(route_qk: tuple[Tensor, Tensor] | None, q: Tensor, layout: ShotLayout, config: MoCConfig) -> None:
    if (config.descriptor is Descriptor.pre_rope) != (route_qk is not None):
        raise ValueError("route_qk goes with descriptor='pre_rope', and only with it")
    if route_qk is None:
        return
    _check("the q, k of route_qk", route_qk, layout)
    if route_qk[0].shape[:2] != q.shape[:2]:
        raise ValueError(
            f"route_qk has {len(route_qk[0])} queries of {route_qk[0].shape[1]} heads, q {len(q)} of {q.shape[1]}: "
            "every query of every head routes by its own"
        )
