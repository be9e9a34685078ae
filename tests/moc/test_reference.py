"""These tests are about the reference attention against a brute force, and the properties every backend has to keep.

Causality and the separation of packed samples are tested by gradient: what a query does not attend to has none.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import moc
from moc.context import is_anchor
from tests import brute_force
from tests.strategies import attention_tensors, configs, seeds, streams, tensors

OPTIONS = [
    (causal, own, text)
    for causal in (True, False)
    for own in ("shot", "chunk", "none")
    for text in ("all", "global_and_own", "none")
]


def attention(q, k, v, layout, config, **more):
    return moc.moc_attention(q, k, v, layout, config, backend="reference", **more)


def dense_by_sample(q, k, v, layout):
    """Returns dense attention within each sample, by torch."""
    outputs = []
    for start, end in layout.sample_ranges:
        heads_first = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(scaled_dot_product_attention(*heads_first)[0].transpose(0, 1))
    return torch.cat(outputs)


def two_samples(chunk_tokens=4) -> moc.ShotLayout:
    """Texts with and without tokens, unequal shots, a one-frame shot, frames split into rows."""
    first = moc.ShotLayout.build([moc.Shot(2, (3, 2, 2)), moc.Shot(0, (1, 2, 2)), moc.Shot(1, (2, 2, 2))], 2, 4)
    second = moc.ShotLayout.build([moc.Shot(1, (1, 3, 2)), moc.Shot(1, (2, 3, 2))], 0, 4)
    return moc.ShotLayout.pack([first, second]).rechunk(chunk_tokens)


# Against the brute force


@given(streams(), configs(), seeds)
def test_output_and_gradients_equal_the_brute_force(stream, config, seed):
    layout = stream.layout()
    q, k, v = attention_tensors(layout, seed, requires_grad=True)
    direction = torch.randn(v.shape, dtype=v.dtype)
    keys = brute_force.attended(brute_force.route(q, k, stream, config), stream, config)
    expected = brute_force.attention(q, k, v, keys)
    out = attention(q, k, v, layout, config)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out, (q, k, v), direction)
    theirs = torch.autograd.grad(expected, (q, k, v), direction, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other)


@given(streams(max_size=(3, 2, 1)), configs(), seeds)
def test_mask_equals_the_brute_force(stream, config, seed):
    """Identity values make the output the attention weights themselves: a key is attended where its weight is not 0."""
    layout = stream.layout()
    num_tokens = layout.num_tokens
    q, k, _ = attention_tensors(layout, seed, head_dim=num_tokens)
    identity = torch.eye(num_tokens, dtype=q.dtype)[:, None].expand(-1, 2, -1)
    weights = attention(q, k, identity, layout, config)
    keys = brute_force.attended(brute_force.route(q, k, stream, config), stream, config)
    for head in range(2):
        assert [set(row.nonzero().flatten().tolist()) for row in weights[:, head]] == keys[head]
    has_keys = torch.tensor([[bool(row) for row in rows] for rows in keys]).T.double()
    torch.testing.assert_close(weights.sum(-1), has_keys)


@given(streams(), configs(), seeds, st.data())
def test_callers_routes_are_attended_with_each_key_once(stream, config, seed, data):
    """Empty slots anywhere, a chunk twice or a chunk that an anchor covers already leave the same set of keys."""
    layout = stream.layout()
    q, k, v = attention_tensors(layout, seed)
    tokens = brute_force.tokens_of(stream)
    row = st.lists(st.integers(-1, layout.num_chunks - 1), min_size=4, max_size=4)
    by_token = [data.draw(row) for _ in tokens]
    by_token = [
        [c if sample_of(tokens, c) == t.sample else -1 for c in r] for t, r in zip(tokens, by_token, strict=True)
    ]
    routes = torch.tensor([by_token, by_token[::-1] if len(stream.samples) == 1 else by_token], dtype=torch.int32)
    keys = brute_force.attended(brute_force.as_lists(routes), stream, config)
    expected = brute_force.attention(q, k, v, keys)
    torch.testing.assert_close(attention(q, k, v, layout, config, routes=routes), expected)
    torch.testing.assert_close(attention(q, k, v, layout, config, routes=routes.flip(-1).long()), expected)


def sample_of(tokens, chunk):
    return next((token.sample for token in tokens if token.chunk == chunk), None)


@pytest.mark.parametrize(("causal", "own", "text"), OPTIONS)
def test_gradcheck(causal, own, text):
    first = moc.ShotLayout.build([moc.Shot(1, (2, 1, 1)), moc.Shot(0, (1, 1, 2))], 1)
    layout = moc.ShotLayout.pack([first, moc.ShotLayout.build([moc.Shot(1, (2, 1, 1))])]).rechunk(1)
    config = moc.MoCConfig(top_k=1, causal=causal, own_anchor=own, text_anchor=text)
    q, k, v = attention_tensors(layout, requires_grad=True, num_heads=1, head_dim=2)
    routes = moc.route(q, k, layout, config, backend="reference")
    torch.autograd.gradcheck(lambda *qkv: attention(*qkv, layout, config, routes=routes), (q, k, v))
    torch.autograd.gradcheck(lambda *qkv: attention(*qkv, layout, config), (q, k, v))


# Equal to dense attention


@given(streams(max_samples=3), configs(causal=False, text_anchor="all", top_k=500), seeds)
def test_everything_selected_is_dense(stream, config, seed):
    layout = stream.layout()
    q, k, v = attention_tensors(layout, seed)
    torch.testing.assert_close(attention(q, k, v, layout, config), dense_by_sample(q, k, v, layout))


@given(streams(max_shots=1), configs(own_anchor="shot"), seeds)
def test_one_shot_without_global_text_is_dense(stream, config, seed):
    layouts = [moc.ShotLayout.build(list(shots), 0, stream.chunk_tokens) for _, shots in stream.samples]
    layout = moc.ShotLayout.pack(layouts)
    q, k, v = attention_tensors(layout, seed)
    torch.testing.assert_close(attention(q, k, v, layout, config), dense_by_sample(q, k, v, layout))


@given(streams(max_samples=3), configs(dense=True), seeds)
def test_dense_setting_is_dense_whatever_the_rest(stream, config, seed):
    layout = stream.layout()
    q, k, v = attention_tensors(layout, seed)
    torch.testing.assert_close(attention(q, k, v, layout, config), dense_by_sample(q, k, v, layout))


@given(streams(), configs(), seeds)
def test_packed_samples_equal_samples_alone(stream, config, seed):
    layout = stream.layout()
    q, k, v = attention_tensors(layout, seed)
    alone = [
        attention(q[start:end], k[start:end], v[start:end], sample, config)
        for sample, (start, end) in zip(stream.layouts(), layout.sample_ranges, strict=True)
    ]
    torch.testing.assert_close(attention(q, k, v, layout, config), torch.cat(alone))


def test_no_routes_leave_the_anchors():
    layout = two_samples()
    q, k, v = attention_tensors(layout)
    expected = attention(q, k, v, layout, moc.MoCConfig(top_k=0))
    empty = torch.full((2, layout.num_tokens, 3), -1, dtype=torch.int32)
    torch.testing.assert_close(attention(q, k, v, layout, moc.MoCConfig(top_k=3), routes=empty), expected)
    none = torch.empty(2, layout.num_tokens, 0, dtype=torch.int32)
    torch.testing.assert_close(attention(q, k, v, layout, moc.MoCConfig(top_k=3), routes=none), expected)


def test_a_query_without_any_key_outputs_zero_and_takes_no_gradient():
    layout = moc.ShotLayout.build([moc.Shot(1, (1, 1, 2)), moc.Shot(0, (1, 1, 2))], 1, chunk_tokens=2)
    config = moc.MoCConfig(top_k=2, own_anchor="none", text_anchor="none")
    q, k, v = attention_tensors(layout, requires_grad=True)
    out = attention(q, k, v, layout, config)
    assert (out[:4] == 0).all()  # global text, first caption, first shot: nothing comes before them
    assert (out[4:] != 0).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert (dq[:4] == 0).all()


def test_a_chunk_nobody_chose_takes_no_gradient():
    layout = moc.ShotLayout.build([moc.Shot(0, (3, 1, 2)), moc.Shot(0, (1, 1, 2))], chunk_tokens=2)
    config = moc.MoCConfig(top_k=1, own_anchor="none", text_anchor="none")
    q, k, v = attention_tensors(layout, requires_grad=True)
    routes = torch.full((2, layout.num_tokens, 1), -1, dtype=torch.int32)
    routes[:, 6:] = 1
    dk, dv = torch.autograd.grad(attention(q, k, v, layout, config, routes=routes).sum(), (k, v))
    for gradient in (dk, dv):
        assert (gradient[[0, 1, 4, 5, 6, 7]] == 0).all()
        assert (gradient[2:4] != 0).any()


# What may reach what


def reached(layers: int, layout: moc.ShotLayout, config: moc.MoCConfig, **more) -> torch.Tensor:
    """Returns bool [L, L]: whether the input of token j has a gradient in the output of token i, through stacked
    attention."""
    x = tensors(layout.num_tokens, 3, count=1)[0].requires_grad_()
    weights = torch.randn(layers, 3, 4, 4, dtype=torch.float64)

    def forward(x):
        for layer in weights:
            x = x + attention(*(x @ w for w in layer), layout, config, **more)
        return x

    out = forward(x)
    rows = [torch.autograd.grad(out[i].sum(), x, retain_graph=True)[0].abs().sum((1, 2)) for i in range(len(out))]
    return torch.stack(rows) > 0


def later(layout: moc.ShotLayout) -> torch.Tensor:
    """Returns bool [L, L]: key j belongs to a later shot than query i (global text precedes all shots) or another
    sample."""
    sample, group = layout.token_sample, layout.token_group
    return (sample[:, None] != sample) | (group[None] > group[:, None])


@pytest.mark.parametrize("own", ["shot", "chunk", "none"])
@pytest.mark.parametrize("drops", [None, moc.DropKey(1, 2, 3)])
@pytest.mark.parametrize("layers", [1, 2])
def test_strict_forward_flow(own, drops, layers):
    """With own text and causal routing nothing of later shots arrives, however many layers stand on one another."""
    config = moc.MoCConfig(top_k=3, own_anchor=own, text_anchor="global_and_own", drop_in_rate=2.0)
    layout = two_samples()
    found = reached(layers, layout, config, drops=drops)
    assert not (found & later(layout)).any()
    assert (found & (layout.token_group[None] < layout.token_group[:, None])).any()


@pytest.mark.parametrize("settings", [{"causal": False}, {"text_anchor": "all"}])
def test_other_settings_do_look_ahead(settings):
    """The test above can fail: the paper's own text anchor, or routing both ways, lets later shots in."""
    layout = two_samples()
    config = moc.MoCConfig(top_k=3, **{"text_anchor": "global_and_own", **settings})
    same_sample = layout.token_sample[:, None] == layout.token_sample
    assert (reached(1, layout, config) & later(layout) & same_sample).any()


