"""Dense attention kernels have one signature here; the fastest one present is chosen by name.

Each kernel returns its output with the natural-log LSE, and has a raw backward that takes any output and LSE: given
those of a softmax over *more* keys it returns the exact gradient of these keys (FlashAttention's backward recomputes
P = exp(scores - LSE) and D = rowsum(dO * O), both of which are then the merged ones).

    fa3    FlashAttention-3, Hopper        (packages flash_attn_3 or xformers)
    fa4    FlashAttention-4, Hopper and on (package flash-attn-4, our extra `fa4`)
    cudnn  cuDNN, shipped with torch
    fa2    FlashAttention-2, shipped with torch
    cpu    flash attention for CPUs, shipped with torch
    math   plain tensor code in blocks of queries: any device, any dtype

Shape letters: B runs of tokens, Lq queries, Lk keys, N heads, D head dim.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moc.errors import UserError

logger = logging.getLogger(__name__)

FA4_TESTED = ("4.0.0b16",)  # betas change their return values
SCORES_PER_BLOCK = 1 << 25  # the most scores that `math` holds at a time

Forward = Callable[..., tuple[Tensor, ...]]
Backward = Callable[..., tuple[Tensor, ...]]


class Lengths(NamedTuple):
    """Lengths tell sequences of queries and of keys, packed along the first dim, apart: prefix sums, int32 [B + 1], and
    the longest of each. Sequence i of the queries attends to sequence i of the keys."""

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True)
class DenseKernel:
    """A dense kernel is one way to compute dense attention with scale D**-0.5, without mask.

    forward(q, k, v) -> (out, lse): q [Lq, N, D], k, v [Lk, N, D] -> out [Lq, N, D] in their dtype, lse fp32 [N, Lq].
    backward(dout, q, k, v, out, lse, deterministic) -> (dq, dk, dv), where out and lse may be merged ones.
    Both also take B runs at once, each of which attends to its own keys: all shapes then begin with B.
    varlen: whether both take `lengths=` as well, and shapes without B.
    """

    name: str
    forward: Forward
    backward: Backward
    deterministic: bool = True
    varlen: bool = False


def choose(q: Tensor, name: str = "auto", deterministic: bool = False) -> DenseKernel:
    """Returns the kernel called `name`, or the fastest that fits q's device, dtype and head dim (and determinism).

    Raises UserError for an unknown name and for a kernel that is not installed or does not fit.
    """
    return _choose(name, capability(q.device), q.dtype, q.shape[-1], deterministic)


def choose_varlen(kernel: DenseKernel, q: Tensor) -> DenseKernel | None:
    """Returns the kernel for sequences of different lengths: `kernel` where it takes them, else FlashAttention-2, None
    where that does not take q either. FlashAttention-2 gives a sequence without keys an LSE of +inf."""
    if kernel.varlen:
        return kernel
    fa2, fits = _KERNELS["fa2"]
    return fa2 if fits(capability(q.device), q.dtype, q.shape[-1]) else None


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Returns a GPU's compute capability, None for a CPU; kept, since asking costs as much as launching a kernel."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@cache
def _choose(
    name: str, capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> DenseKernel:
    if name != "auto" and name not in _KERNELS:
        raise UserError(f"dense_kernel={name!r} is unknown; choose one of auto, {', '.join(_KERNELS)}")
    fitting = [
        kernel
        for kernel, fits in _KERNELS.values()
        if name in ("auto", kernel.name)
        and (kernel.deterministic or not deterministic)
        and fits(capability, dtype, head_dim)
    ]
    if not fitting:
        raise UserError(
            f"dense_kernel={name!r} is not installed or does not fit {dtype}, head dim {head_dim}, "
            f"{'CPU' if capability is None else f'compute capability {capability}'}, "
            f"deterministic={deterministic}; use dense_kernel='auto'"
        )
    where = "CPU" if capability is None else f"sm_{capability[0]}{capability[1]}"
    logger.info("dense attention on %s, %s, head dim %d: %s", where, dtype, head_dim, fitting[0].name)
    return fitting[0]


def is_installed(name: str) -> bool:
    """Returns whether the library of this kernel is present (whatever the device)."""
    return {"fa3": _fa3, "fa4": _fa4}.get(name, lambda: True)() is not None


def refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward that is itself to be differentiated: it would take the LSE for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this attention has no second derivative: leave out create_graph=True, or, in moc_attention, use "
            "backend='reference'"
        )


def _half_on_gpu(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, most: int = 256) -> bool:
    half = dtype in (torch.float16, torch.bfloat16)
    return capability is not None and capability >= (8, 0) and half and head_dim % 8 == 0 and head_dim <= most


def _of_runs(kernel: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Has a kernel, written for B runs at once, take a single one as well."""

    @wraps(kernel)
    def run(*args: Any, **lengths: Any) -> tuple[Tensor, ...]:
        if lengths or args[0].dim() == 4:
            return kernel(*args, **lengths)
        return tuple(x[0] for x in kernel(*(x[None] if isinstance(x, Tensor) else x for x in args)))

    return run


