"""These tests are about context drop-off and drop-in: what they may change, how often, and that the draws depend on the
key alone."""

import math

import pytest
import torch
from hypothesis import given

import moc
from moc import routing
from tests import brute_force
from tests.moc.against_reference import interpreted
from tests.routes import same_chunks
from tests.strategies import attention_tensors, configs, seeds, streams

KEY = moc.DropKey(seed=1, step=2, layer=3)


def route(q, k, layout, config, drops=None):
    return moc.route(q, k, layout, config, drops, backend="reference")


def long_stream(shots=3, frames=40) -> moc.ShotLayout:
    """Returns many queries and chunks of two tokens: the last shot has plenty of both."""
    return moc.ShotLayout.build([moc.Shot(0, (frames, 1, 2)) for _ in range(shots)], chunk_tokens=2)


def chosen(routes: torch.Tensor, layout: moc.ShotLayout) -> torch.Tensor:
    """Returns bool [N, L, M]: which chunks a query holds; refuses a chunk held twice."""
    table = torch.zeros(*routes.shape[:2], layout.num_chunks + 1, dtype=torch.int64)
    table.scatter_add_(-1, torch.where(routes < 0, layout.num_chunks, routes).long(), torch.ones_like(routes).long())
    assert table[..., :-1].max() <= 1
    return table[..., :-1] > 0


def before_and_after(config, layout=None, heads=8, key=KEY, tokens=None):
    """Returns chunks held by the queries of the last shot without and with drops: bool [N, queries, M] twice."""
    layout = layout or long_stream()
    q, k, _ = attention_tensors(layout, num_heads=heads)
    tokens = tokens or slice(layout.groups[-1].start, None)
    before = chosen(route(q, k, layout, config), layout)[:, tokens]
    return before, chosen(route(q, k, layout, config, key), layout)[:, tokens]


def shares(counts: torch.Tensor, most: int) -> torch.Tensor:
    return torch.bincount(counts.flatten(), minlength=most + 1).double() / counts.numel()


def spread(num_draws: int) -> float:
    """Returns five standard errors of a share, at most."""
    return 5 * 0.5 / math.sqrt(num_draws)


# What drops may change


@given(streams(max_shots=4, max_chunk_tokens=6), configs(drop_in_rate=1.5, drop_in_max=3), seeds)
def test_drops_only_drop_routes_and_add_candidates(stream, config, seed):
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed)
    tokens = brute_force.tokens_of(stream)
    routes = route(q, k, layout, config, moc.DropKey(seed, 0))
    assert routes.shape == (2, layout.num_tokens, config.top_k + 3)
    assert routes.dtype == torch.int32
    held = brute_force.route(q, k, stream, config)
    for head, rows in enumerate(brute_force.as_lists(routes)):
        for i, row in enumerate(rows):
            allowed = brute_force.candidates(tokens, i, config)
            added = set(row) - set(held[head][i])
            assert len(row) == len(set(row))
            assert set(row) <= set(allowed)
            assert len(added) <= min(3, len(allowed) - len(held[head][i]))
            if held[head][i]:  # with p below 1, floor(p k) drops fewer than k
                assert set(row) & set(held[head][i])


@given(streams(), configs(drop_off_max=0.0, drop_in_rate=0.0), seeds)
def test_drops_turned_off_change_nothing(stream, config, seed):
    layout = stream.layout()
    q, k, v = attention_tensors(layout, seed)
    assert brute_force.as_lists(route(q, k, layout, config, KEY)) == brute_force.as_lists(route(q, k, layout, config))
    out = [moc.moc_attention(q, k, v, layout, config, drops=drops, backend="reference") for drops in (None, KEY)]
    assert torch.equal(*out)


