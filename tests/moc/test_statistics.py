"""These tests are about routing statistics against plain counting."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given

import moc
from moc.statistics import RoutingMap, chunk_counts, routing_statistics, shot_counts
from tests import brute_force
from tests.strategies import attention_tensors, configs, seeds, streams


def counted(routes, stream) -> Counter:
    """Returns (query token, key's first token) of every route."""
    tokens = brute_force.tokens_of(stream)
    first = [tokens[positions[0]] for positions in brute_force.chunks_of(tokens)]
    rows = brute_force.as_lists(routes)
    return Counter((tokens[i], first[c]) for head in rows for i, row in enumerate(head) for c in row)


def routed(stream, config, seed):
    layout = stream.layout()
    q, k, _ = attention_tensors(layout, seed)
    return layout, moc.route(q, k, layout, config, moc.DropKey(seed, 0), backend="reference")


@given(streams(), configs(), seeds)
def test_chunk_counts(stream, config, seed):
    layout, routes = routed(stream, config, seed)
    expected = torch.zeros(layout.num_groups, layout.num_chunks, dtype=torch.int64)
    for (query, key), count in counted(routes, stream).items():
        group = next(g for g, x in enumerate(layout.groups) if (x.sample, x.shot) == (query.sample, query.shot))
        expected[group, key.chunk] += count
    assert torch.equal(chunk_counts(routes, layout), expected)


@given(streams(), configs(), seeds)
def test_summary_numbers(stream, config, seed):
    layout, routes = routed(stream, config, seed)
    counts = counted(routes, stream)
    total = sum(counts.values())
    found = routing_statistics(routes, layout)

    distances = Counter()
    by_chunk = Counter()
    for (query, key), count in counts.items():
        if query.shot >= 0:
            distances[query.shot - key.shot] += count
        by_chunk[key.chunk] += count
    shares = {d: count / distances.total() for d, count in distances.items()}
    assert found.share_by_distance == pytest.approx(shares)

    num_video = sum(chunk.kind == "video" for chunk in layout.chunks)
    assert found.unused == pytest.approx(1 - len(by_chunk) / num_video)
    bits = -sum(count / total * math.log(count / total) for count in by_chunk.values())
    assert found.entropy == pytest.approx(bits / math.log(num_video) if num_video > 1 else 0, abs=1e-9)


def test_forward_routes_have_negative_distance():
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 1, 1)) for _ in range(3)], chunk_tokens=1)
    routes = torch.tensor([[[2], [0], [1]]], dtype=torch.int32)
    found = routing_statistics(routes, layout)
    assert found.share_by_distance == pytest.approx({-2: 1 / 3, 1: 2 / 3})
    assert found.entropy == pytest.approx(1.0)
    assert found.unused == 0


def test_global_text_stands_at_no_distance():
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 1, 1)) for _ in range(2)], global_text_tokens=1, chunk_tokens=1)
    # The global text routes to the second shot, and the second shot to the first.
    routes = torch.tensor([[[2], [-1], [1]]], dtype=torch.int32)
    found = routing_statistics(routes, layout)
    assert found.share_by_distance == {1: 1.0}
    assert found.unused == 0
    assert found.entropy == pytest.approx(1.0)


def test_one_favourite_has_no_entropy():
    layout = moc.ShotLayout.build([moc.Shot(0, (4, 1, 1)), moc.Shot(0, (2, 1, 1))], chunk_tokens=1)
    routes = torch.full((2, 6, 3), -1, dtype=torch.int32)
    assert routing_statistics(routes, layout).share_by_distance == {}
    assert routing_statistics(routes, layout).unused == 1
    routes[:, 4:, 1] = 2
    found = routing_statistics(routes, layout)
    assert (found.entropy, found.unused, found.share_by_distance) == (0, pytest.approx(5 / 6), {1: 1.0})


@given(streams(max_samples=2), configs(), seeds)
def test_shots_by_shots(stream, config, seed):
    layout, routes = routed(stream, config, seed)
    names = [(b, s) for b, (_, shots) in enumerate(stream.samples) for s in range(len(shots))]
    expected = torch.zeros(len(names), len(names), dtype=torch.float64)
    for (query, key), count in counted(routes, stream).items():
        if query.shot >= 0:
            expected[names.index((query.sample, query.shot)), names.index((key.sample, key.shot))] += count
    assert torch.equal(shot_counts(routes, layout), expected)


def test_routing_map_gathers_layers_and_streams():
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 1, 1)) for _ in range(3)], chunk_tokens=1)
    routes = torch.tensor([[[-1], [0], [1]], [[-1], [0], [0]]], dtype=torch.int32)
    story = RoutingMap(5)
    observe = story.observer(layout, [0, 2, 4], [2, 4], [0.2, 0.6])
    observe(0, routes)
    observe(1, routes)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[2, 0], expected[4, 2], expected[4, 0] = 1.0, 0.5, 0.5
    assert torch.equal(story.shares(), expected)
    assert story.counts.sum() == 8
    story.observer(layout, [0, 2, 4], [2], [1.0])(0, routes)  # the last shot, 4, is history here
    assert story.counts.shape == (2, 4, 5, 5)
    by_layer_and_level = story.counts[:, :, [2, 4]].sum(-1).tolist()
    assert by_layer_and_level == [[[2, 0], [0, 0], [0, 2], [2, 0]], [[2, 0], [0, 0], [0, 2], [0, 0]]]


def test_routing_map_of_very_many_shots_counts_layers_and_levels_as_one():
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 1, 1)) for _ in range(2)], chunk_tokens=1)
    routes = torch.tensor([[[-1], [0]]], dtype=torch.int32)
    story = RoutingMap(101)
    for layer in (0, 1):
        story.observer(layout, [0, 100], [100], [0.3])(layer, routes)
    assert story.counts.shape == (1, 1, 101, 101)
    assert story.counts.sum() == story.counts[0, 0, 100, 0] == 2
