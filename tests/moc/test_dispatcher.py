"""The dispatcher chooses a backend, takes a caller's routes and computes the last queries alone."""

import logging

import pytest
import torch
from hypothesis import given

import moc
from moc import attention, reference
from moc.errors import UserError
from moc.kernels import anchors, masked
from moc.routes import drop_covered
from tests.moc.against_reference import DROPS, interpreted
from tests.moc.test_reference import two_samples
from tests.strategies import attention_tensors, configs, seeds, streams

pytestmark = pytest.mark.usefixtures("listed")


def test_backends_are_chosen_by_device_by_setting_and_by_call(monkeypatch):
    layout, config = two_samples(), moc.MoCConfig(top_k=1)
    q, k, v = attention_tensors(layout, dtype=torch.float32, head_dim=16)
    if not torch.cuda.is_available():
        torch_ = moc.moc_attention(q, k, v, layout, config, backend="torch")
        assert torch.equal(moc.moc_attention(q, k, v, layout, config), torch_)
    with pytest.raises(UserError, match="backend='triton' needs"):
        moc.moc_attention(q.double(), k.double(), v.double(), layout, config, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="on cpu: use backend='torch'"):
        moc.moc_attention(q, k, v, layout, config, backend="triton")


def test_the_backend_is_logged_once_for_each_kind_of_call(caplog):
    attention._log.cache_clear()
    q = torch.zeros(3, 2, 7, dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="moc.attention"):
        for backend in (moc.Backend.auto, moc.Backend.auto, moc.Backend.reference):
            attention.resolve_backend(q, backend)
    kind = "attention on cpu, torch.float64, head dim 7: backend"
    assert [record.message for record in caplog.records] == [f"{kind} torch", f"{kind} reference"]


@interpreted
def test_triton_takes_head_dims_from_16_to_128():
    for head_dim in (16, 128):
        chosen = attention.resolve_backend(torch.zeros(3, 200, head_dim), moc.Backend.triton)
        assert chosen.__name__ == "moc.kernels.triton_backend"
    for head_dim in (15, 129):
        with pytest.raises(UserError, match=rf"head dims from 16 to 128; q is torch.float32, head dim {head_dim}"):
            attention.resolve_backend(torch.zeros(3, 64, head_dim), moc.Backend.triton)


@given(streams(max_samples=2), configs(), seeds)
def test_callers_routes_lose_what_anchors_cover_and_repeats(stream, config, seed):
    layout = stream.layout()
    generator = torch.Generator().manual_seed(seed)
    wild = torch.randint(-1, layout.num_chunks, (2, layout.num_tokens, 5), generator=generator)
    kept = drop_covered(wild, layout, config)
    anchored = reference.anchor_mask(layout, config).float()
    for head, token in ((h, t) for h in range(2) for t in range(layout.num_tokens)):
        row = [c for c in kept[head, token].tolist() if c >= 0]
        assert len(set(row)) == len(row)
        named = {c for c in wild[head, token].tolist() if c >= 0}
        covered = {c for c in named if anchored[token, layout.chunks[c].start]}
        unseen = {c for c in named if layout.chunks[c].sample != layout.token_sample[token]}
        assert set(row) == named - covered - unseen


@pytest.fixture(params=["reference", "torch", "torch unmasked", pytest.param("triton", marks=interpreted)])
def backend(request, monkeypatch):
    name, _, in_parts = request.param.partition(" ")
    if in_parts:
        monkeypatch.setattr(masked, "MAX_TOKENS", 0)
    return name


@pytest.mark.parametrize(
    "config",
    [
        moc.MoCConfig(top_k=2, text_anchor="global_and_own"),
        moc.MoCConfig(top_k=2, causal=False),
        moc.MoCConfig(top_k=2, own_anchor="chunk", text_anchor="none"),
        moc.MoCConfig(dense=True),
    ],
    ids=["forward", "both ways", "own chunk", "dense"],
)
def test_the_last_queries_alone_equal_those_of_all(backend, config):
    """The first query is in a text, at a group's start, within a chunk, or the last token."""
    layout = two_samples()
    heads = 1 if backend == "triton" else 2  # interpreted kernels are slow
    q, k, v = attention_tensors(layout, dtype=torch.float32, num_heads=heads, head_dim=16, requires_grad=True)
    drops = DROPS if config.text_anchor == "global_and_own" else None
    whole = moc.moc_attention(q, k, v, layout, config, backend=backend, drops=drops)
    direction = torch.randn_like(whole)
    firsts = [layout.groups[2].start, layout.groups[3].end - 3, 1, layout.num_tokens - 1]
    for first in firsts[:1] if backend == "triton" else firsts:
        kind = {"backend": backend, "drops": drops}
        tail = moc.moc_attention(q[first:], k, v, layout, config, **kind)
        torch.testing.assert_close(tail, whole[first:], rtol=1e-5, atol=1e-5)
        if not config.dense:
            routes = moc.route(q[first:], k, layout, config, **kind)
            again = moc.moc_attention(q[first:], k, v, layout, config, routes, backend)
            torch.testing.assert_close(again, tail, rtol=1e-5, atol=1e-5)
        mine = torch.autograd.grad(tail, (q, k, v), direction[first:])
        cut = direction.clone()
        cut[:first] = 0
        expected = torch.autograd.grad(whole, (q, k, v), cut, retain_graph=True)
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_inputs_may_lie_in_memory_in_any_way(backend):
    layout, config, heads = two_samples(), moc.MoCConfig(top_k=2), 1 if backend == "triton" else 2
    given = attention_tensors(layout, dtype=torch.float32, num_heads=heads, head_dim=16)
    ways = [
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        lambda x: torch.stack([x, x], 1)[:, 1],
    ]
    q, k, v = (way(x).requires_grad_() for way, x in zip(ways, given, strict=True))
    results = []
    for inputs in ((q, k, v), [x.contiguous() for x in (q, k, v)]):
        out = moc.moc_attention(*inputs, layout, config, backend=backend)
        results.append([out, *torch.autograd.grad(out, (q, k, v), ways[0](out.detach()))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=interpreted)])
def test_queries_before_the_first_one_cost_no_call(name, monkeypatch):
    """The anchored attention of four shots is five dense calls, of the last shot's queries one."""
    layout = moc.ShotLayout.build([moc.Shot(2, (2, 2, 2))] * 4, 3, chunk_tokens=4)
    q, k, v = attention_tensors(layout, dtype=torch.float32, head_dim=16)
    config = moc.MoCConfig(top_k=1, text_anchor="global_and_own")
    calls = []
    monkeypatch.setattr(masked, "MAX_TOKENS", 0)

    def counting(*args):
        plan = args[4]
        calls.append(len(plan.packed.query_starts) - 1 if plan.packed else len(plan.calls))
        return forward(*args)

    forward = anchors.forward
    monkeypatch.setattr(anchors, "forward", counting)
    moc.moc_attention(q, k, v, layout, config, backend=name)
    last = layout.groups[-1].start
    moc.moc_attention(q[last:], k, v, layout, config, backend=name)
    assert calls == [5, 1]