@pytest.mark.parametrize("own", ["shot", "chunk", "none"])
def test_later_shots_change_no_earlier_choice(own):
    """Routing has no gradient, so it is tested by other inputs: the outputs of earlier shots stay the same bits."""
    layout = two_samples()
    config = moc.MoCConfig(top_k=2, own_anchor=own, text_anchor="global_and_own")
    q, k, v = attention_tensors(layout)
    before = attention(q, k, v, layout, config, drops=moc.DropKey(0, 0))
    for group in layout.groups:
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[group.start :] = torch.randn_like(x[group.start :]) * 3
        assert torch.equal(
            attention(*changed, layout, config, drops=moc.DropKey(0, 0))[: group.start], before[: group.start]
        )


@pytest.mark.parametrize(("causal", "own", "text"), OPTIONS)
def test_packed_samples_never_see_each_other(causal, own, text):
    layout = two_samples()
    config = moc.MoCConfig(top_k=6, causal=causal, own_anchor=own, text_anchor=text, drop_in_rate=3.0)
    for drops in (None, moc.DropKey(5, 6)):
        found = reached(1, layout, config, drops=drops)
        assert not (found & (layout.token_sample[:, None] != layout.token_sample)).any()


def test_dense_packed_samples_never_see_each_other():
    layout = two_samples()
    same_sample = layout.token_sample[:, None] == layout.token_sample
    assert torch.equal(reached(1, layout, moc.MoCConfig(dense=True)), same_sample)


