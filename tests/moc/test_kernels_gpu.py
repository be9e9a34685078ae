"""These tests are about the fast backends on a GPU: pytest -m gpu tests/moc/test_kernels_gpu.py

The yardstick is torch's own attention in the same precision: errors against fp32 at most twice (gradients: three times)
its errors, on the same inputs, mask and routes.
"""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import moc
from moc import reference, routing
from moc.kernels import anchors, dense, torch_backend
from moc.routes import drop_covered
from tests.routes import assert_same_choice, same_chunks, with_ties

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("listed")]
if torch.cuda.is_available():
    from moc.kernels import triton_backend, triton_routed

DROPS = moc.DropKey(seed=1, step=2, layer=3, first_head=4)
OPTIONS = [
    (causal, own, text)
    for causal in (True, False)
    for own in ("shot", "chunk", "none")
    for text in ("all", "global_and_own", "none")
]


def stream(chunk_tokens=128) -> moc.ShotLayout:
    """Returns two packed samples: unequal shots, a one-frame shot, absent texts, sizes that fit no block."""
    first = moc.ShotLayout.build([moc.Shot(5, (3, 8, 17)), moc.Shot(0, (1, 8, 17)), moc.Shot(9, (2, 8, 17))], 70, 128)
    second = moc.ShotLayout.build([moc.Shot(3, (2, 5, 27)), moc.Shot(2, (3, 5, 27))], 0, 128)
    return moc.ShotLayout.pack([first, second]).rechunk(chunk_tokens).to("cuda")


def inputs(layout, dtype=torch.bfloat16, num_heads=3, head_dim=128, seed=0, requires_grad=True):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (layout.num_tokens, num_heads, head_dim)
    made = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(4)]
    return [x.requires_grad_(requires_grad) for x in made[:3]], made[3]


def with_gradients(function, tensors, direction):
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, direction.to(out.dtype))


def torch_attention(q, k, v, mask):
    """Returns scaled_dot_product_attention under mask [N, L, L]; 0 for queries without any key."""
    alone = ~mask.any(-1)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(*heads_first, attn_mask=(mask | alone[..., None])[None])[0]
    return out.masked_fill(alone[..., None], 0).transpose(0, 1)


def assert_as_good_as_torch(attend, layout, config, routes, tensors, direction):
    mask = reference.attention_mask(routes, layout, config).expand(tensors[0].shape[1], -1, -1)
    exact = with_gradients(
        lambda *x: reference.masked_attention(*x, mask),
        [x.detach().double().requires_grad_() for x in tensors],
        direction,
    )
    yardstick = with_gradients(lambda *x: torch_attention(*x, mask), tensors, direction)
    mine = with_gradients(lambda *x: attend(*x, routes, layout, config), tensors, direction)
    for name, allowed, ours, theirs, truth in zip("oqkv", (2, 3, 3, 3), mine, yardstick, exact, strict=True):
        error, bound = ours - truth, allowed * (theirs - truth)
        # A single number may lie between two roundings, so the exact result's own rounding is added.
        rounding = (truth.to(ours.dtype) - truth).abs().max()
        assert error.norm() <= bound.norm() + 1e-6 * truth.norm(), f"{name}: {error.norm():.2e} > {bound.norm():.2e}"
        assert error.abs().max() <= bound.abs().max() + rounding + 1e-6, f"{name}: {error.abs().max():.2e}"
    return mine


def check(config, layout=None, drops=None, attend=None, **kind):
    layout = layout or stream()
    tensors, direction = inputs(layout, **kind)
    q, k = (x.detach() for x in tensors[:2])
    routes = triton_backend.route(q, k, layout, config, drops)
    assert_same_choice(routes, q, k, layout, config, drops)
    assert_as_good_as_torch(attend or triton_backend.attend, layout, config, routes, tensors, direction)


