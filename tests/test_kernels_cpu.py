"""The fast backends on CPU: dense kernels, the plan of the anchored part, backend `torch`, Triton interpreted.

The interpreter runs where there is no GPU (`conftest` asks for it before Triton is first imported); it needs fp32.
"""

import logging

import pytest
import torch
from hypothesis import given, settings

import moc
from moc import reference, routing
from moc.kernels import anchors, dense, torch_parts
from tests.strategies import attention_tensors, configs, seeds, streams, tensors
from tests.test_reference import OPTIONS, two_samples

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
DROPS = moc.DropKey(seed=1, step=2, layer=3, first_head=4)


def same_chunks(routes, expected) -> bool:
    return torch.equal(routes.sort(-1).values, expected.sort(-1).values)


def assert_equal_to_reference(attend, layout, config, routes, dtype=torch.float64, tolerance=1e-9, **kind):
    """Output and gradients of `attend` against the fp64 reference with the same routes."""
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


# Dense kernels


@pytest.mark.parametrize(("name", "dtype"), [("cpu", torch.float32), ("math", torch.float32), ("math", torch.float64)])
def test_parts_merged_by_lse_are_exact_in_output_and_gradients(name, dtype):
    q, k, v, direction = tensors(50, 0, 3, 16, 4, dtype=dtype)
    kernel = dense.choose(q, name)
    parts = [slice(0, 7), slice(7, 50)]
    outs, lses = zip(*(kernel.forward(q, k[part], v[part]) for part in parts), strict=True)
    lse = torch.logaddexp(*lses)
    out = sum(o * (part_lse - lse).exp().T[..., None] for o, part_lse in zip(outs, lses, strict=True))
    grads = [kernel.backward(direction, q, k[part], v[part], out, lse) for part in parts]
    dq, dk, dv = sum(g[0] for g in grads), torch.cat([g[1] for g in grads]), torch.cat([g[2] for g in grads])

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    everything = torch.ones(1, 50, 50, dtype=torch.bool)
    expected = reference.masked_attention(*exact, everything)
    theirs = torch.autograd.grad(expected, exact, direction.double())
    for mine, other in zip((out, dq, dk, dv), (expected, *theirs), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(ValueError, match=r"'fa9' is unknown; choose one of auto, fa3"):
        dense.choose(torch.zeros(1, 1, 8), "fa9")
    with pytest.raises(ValueError, match="does not fit"):
        dense.choose(torch.zeros(1, 1, 8), "cudnn")


# The anchored part


@given(streams(max_samples=3), configs(), seeds)
def test_the_calls_of_the_anchored_part_hold_every_anchor_once(stream, config, seed):
    layout = stream.layout()
    seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int32)
    for call in anchors.anchor_calls(layout, config):
        keys = torch.cat([
            torch.arange(call.own_start, call.own_end),
            layout.text_index[call.a0 : call.a1],
            layout.text_index[call.b0 : call.b1],
        ])  # fmt: skip
        assert len(keys) == call.num_keys
        seen[call.start : call.end, keys] += 1
    none = torch.empty(1, layout.num_tokens, 0, dtype=torch.int32)
    own = anchors.with_own_chunk(none, layout, config)
    for slot in range(own.shape[-1]):
        seen += (own[0, :, slot, None] == layout.token_chunk) & (own[0, :, slot, None] >= 0)
    assert torch.equal(seen, reference.anchor_mask(layout, config).int())


# Backend torch


@given(streams(), configs(), seeds)
def test_torch_equals_the_reference(stream, config, seed):
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed)
    assert_equal_to_reference(torch_parts.attend, layout, config, moc.route(q, k, layout, config))


@pytest.mark.parametrize("dense_setting", [False, True])
def test_torch_with_drops_and_dense(dense_setting):
    layout, config = two_samples(), moc.MoCConfig(dense=dense_setting, causal=False, top_k=3)
    q, k, _ = attention_tensors(layout)
    assert_equal_to_reference(torch_parts.attend, layout, config, moc.route(q, k, layout, config, DROPS))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06), (torch.float16, 8e-3)])
def test_torch_in_lower_precision(dtype, tolerance):
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, _ = attention_tensors(layout)
    routes = moc.route(q, k, layout, config)
    assert_equal_to_reference(torch_parts.attend, layout, config, routes, dtype, tolerance, head_dim=32)