# Types, entry points, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_costs_one_rounding(dtype):
    """It is computed in fp32 inside: outputs and gradients are those of fp64 on the same numbers and routes, rounded
    once."""
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, v = (x.to(dtype).requires_grad_() for x in attention_tensors(layout, head_dim=32))
    routes = moc.route(q, k, layout, config, backend="reference")
    out = attention(q, k, v, layout, config, routes=routes)
    assert out.dtype == dtype
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = attention(*exact_inputs, layout, config, routes=routes)
    rounding = {"rtol": 0.51 * torch.finfo(dtype).eps, "atol": 2e-6}
    torch.testing.assert_close(out.double(), exact, **rounding)
    direction = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), direction)
    for mine, wide in zip(gradients, torch.autograd.grad(exact, exact_inputs, direction.double()), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), wide, **rounding)


def test_autocast_changes_nothing():
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, v = attention_tensors(layout, head_dim=32, dtype=torch.float32)
    expected = attention(q, k, v, layout, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, layout, config), expected)


def test_the_reference_is_a_backend_by_name_by_execution_and_by_module():
    layout, drops = two_samples(), moc.DropKey(1, 1)
    config = moc.MoCConfig(top_k=2)
    q, k, v = attention_tensors(layout)
    expected = moc.reference.moc_attention(q, k, v, layout, config, drops=drops)
    for backend in ("reference", moc.Backend.reference, moc.Execution("reference")):
        assert torch.equal(moc.moc_attention(q, k, v, layout, config, drops=drops, backend=backend), expected)
        routes = moc.route(q, k, layout, config, drops, backend)
        assert torch.equal(moc.moc_attention(q, k, v, layout, config, routes, backend), expected)