# FlashAttention-3


@cache
def _fa3() -> ModuleType | None:
    for package in ("flash_attn_3", "xformers.flash_attn_3"):
        try:
            import_module(f"{package}._C")
        except (ImportError, OSError):  # the package is not installed, or was built for another CUDA
            continue
        return torch.ops.flash_attn_3
    return None


def _fa3_fits(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> bool:
    return capability is not None and capability[0] == 9 and _half_on_gpu(capability, dtype, head_dim) and bool(_fa3())


def _cu_seqlens(lengths: Lengths | None) -> dict[str, Any]:
    """Returns lengths by the names that FlashAttention-3 and 4 give them."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, lengths, strict=True)) if lengths else {}


@_of_runs
def _fa3_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None = None) -> tuple[Tensor, Tensor]:
    ops = _fa3()
    assert ops is not None
    out, lse, *_ = ops.fwd(q, k, v, **_cu_seqlens(lengths), softmax_scale=q.shape[-1] ** -0.5, num_splits=1)
    return out, lse


@_of_runs
def _fa3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, deterministic: bool = False,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ops = _fa3()
    assert ops is not None
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    ops.bwd(
        dout, q, k, v, out, lse.contiguous(), dq, dk, dv, **_cu_seqlens(lengths),
        softmax_scale=q.shape[-1] ** -0.5, deterministic=deterministic,
    )  # fmt: skip
    return dq, dk, dv


# FlashAttention-4


@cache
def _fa4() -> ModuleType | None:
    try:
        found = version("flash-attn-4")
        module = import_module("flash_attn.cute.interface")
    except (ImportError, OSError, PackageNotFoundError):
        return None
    if found not in FA4_TESTED:
        logger.info("flash-attn-4 %s is installed but not tested; tested: %s", found, ", ".join(FA4_TESTED))
        return None
    return module


def _fa4_fits(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> bool:
    modern = capability is not None and capability[0] in (9, 10, 11)
    return modern and head_dim in (64, 96, 128) and _half_on_gpu(capability, dtype, head_dim) and bool(_fa4())


@_of_runs
def _fa4_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None = None) -> tuple[Tensor, Tensor]:
    module = _fa4()
    assert module is not None
    return module._flash_attn_fwd(q, k, v, **_cu_seqlens(lengths), softmax_scale=q.shape[-1] ** -0.5, return_lse=True)


@_of_runs
def _fa4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, deterministic: bool = False,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    module = _fa4()
    assert module is not None
    return module._flash_attn_bwd(
        q, k, v, out, dout, lse.contiguous(), **_cu_seqlens(lengths),
        softmax_scale=q.shape[-1] ** -0.5, deterministic=deterministic,
    )  # fmt: skip


# Shipped with torch: cuDNN, FlashAttention-2, CPU


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Returns tensors [B, L, N, D] as [B, N, L, D], or the other way round, without a copy."""
    return [x.transpose(1, 2) for x in tensors]


def _cudnn_fits(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> bool:
    return _half_on_gpu(capability, dtype, head_dim, 128) and torch.backends.cudnn.is_available()


@_of_runs
def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    if q.shape[1] == k.shape[1] == 1:  # cuDNN refuses a single query and key
        return _fa2_forward(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, True)
    return out.transpose(1, 2), lse.reshape(len(q), q.shape[2], q.shape[1])


@_of_runs
def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, deterministic: bool = False
) -> tuple[Tensor, ...]:
    if q.shape[1] == k.shape[1] == 1:
        return _fa2_backward(dout, q, k, v, out, lse, deterministic)
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # seeds dropout, which is off
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse[..., None].contiguous(), seed, seed, None, None, None,
        q.shape[2], k.shape[2], 0.0, False,
    )  # fmt: skip
    return tuple(_heads_first(*grads))


