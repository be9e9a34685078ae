"""These tests are about cost against a count of the mask, and against figures worked out by hand and in print."""

from unittest import mock

import pytest
import torch
from hypothesis import given

import moc
from moc.context import is_candidate
from moc.cost import attention_cost
from moc.statistics import chunk_counts
from tests import brute_force
from tests.strategies import attention_tensors, configs, seeds, streams


@given(streams(), configs(), seeds)
def test_pairs_equal_a_count_of_the_mask(stream, config, seed):
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed)
    drops = moc.DropKey(seed, 0) if seed % 2 else None
    routes = moc.route(q, k, layout, config, drops, backend="reference")
    cost = attention_cost(layout, config, routes, num_heads=2, head_dim=4)

    tokens = brute_force.tokens_of(stream)
    video = {i for i, token in enumerate(tokens) if not token.is_text}
    own = [brute_force.own_anchor(tokens, i, config) for i in range(len(tokens))]
    fixed = [brute_force.anchors(tokens, i, config) for i in range(len(tokens))]
    heads = brute_force.attended(brute_force.as_lists(routes), stream, config)
    assert cost.own == sum(len(keys) for keys in own)
    assert cost.text == sum(len(keys - mine) for keys, mine in zip(fixed, own, strict=True))
    routed = sum(len(keys - fixed[i]) for rows in heads for i, keys in enumerate(rows)) / 2
    assert cost.routed == pytest.approx(routed)
    assert cost.attended == pytest.approx(sum(len(keys) for rows in heads for keys in rows) / 2)
    assert cost.video == pytest.approx(sum(len(rows[i] & video) for rows in heads for i in video) / 2)

    samples = range(len(stream.samples))
    assert cost.dense == sum(sum(t.sample == b for t in tokens) ** 2 for b in samples)
    assert cost.video_dense == sum(sum(t.sample == b and not t.is_text for t in tokens) ** 2 for b in samples)
    assert cost.sparsity == pytest.approx(1 - cost.attended / cost.dense)
    assert cost.density == pytest.approx(1 - cost.sparsity)
    assert cost.video_sparsity == pytest.approx(1 - cost.video / cost.video_dense)


@given(streams(max_samples=3), configs())
def test_blocks_of_query_chunks_change_nothing(stream, config):
    layout = stream.layout()
    whole = attention_cost(layout, config, None, num_heads=3, head_dim=8)
    with mock.patch("moc.cost.QUERY_CHUNKS", 2):
        assert attention_cost(layout, config, None, num_heads=3, head_dim=8) == whole


@given(streams(max_samples=3), configs())
def test_dense_attention_has_no_sparsity_and_no_routing(stream, config):
    layout = stream.layout()
    cost = attention_cost(layout, moc.MoCConfig(dense=True, top_k=config.top_k), None, num_heads=3, head_dim=8)
    assert (cost.sparsity, cost.video_sparsity, cost.routing_flops) == (0, 0, 0)
    assert cost.flops == cost.dense_flops


@given(streams(), configs(), seeds)
def test_pairs_of_a_callers_routes_equal_a_count_of_the_mask(stream, config, seed):
    """The routes are any chunks at all: repeated, covered by anchors, of text, of other samples. Each key counts
    once."""
    layout = stream.layout()
    generator = torch.Generator().manual_seed(seed)
    routes = torch.randint(-1, layout.num_chunks, (2, layout.num_tokens, 4), generator=generator, dtype=torch.int32)
    cost = attention_cost(layout, config, routes, num_heads=2, head_dim=4)
    mask = moc.reference.attention_mask(routes, layout, config)
    mask &= layout.token_sample[:, None] == layout.token_sample
    assert cost.attended == pytest.approx(float(mask.sum()) / 2)
    video = ~layout.token_is_text
    assert cost.video == pytest.approx(float(mask[:, video][:, :, video].sum()) / 2)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 64), (12, 128)])
def test_flops_follow_the_paper(num_heads, head_dim):
    """Per head the FLOPs are: dense 4 L^2 d; MoC L d to pool, 2 L C d to score, 4 (own + text + routed pairs) d to
    attend."""
    layout = moc.ShotLayout.build([moc.Shot(0, (4, 2, 2)) for _ in range(4)], chunk_tokens=4)
    config = moc.MoCConfig(top_k=2, causal=False, own_anchor="none")
    q, k, _ = attention_tensors(layout, num_heads=num_heads)
    routes = moc.route(q, k, layout, config, backend="reference")
    cost = attention_cost(layout, config, routes, num_heads, head_dim)
    length, chunks = 64, 16
    pairs = 64 * 2 * 4
    routing = length * head_dim + 2 * length * chunks * head_dim
    assert cost.dense_flops == 4 * length**2 * head_dim * num_heads
    assert cost.routing_flops == routing * num_heads
    assert cost.flops == (4 * pairs * head_dim + routing) * num_heads