@given(streams(max_shots=4), configs(), seeds)
def test_attention_follows_the_routes_after_drops(stream, config, seed):
    layout = stream.layout()
    q, k, v = attention_tensors(layout, seed)
    keys = brute_force.attended(brute_force.as_lists(route(q, k, layout, config, KEY)), stream, config)
    out = moc.moc_attention(q, k, v, layout, config, drops=KEY, backend="reference")
    torch.testing.assert_close(out, brute_force.attention(q, k, v, keys))


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({}, 5 + 2),
        ({"top_k": 0}, 2),
        ({"drop_in_max": 0}, 5),
        ({"drop_in_max": 500}, 505),  # more than there are chunks
        ({"drop_off_max": 0.0}, 7),
        ({"drop_in_rate": 0.0}, 7),
    ],
)
def test_the_table_is_top_k_plus_drop_in_max_wide(settings, width):
    layout = long_stream(frames=4)
    q, k, _ = attention_tensors(layout)
    config = moc.MoCConfig(**settings)
    routes = route(q, k, layout, config, KEY)
    assert routes.shape[-1] == width
    assert routes.min() == -1
    assert route(q, k, layout, config).shape[-1] == config.top_k


# How often


def test_drop_off_takes_floor_of_p_times_the_routes_held():
    config = moc.MoCConfig(top_k=5, drop_off_max=1.0, drop_in_rate=0.0)
    before, after = before_and_after(config)
    dropped = (before & ~after).sum(-1)
    assert (before.sum(-1) == 5).all()
    assert not (after & ~before).any()
    expected = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 0.0]).double()
    assert (shares(dropped, 5) - expected).abs().max() < spread(dropped.numel())
    assert abs(dropped.double().mean() - 2.0) < 0.2


def test_drop_off_bounds_p():
    """p ~ U(0, 0.5) of 5: floor is 0, 1, 2 with chances 0.4, 0.4, 0.2."""
    before, after = before_and_after(moc.MoCConfig(top_k=5, drop_off_max=0.5, drop_in_rate=0.0))
    dropped = (before & ~after).sum(-1)
    expected = torch.tensor([0.4, 0.4, 0.2, 0.0, 0.0, 0.0]).double()
    assert (shares(dropped, 5) - expected).abs().max() < spread(dropped.numel())


def test_drop_off_counts_the_routes_held_not_top_k():
    """Three candidates under top_k = 9: floor(3 p) is uniform on 0, 1, 2, where floor(9 p) would take all three."""
    layout = moc.ShotLayout.build([moc.Shot(0, (3, 1, 2)), moc.Shot(0, (200, 1, 2))], chunk_tokens=2)
    config = moc.MoCConfig(top_k=9, drop_off_max=1.0, drop_in_rate=0.0)
    before, after = before_and_after(config, layout)
    assert (before.sum(-1) == 3).all()
    dropped = (before & ~after).sum(-1)
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]).double()
    assert (shares(dropped, 3) - expected).abs().max() < spread(dropped.numel())


def test_drop_off_has_no_favourites():
    """The best and the worst route of a query are dropped equally often."""
    layout = long_stream()
    q, k, _ = attention_tensors(layout, num_heads=8)
    config = moc.MoCConfig(top_k=5, drop_in_rate=0.0)
    last = slice(layout.groups[-1].start, None)
    before = route(q, k, layout, config)[:, last]
    after = chosen(route(q, k, layout, config, KEY), layout)[:, last]
    kept = after.gather(-1, before.long()).flatten(0, 1).double().mean(0)
    assert (kept - 0.6).abs().max() < spread(before[..., 0].numel())


@pytest.mark.parametrize(("rate", "most"), [(0.5, 2), (2.0, 3), (1.0, 1)])
def test_drop_in_adds_a_truncated_poisson_number(rate, most):
    before, after = before_and_after(moc.MoCConfig(top_k=5, drop_off_max=0.0, drop_in_rate=rate, drop_in_max=most))
    added = (after & ~before).sum(-1)
    assert (after | ~before).all()
    expected = [math.exp(-rate) * rate**m / math.factorial(m) for m in range(most)]
    expected = torch.tensor([*expected, 1 - sum(expected)]).double()
    assert (shares(added, most) - expected).abs().max() < spread(added.numel())


