"""The fast backends on CPU: dense kernels, the plan of the anchored part, backend `torch`, the dispatcher.

Triton, interpreted, has tests of its own in test_triton_cpu.py.
"""

import logging
from functools import partial

import pytest
import torch
from hypothesis import given

import moc
from moc import attention, reference
from moc.kernels import anchors, dense, masked, torch_parts
from moc.kernels import packed as packed_kernels
from moc.kernels.packed import Packed
from moc.kernels.packed import attend as packed_attend
from moc.routes import drop_covered
from tests.moc.test_reference import two_samples
from tests.strategies import attention_tensors, configs, seeds, streams, tensors

pytestmark = pytest.mark.usefixtures("listed")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
DROPS = moc.DropKey(seed=1, step=2, layer=3, first_head=4)


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
            layout.text_index[call.text_start : call.text_end],
            layout.text_index[call.later_start : call.later_end],
        ])  # fmt: skip
        assert len(keys) == call.num_keys
        seen[call.start : call.end, keys] += 1
    none = torch.empty(1, layout.num_tokens, 0, dtype=torch.int32)
    own = anchors.with_own_chunk(none, layout, config)
    for slot in range(own.shape[-1]):
        seen += (own[0, :, slot, None] == layout.token_chunk) & (own[0, :, slot, None] >= 0)
    assert torch.equal(seen, reference.anchor_mask(layout, config).int())


@pytest.mark.parametrize("config", [{}, {"text_anchor": "global_and_own"}, {"own_anchor": "none"}, {"dense": True}])
def test_a_call_a_group_equals_one_packed_call(config, monkeypatch):
    """Short shots are packed; long ones, of which each is a call, are made of short ones here."""
    config = moc.MoCConfig(top_k=2, **config)
    q, k, v = attention_tensors(two_samples(), requires_grad=True)
    direction = torch.randn_like(q)
    results = []
    for short in (anchors.SHORT, 0):
        monkeypatch.setattr(anchors, "SHORT", short)
        layout = two_samples()
        assert (anchors.anchor_plan(layout, config).packed is not None) == (short > 0)
        out = moc.moc_attention(q, k, v, layout, config, backend="torch")
        results.append((out, *torch.autograd.grad(out, (q, k, v), direction)))
    for packed, apart in zip(*results, strict=True):
        torch.testing.assert_close(packed, apart)