# Dense kernels


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["fa3", "fa4", "cudnn", "fa2"])
def test_dense_kernels_take_merged_output_and_lse(name, dtype, head_dim):
    q, k, v, direction = (torch.randn(777, 2, head_dim, device="cuda", dtype=dtype) for _ in range(4))
    try:
        kernel = dense.choose(q, name)
    except ValueError as absent:
        pytest.skip(str(absent))
    runs = [slice(0, 300), slice(300, 777)]
    outs, lses = zip(*(kernel.forward(q, k[run], v[run]) for run in runs), strict=True)
    lse = torch.logaddexp(*lses)
    out = sum(o * (p - lse).exp().T[..., None] for o, p in zip(outs, lses, strict=True)).to(dtype)
    grads = [kernel.backward(direction, q, k[run], v[run], out, lse) for run in runs]
    mine = (out, sum(g[0] for g in grads), torch.cat([g[1] for g in grads]), torch.cat([g[2] for g in grads]))
    wide = [x.float() for x in (q, k, v)]
    truth_out, truth_lse = dense.math_forward(*wide)
    truth = (truth_out, *dense.math_backward(direction.float(), *wide, truth_out, truth_lse))
    for ours, exact in zip(mine, truth, strict=True):
        assert (ours - exact).norm() <= 6e-3 * exact.norm()