@given(streams(), configs())
def test_routing_scores_candidates_alone(stream, config):
    """Text chunks, chunks of anchors and, when causal, later chunks cost nothing."""
    layout = stream.layout()
    candidates = is_candidate(layout, config, layout.token_chunk[:, None], torch.arange(layout.num_chunks))
    routes = torch.full((1, layout.num_tokens, 0), -1)
    cost = attention_cost(layout, config, routes, num_heads=3, head_dim=8)
    pooled = int((~layout.token_is_text).sum())
    assert cost.routing_flops == (config.top_k > 0) * (pooled + 2 * int(candidates.sum())) * 8 * 3


@given(streams(max_samples=3), configs(), seeds)
def test_the_cost_of_a_pack_is_the_sum_of_its_samples(stream, config, seed):
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed)
    packed = attention_cost(layout, config, moc.route(q, k, layout, config, backend="reference"), 2, 4)
    alone = []
    for sample, (start, end) in zip(stream.layouts(), layout.sample_ranges, strict=True):
        routes = moc.route(q[start:end], k[start:end], sample, config, backend="reference")
        alone.append(attention_cost(sample, config, routes, 2, 4))
    for name in ("own", "text", "routed", "dense", "video", "video_dense", "routing_flops", "flops", "dense_flops"):
        assert getattr(packed, name) == pytest.approx(sum(getattr(cost, name) for cost in alone)), name


def paper_stream(num_shots: int = 8) -> moc.ShotLayout:
    return moc.ShotLayout.build([moc.Shot(64, (36, 20, 32)) for _ in range(num_shots)], 256, chunk_tokens=1280)


def any_routes(layout: moc.ShotLayout, top_k: int) -> torch.Tensor:
    """Returns routes to the latest video chunks of earlier shots; all chunks of this stream are equally long."""
    routes = torch.full((1, layout.num_tokens, top_k), -1, dtype=torch.int32)
    for index, group in enumerate(layout.groups):
        video = [c for c in range(group.first_chunk) if layout.chunks[c].kind == "video"]
        if index > 0 and video:
            routes[:, group.start : group.end] = torch.tensor(video[-top_k:])
    return routes


def test_density_of_the_benchmark_stream():
    """8 shots of 23,040 video and 64 text tokens with 256 global ones, k 5 of 1,280, have a density of 0.159."""
    layout = paper_stream()
    cost = attention_cost(layout, moc.MoCConfig(), any_routes(layout, 5), num_heads=12, head_dim=128)
    shot, text, total = 23_104, 256 + 8 * 64, 8 * 23_104 + 256
    assert cost.own == 8 * shot**2
    assert cost.text == 8 * shot * (text - 64) + 256 * text
    assert cost.routed == 7 * shot * 5 * 1280
    assert cost.dense == total**2
    assert cost.density == pytest.approx(0.159, abs=5e-4)


def test_own_shots_cap_the_sparsity():
    """Eight equal shots that see nothing but their own shot have a sparsity of 87.5 %."""
    layout = moc.ShotLayout.build([moc.Shot(0, (8, 2, 2)) for _ in range(8)], chunk_tokens=4)
    none = torch.empty(1, layout.num_tokens, 0, dtype=torch.int32)
    cost = attention_cost(layout, moc.MoCConfig(top_k=0), none, num_heads=1, head_dim=8)
    assert cost.sparsity == cost.video_sparsity == 0.875
    assert cost.flops == 0.125 * cost.dense_flops  # choosing no chunk needs no scores


def test_routes_of_the_last_queries_alone_are_refused():
    """One row would count for every token."""
    layout = moc.ShotLayout.build([moc.Shot(0, (2, 2, 2))] * 2, chunk_tokens=4)
    q, k, _ = attention_tensors(layout)
    for first in (layout.num_tokens - 1, 3):
        routes = moc.route(q[first:], k, layout, moc.MoCConfig(top_k=1))
        for count in (lambda r: attention_cost(layout, moc.MoCConfig(), r, 2, 4), lambda r: chunk_counts(r, layout)):
            with pytest.raises(ValueError, match=r"routes must be \[N, 16, K\].*pad"):
                count(routes)
