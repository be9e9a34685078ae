"""These tests are about dense kernels: their results merge exactly, and one is chosen by name, by speed or by
determinism."""

import logging

import pytest
import torch

from moc import reference
from moc.errors import UserError
from moc.kernels import dense
from tests.strategies import tensors

pytestmark = pytest.mark.usefixtures("listed")


@pytest.mark.parametrize(("name", "dtype"), [("cpu", torch.float32), ("math", torch.float32), ("math", torch.float64)])
def test_parts_merged_by_lse_are_exact_in_output_and_gradients(name, dtype):
    q, k, v, direction = tensors(50, 0, 3, 16, 4, dtype=dtype)
    kernel = dense.choose(q, name)
    runs = [slice(0, 7), slice(7, 50)]
    outs, lses = zip(*(kernel.forward(q, k[run], v[run]) for run in runs), strict=True)
    lse = torch.logaddexp(*lses)
    out = sum(o * (part_lse - lse).exp().T[..., None] for o, part_lse in zip(outs, lses, strict=True))
    grads = [kernel.backward(direction, q, k[run], v[run], out, lse) for run in runs]
    dq, dk, dv = sum(g[0] for g in grads), torch.cat([g[1] for g in grads]), torch.cat([g[2] for g in grads])

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    everything = torch.ones(1, 50, 50, dtype=torch.bool)
    expected = reference.masked_attention(*exact, everything)
    theirs = torch.autograd.grad(expected, exact, direction.double())
    for mine, other in zip((out, dq, dk, dv), (expected, *theirs), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cpu", "math"])
def test_runs_at_once_are_the_runs_one_by_one(name):
    """Of three runs of 5 queries, each has 7 keys."""
    q, direction, k, v = (torch.randn(3, length, 2, 8) for length in (5, 5, 7, 7))
    kernel = dense.choose(q, name)
    out, lse = kernel.forward(q, k, v)
    together = out, lse, *kernel.backward(direction, q, k, v, out, lse)
    apart = []
    for run in range(3):
        own = q[run], k[run], v[run]
        result = kernel.forward(*own)
        apart.append((*result, *kernel.backward(direction[run], *own, *result)))
    torch.testing.assert_close(together, tuple(torch.stack(results) for results in zip(*apart, strict=True)))


def test_math_in_blocks_of_queries_is_the_same(monkeypatch):
    q, k, v, direction = tensors(33, 1, 2, 8, 4)
    whole = dense.math_forward(q, k, v)
    grads = dense.math_backward(direction, q, k, v, *whole)
    monkeypatch.setattr(dense, "SCORES_PER_BLOCK", 300)
    for a, b in zip((*whole, *grads), (*dense.math_forward(q, k, v), *dense.math_backward(direction, q, k, v, *whole)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_a_dense_kernel_is_chosen_by_name_or_as_the_fastest_and_logged(caplog):
    dense._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="moc.kernels.dense"):
        assert dense.choose(torch.zeros(1, 1, 8)).name == "cpu"
    assert "CPU" in caplog.text
    assert "cpu" in caplog.text
    assert dense.choose(torch.zeros(1, 1, 8, dtype=torch.float64)).name == "math"
    assert dense.choose(torch.zeros(1, 1, 8), "math").name == "math"
    with pytest.raises(UserError, match=r"'fa9' is unknown; choose one of auto, fa3"):
        dense.choose(torch.zeros(1, 1, 8), "fa9")
    with pytest.raises(UserError, match="does not fit"):
        dense.choose(torch.zeros(1, 1, 8), "cudnn")


def test_deterministic_rules_a_kernel_out_that_is_not(monkeypatch):
    shaky = dense.DenseKernel("cpu", dense.math_forward, dense.math_backward, deterministic=False)
    monkeypatch.setitem(dense._KERNELS, "cpu", (shaky, lambda *_: True))
    dense._choose.cache_clear()
    try:
        assert dense.choose(torch.zeros(1, 1, 8)) is shaky
        assert dense.choose(torch.zeros(1, 1, 8), deterministic=True).name == "math"
        with pytest.raises(UserError, match="deterministic=True; use dense_kernel='auto'"):
            dense.choose(torch.zeros(1, 1, 8), "cpu", deterministic=True)
    finally:
        dense._choose.cache_clear()


def test_a_broken_library_is_a_missing_one(monkeypatch):
    def broken(name):
        raise OSError(f"{name}: libcudart.so.13: cannot open shared object file")

    for find in (dense._fa3, dense._fa4):
        find.cache_clear()
    monkeypatch.setattr(dense, "import_module", broken)
    monkeypatch.setattr(dense, "version", lambda name: dense.FA4_TESTED[0])
    try:
        assert not dense.is_installed("fa3")
        assert not dense.is_installed("fa4")
    finally:
        for find in (dense._fa3, dense._fa4):
            find.cache_clear()
