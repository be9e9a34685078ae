"""A Triton kernel adds up rows that were gathered from tokens: the gradient of a key is the sum of its copies'.

Plain tensor code takes several launches for each of two tensors, which cost more than the work where shots are short.

Shape letters: L tokens, R gathered rows, N heads, D head dim.
"""

import triton
import triton.language as tl
from torch import Tensor

from moc.kernels.sizes import next_power_of_2


def sum_rows(first: Tensor, second: Tensor, rows: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums rows [R, N, D] of two tensors for each token, in fp32 and in the order of `rows` -> two of [L, N, D].

    Token i has rows[starts[i] : starts[i + 1]], perhaps none: its sum then is 0. rows [R], starts [L + 1]: int64.
    """
    first, second = first.contiguous(), second.contiguous()
    num_tokens, width = len(starts) - 1, first[0].numel()
    sums = [x.new_empty(num_tokens, *x.shape[1:]) for x in (first, second)]
    block = next_power_of_2(width)
    sum_rows_kernel[(num_tokens,)](
        first, second, *sums, rows, starts, WIDTH=width, BLOCK=block, num_warps=max(4, block // 512)
    )
    return sums[0], sums[1]


@triton.jit
def sum_rows_kernel(
    first, second, first_sum, second_sum, rows, starts, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program adds up the rows of one token, of both tensors."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    one, other = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in range(tl.load(starts + token), tl.load(starts + token + 1)):
        row = tl.load(rows + at) * WIDTH + column
        one += tl.load(first + row, mask=inside, other=0.0).to(tl.float32)
        other += tl.load(second + row, mask=inside, other=0.0).to(tl.float32)
    offset = token * WIDTH + column
    tl.store(first_sum + offset, one.to(first_sum.dtype.element_ty), mask=inside)
    tl.store(second_sum + offset, other.to(second_sum.dtype.element_ty), mask=inside)
