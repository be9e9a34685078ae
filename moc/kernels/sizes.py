"""Triton kernels are launched with these sizes: block sizes for each GPU and dtype, and arithmetic with sizes.

Triton has functions of the same names, for kernels too: called from outside they take microseconds, twenty times as
long, and what a short stream takes is the time of its launches.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moc.kernels.dense import capability


def cdiv(total: int, size: int) -> int:
    """Returns how many blocks of `size` hold `total`."""
    return -(-total // size)


def next_power_of_2(number: int) -> int:
    """Returns the least power of two that is not below `number`, which is 1 at least."""
    return 1 << (number - 1).bit_length()


def padded(head_dim: int) -> int:
    """Returns the head dim as kernels see it: a power of two that the matrix unit takes."""
    return max(16, next_power_of_2(head_dim))


@dataclass(frozen=True)
class Blocks:
    """These are the block sizes of the attention kernels: BM queries, BN keys, num_warps and num_stages of each."""

    tile: int
    forward: dict[str, int]
    dq: dict[str, int]
    dkv: dict[str, int]


# These were measured on an H100 with head dim 128.
HALF = Blocks(
    tile=128,
    forward={"BN": 64, "num_warps": 4, "num_stages": 2},
    dq={"BN": 64, "num_warps": 8, "num_stages": 3},
    dkv={"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
)
HALF_SMALL_CHUNKS = Blocks(
    tile=128,
    forward={"BN": 32, "num_warps": 8, "num_stages": 3},
    dq={"BN": 32, "num_warps": 4, "num_stages": 3},
    dkv={"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
)
# These were measured on an H100 with head dim 64, at chunks of 96, 360, 576 and 1,280 tokens.
HALF_NARROW_HEADS = Blocks(
    tile=64,
    forward={"BN": 64, "num_warps": 4, "num_stages": 2},
    dq={"BN": 32, "num_warps": 4, "num_stages": 3},
    dkv={"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
)
HALF_NARROW_HEADS_SMALL_CHUNKS = replace(HALF_NARROW_HEADS, forward={"BN": 32, "num_warps": 4, "num_stages": 2})
# These are chosen by what compiles without spills (docs/benchmarks/kernels_ahead.md); they are not measured.
HALF_BY_REGISTERS = Blocks(
    tile=128,
    forward={"BN": 32, "num_warps": 8, "num_stages": 2},
    dq={"BN": 32, "num_warps": 8, "num_stages": 2},
    dkv={"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 2},
)
FULL = Blocks(
    tile=32,
    forward={"BN": 32, "num_warps": 8, "num_stages": 1},
    dq={"BN": 16, "num_warps": 8, "num_stages": 2},
    dkv={"BM": 32, "BN": 16, "num_warps": 8, "num_stages": 1},
)
SMALL_CHUNK = 200  # tokens; smaller chunks have other blocks
# Data-centre chips from Hopper on: their matrix units read operands from shared memory, others from registers.
WIDE_UNITS = ((9, 0), (10, 0), (10, 3))

# Kernels of short samples, whose tile is the block of queries of forward and dq and the block of keys of dkv.
# Measured on an H100 with head dim 64.
MASKED_HALF = Blocks(
    tile=64,
    forward={"BN": 64, "num_warps": 4},
    dq={"BN": 64, "num_warps": 4},
    dkv={"BM": 64, "num_warps": 4},
)
# These are chosen by what they compile to; they are not measured.
MASKED_HALF_WIDE_HEADS = replace(MASKED_HALF, dkv={"BM": 32, "num_warps": 8})
MASKED_HALF_BY_REGISTERS = Blocks(
    tile=32,
    forward={"BN": 64, "num_warps": 4, "num_stages": 2},
    dq={"BN": 64, "num_warps": 4, "num_stages": 2},
    dkv={"BM": 64, "num_warps": 4},
)
MASKED_FULL = Blocks(
    tile=32,
    forward={"BN": 32, "num_warps": 8, "num_stages": 1},
    dq={"BN": 16, "num_warps": 8, "num_stages": 2},
    dkv={"BM": 16, "num_warps": 8},
)


def has_wide_units(device: torch.device) -> bool:
    """Returns whether a GPU is one of WIDE_UNITS; a CPU, where kernels are interpreted, is taken for one."""
    return capability(device) in (None, *WIDE_UNITS)


def blocks_for(q: Tensor, chunk_tokens: int) -> Blocks:
    """Returns the block sizes of routed attention for q's dtype and device and a layout's `chunk_tokens`.

    The layout's largest chunk changes with every stream, and for other blocks the kernels would be compiled anew.
    """
    if q.dtype == torch.float32:
        return FULL
    if not has_wide_units(q.device):
        return HALF_BY_REGISTERS
    small = chunk_tokens < SMALL_CHUNK
    if padded(q.shape[-1]) <= 64:
        return HALF_NARROW_HEADS_SMALL_CHUNKS if small else HALF_NARROW_HEADS
    return HALF_SMALL_CHUNKS if small else HALF


def masked_blocks(q: Tensor) -> Blocks:
    """Returns the block sizes of the kernels of short samples for q's dtype, head dim and device."""
    if q.dtype == torch.float32:
        return MASKED_FULL
    if not has_wide_units(q.device):
        return MASKED_HALF_BY_REGISTERS
    return MASKED_HALF if padded(q.shape[-1]) <= 64 else MASKED_HALF_WIDE_HEADS


def route_blocks(q: Tensor, top_k: int, subchunks: int) -> dict[str, int]:
    """Returns BQ queries, BC chunks and num_warps of the routing kernel. Those for several subchunks are chosen by what
    spills least (docs/benchmarks/kernels_ahead.md); they are not measured."""
    several = subchunks > 1
    if q.dtype == torch.float32:
        return {"BQ": 32, "BC": 16, "num_warps": 8 if several else 4}
    return {"BQ": 128 if top_k <= 8 and not several else 64, "BC": 32, "num_warps": 4}
