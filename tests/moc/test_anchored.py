"""These tests are about the anchored attention: its plan holds every anchor once, and short runs share one packed
call."""

import pytest
import torch
from hypothesis import given

import moc
from moc import reference
from moc.kernels import anchors, dense
from moc.kernels import packed as packed_kernels
from moc.kernels.packed import Packed, numbers_in
from moc.kernels.packed import attend as packed_attend
from tests.moc.test_reference import two_samples
from tests.strategies import attention_tensors, configs, seeds, streams

pytestmark = pytest.mark.usefixtures("listed")


@given(streams(max_samples=3), configs(), seeds)
def test_the_calls_of_the_anchored_part_hold_every_anchor_once(stream, config, seed):
    layout = stream.layout()
    seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int32)
    for call in anchors.anchor_calls(layout, config, layout.num_tokens):
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
        assert (anchors.anchor_plan(layout, config, layout.num_tokens).packed is not None) == (short > 0)
        out = moc.moc_attention(q, k, v, layout, config, backend="torch")
        results.append((out, *torch.autograd.grad(out, (q, k, v), direction)))
    for packed, apart in zip(*results, strict=True):
        torch.testing.assert_close(packed, apart)


@pytest.mark.parametrize("config", [{}, {"dense": True}])
def test_shots_of_one_length_are_one_call(config, monkeypatch):
    """There is no text in the stream; the calls one by one, for which they are then not known as such, give the
    same."""
    config = moc.MoCConfig(top_k=2, **config)
    monkeypatch.setattr(anchors, "SHORT", 0)  # otherwise short calls would be packed
    sample = moc.ShotLayout.build([moc.Shot(0, (3, 2, 2))] * 3, 0, chunk_tokens=4)
    layout = moc.ShotLayout.pack([sample, sample])
    q, k, v = attention_tensors(layout, requires_grad=True)
    calls = anchors.anchor_calls(layout, config, layout.num_tokens)
    assert anchors.equal_shots(calls, q, k) == (2 if config.dense else 6)
    direction, results = torch.randn_like(q), []
    for _ in range(2):
        out = moc.moc_attention(q, k, v, layout, config, backend="torch")
        results.append((out, *torch.autograd.grad(out, (q, k, v), direction)))
        monkeypatch.setattr(anchors, "equal_shots", lambda *_: 0)
    torch.testing.assert_close(*results)


def test_shots_that_are_no_one_call():
    """They differ in length, see text, or are not all asked for."""
    config = moc.MoCConfig(top_k=2)
    short, long, told = moc.Shot(0, (1, 2, 2)), moc.Shot(0, (2, 2, 2)), moc.Shot(1, (1, 2, 2))
    for shots, queries in (([short, long], 12), ([told, told], 10), ([short, short], 4)):
        layout = moc.ShotLayout.build(shots, 0, chunk_tokens=4)
        q = torch.empty(layout.num_tokens, 1, 8)
        assert not anchors.equal_shots(anchors.anchor_calls(layout, config, queries), q[-queries:], q)


def singly(keys):
    """Returns keys, a tensor for each run, as ranges of one token each."""
    return [[(key, key + 1) for key in run.tolist()] for run in keys]


def test_numbers_in_ranges():
    cpu = torch.device("cpu")
    assert numbers_in([(3, 5), (0, 0), (1, 4), (4, 5)], cpu).tolist() == [3, 4, 1, 2, 3, 4]
    assert numbers_in([(2, 2)], cpu).tolist() == []
    assert numbers_in([], cpu).dtype == torch.int64


def test_ranges_may_count_other_rows_than_tokens():
    """Rows 4 and 5 are tokens 3 and 0 once more."""
    rows = [(0, 4), (3, 4), (0, 1)]
    packed = Packed.build([1, 3], [[(4, 6), (1, 2)], [(0, 4)]], 4, torch.device("cpu"), rows)
    assert packed.key_index.tolist() == [3, 0, 1, 0, 1, 2, 3]
    assert packed.key_starts.tolist() == [0, 3, 7]
    in_order = Packed.build([2, 2], [[(0, 2)], [(2, 4)]], 4, torch.device("cpu"), rows)
    assert not len(in_order.key_index)