def test_torch_a_few_heads_at_a_time_is_the_same(monkeypatch):
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, _ = attention_tensors(layout, num_heads=5)
    monkeypatch.setattr(torch_parts, "MAX_ELEMENTS", 2 * layout.num_tokens * 2 * 4)
    routes = moc.route(q, k, layout, config)
    assert len(list(torch_parts._lists(routes, layout.num_chunks, 4))) == 3
    assert_equal_to_reference(torch_parts.attend, layout, config, routes, num_heads=5)


@pytest.mark.parametrize("own", ["shot", "chunk", "none"])
def test_torch_gradcheck(own):
    layout = moc.ShotLayout.build([moc.Shot(1, (2, 2, 1)), moc.Shot(1, (2, 1, 2))], 1, chunk_tokens=2)
    config = moc.MoCConfig(top_k=1, own_anchor=own, causal=False)
    q, k, v = attention_tensors(layout, requires_grad=True, num_heads=1, head_dim=2)
    routes = moc.route(q, k, layout, config)
    assert torch.autograd.gradcheck(lambda *x: torch_parts.attend(*x, routes, layout, config), (q, k, v))


# The dispatcher


def test_backends_are_chosen_by_device_by_setting_and_by_call():
    layout, config = two_samples(), moc.MoCConfig(top_k=1)
    q, k, v = attention_tensors(layout, dtype=torch.float32, head_dim=16)
    if not torch.cuda.is_available():
        torch_ = moc.moc_attention(q, k, v, layout, config, backend="torch")
        assert torch.equal(moc.moc_attention(q, k, v, layout, config), torch_)
    with pytest.raises(ValueError, match="backend='triton' needs"):
        moc.moc_attention(q.double(), k.double(), v.double(), layout, config, backend="triton")


@given(streams(max_samples=2), configs(), seeds)
def test_callers_routes_lose_what_anchors_cover_and_repeats(stream, config, seed):
    layout = stream.layout()
    generator = torch.Generator().manual_seed(seed)
    wild = torch.randint(-1, layout.num_chunks, (2, layout.num_tokens, 5), generator=generator)
    kept = routing.drop_covered(wild, layout, config)
    anchored = reference.anchor_mask(layout, config).float()
    for head, token in ((h, t) for h in range(2) for t in range(layout.num_tokens)):
        row = [c for c in kept[head, token].tolist() if c >= 0]
        assert len(set(row)) == len(row)
        named = {c for c in wild[head, token].tolist() if c >= 0}
        covered = {c for c in named if anchored[token, layout.chunks[c].start]}
        unseen = {c for c in named if layout.chunks[c].sample != layout.token_sample[token]}
        assert set(row) == named - covered - unseen


# The last queries of a stream alone


@pytest.fixture(params=["reference", "torch", pytest.param("triton", marks=interpreted)])
def backend(request):
    return request.param


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
    """First queries in a text, at a group's start, within a chunk, and of the last token alone."""
    layout = two_samples()
    q, k, v = attention_tensors(layout, dtype=torch.float32, head_dim=16, requires_grad=True)
    drops = DROPS if config.text_anchor == "global_and_own" else None
    whole = moc.moc_attention(q, k, v, layout, config, backend=backend, drops=drops)
    direction = torch.randn_like(whole)
    firsts = [layout.groups[2].start, layout.groups[3].end - 3, 1, layout.num_tokens - 1]
    for first in firsts[:1] if backend == "triton" else firsts:  # interpreting takes its time
        kind = {"backend": backend, "drops": drops, "first_query": first}
        tail = moc.moc_attention(q[first:], k, v, layout, config, **kind)
        torch.testing.assert_close(tail, whole[first:], rtol=1e-5, atol=1e-5)
        if not config.dense:
            routes = moc.route(q[first:], k, layout, config, **kind)
            again = moc.moc_attention(q[first:], k, v, layout, config, routes, backend, first_query=first)
            torch.testing.assert_close(again, tail, rtol=1e-5, atol=1e-5)
        mine = torch.autograd.grad(tail, (q, k, v), direction[first:])
        cut = direction.clone()
        cut[:first] = 0
        expected = torch.autograd.grad(whole, (q, k, v), cut, retain_graph=True)
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=interpreted)])
def test_queries_before_the_first_one_cost_no_call(name, monkeypatch):
    """The anchored part of four shots is five dense calls, of the last shot's queries one."""
    layout = moc.ShotLayout.build([moc.Shot(2, (2, 2, 2))] * 4, 3, chunk_tokens=4)
    q, k, v = attention_tensors(layout, dtype=torch.float32, head_dim=16)
    config = moc.MoCConfig(top_k=1, text_anchor="global_and_own")
    calls = []

    def counting(*args):
        calls.append(len(args[5]))
        return forward(*args)

    forward = anchors.forward
    monkeypatch.setattr(anchors, "forward", counting)
    moc.moc_attention(q, k, v, layout, config, backend=name)
    last = layout.groups[-1].start
    moc.moc_attention(q[last:], k, v, layout, config, backend=name, first_query=last)
    assert calls == [5, 1]


