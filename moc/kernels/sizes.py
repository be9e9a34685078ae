"""Sizes that launches of Triton kernels are made of.

Triton has functions of the same names, for kernels too: called from outside they take microseconds, twenty times as
long, and what a short stream takes is the time of its launches.
"""


def cdiv(total: int, size: int) -> int:
    """Blocks of `size` that hold `total`."""
    return -(-total // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`, which is 1 at least."""
    return 1 << (number - 1).bit_length()


def padded(head_dim: int) -> int:
    """The head dim as kernels see it: a power of two that the matrix unit takes."""
    return max(16, next_power_of_2(head_dim))