def test_runs_share_keys_and_leave_some_unread():
    """It is compared with one plain attention a run; keys 1 and 2 are read twice, key 5 never."""
    keys = [torch.tensor([1, 2]), torch.tensor([2, 1, 4, 3]), torch.tensor([0])]
    packed = Packed.build([2, 1, 3], singly(keys), 6, torch.device("cpu"))
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


def test_packed_attention_refuses_a_second_derivative():
    """That of plain code would take the LSE for a constant, and be wrong."""
    packed = Packed.build([2, 1], singly([torch.tensor([1, 2]), torch.tensor([0])]), 3, torch.device("cpu"))
    q, k, v = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with pytest.raises(RuntimeError, match="no second derivative: leave out create_graph=True"):
        torch.autograd.grad(packed_attend(q, k, v, packed).sum(), q, create_graph=True)


@pytest.mark.parametrize("heads_at_a_time", [1, 2, 3, 5])
def test_runs_of_heads_whose_rows_can_be_addressed(heads_at_a_time, monkeypatch):
    """FlashAttention-2, here stood in for by a dense kernel a run, gets few heads at a time, and all of them once."""
    lengths, keys = [2, 1, 3], [torch.tensor(x) for x in ([0, 1, 5], [2], [0, 3, 4, 5])]
    packed = Packed.build(lengths, singly(keys), 6, torch.device("cpu"))
    q, k, v, dout = torch.randn(4, 6, 5, 16)
    kernel, numbers = dense.choose(q), []

    def forward(q, k, v, lengths):
        numbers.append(k.numel())
        results = [kernel.forward(q[a], k[b], v[b]) for a, b in packed.runs()]
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results], 1)

    def backward(dout, q, k, v, out, lse, deterministic, lengths):
        grads = [kernel.backward(dout[a], q[a], k[b], v[b], out[a], lse[:, a]) for a, b in packed.runs()]
        return tuple(torch.cat(results) for results in zip(*grads, strict=True))

    out, lse = packed_kernels.forward(kernel, q, k, v, packed)
    expected = out, lse, *packed_kernels.backward(kernel, dout, q, k, v, out, lse, packed)
    monkeypatch.setattr(packed_kernels, "MAX_NUMBERS", heads_at_a_time * 8 * 16)  # 8 gathered rows
    varlen = dense.DenseKernel("varlen", forward, backward, varlen=True)
    out, lse = packed_kernels.forward(varlen, q, k, v, packed)
    found = out, lse, *packed_kernels.backward(varlen, dout, q, k, v, out, lse, packed)
    assert len(numbers) == -(-5 // heads_at_a_time)
    assert max(numbers) <= packed_kernels.MAX_NUMBERS
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_plan_is_made_once_a_stream():
    layout, length = two_samples(), two_samples().num_tokens
    plan = anchors.anchor_plan(layout, moc.MoCConfig(top_k=2), length)
    assert plan is anchors.anchor_plan(layout, moc.MoCConfig(top_k=5), length)
    assert plan is not anchors.anchor_plan(layout, moc.MoCConfig(dense=True), length)
    assert plan is not anchors.anchor_plan(layout, moc.MoCConfig(top_k=2), length - 1)


@pytest.mark.parametrize("settings", [{"text_anchor": "global_and_own"}, {}, {"own_anchor": "chunk"}])
def test_a_packed_plan_is_made_within_a_compiled_graph(settings):
    layout, config = two_samples(), moc.MoCConfig(top_k=2, **settings)

    def index(x):
        return x[anchors.anchor_plan(layout, config, layout.num_tokens).packed.key_index]

    x = torch.arange(layout.num_tokens)
    expected = index(x)
    assert len(expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(index, fullgraph=True, backend="eager")(x), expected)