@pytest.mark.parametrize("name", ["fa3", "fa4", "cudnn", "fa2"])
def test_dense_kernels_take_runs_at_once(name):
    q, k, v, direction = (torch.randn(3, 300, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    try:
        kernel = dense.choose(q, name)
    except ValueError as absent:
        pytest.skip(str(absent))
    out, lse = kernel.forward(q, k, v)
    mine = out, lse, *kernel.backward(direction, q, k, v, out, lse)
    for run in range(3):
        own = q[run], k[run], v[run]
        result = kernel.forward(*own)
        for ours, exact in zip(mine, (*result, *kernel.backward(direction[run], *own, *result)), strict=True):
            assert (ours[run].float() - exact.float()).norm() <= 6e-3 * exact.float().norm()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["fa3", "fa4", "fa2"])
def test_dense_kernels_take_runs_of_different_lengths(name, head_dim):
    queries, keys = torch.tensor([0, 300, 301, 477]), torch.tensor([0, 77, 500, 512])
    q, direction = (torch.randn(477, 2, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(512, 2, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    try:
        kernel = dense.choose(q, name)
    except ValueError as absent:
        pytest.skip(str(absent))
    lengths = dense.Lengths(queries.int().cuda(), keys.int().cuda(), 300, 423)
    out, lse = kernel.forward(q, k, v, lengths=lengths)
    dq, dk, dv = kernel.backward(direction, q, k, v, out, lse, lengths=lengths)
    for a, b, c, d in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        wide = [x.float() for x in (q[a:b], k[c:d], v[c:d])]
        truth, truth_lse = dense.math_forward(*wide)
        exact = truth, truth_lse, *dense.math_backward(direction[a:b].float(), *wide, truth, truth_lse)
        for ours, one in zip((out[a:b], lse[:, a:b], dq[a:b], dk[c:d], dv[c:d]), exact, strict=True):
            assert (ours - one).norm() <= 6e-3 * one.norm()


# Triton against the reference


@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128])
def test_every_head_dim(head_dim):
    check(moc.MoCConfig(top_k=3), head_dim=head_dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_dtype(dtype, head_dim):
    check(moc.MoCConfig(top_k=3, causal=False), dtype=dtype, head_dim=head_dim)


@pytest.mark.parametrize(("causal", "own", "text"), OPTIONS)
def test_every_option(causal, own, text):
    check(moc.MoCConfig(top_k=3, causal=causal, own_anchor=own, text_anchor=text), head_dim=64)


@pytest.mark.parametrize("top_k", [0, 1, 12, 40])
def test_few_and_many_routes(top_k):
    check(moc.MoCConfig(top_k=top_k, causal=False), stream(chunk_tokens=20), head_dim=64)


@pytest.mark.parametrize(("causal", "own"), [(True, "shot"), (False, "shot"), (False, "chunk"), (True, "none")])
def test_routes_among_many_chunks(causal, own):
    """There are hundreds of chunks, some of them alike at a period, some equal, for shortlists and what they leave. Of
    whole numbers and 32 tokens a chunk every score is exact, whatever the order of its sum."""
    layout = moc.ShotLayout.build([moc.Shot(5, (40, 8, 16))] * 3, 9, 32).to("cuda")
    q, k = (torch.randint(-60, 61, (layout.num_tokens, 4, 128), device="cuda").bfloat16() for _ in range(2))
    q[:, 1:] = q[:, 1:].abs()
    k[layout.token_chunk % 4 == 0, 1] += 60
    k[:, 2] = 1
    k[layout.token_chunk == 77, 3] = 1000
    for top_k in (17, 40, 64):
        config = moc.MoCConfig(top_k=top_k, causal=causal, own_anchor=own)
        assert same_chunks(triton_backend.route(q, k, layout, config), routing.route(q, k, layout, config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("subchunks", "head_dim"), [(2, 64), (3, 128), (4, 80), (24, 128)])
def test_routes_by_subchunks(subchunks, head_dim, dtype):
    """Chunks have 17 or 27 tokens, so that 24 subchunks are more than most have."""
    layout = stream(chunk_tokens=20)
    (q, k, _), _ = inputs(layout, dtype, head_dim=head_dim, requires_grad=False)
    for top_k, causal, first, drops in ((3, True, 0, DROPS), (20, False, 0, None), (5, True, 500, None)):
        config = moc.MoCConfig(top_k=top_k, causal=causal, descriptor_subchunks=subchunks)
        routes = moc.route(q[first:], k, layout, config, drops, backend="triton")
        assert_same_choice(routes, q[first:], k, layout, config, drops)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("top_k", [3, 20])
@pytest.mark.parametrize("subchunks", [2, 4])
def test_ties_of_subchunks_go_to_the_lowest_chunk(subchunks, top_k, dtype):
    layout = moc.ShotLayout.build([moc.Shot(4, (60, 4, 4)), moc.Shot(0, (12, 4, 4))], 4, 16).to("cuda")
    q, k = with_ties(layout, subchunks, dtype=dtype)
    config = moc.MoCConfig(top_k=top_k, causal=False, own_anchor="chunk", descriptor_subchunks=subchunks)
    assert same_chunks(triton_backend.route(q, k, layout, config), routing.route(q, k, layout, config))


@pytest.mark.parametrize("top_k", [3, 20])
def test_drops(top_k):
    check(moc.MoCConfig(top_k=top_k, causal=False, drop_in_max=3), stream(chunk_tokens=40), DROPS, head_dim=64)


def test_chunks_larger_than_a_block_and_one_shot():
    check(moc.MoCConfig(top_k=2), moc.ShotLayout.build([moc.Shot(7, (9, 16, 31))] * 3, 5, 1000).to("cuda"))
    check(moc.MoCConfig(top_k=5), moc.ShotLayout.build([moc.Shot(7, (2, 16, 31))], 0, 100).to("cuda"))


def test_callers_routes():
    layout, config = stream(), moc.MoCConfig(top_k=3)
    tensors, direction = inputs(layout)
    wild = torch.randint(-1, layout.num_chunks, (3, layout.num_tokens, 4), device="cuda")
    triton = partial(moc.moc_attention, layout=layout, config=config, routes=wild, backend="triton")
    kept = drop_covered(wild, layout, config)  # drops chunks of other samples
    assert_as_good_as_torch(lambda q, k, v, *_: triton(q, k, v), layout, config, kept, tensors, direction)


def test_ties_go_to_the_lowest_chunk():
    """Chunks are 16 tokens of +1 and -1: means and scores are exact, and many are equal."""
    layout = moc.ShotLayout.build([moc.Shot(3, (30, 4, 4)), moc.Shot(0, (9, 4, 4))], 2, 16).to("cuda")
    tensors, _ = inputs(layout, requires_grad=False)
    q, k = (x.sign() for x in tensors[:2])
    for top_k in (4, 15, 33):
        config = moc.MoCConfig(top_k=top_k, causal=False)
        assert same_chunks(triton_backend.route(q, k, layout, config), routing.route(q, k, layout, config))


def test_torch_backend_on_the_gpu():
    for own in ("shot", "chunk"):
        check(moc.MoCConfig(top_k=3, own_anchor=own), attend=torch_backend.attend)
    check(moc.MoCConfig(top_k=3), attend=torch_backend.attend, dtype=torch.float32, head_dim=64)
    check(moc.MoCConfig(dense=True, top_k=1), attend=torch_backend.attend)


def test_the_longest_rows_fit():
    """There are more than 2^31 numbers in q: row offsets need 64 bits."""
    layout = moc.ShotLayout.build([moc.Shot(16, (30, 32, 64))] * 17, 16, 2048).to("cuda")
    config = moc.MoCConfig(top_k=1, own_anchor="none", text_anchor="none")
    q, k, v = (torch.randn(layout.num_tokens, 17, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 2**31
    out = moc.moc_attention(q, k, v, layout, config)
    routes = triton_backend.route(q, k, layout, config)
    token, head = layout.num_tokens - 1, 16
    chunk = layout.chunks[int(routes[head, token])]
    keys = slice(chunk.start, chunk.start + chunk.length)
    weights = (k[keys, head].float() @ q[token, head].float() * 128**-0.5).softmax(0)
    torch.testing.assert_close(out[token, head].float(), weights @ v[keys, head].float(), rtol=0.02, atol=0.01)


# Memory, order, compilation


def test_outputs_are_written_whole_and_unchosen_chunks_get_exactly_zero():
    """With torch's poison, every new tensor starts as NaN (or the largest int)."""
    layout, config = stream(), moc.MoCConfig(top_k=2, own_anchor="none", text_anchor="none")
    tensors, direction = inputs(layout, requires_grad=True)
    q, k, _ = tensors
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        routes = triton_backend.route(q, k, layout, config)
        results = with_gradients(lambda *x: triton_backend.attend(*x, routes, layout, config), tensors, direction)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in results)
    assert_same_choice(routes, q, k, layout, config)
    alone = (routes < 0).all(-1).T
    assert alone.any()
    assert (results[0][alone] == 0).all()
    assert (results[1][alone] == 0).all()
    for head in range(3):
        chosen = torch.isin(layout.token_chunk, routes[head])
        assert not chosen.all()
        assert (results[2][~chosen, head] == 0).all()
        assert (results[3][~chosen, head] == 0).all()


@pytest.mark.parametrize("kernel", ["auto", "fa2"])
def test_deterministic_gradients_repeat_bit_for_bit(kernel):
    layout = moc.ShotLayout.build([moc.Shot(7, (9, 16, 32))] * 3, 20, 512).to("cuda")
    execution = moc.Execution(dense_kernel=kernel, deterministic=True)
    call = partial(moc.moc_attention, layout=layout, config=moc.MoCConfig(top_k=3), backend=execution, drops=DROPS)
    tensors, direction = inputs(layout)
    first = with_gradients(call, tensors, direction)
    for _ in range(100):
        again = with_gradients(call, tensors, direction)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 4, 9])
def test_the_forward_repeats_bit_for_bit(top_k):
    """With few slots a program's LSE are fewer than its threads: a race of loads and stores would show."""
    layout = moc.ShotLayout.build([moc.Shot(7, (9, 16, 31))] * 3, 5, 1000).to("cuda")
    config, execution = moc.MoCConfig(top_k=top_k), moc.Execution(dense_kernel="fa2")
    tensors, _ = inputs(layout, requires_grad=False)
    first = moc.moc_attention(*tensors, layout, config, backend=execution)
    for _ in range(50):
        assert torch.equal(moc.moc_attention(*tensors, layout, config, backend=execution), first)


def test_a_few_heads_and_tiles_at_a_time_are_the_same(monkeypatch):
    layout, config = stream(), moc.MoCConfig(top_k=3)
    tensors, direction = inputs(layout, num_heads=5)
    whole = with_gradients(lambda *x: moc.moc_attention(*x, layout, config), tensors, direction)
    monkeypatch.setattr(triton_routed, "PARTIAL_SIZE", 0.3)
    monkeypatch.setattr(triton_routed, "PARTIAL_NUMBERS", 0)
    blocked = with_gradients(lambda *x: moc.moc_attention(*x, layout, config), tensors, direction)
    for a, b in zip(whole, blocked, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_nothing_waits_for_the_host():
    layout, config, execution = stream(), moc.MoCConfig(top_k=3), moc.Execution(dense_kernel="cudnn")
    tensors, direction = inputs(layout)
    call = partial(moc.moc_attention, layout=layout, config=config, backend=execution, drops=DROPS)
    with_gradients(call, tensors, direction)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(call, tensors, direction)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_operator_passes_opcheck():
    layout, config = stream(), moc.MoCConfig(top_k=3)
    (q, k, v), _ = inputs(layout, head_dim=64)
    routes = triton_backend.route(q, k, layout, config)
    tables, numbers = triton_backend._flat(anchors.anchor_plan(layout, config, layout.num_tokens))
    settings = (tables, numbers, layout.chunk_tokens, layout.max_chunk_tokens, "fa2", True)
    torch.library.opcheck(
        torch.ops.moc.attend,
        (q, k, v, routes, layout.chunk_cu_seqlens, *settings),
        atol=1e-2,
        rtol=1e-2,
    )


@pytest.mark.parametrize("dense_setting", [False, True])
def test_compiled_and_recomputed_gradients_are_the_same(dense_setting):
    layout = stream()
    config, execution = moc.MoCConfig(top_k=3, dense=dense_setting), moc.Execution("auto", "fa2", deterministic=True)
    tensors, direction = inputs(layout, head_dim=64)
    call = partial(moc.moc_attention, layout=layout, config=config, backend=execution, drops=DROPS)
    expected = with_gradients(call, tensors, direction)
    for other in (torch.compile(call, fullgraph=True), lambda *x: checkpoint(call, *x, use_reentrant=False)):
        for a, b in zip(with_gradients(other, tensors, direction), expected, strict=True):
            assert torch.equal(a, b)


def test_a_cuda_graph_of_forward_and_backward_takes_new_inputs():
    """A short stream needs this, since it takes longer to launch than to compute."""
    layout = stream()
    config = moc.MoCConfig(top_k=3, causal=False, own_anchor="chunk")
    execution = moc.Execution(dense_kernel="fa2", deterministic=True)
    tensors, direction = inputs(layout)
    call = partial(moc.moc_attention, layout=layout, config=config, backend=execution)
    attend = torch.compile(call, mode="reduce-overhead")
    for seed in range(4):
        fresh, direction = inputs(layout, seed=seed)
        with torch.no_grad():
            for x, new in zip(tensors, fresh, strict=True):
                x.copy_(new)
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in with_gradients(attend, tensors, direction)]
        expected = with_gradients(call, fresh, direction)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# The last queries of a stream alone


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("settings", [{"text_anchor": "global_and_own"}, {"own_anchor": "chunk"}, {"dense": True}])
def test_the_last_queries_alone_equal_those_of_all(settings, backend):
    layout, config = stream(), moc.MoCConfig(**{"top_k": 3, "causal": "own_anchor" not in settings} | settings)
    (q, k, v), direction = inputs(layout)
    whole = moc.moc_attention(q, k, v, layout, config, backend=backend)
    for first in (layout.groups[2].start, layout.groups[-1].start + 11):
        tail = moc.moc_attention(q[first:], k, v, layout, config, backend=backend)
        if not config.dense:
            all_routes = moc.route(q, k, layout, config, backend=backend)
            assert same_chunks(moc.route(q[first:], k, layout, config, backend=backend), all_routes[:, first:])
        cut = direction.clone()
        cut[:first] = 0
        mine = (tail, *torch.autograd.grad(tail, (q, k, v), direction[first:]))
        expected = (whole[first:], *torch.autograd.grad(whole, (q, k, v), cut, retain_graph=True))
        for ours, theirs in zip(mine, expected, strict=True):
            assert (ours - theirs).float().norm() <= 5e-3 * theirs.float().norm()
