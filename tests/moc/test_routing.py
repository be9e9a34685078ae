"""These tests are about routes against a brute force: scores, candidates, ties, missing candidates; and the outer loop,
`select_shots`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moc
from moc import routing
from tests import brute_force
from tests.strategies import Stream, attention_tensors, configs, seeds, streams


def route(q, k, layout, config, **more):
    return moc.route(q, k, layout, config, backend="reference", **more)


@given(streams(), configs(), seeds)
def test_routes_equal_the_brute_force(stream, config, seed):
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed)
    routes = route(q, k, layout, config)
    assert routes.shape == (2, layout.num_tokens, config.top_k)
    assert routes.dtype == torch.int32
    expected = brute_force.route(q, k, stream, config)
    assert torch.equal(routes, brute_force.as_table(expected, config.top_k))  # best first, then empty slots


@given(streams(), configs(), seeds, st.integers(2, 5))
def test_routes_by_several_means_equal_the_brute_force(stream, config, seed, subchunks):
    """Chunks of fewer tokens than sub-chunks are among them."""
    layout, config = stream.layout(), replace(config, descriptor_subchunks=subchunks)
    q, k, _ = attention_tensors(layout, seed)
    expected = brute_force.route(q, k, stream, config)
    assert torch.equal(route(q, k, layout, config), brute_force.as_table(expected, config.top_k))


def test_several_means_route_a_pack_as_its_samples_at_their_positions():
    """Drops are drawn by position, also where the layout is copied and its positions are written."""
    scenes = [[moc.Shot(1, (2, 2, 2))] * 3, [moc.Shot(0, (1, 2, 3))] * 4, [moc.Shot(2, (1, 2, 2))] * 3]
    streams = [moc.ShotLayout.build(shots, 2, chunk_tokens=4) for shots in scenes]
    pack = moc.ShotLayout.pack(streams)
    config, drops = moc.MoCConfig(descriptor_subchunks=2, top_k=3), moc.DropKey(1, 2)
    q, k, _ = attention_tensors(pack)
    for positions in ((5, 9, 6), (7, 3, 2)):
        copied = pack.copied()
        copied.sample_position.copy_(torch.tensor(positions))
        expected, first = [], 0
        for stream, position, (start, end) in zip(streams, positions, pack.sample_ranges, strict=True):
            routes = route(q[start:end], k[start:end], stream.at([position]), config, drops=drops)
            expected.append(routes.where(routes < 0, routes + first))
            first += stream.num_chunks
        assert torch.equal(route(q, k, copied, config, drops=drops), torch.cat(expected, dim=1))


def test_positions_are_not_copied_to_route_each_sample(monkeypatch):
    """A copy would be a launch for each sample and layer."""
    pack = moc.ShotLayout.pack([moc.ShotLayout.build([moc.Shot(0, (2, 2, 2))] * 2, chunk_tokens=4)] * 2)
    config, (q, k, _), clone = moc.MoCConfig(descriptor_subchunks=2), attention_tensors(pack), torch.Tensor.clone
    cloned = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **given: cloned.append(x) or clone(x, **given))
    route(q, k, pack, config)
    assert cloned == []
    assert pack.copied().sample_position is not pack.sample_position


def test_several_means_find_a_key_that_one_mean_hides():
    """Chunk 0 has one key that matches among its opposites, chunk 1 has none that does."""
    layout = moc.ShotLayout.build([moc.Shot(0, (2, 1, 4)), moc.Shot(0, (1, 1, 4))], chunk_tokens=4)
    q, k = torch.zeros(12, 1, 4), torch.zeros(12, 1, 4)
    q[..., 0], k[0, 0, 0], k[1:4, 0, 0] = 4.0, 3.0, -2.0
    assert (route(q, k, layout, moc.MoCConfig(top_k=1))[0, 8:] == 1).all()
    assert (route(q, k, layout, moc.MoCConfig(top_k=1, descriptor_subchunks=4))[0, 8:] == 0).all()


@given(streams(max_size=(4, 1, 2), max_chunk_tokens=2), configs(max_top_k=3), seeds)
def test_ties_go_to_the_lowest_chunk(stream, config, seed):
    """Small whole numbers and chunks of one or two tokens: scores are exact and equal all the time."""
    layout = stream.layout()
    q, k = (torch.randint(0, 2, (layout.num_tokens, 2, 2)).double() for _ in range(2))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        routes = route(q.to(dtype), k.to(dtype), layout, config)
        assert torch.equal(routes, brute_force.as_table(brute_force.route(q, k, stream, config), config.top_k))


@pytest.mark.parametrize("num_chunks", [5, 200])
def test_all_scores_equal(num_chunks):
    layout = moc.ShotLayout.build([moc.Shot(0, (num_chunks, 1, 2)), moc.Shot(0, (1, 1, 2))], chunk_tokens=2)
    q, k = torch.zeros(layout.num_tokens, 1, 8), torch.randn(layout.num_tokens, 1, 8)
    routes = route(q, k, layout, moc.MoCConfig(top_k=4))
    assert (routes[0, -2:] == torch.arange(4)).all()


@given(streams(), configs(), seeds)
def test_routes_are_candidates_once_each_and_as_many_as_there_are(stream, config, seed):
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed, dtype=torch.bfloat16)
    tokens = brute_force.tokens_of(stream)
    for rows in brute_force.as_lists(route(q, k, layout, config)):
        for i, row in enumerate(rows):
            allowed = brute_force.candidates(tokens, i, config)
            assert len(row) == len(set(row)) == min(config.top_k, len(allowed))
            assert set(row) <= set(allowed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_scored_in_full_precision(dtype):
    """Routes are those of fp64 scores of the same numbers, wherever the k / k+1 margin exceeds the error allowed."""
    stream = Stream(((3, tuple(moc.Shot(2, (8, 2, 4)) for _ in range(4))),), 16)
    layout, config = stream.layout(), moc.MoCConfig(top_k=3)
    q, k, _ = attention_tensors(layout, 1, head_dim=64, dtype=dtype)
    k = k + 1  # this common vector makes the differences relatively small
    routes = brute_force.as_lists(route(q, k, layout, config))
    scores, expected = brute_force.scores(q, k, stream), brute_force.route(q, k, stream, config)
    tokens, compared = brute_force.tokens_of(stream), 0
    for head in range(2):
        for i in range(layout.num_tokens):
            row = sorted((scores[head][i][c] for c in brute_force.candidates(tokens, i, config)), reverse=True)
            if len(row) > 3 and row[2] - row[3] > 1e-5 * max(map(abs, row)):
                assert set(routes[head][i]) == set(expected[head][i])
                compared += 1
    assert compared > 300


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_changes_no_route(backend):
    layout = moc.ShotLayout.build([moc.Shot(4, (8, 4, 4)) for _ in range(5)], 8, chunk_tokens=16)
    q, k, _ = attention_tensors(layout, head_dim=64, dtype=torch.float32)
    config = moc.MoCConfig(top_k=3)
    expected = moc.route(q, k, layout, config, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moc.route(q, k, layout, config, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_descriptors_of_long_chunks_are_accurate(dtype):
    layout = moc.ShotLayout.build([moc.Shot(0, (40, 16, 32))], chunk_tokens=10240)
    k = (torch.randn(layout.num_tokens, 1, 16) + 1).to(dtype)
    means = routing.descriptors(k, layout)
    exact = torch.stack([keys.double().mean(0) for keys in k.split(10240)])
    assert means.dtype == torch.float32
    assert ((means - exact).abs() / exact.abs()).max() < 1e-5


def test_fewer_candidates_than_top_k_leave_empty_slots():
    layout = moc.ShotLayout.build([moc.Shot(1, (2, 1, 2)) for _ in range(3)], chunk_tokens=2)
    q, k, _ = attention_tensors(layout)
    routes = route(q, k, layout, moc.MoCConfig(top_k=9))
    assert routes.shape[-1] == 9
    for shot, group in enumerate(layout.groups[1:]):
        rows = routes[:, group.start : group.end]
        assert (rows[..., : 2 * shot] >= 0).all()
        assert (rows[..., 2 * shot :] == -1).all()


def test_top_k_zero_routes_nowhere():
    layout = moc.ShotLayout.build([moc.Shot(1, (2, 1, 2)) for _ in range(3)], chunk_tokens=2)
    q, k, _ = attention_tensors(layout)
    assert route(q, k, layout, moc.MoCConfig(top_k=0)).shape == (2, layout.num_tokens, 0)


def test_global_text_routes_to_all_video_only_when_not_causal():
    layout = moc.ShotLayout.build([moc.Shot(1, (2, 1, 2)) for _ in range(2)], 3, chunk_tokens=2)
    q, k, _ = attention_tensors(layout)
    assert (route(q, k, layout, moc.MoCConfig(top_k=9))[:, :3] == -1).all()
    rows = route(q, k, layout, moc.MoCConfig(top_k=9, causal=False))[:, :3]
    video = [index for index, chunk in enumerate(layout.chunks) if chunk.kind == "video"]
    assert (rows[..., :4].sort(-1).values == torch.tensor(video)).all()


def test_text_queries_of_a_shot_route_like_any_other():
    layout = moc.ShotLayout.build([moc.Shot(2, (2, 1, 2)) for _ in range(2)], chunk_tokens=2)
    q, k, _ = attention_tensors(layout)
    second = layout.groups[2].start
    assert (route(q, k, layout, moc.MoCConfig(top_k=2))[:, second : second + 2] >= 0).all()


@given(streams(max_samples=3), configs(), seeds)
def test_packing_changes_no_route(stream, config, seed):
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed)
    packed = route(q, k, layout, config)
    chunk = 0
    for sample, (start, end) in zip(stream.layouts(), layout.sample_ranges, strict=True):
        alone = route(q[start:end], k[start:end], sample, config)
        inside = packed[:, start:end]
        assert torch.equal(torch.where(inside >= 0, inside - chunk, -1), alone)
        chunk += sample.num_chunks


@given(streams(), configs(), seeds)
def test_heads_route_apart(stream, config, seed):
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed, num_heads=3)
    alone = [route(q[:, n : n + 1], k[:, n : n + 1], layout, config) for n in range(3)]
    assert torch.equal(route(q, k, layout, config), torch.cat(alone))


def test_the_block_of_queries_scored_at_a_time_changes_nothing(monkeypatch):
    layout = moc.ShotLayout.build([moc.Shot(2, (4, 2, 2)) for _ in range(3)], 3, chunk_tokens=4)
    q, k, _ = attention_tensors(layout)
    config, drops = moc.MoCConfig(top_k=3), moc.DropKey(1, 2, 3)
    whole = [route(q, k, layout, config), route(q, k, layout, config, drops=drops)]
    for scores_per_block in (1, 7 * 2 * layout.num_chunks):
        monkeypatch.setattr(routing, "SCORES_PER_BLOCK", scores_per_block)
        assert torch.equal(route(q, k, layout, config), whole[0])
        assert torch.equal(route(q, k, layout, config, drops=drops), whole[1])
        assert torch.equal(route(q[20:], k, layout, config, drops=drops), whole[1][:, 20:])


def test_routing_leaves_no_graph():
    layout = moc.ShotLayout.build([moc.Shot(2, (4, 2, 2)) for _ in range(2)], chunk_tokens=4)
    q, k, _ = attention_tensors(layout, requires_grad=True)
    assert not route(q, k, layout, moc.MoCConfig(top_k=2)).requires_grad


@given(streams(), configs(), seeds)
def test_any_routes_of_a_caller_mean_the_same_to_every_backend(stream, config, seed):
    """The routes are repeated, covered, of text, or of other samples, which stay unseen."""
    layout = stream.layout()
    q, k, v = attention_tensors(layout, seed, dtype=torch.float32)
    routes = torch.randint(-1, layout.num_chunks, (2, layout.num_tokens, 4), dtype=torch.int32)
    expected = moc.reference.moc_attention(q, k, v, layout, config, routes=routes)
    found = moc.moc_attention(q, k, v, layout, config, routes=routes, backend="torch")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# Outer loop


def test_select_shots_prefers_the_most_alike_earlier_shots():
    layout = moc.ShotLayout.build([moc.Shot(0, (t, 1, 2)) for t in (1, 3, 2, 1)], 2, chunk_tokens=2)
    by_shot = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.5], [0.9, 0.1]])
    noise = torch.randn(layout.num_tokens, 2).double() * 0.01
    features = torch.stack([by_shot[shot] if shot >= 0 else torch.zeros(2) for shot in shot_of_tokens(layout)]) + noise
    assert moc.select_shots(features, layout, 2).tolist() == [[-1, -1], [0, -1], [0, 1], [0, 2]]
    assert moc.select_shots(features.float(), layout, 1).tolist() == [[-1], [0], [0], [0]]
    assert moc.select_shots(features, layout, 5)[3].tolist() == [0, 2, 1, -1, -1]


def test_select_shots_averages_so_that_long_shots_have_no_advantage():
    layout = moc.ShotLayout.build([moc.Shot(0, (t, 1, 1)) for t in (9, 1, 1)], chunk_tokens=4)
    by_shot = torch.tensor([[200.0], [400.0], [400.0]])
    features = torch.stack([by_shot[shot] for shot in shot_of_tokens(layout)])
    for dtype in (torch.float32, torch.float16):  # whose products are past half precision
        assert moc.select_shots(features.to(dtype), layout, 1)[2].tolist() == [1]


def test_select_shots_never_crosses_samples():
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 1, 2)) for _ in range(2)], 1, chunk_tokens=2)
    layout = moc.ShotLayout.pack([layout, layout])
    assert moc.select_shots(torch.ones(layout.num_tokens, 3), layout, 2).tolist() == [
        [-1, -1],
        [0, -1],
        [-1, -1],
        [2, -1],
    ]


def test_select_shots_ties_and_zero():
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 1, 2)) for _ in range(3)], chunk_tokens=2)
    features = torch.ones(layout.num_tokens, 3)
    assert moc.select_shots(features, layout, 1)[2].tolist() == [0]
    assert moc.select_shots(features, layout, 0).shape == (3, 0)


def test_select_shots_refuses_features_of_another_stream():
    """Too few of them would be read past their end."""
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 1, 2)) for _ in range(3)], chunk_tokens=2)
    for shape in ((5, 3), (7, 3), (6, 2, 3)):
        with pytest.raises(ValueError, match=r"features must be \[6, C\]"):
            moc.select_shots(torch.ones(shape), layout, 1)


def shot_of_tokens(layout: moc.ShotLayout) -> list[int]:
    return layout.group_shot[layout.token_group].tolist()


def test_first_candidates_are_the_first_video_chunk_of_each_shot():
    shots = [moc.Shot(text, (3, 2, 2)) for text in (2, 0, 3)]
    layout = moc.ShotLayout.build(shots, global_text_tokens=1, chunk_tokens=4)
    config = moc.MoCConfig(top_k=5, candidates="first", causal=False)
    q, k = torch.randn(2, layout.num_tokens, 2, 8).unbind()
    routes = moc.route(q, k, layout, config)
    firsts = {chunk for chunk, c in enumerate(layout.chunks) if c.kind == "video"}
    firsts = {c for c in firsts if c - 1 not in firsts or layout.chunks[c - 1].group != layout.chunks[c].group}
    assert len(firsts) == 3
    for token in layout.video_index.tolist():
        own = int(layout.token_group[token])
        wanted = {chunk for chunk in firsts if layout.chunks[chunk].group != own}
        for head in range(2):
            assert set(routes[head, token].tolist()) - {-1} == wanted


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_first_candidates_are_chosen_as_from_all_scores(top_k, causal):
    """Drops that draw nothing take the general way."""
    samples = [(1, [(2, 3), (0, 2)]), (0, [(3, 1), (1, 2), (2, 3)])]
    layout = moc.ShotLayout.pack(
        [moc.ShotLayout.build([moc.Shot(t, (f, 2, 2)) for t, f in shots], text, 4) for text, shots in samples]
    )
    config = moc.MoCConfig(top_k=top_k, candidates="first", causal=causal, drop_off_max=1e-9, drop_in_rate=0)
    q, k = torch.randn(2, layout.num_tokens, 2, 8).unbind()
    general = routing.route(q, k, layout, config, moc.DropKey(0, 0))[..., :top_k]
    assert torch.equal(routing.route(q, k, layout, config), general)