def test_runs_share_keys_and_leave_some_unread():
    """Against one plain attention a run; keys 1 and 2 are read twice, key 5 never."""
    keys = [torch.tensor([1, 2]), torch.tensor([2, 1, 4, 3]), torch.tensor([0])]
    packed = Packed.build([2, 1, 3], keys, 6, torch.device("cpu"))
    q, k, v = (torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = packed_attend(q, k, v, packed)
    runs = [slice(0, 2), slice(2, 3), slice(3, 6)]
    expected = torch.cat([
        torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q[run], k[own], v[own])))
        .transpose(0, 1)
        for run, own in zip(runs, keys, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    mine, theirs = (torch.autograd.grad(x, (q, k, v), direction) for x in (out, expected))
    torch.testing.assert_close(mine, theirs)
    assert (mine[1][5] == 0).all()


@pytest.mark.parametrize("heads_at_a_time", [1, 2, 3, 5])
def test_runs_of_heads_whose_rows_can_be_addressed(heads_at_a_time, monkeypatch):
    """FlashAttention-2, here stood in for by a dense kernel a run, gets few heads at a time, and all of them once."""
    lengths, keys = [2, 1, 3], [torch.tensor(x) for x in ([0, 1, 5], [2], [0, 3, 4, 5])]
    packed = Packed.build(lengths, keys, 6, torch.device("cpu"))
    q, k, v, dout = torch.randn(4, 6, 5, 16)
    kernel, numbers = dense.choose(q), []

    def forward(q, k, v, *_):
        numbers.append(k.numel())
        parts = [kernel.forward(q[a], k[b], v[b]) for a, b in packed.runs()]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    def backward(dout, q, k, v, out, lse, *_):
        grads = [kernel.backward(dout[a], q[a], k[b], v[b], out[a], lse[:, a]) for a, b in packed.runs()]
        return tuple(torch.cat(parts) for parts in zip(*grads, strict=True))

    out, lse = packed_kernels.forward(kernel, q, k, v, packed)
    expected = out, lse, *packed_kernels.backward(kernel, dout, q, k, v, out, lse, packed)
    monkeypatch.setattr(packed_kernels, "MAX_NUMBERS", heads_at_a_time * 8 * 16)  # 8 gathered rows
    monkeypatch.setattr(dense, "has_fa2", lambda q: True)
    monkeypatch.setattr(dense, "fa2_varlen_forward", forward)
    monkeypatch.setattr(dense, "fa2_varlen_backward", backward)
    out, lse = packed_kernels.forward(kernel, q, k, v, packed)
    found = out, lse, *packed_kernels.backward(kernel, dout, q, k, v, out, lse, packed)
    assert len(numbers) == -(-5 // heads_at_a_time)
    assert max(numbers) <= packed_kernels.MAX_NUMBERS
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_plan_is_made_once_a_stream():
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    assert anchors.anchor_plan(layout, config) is anchors.anchor_plan(layout, moc.MoCConfig(top_k=5))
    assert anchors.anchor_plan(layout, config) is not anchors.anchor_plan(layout, moc.MoCConfig(dense=True))


# Backend torch


@pytest.fixture(params=["masked", "in parts"])
def way(request, monkeypatch):
    """How the backend computes short samples, and how long ones."""
    if request.param == "in parts":
        monkeypatch.setattr(masked, "MAX_TOKENS", 0)


@pytest.mark.parametrize("kernel", ["auto", "math"])
@given(streams(), configs(), seeds)
def test_torch_equals_the_reference(kernel, stream, config, seed):
    """Masked, and in parts."""
    layout, attend = stream.layout(), partial(torch_parts.attend, execution=moc.Execution(dense_kernel=kernel))
    q, k, _ = attention_tensors(layout, seed)
    assert_equal_to_reference(attend, layout, config, moc.route(q, k, layout, config))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dense_setting", [False, True])
def test_torch_with_drops_and_dense(dense_setting):
    layout, config = two_samples(), moc.MoCConfig(dense=dense_setting, causal=False, top_k=3)
    q, k, _ = attention_tensors(layout)
    assert_equal_to_reference(torch_parts.attend, layout, config, moc.route(q, k, layout, config, DROPS))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06), (torch.float16, 8e-3)])
def test_torch_in_lower_precision(dtype, tolerance):
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, _ = attention_tensors(layout)
    routes = moc.route(q, k, layout, config)
    assert_equal_to_reference(torch_parts.attend, layout, config, routes, dtype, tolerance, head_dim=32)


def test_torch_a_few_heads_at_a_time_is_the_same(monkeypatch):
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    attend = partial(torch_parts.attend, execution=moc.Execution(dense_kernel="math"))
    q, k, _ = attention_tensors(layout, num_heads=5)
    monkeypatch.setattr(torch_parts, "MAX_ELEMENTS", 2 * layout.num_tokens * 2 * 4)
    routes = moc.route(q, k, layout, config)
    assert len(list(torch_parts._lists(routes, layout.num_chunks, 4))) == 3
    assert_equal_to_reference(attend, layout, config, routes, num_heads=5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("own", ["shot", "chunk", "none"])
def test_torch_gradcheck(own):
    layout = moc.ShotLayout.build([moc.Shot(1, (2, 2, 1)), moc.Shot(1, (2, 1, 2))], 1, chunk_tokens=2)
    config = moc.MoCConfig(top_k=1, own_anchor=own, causal=False)
    q, k, v = attention_tensors(layout, requires_grad=True, num_heads=1, head_dim=2)
    routes = moc.route(q, k, layout, config)
    assert torch.autograd.gradcheck(lambda *x: torch_parts.attend(*x, routes, layout, config), (q, k, v))


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_which_streams_are_masked(kernel):
    """Those of short samples, however many, unless another kernel is asked for."""
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 16, 10))] * 4, chunk_tokens=256)
    q = torch.zeros(1, 2, 4)
    execution = moc.Execution(dense_kernel=kernel)
    assert masked.fits(q, moc.ShotLayout.pack([layout] * 3), execution) == (kernel == "auto")
    longer = moc.ShotLayout.build([moc.Shot(1, (1, 16, 10))] * 4, chunk_tokens=256)
    assert not masked.fits(q, moc.ShotLayout.pack([layout, longer]), execution)


