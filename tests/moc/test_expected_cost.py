"""These tests are about costs that are counted from sizes alone, against `moc.cost` on streams that are laid out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moc import MoCConfig, Shot, ShotLayout, route
from moc.config import Candidates
from moc.context import is_candidate
from moc.cost import attention_cost
from moc.expected_cost import GLOBAL_TEXT, ExpectedCosts
from tests.strategies import attention_tensors, configs, seeds, shots

stories = st.lists(shots((4, 3, 2), 3), min_size=1, max_size=4)
choices = st.sampled_from(list(Candidates))


def routed_pairs(layout: ShotLayout, config: MoCConfig) -> float:
    """Returns pairs of queries and routed keys where each query takes all its candidates equally often."""
    lengths, chunks, found = layout.chunk_cu_seqlens.diff().double(), torch.arange(layout.num_chunks), 0.0
    for query in chunks:
        keys = lengths[is_candidate(layout, config, query, chunks)]
        if len(keys) and not config.dense:
            found += float(lengths[query] * min(config.top_k, len(keys)) * keys.mean())
    return found


@given(st.integers(0, 3), stories, configs(), choices, st.integers(1, 8))
def test_a_stream_costs_what_is_counted_of_its_layout(global_tokens, story, config, candidates, chunk_tokens):
    config = replace(config, chunk_tokens=chunk_tokens, candidates=candidates)
    layout = ShotLayout.build(story, global_tokens, chunk_tokens)
    no_routes = torch.full((1, layout.num_tokens, 0), -1)
    counted = attention_cost(layout, config, no_routes, num_heads=1, head_dim=1)
    whole = range(len(story))
    expected = ExpectedCosts(global_tokens, story, config).of([GLOBAL_TEXT, *whole], whole)
    assert expected.pairs == pytest.approx(counted.attended + routed_pairs(layout, config))
    assert expected.dense == counted.dense
    pooled = sum(group.video_tokens for group in layout.groups) if config.top_k else 0
    assert 2 * expected.scores == counted.routing_flops - pooled


@given(st.integers(0, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4), configs(), seeds)
def test_chunks_of_one_length_cost_what_any_routes_do(global_tokens, frames, config, seed):
    story = [Shot(1, (count, 1, 2)) for count in frames]
    config = replace(config, chunk_tokens=2)
    layout = ShotLayout.build(story, global_tokens, 2)
    q, k, _ = attention_tensors(layout, seed)
    routes = route(q, k, layout, config, backend="reference")
    counted = attention_cost(layout, config, routes, num_heads=2, head_dim=4)
    whole = range(len(story))
    assert ExpectedCosts(global_tokens, story, config).of([GLOBAL_TEXT, *whole], whole).pairs == counted.attended


@given(st.integers(0, 3), stories, configs(), st.sets(st.integers(0, 3)))
def test_a_stream_of_some_shots_is_a_story_of_them_and_its_queries_add_up(global_tokens, story, config, chosen):
    costs = ExpectedCosts(global_tokens, story, config)
    stream = sorted(shot for shot in chosen if shot < len(story)) or [0]
    some = [story[shot] for shot in stream]
    alone = ExpectedCosts(global_tokens, some, config).of([GLOBAL_TEXT, *range(len(some))], range(len(some)))
    whole = costs.of([GLOBAL_TEXT, *stream], stream)
    parts = [costs.of([query], stream) for query in (GLOBAL_TEXT, *stream)]
    for name in ("pairs", "scores", "dense"):
        assert getattr(whole, name) == pytest.approx(getattr(alone, name))
        assert sum(getattr(part, name) for part in parts) == pytest.approx(getattr(whole, name))
    tokens = costs.tokens([GLOBAL_TEXT, *stream])
    dense = costs.of([GLOBAL_TEXT, *stream], stream, dense=True)
    assert (dense.pairs, dense.scores) == (whole.dense, 0) == (tokens**2, 0)
