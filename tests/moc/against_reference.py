"""A backend is held against the plain reference, in output and in every gradient."""

import pytest
import torch

import moc
from moc import reference
from tests.strategies import attention_tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
DROPS = moc.DropKey(seed=1, step=2, layer=3, first_head=4)


def assert_equal_to_reference(attend, layout, config, routes, dtype=torch.float64, tolerance=1e-9, **kind):
    """Compares output and gradients of `attend` with the fp64 reference with the same routes."""
    q, k, v = attention_tensors(layout, dtype=dtype, **kind)
    direction = torch.randn(q.shape, dtype=dtype)
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out = attend(*mine, routes, layout, config)
    expected = reference.attend(*exact, routes, layout, config)
    assert out.dtype == dtype
    pairs = [(out, expected)]
    out.backward(direction)
    expected.backward(direction.double())
    pairs += [(x.grad, y.grad) for x, y in zip(mine, exact, strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