@_of_runs
def _fa2_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None = None) -> tuple[Tensor, Tensor]:
    cu_seqlens = lengths or (None, None, q.shape[1], k.shape[1])
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *cu_seqlens, 0.0, False, False)
    return out, lse


@_of_runs
def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, deterministic: bool = False,
    lengths: Lengths | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    cu_seqlens = lengths or (None, None, q.shape[1], k.shape[1])
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    with deterministic_algorithms(deterministic):
        return torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), *cu_seqlens, 0.0, False, unused, unused
        )


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Sets torch's switch for deterministic kernels for one call, since FA2's backward has no argument for it."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(wanted or before, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@_of_runs
def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v))
    return out.transpose(1, 2), lse


@_of_runs
def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, deterministic: bool = False
) -> tuple[Tensor, ...]:
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, False)
    return tuple(_heads_first(*grads))


# Plain tensor code


def _out_of_autocast(kernel: Callable) -> Callable:
    """Keeps a kernel out of autocast, which would round the products to bf16."""

    @wraps(kernel)
    def run(q: Tensor, *args):
        with torch.autocast(q.device.type, enabled=False):
            return kernel(q, *args)

    return run


def _query_blocks(q: Tensor, k: Tensor) -> list[slice]:
    size = max(1, SCORES_PER_BLOCK // max(1, len(q) * q.shape[2] * k.shape[1]))
    return [slice(start, start + size) for start in range(0, q.shape[1], size)]


@_of_runs
@_out_of_autocast
def math_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Computes attention in blocks of queries, in fp32 at least; it takes any device and dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(wide).permute(0, 2, 3, 1), v.to(wide).transpose(1, 2)
    out, lse = torch.empty_like(q), q.new_empty(len(q), q.shape[2], q.shape[1], dtype=wide)
    for rows in _query_blocks(q, k):
        scores = q[:, rows].to(wide).transpose(1, 2) @ keys * q.shape[-1] ** -0.5
        lse[..., rows] = scores.logsumexp(-1)
        out[:, rows] = ((scores - lse[..., rows, None]).exp() @ values).transpose(1, 2).to(q.dtype)
    return out, lse


@_of_runs
@_out_of_autocast
def math_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, deterministic: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradient of `math_forward`, or of these keys in a larger softmax whose `out` and `lse` are given."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    keys, values = k.to(wide).transpose(1, 2), v.to(wide).transpose(1, 2)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for rows in _query_blocks(q, k):
        queries, grad = q[:, rows].to(wide).transpose(1, 2), dout[:, rows].to(wide).transpose(1, 2)
        delta = (grad * out[:, rows].to(wide).transpose(1, 2)).sum(-1, keepdim=True)
        weights = (queries @ keys.mT * scale - lse[..., rows, None]).exp()
        dscores = weights * (grad @ values.mT - delta) * scale
        dq[:, rows] = (dscores @ keys).transpose(1, 2).to(q.dtype)
        dk += dscores.mT @ queries
        dv += weights.mT @ grad
    return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)


def _cpu_fits(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> bool:
    return capability is None and dtype in (torch.float32, torch.bfloat16, torch.float16)


# The fastest comes first.
_KERNELS: dict[str, tuple[DenseKernel, Callable[..., bool]]] = {
    "fa3": (DenseKernel("fa3", _fa3_forward, _fa3_backward, varlen=True), _fa3_fits),
    "fa4": (DenseKernel("fa4", _fa4_forward, _fa4_backward, varlen=True), _fa4_fits),
    "cudnn": (DenseKernel("cudnn", _cudnn_forward, _cudnn_backward, deterministic=False), _cudnn_fits),
    "fa2": (DenseKernel("fa2", _fa2_forward, _fa2_backward, varlen=True), _half_on_gpu),
    "cpu": (DenseKernel("cpu", _cpu_forward, _cpu_backward), _cpu_fits),
    "math": (DenseKernel("math", math_forward, math_backward), lambda *_: True),
}