def test_pre_rope_scores_what_the_caller_passes():
    layout = two_samples()
    config = moc.MoCConfig(top_k=1, descriptor="pre_rope")
    q, k, v = attention_tensors(layout)
    plain = attention_tensors(layout, seed=1)[:2]
    routes = moc.route(*plain, layout, config, backend="reference")
    assert not torch.equal(routes, moc.route(q, k, layout, config, backend="reference"))
    out = attention(q, k, v, layout, config, route_qk=tuple(plain))
    assert torch.equal(out, attention(q, k, v, layout, config, routes=routes))


def test_inputs_need_not_be_contiguous():
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, v = attention_tensors(layout)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    torch.testing.assert_close(attention(*strided, layout, config), attention(q, k, v, layout, config))


def refused(message, *qkv, layout=None, config=None, **more):
    with pytest.raises(ValueError, match=message):
        moc.moc_attention(*qkv, layout or two_samples(), config or moc.MoCConfig(top_k=2), **more)


def test_wrong_inputs_are_refused():
    layout = two_samples()
    q, k, v = attention_tensors(layout)
    length = layout.num_tokens
    refused(r"one shape \[L, N, D\].*\(2, 4\)", q[0], k, v)
    refused(r"one shape", q, k[:, :1], v)
    refused(r"one shape", q, k, v[..., :2])
    refused(rf"k has {length - 1} tokens, its layout {length}", q[1:], k[1:], v[1:])
    refused(r"one shape .* of which q may have the last tokens alone", q[:0], k, v)
    refused(r"one shape .* the last tokens alone", q, k[3:], v[3:])
    refused("layout is on meta, q on cpu.*layout.to", q, k, v, layout=layout.to("meta"))
    refused("route_qk.*pre_rope", q, k, v, route_qk=(q, k))
    refused("route_qk.*pre_rope", q, k, v, config=moc.MoCConfig(descriptor="pre_rope"))
    refused("backend='nonsense'.*reference", q, k, v, backend="nonsense")
    refused(r"one floating dtype.*float64, torch.float64, torch.bfloat16", q, k, v.bfloat16())
    refused(r"one floating dtype.*int64", q.long(), k.long(), v.long())


