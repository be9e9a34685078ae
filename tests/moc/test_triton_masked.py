"""The Triton kernels of short samples equal the reference, and are chosen where samples are short."""

import pytest
import torch
from hypothesis import given, settings

import moc
from moc import reference
from tests.moc.against_reference import interpreted
from tests.strategies import attention_tensors, configs, seeds, streams


def assert_equal_to_reference(layout, config, routes, seed=0, **kind):
    from moc.kernels import triton_masked

    q, k, v = attention_tensors(layout, seed, dtype=torch.float32, head_dim=16, requires_grad=True, **kind)
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed))
    out = triton_masked.attend(q, k, v, routes.int(), triton_masked.masked_plan(q, layout, config))
    expected = reference.attend(q, k, v, routes, layout, config)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    mine, theirs = (torch.autograd.grad(x, (q, k, v), direction) for x in (out, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@interpreted
@settings(max_examples=25)
@given(streams(max_samples=3), configs(), seeds)
def test_masked_equals_the_reference(stream, config, seed):
    from moc.kernels import triton_masked

    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed, dtype=torch.float32, head_dim=16)
    if config.dense or triton_masked.masked_plan(q, layout, config) is None:
        return
    assert_equal_to_reference(layout, config, moc.route(q, k, layout, config), seed)


@interpreted
@pytest.mark.parametrize(
    ("own_anchor", "causal"),
    [
        ("shot", True), ("chunk", False), ("none", True),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [("shot", False), ("chunk", True), ("none", False)]),
    ],
)  # fmt: skip
def test_blocks_that_nobody_attends_to_and_all_64_chunks(own_anchor, causal):
    """Samples have 63 and 62 chunks and several blocks of keys; of the former the last bits of a word are used."""
    layout = moc.ShotLayout.build([moc.Shot(3, (30, 1, 2)), moc.Shot(7, (30, 1, 3))], 5, chunk_tokens=3)
    layout = moc.ShotLayout.pack([layout, moc.ShotLayout.build([moc.Shot(0, (61, 1, 3))], 1, chunk_tokens=3)])
    assert max(group.num_chunks for group in layout.groups) == 61
    config = moc.MoCConfig(top_k=2, causal=causal, own_anchor=own_anchor, text_anchor="global_and_own")
    q, k, _ = attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=1)
    assert_equal_to_reference(layout, config, moc.route(q, k, layout, config), num_heads=1)


@interpreted
def test_a_caller_s_routes_may_go_anywhere():
    """Routes lead to later chunks, though the config is causal: no key is left out for coming late."""
    layout = moc.ShotLayout.build([moc.Shot(2, (4, 2, 2))] * 3, 1, chunk_tokens=4)
    config = moc.MoCConfig(top_k=2, text_anchor="none")
    routes = torch.full((2, layout.num_tokens, 2), -1)
    routes[..., 0] = layout.num_chunks - 1
    own = layout.token_group == layout.token_group[-1]
    routes[:, own] = -1
    assert_equal_to_reference(layout, config, routes)


@interpreted
def test_short_samples_are_masked_and_long_ones_listed(monkeypatch):
    from moc.kernels import triton_backend, triton_masked

    chosen = []
    monkeypatch.setattr(triton_masked, "attend", lambda q, *_: chosen.append(len(q)) or q)
    monkeypatch.setattr(triton_backend._Attend, "apply", lambda q, *_: q)
    config = moc.MoCConfig(top_k=1, chunk_tokens=4096)
    for shots, is_short in (([(1, 8, 8)] * 3, True), ([(1, 40, 30)] * 2, False)):
        layout = moc.ShotLayout.build([moc.Shot(1, grid) for grid in shots], 2, chunk_tokens=4096)
        q = torch.randn(layout.num_tokens, 1, 16)
        assert (triton_masked.masked_plan(q, layout, config) is not None) == is_short
        moc.moc_attention(q, q, q, layout, config, backend="triton")
        assert chosen == ([layout.num_tokens] if is_short else [])
        chosen.clear()
    many = moc.ShotLayout.build([moc.Shot(0, (70, 1, 1))], 0, chunk_tokens=1)
    assert triton_masked.masked_plan(q, many, config) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128])
def test_masked_on_a_gpu(head_dim, dtype):
    """Errors are compared with those of torch's attention, as in test_kernels_gpu."""
    from tests.moc.test_kernels_gpu import check, stream

    layout = stream()
    assert len(layout.chunks) <= 64
    check(moc.MoCConfig(top_k=3), layout, dtype=dtype, head_dim=head_dim)
