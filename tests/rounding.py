"""This module compares rows that are rounded to fp8."""

import torch
from torch import Tensor


def assert_rounded_alike(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], exactly: bool) -> None:
    """Numbers and scales are the same, or within a number's neighbours and fp32's rounding."""
    (numbers, scale), (expected_numbers, expected_scale) = found, expected
    if exactly:
        assert torch.equal(numbers.view(torch.uint8), expected_numbers.view(torch.uint8))
        assert torch.equal(scale, expected_scale)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    wide, expected_wide = numbers.float(), expected_numbers.float()
    assert ((wide - expected_wide).abs() <= (2**-3 * expected_wide.abs()).clamp(min=2**-9)).all()