def test_what_a_mask_takes_from_the_stream_is_made_once(monkeypatch):
    made, is_anchor = [], masked.is_anchor
    monkeypatch.setattr(masked, "is_anchor", lambda *args: made.append(args) or is_anchor(*args))
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, v = attention_tensors(layout, requires_grad=True)
    for _ in range(3):
        moc.moc_attention(q, k, v, layout, config, backend="torch").sum().backward()
    assert len(made) == layout.num_samples


@pytest.mark.usefixtures("way")
def test_deterministic_gradients_repeat_bit_for_bit():
    layout, config, execution = two_samples(), moc.MoCConfig(top_k=2), moc.Execution("torch", deterministic=True)
    q, k, v = attention_tensors(layout, dtype=torch.float32, requires_grad=True)
    direction = torch.randn_like(q)

    def gradients():
        return torch.autograd.grad(moc.moc_attention(q, k, v, layout, config, backend=execution), (q, k, v), direction)

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


def test_deterministic_rules_a_kernel_out_that_is_not(monkeypatch):
    shaky = dense.DenseKernel("cpu", dense.math_forward, dense.math_backward, deterministic=False)
    monkeypatch.setitem(dense._KERNELS, "cpu", (shaky, lambda *_: True))
    dense._choose.cache_clear()
    try:
        assert dense.choose(torch.zeros(1, 1, 8)) is shaky
        assert dense.choose(torch.zeros(1, 1, 8), deterministic=True).name == "math"
        with pytest.raises(ValueError, match="deterministic=True; use dense_kernel='auto'"):
            dense.choose(torch.zeros(1, 1, 8), "cpu", deterministic=True)
    finally:
        dense._choose.cache_clear()


@pytest.mark.usefixtures("way")
def test_torch_refuses_a_second_derivative():
    """The plain kernel's backward could be differentiated, to wrong numbers."""
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, v = attention_tensors(layout, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        torch.autograd.grad(moc.moc_attention(q, k, v, layout, config).sum(), q, create_graph=True)


def test_autocast_leaves_the_plain_kernel_alone():
    layout, config, execution = two_samples(), moc.MoCConfig(top_k=2), moc.Execution("torch", "math")
    q, k, v = attention_tensors(layout, dtype=torch.float32, requires_grad=True)

    def both():
        out = moc.moc_attention(q, k, v, layout, config, backend=execution)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    expected = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mine, other in zip(both(), expected, strict=True):
            assert torch.equal(mine, other)


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


# The dispatcher


def test_backends_are_chosen_by_device_by_setting_and_by_call(monkeypatch):
    layout, config = two_samples(), moc.MoCConfig(top_k=1)
    q, k, v = attention_tensors(layout, dtype=torch.float32, head_dim=16)
    if not torch.cuda.is_available():
        torch_ = moc.moc_attention(q, k, v, layout, config, backend="torch")
        assert torch.equal(moc.moc_attention(q, k, v, layout, config), torch_)
    with pytest.raises(ValueError, match="backend='triton' needs"):
        moc.moc_attention(q.double(), k.double(), v.double(), layout, config, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="on cpu: use backend='torch'"):
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
        with pytest.raises(ValueError, match=rf"head dims from 16 to 128; q is torch.float32, head dim {head_dim}"):
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


# The last queries of a stream alone


@pytest.fixture(params=["reference", "torch", "torch in parts", pytest.param("triton", marks=interpreted)])
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
    """First queries in a text, at a group's start, within a chunk, and of the last token alone."""
    layout = two_samples()
    heads = 1 if backend == "triton" else 2  # interpreting takes its time
    q, k, v = attention_tensors(layout, dtype=torch.float32, num_heads=heads, head_dim=16, requires_grad=True)
    drops = DROPS if config.text_anchor == "global_and_own" else None
    whole = moc.moc_attention(q, k, v, layout, config, backend=backend, drops=drops)
    direction = torch.randn_like(whole)
    firsts = [layout.groups[2].start, layout.groups[3].end - 3, 1, layout.num_tokens - 1]
    for first in firsts[:1] if backend == "triton" else firsts:
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
    monkeypatch.setattr(masked, "MAX_TOKENS", 0)

    def counting(*args):
        plan = args[4]
        calls.append(len(plan.packed.query_starts) - 1 if plan.packed else len(plan.calls))
        return forward(*args)

    forward = anchors.forward
    monkeypatch.setattr(anchors, "forward", counting)
    moc.moc_attention(q, k, v, layout, config, backend=name)
    last = layout.groups[-1].start
    moc.moc_attention(q[last:], k, v, layout, config, backend=name, first_query=last)
    assert calls == [5, 1]