def test_a_wrong_route_qk_is_refused():
    """Too few keys would be read past their end."""
    q, k, v = attention_tensors(two_samples())
    config = moc.MoCConfig(descriptor="pre_rope")
    refused("the q, k of route_qk must share one shape", q, k, v, config=config, route_qk=(q, k[:-1]))
    refused("k has .* tokens, its layout", q, k, v, config=config, route_qk=(q[1:], k[1:]))
    refused("one floating dtype", q, k, v, config=config, route_qk=(q.float(), k))
    refused("route_qk has .* queries of 1 heads, q .* of 2", q, k, v, config=config, route_qk=(q[:, :1], k[:, :1]))


def test_wrong_routes_are_refused():
    layout = two_samples()
    q, k, v = attention_tensors(layout)
    routes = moc.route(q, k, layout, moc.MoCConfig(top_k=2))
    length = layout.num_tokens
    refused(rf"routes.*\[2, {length}, K\].*\(1, {length}, 2\)", q, k, v, routes=routes[:1])
    refused(r"routes", q, k, v, routes=routes[:, 1:])
    refused(r"routes", q, k, v, routes=routes[0])
    refused(r"routes.*int.*float", q, k, v, routes=routes.float())


@given(streams(max_samples=3), configs())
def test_the_rule_for_chunks_is_the_one_for_tokens(stream, config):
    """`moc.context`, by which all backends plan, gives the anchors that the reference has by itself."""
    layout = stream.layout()
    chunk = layout.token_chunk
    assert torch.equal(is_anchor(layout, config, chunk[:, None], chunk), moc.reference.anchor_mask(layout, config))


def test_routes_of_the_last_queries_are_checked_once():
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, v = attention_tensors(layout)
    first = layout.num_tokens - 5
    chosen = moc.route(q[first:], k, layout, config)
    routes = moc.Routes(chosen)
    expected = attention(q[first:], k, v, layout, config, routes=chosen)
    assert torch.equal(attention(q[first:], k, v, layout, config, routes=routes), expected)
    assert torch.equal(routes.whole(layout)[:, first:], chosen)
    assert (routes.whole(layout)[:, :first] == -1).all()
    again = moc.Routes.checked(torch.cat([chosen, chosen], -1), layout, config)  # names each chunk twice
    assert again.indices.shape[1] == 5
    assert torch.equal((again.indices >= 0).sum(-1), (chosen >= 0).sum(-1))
    refused(r"routes must be \[2, .*\(2, 5, 2\)", q, k, v, routes=routes)
    refused(r"routes must be \[1, 5, K\]", q[first:, :1], k[:, :1], v[:, :1], routes=routes)
    for wrong in (chosen[0], chosen[:, :0], chosen.float()):
        with pytest.raises(ValueError, match="routes must be"):
            moc.Routes.checked(wrong, layout, config)
    for wrong in (-2, layout.num_chunks):
        with pytest.raises(ValueError, match=rf"{wrong}.*this layout has those from 0 to {layout.num_chunks - 1}"):
            moc.Routes.checked(torch.full_like(chosen, wrong), layout, config)


def test_route_refuses_the_layout_of_another_stream():
    q, k, _ = attention_tensors(two_samples())
    other = moc.ShotLayout.build([moc.Shot(1, (2, 2, 2))])
    with pytest.raises(ValueError, match="different streams"):
        moc.route(q, k, other, moc.MoCConfig())
    with pytest.raises(ValueError, match=r"q, k must share one shape"):
        moc.route(q, k[1:], other, moc.MoCConfig())