def test_drop_in_has_no_favourites():
    """Every candidate that a query does not hold is added equally often."""
    config = moc.MoCConfig(top_k=2, drop_off_max=0.0, drop_in_rate=2.0, drop_in_max=2)
    before, after = before_and_after(config, heads=16)
    candidates = 80  # the number of chunks in the two earlier shots
    free, added = ~before[..., :candidates], (after & ~before)[..., :candidates]
    share = added.sum((0, 1)) / free.sum((0, 1))
    mean = added.sum() / free.sum()
    deviation = (mean * (1 - mean) / free.sum((0, 1))).sqrt()
    assert ((share - mean).abs() < 5 * deviation).all()


def test_drop_in_works_without_any_route():
    """With k = 0 there is nothing to drop, but chance still brings chunks in."""
    before, after = before_and_after(moc.MoCConfig(top_k=0, drop_in_rate=1.0))
    assert not before.any()
    assert 0.5 < after.sum(-1).double().mean() < 1.2


def test_defaults_drop_half_a_chunk_or_more():
    before, after = before_and_after(moc.MoCConfig())
    assert (before & ~after).sum(-1).double().mean() >= 0.5


def test_dropped_chunks_do_not_come_back_as_drop_ins():
    """With every candidate held, drop-in has nothing to take from: dropped chunks stay away."""
    layout = moc.ShotLayout.build([moc.Shot(0, (4, 1, 2)), moc.Shot(0, (50, 1, 2))], chunk_tokens=2)
    before, after = before_and_after(moc.MoCConfig(top_k=4, drop_in_rate=9.0, drop_in_max=4), layout)
    dropped = (before & ~after).sum(-1).double()
    assert abs(dropped.mean() - 1.5) < 0.2  # as without drop-in, where 0, 1, 2 and 3 are equally likely
    assert before.sum(-1).min() == 4


# What the draws depend on


def test_the_same_key_gives_the_same_routes():
    layout = long_stream()
    q, k, _ = attention_tensors(layout)
    config = moc.MoCConfig()
    first = route(q, k, layout, config, KEY)
    torch.rand(7)  # the draws depend on no global generator
    assert torch.equal(route(q, k, layout, config, moc.DropKey(1, 2, 3)), first)


@pytest.mark.parametrize("other", [(9, 2, 3), (1, 9, 3), (1, 2, 9), (2, 1, 3), (1, 3, 2), (1 + 2**16, 2, 3)])
def test_seed_step_and_layer_each_change_the_draws(other):
    """Draws are different, and unrelated: drop counts under two keys agree no more often than chance has it."""
    config = moc.MoCConfig(top_k=5, drop_in_rate=0.0)
    layout = long_stream(frames=100)
    before, after = before_and_after(config, layout)
    _, changed = before_and_after(config, layout, key=moc.DropKey(*other))
    counts = [(before & ~x).sum(-1).double() for x in (after, changed)]
    assert_unrelated(*counts)


def assert_unrelated(a: torch.Tensor, b: torch.Tensor):
    correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_heads_and_neighbouring_tokens_draw_apart():
    config = moc.MoCConfig(top_k=5, drop_in_rate=1.0)
    before, after = before_and_after(config, long_stream(frames=100))
    dropped, added = (before & ~after).sum(-1).double(), (after & ~before).sum(-1).double()
    for counts in (dropped, added):
        assert_unrelated(counts[1:], counts[:-1])
        assert_unrelated(counts[:, 1:], counts[:, :-1])
    assert_unrelated(dropped, added)


@given(streams(max_shots=4, max_chunk_tokens=6), configs(), seeds)
def test_a_split_of_the_heads_draws_the_same(stream, config, seed):
    """`first_head` is the global index of the first head at hand."""
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed, num_heads=6)
    whole = route(q, k, layout, config, moc.DropKey(seed, 1, 2))
    for first, last in ((0, 2), (2, 3), (3, 6)):
        some = route(q[:, first:last], k[:, first:last], layout, config, moc.DropKey(seed, 1, 2, first_head=first))
        assert torch.equal(some, whole[first:last])


