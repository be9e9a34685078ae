"""Compiled pointwise functions equal the eager ones, in forward and gradient."""

import pytest
import torch
from torch import Tensor

from models.layers import add_gated, layer_norm, modulate, rms_norm
from models.rope import rotate
from models.stream import Members

MEMBERS = Members.build(torch.tensor([0, 0, 1, 2, 2, 2, 2], dtype=torch.int32), [2, 1, 4])


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


CASES = {
    "modulate": (modulate, lambda: (*tensors((7, 8), (3, 8), (3, 8)), MEMBERS)),
    "add_gated": (add_gated, lambda: (*tensors((7, 8), (7, 8), (3, 8)), MEMBERS)),
    "layer_norm": (layer_norm, lambda: (*tensors((7, 8), (8,), (8,)), 1e-6)),
    "rms_norm": (rms_norm, lambda: (*tensors((7, 2, 8), (8,)), 1e-6)),
    "rotate": (rotate, lambda: (*tensors((7, 2, 8)), tuple(torch.randn(2, 7, 4)))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager(name: str) -> None:
    function, arguments = CASES[name]
    compiled = torch.compile(function.__wrapped__, fullgraph=True)
    args = arguments()
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    results = []
    for run in (function, compiled):
        out = run(*args)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