# Triton, interpreted


def larger_stream() -> moc.ShotLayout:
    """Chunks larger than a block of keys, ragged; more tokens than a block of queries; two samples."""
    first = moc.ShotLayout.build([moc.Shot(5, (3, 5, 8)), moc.Shot(0, (1, 5, 8)), moc.Shot(3, (2, 5, 8))], 7, 40)
    second = moc.ShotLayout.build([moc.Shot(0, (2, 3, 9)), moc.Shot(2, (3, 3, 9))], 0, 40)
    return moc.ShotLayout.pack([first, second])


def check_triton(layout, config, drops=None, dtype=torch.float32, tolerance=1e-5, head_dim=16, heads=2):
    from moc.kernels import triton_backend

    q, k, _ = attention_tensors(layout, dtype=dtype, head_dim=head_dim, num_heads=heads)
    routes = triton_backend.route(q, k, layout, config, drops)
    assert same_chunks(routes, routing.route(q, k, layout, config, drops))
    kind = {"head_dim": head_dim, "num_heads": heads}
    assert_equal_to_reference(triton_backend.attend, layout, config, routes, dtype, tolerance, **kind)


@interpreted
@pytest.mark.parametrize(
    ("causal", "own", "text"), [(True, "shot", "all"), (False, "chunk", "global_and_own"), (False, "none", "none")]
)
def test_triton_equals_the_reference(causal, own, text):
    check_triton(two_samples(4), moc.MoCConfig(top_k=2, causal=causal, own_anchor=own, text_anchor=text))


@interpreted
def test_triton_with_drops_and_a_padded_head_dim():
    check_triton(two_samples(3), moc.MoCConfig(top_k=3, causal=False, drop_in_max=3), DROPS, head_dim=24)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("causal", "own", "text"), OPTIONS)
def test_triton_equals_the_reference_in_every_option(causal, own, text):
    config = moc.MoCConfig(top_k=3, causal=causal, own_anchor=own, text_anchor=text)
    check_triton(larger_stream(), config, DROPS if causal else None)


@interpreted
@pytest.mark.slow
@settings(max_examples=25)
@given(streams(), configs(), seeds)
def test_triton_on_random_streams(stream, config, seed):
    check_triton(stream.layout(), config)


@interpreted
@pytest.mark.slow
def test_triton_in_fp16_and_in_parts(monkeypatch):
    from moc.kernels import triton_index, triton_routed

    monkeypatch.setattr(triton_routed, "PARTIAL_SIZE", 0.1)
    monkeypatch.setattr(triton_routed, "PARTIAL_NUMBERS", 0)
    monkeypatch.setattr(triton_index, "MAX_WORDS", 1)
    check_triton(larger_stream(), moc.MoCConfig(top_k=3, causal=False), dtype=torch.float16, tolerance=8e-3, heads=3)


@interpreted
def test_triton_lists_are_the_routes_sorted_by_chunk():
    from moc.kernels.triton_index import build_lists

    routes = torch.stack([torch.stack([torch.randperm(9)[:4] for _ in range(70)]) for _ in range(2)]).int()
    routes[torch.rand(routes.shape) < 0.3] = -1
    lists = build_lists(routes, 9, tile=16)
    tiles = 0
    for head in range(2):
        for chunk in range(9):
            index = head * 9 + chunk
            entries = lists.entries[lists.starts[index] : lists.starts[index + 1]]
            assert entries.tolist() == (routes[head].flatten() == chunk).nonzero().flatten().tolist()
            assert lists.tile_starts[index] == tiles
            count = -(-len(entries) // 16)
            assert (lists.tile_list[tiles : tiles + count] == index).all()
            tiles += count
    assert lists.tile_starts[-1] == tiles <= len(lists.tile_list)


def many_chunks() -> moc.ShotLayout:
    """Two samples, 208 chunks of one token or two, blocks of queries across shots and samples."""
    first = [moc.Shot(2, (30, 1, 1)), moc.Shot(1, (120, 1, 1)), moc.Shot(0, (17, 1, 2))]
    second = [moc.Shot(2, (9, 1, 1)), moc.Shot(1, (26, 1, 1))]
    return moc.ShotLayout.pack([moc.ShotLayout.build(first, 3, 2), moc.ShotLayout.build(second, 0, 2)]).rechunk(1)


@interpreted
@pytest.mark.parametrize(
    ("top_k", "causal", "own", "inputs"),
    [
        (17, True, "shot", "periodic"),
        (40, False, "shot", "random"),
        (40, False, "shot", "far"),
        (64, False, "chunk", "equal"),
    ],
)
def test_triton_with_many_routes(top_k, causal, own, inputs):
    from moc.kernels import triton_routing

    layout = many_chunks()
    q, k, _ = attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=1)
    if inputs == "periodic":  # every fourth chunk suits all queries
        q, k = q.abs(), torch.where((torch.arange(len(k)) % 4 == 0)[:, None, None], k.abs(), -k.abs())
    elif inputs == "equal":
        k = torch.ones_like(k)
    elif inputs == "far":
        k[50] *= 1e6
    config = moc.MoCConfig(top_k=top_k, causal=causal, own_anchor=own)
    first = 100 if inputs == "periodic" else 0
    routes = triton_routing.route(q[first:], k, layout, config, first_query=first)
    assert same_chunks(routes, routing.route(q[first:], k, layout, config, first_query=first))