def packed(*positions: int, frames: int = 40) -> moc.ShotLayout:
    """Returns samples of three shots, one for each position; the first has a global text, so that offsets are no
    multiples."""
    shots = [moc.Shot(0, (frames, 1, 2)) for _ in range(3)]
    text = [3, *[0] * (len(positions) - 1)]
    samples = [moc.ShotLayout.build(shots, n, 2, position) for n, position in zip(text, positions, strict=True)]
    return moc.ShotLayout.pack(samples)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_a_sample_draws_the_same_in_any_pack(backend):
    """Draws are keyed by the sample's position and the token's offset in it, never by what else is in the pack."""
    config = moc.MoCConfig(top_k=2, drop_in_rate=1.5)
    layout = packed(7, 5, 9, frames=4).rechunk(3)
    q, k, _ = attention_tensors(layout, num_heads=4, head_dim=16, dtype=torch.float32)
    whole = moc.route(q, k, layout, config, KEY, backend=backend)
    for sample, (start, end) in enumerate(layout.sample_ranges):
        text, shots = layout.samples[sample]
        alone = moc.ShotLayout.build(shots, text, 3, layout.positions[sample])
        routes = moc.route(q[start:end], k[start:end], alone, config, KEY, backend=backend)
        moved = torch.where(routes < 0, routes, routes + layout.sample_first_chunk[sample])
        assert same_chunks(moved, whole[:, start:end])


def test_samples_of_a_pack_draw_apart():
    layout = packed(0, 1, 2**31 - 1)
    config = moc.MoCConfig(top_k=5, drop_in_rate=0.0)
    counts = []
    for start, _ in layout.sample_ranges:
        tokens = slice(start + (3 if not start else 0) + 160, None)  # the queries of the last shot
        before, after = before_and_after(config, layout, tokens=tokens)
        counts.append((before & ~after)[:, :80].sum(-1).double())
    assert_unrelated(counts[0], counts[1])
    assert_unrelated(counts[1], counts[2])


def test_draws_do_not_depend_on_the_type_of_the_inputs():
    """With equal scores everywhere the routes are the same in any precision, and so are the draws."""
    layout, config = long_stream(frames=10), moc.MoCConfig(top_k=3)
    zeros = torch.zeros(layout.num_tokens, 2, 4)
    tables = [route(zeros.to(t), zeros.to(t), layout, config, KEY) for t in (torch.float64, torch.float32, torch.half)]
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])


def test_draws_do_not_depend_on_the_default_dtype():
    layout, config = long_stream(), moc.MoCConfig(top_k=0, drop_in_rate=0.7, drop_in_max=3)
    zeros = torch.zeros(layout.num_tokens, 8, 4)
    expected = route(zeros, zeros, layout, config, KEY)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(route(zeros, zeros, layout, config, KEY), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_step_may_be_a_tensor():
    for step in (0, 7, 2**40):
        number, tensor = moc.DropKey(3, step, 2), moc.DropKey(3, torch.tensor(step), 2)
        assert int(routing.drop_base(tensor)) == routing.drop_base(number)
        before = before_and_after(moc.MoCConfig(top_k=3), long_stream(), key=number)
        assert torch.equal(before[1], before_and_after(moc.MoCConfig(top_k=3), long_stream(), key=tensor)[1])


@pytest.mark.parametrize("key", [moc.DropKey(-1, 0), moc.DropKey(2**63, 2**40, 2**33), moc.DropKey(0, 0, 0, 10**6)])
def test_any_key_works(key):
    layout = long_stream(frames=6)
    q, k, _ = attention_tensors(layout)
    assert route(q, k, layout, moc.MoCConfig(top_k=3), key).shape == (2, layout.num_tokens, 5)


@pytest.mark.gpu
def test_draws_agree_between_devices():
    layout, config = long_stream(), moc.MoCConfig(drop_in_rate=1.5)
    q, k = (torch.randint(-4, 5, (layout.num_tokens, 4, 8)).float() for _ in range(2))  # exact scores
    expected = route(q, k, layout, config, KEY)
    routes = route(q.cuda(), k.cuda(), layout.to("cuda"), config, KEY)
    assert torch.equal(routes.cpu(), expected)