@interpreted
def test_shortlists_take_what_they_can_and_say_what_they_leave(monkeypatch):
    from moc.kernels import triton_routing, triton_shortlist

    layout = moc.ShotLayout.build([moc.Shot(0, (150, 1, 1)), moc.Shot(0, (100, 1, 1))], 0, chunk_tokens=1)
    q, k, _ = attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=3)
    k[:, 2] = 1.0
    found, shortlist = [], triton_shortlist.shortlist_routes
    monkeypatch.setattr(
        triton_routing, "shortlist_routes", lambda *a, **s: found.append(shortlist(*a, **s)) or found[0]
    )
    monkeypatch.setattr(triton_shortlist, "MAX_ENTRIES", 1)
    config = moc.MoCConfig(top_k=20)
    assert same_chunks(triton_routing.route(q, k, layout, config), routing.route(q, k, layout, config))
    left = found[0] > triton_shortlist.room_for(20)
    assert not left[:, :128].any()  # the first shot's queries, without candidates
    assert left[:, 128:192].all()  # a block across the cut
    assert not left[:2, 192:].any()
    assert left[2, 192:].all()  # equal scores


@interpreted
@pytest.mark.parametrize("top_k", [3, 12])
def test_triton_ties_go_to_the_lowest_chunk(top_k):
    from moc.kernels import triton_routing

    layout = moc.ShotLayout.build([moc.Shot(2, (30, 1, 1)), moc.Shot(1, (20, 1, 1))], 3, chunk_tokens=1)
    q, k, _ = (x.sign() for x in attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=1))
    config = moc.MoCConfig(top_k=top_k, causal=False)
    assert same_chunks(triton_routing.route(q, k, layout, config), routing.route(q, k, layout, config))


@interpreted
def test_triton_operator_passes_opcheck_compile_and_recomputation():
    from torch.utils.checkpoint import checkpoint

    from moc.kernels import triton_backend

    layout = moc.ShotLayout.build([moc.Shot(1, (2, 2, 2)), moc.Shot(1, (1, 2, 2))], 1, chunk_tokens=4)
    config = moc.MoCConfig(top_k=1)
    q, k, v = attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=1, requires_grad=True)
    routes = triton_backend.route(q, k, layout, config)
    calls = [number for call in anchors.anchor_calls(layout, config) for number in call.as_ints()]
    arguments = (
        q,
        k,
        v,
        routes,
        layout.chunk_cu_seqlens,
        layout.text_index,
        calls,
        layout.max_chunk_tokens,
        "auto",
        False,
    )
    torch.library.opcheck(torch.ops.moc.attend, arguments, test_utils=("test_schema", "test_faketensor"))

    def attend(q, k, v):
        return moc.moc_attention(q, k, v, layout, config, backend="triton", drops=DROPS)

    direction = torch.randn_like(q)
    expected = torch.autograd.grad(attend(q, k, v), (q, k, v), direction)
    for call in (torch.compile(attend, fullgraph=True, backend="aot_eager"),
                 lambda *x: checkpoint(attend, *x, use_reentrant=False)):  # fmt: skip
        for mine, other in zip(torch.autograd.grad(call(q, k, v), (q, k, v), direction), expected, strict=True):
            assert torch.equal(mine, other)
