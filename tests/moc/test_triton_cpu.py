"""These tests are about backend `triton` on CPU, interpreted, against the reference: routing, lists, attention, the
operator.

The interpreter runs where there is no GPU (`tests.fixtures` asks for it before Triton is imported); it needs fp32.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moc
from moc import attention, routing
from moc.context import candidate_runs, is_candidate
from moc.kept import Kept
from moc.kernels import anchors
from moc.kernels.packed import Packed
from tests.moc.against_reference import DROPS, assert_equal_to_reference, interpreted
from tests.moc.test_reference import OPTIONS, two_samples
from tests.routes import assert_same_choice, same_chunks, with_ties
from tests.strategies import attention_tensors, configs, seeds, streams

pytestmark = pytest.mark.usefixtures("listed")


def larger_stream() -> moc.ShotLayout:
    """Returns chunks larger than a block of keys, ragged; more tokens than a block of queries; two samples."""
    first = moc.ShotLayout.build([moc.Shot(5, (3, 5, 8)), moc.Shot(0, (1, 5, 8)), moc.Shot(3, (2, 5, 8))], 7, 40)
    second = moc.ShotLayout.build([moc.Shot(0, (2, 3, 9)), moc.Shot(2, (3, 3, 9))], 0, 40)
    return moc.ShotLayout.pack([first, second])


def check_triton(layout, config, drops=None, dtype=torch.float32, tolerance=1e-5, head_dim=16, heads=2):
    from moc.kernels import triton_backend

    q, k, _ = attention_tensors(layout, dtype=dtype, head_dim=head_dim, num_heads=heads)
    routes = triton_backend.route(q, k, layout, config, drops)
    assert_same_choice(routes, q, k, layout, config, drops)
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
@pytest.mark.parametrize("own", ["shot", "chunk", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernels_know_the_candidates_of_the_table(causal, own):
    """The kernels read `moc.context.candidate_runs`: a query with a route for every chunk, or a random one for every
    chunk, has just its candidates."""
    from moc.kernels import triton_backend

    layout = two_samples()
    chunks, rule = torch.arange(layout.num_chunks), {"causal": causal, "own_anchor": own}
    expected = is_candidate(layout, moc.MoCConfig(**rule), layout.token_chunk[:, None], chunks)
    q, k, _ = attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=1)
    all_routed = moc.MoCConfig(**rule, top_k=len(chunks))
    all_added = moc.MoCConfig(**rule, top_k=1, drop_off_max=0.0, drop_in_rate=500.0, drop_in_max=len(chunks))
    for config, drops in ((all_routed, None), (all_added, DROPS)):
        routes = triton_backend.route(q, k, layout, config, drops)[0]
        assert torch.equal((routes[..., None] == chunks).any(1), expected)


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
@pytest.mark.parametrize("block", [1024, 16])
def test_triton_lists_are_the_routes_sorted_by_chunk(block, monkeypatch):
    """Some have more lists than a block."""
    from moc.kernels import triton_index

    monkeypatch.setattr(triton_index, "BLOCK", block)
    routes = torch.stack([torch.stack([torch.randperm(9)[:4] for _ in range(70)]) for _ in range(2)]).int()
    routes[torch.rand(routes.shape) < 0.3] = -1
    lists = triton_index.build_lists(routes, 9, tile=16)
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


@interpreted
@pytest.mark.parametrize("shape", [(3, 5), (2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_adds_up_gathered_rows_as_tensor_code_does(shape, dtype):
    """Tokens 1 and 2 have two rows each, token 5 none."""
    from moc.kernels.triton_rows import sum_rows

    keys = [torch.tensor([1, 2]), torch.tensor([2, 1, 4, 3]), torch.tensor([0])]
    ranges = [[(1, 3)], [(2, 3), (1, 2), (4, 5), (3, 4)], [(0, 1)]]
    packed = Packed.build([2, 1, 3], ranges, 6, torch.device("cpu"))
    grads = [torch.randn(7, *shape).to(dtype) for _ in range(2)]
    sums = sum_rows(*grads, packed.rows, packed.row_starts)
    expected = [torch.zeros(6, *shape).index_add_(0, torch.cat(keys), grad.float()).to(dtype) for grad in grads]
    torch.testing.assert_close(sums, tuple(expected))
    torch.testing.assert_close(packed.sum_rows(*grads), tuple(expected))


def eighths(x: torch.Tensor) -> torch.Tensor:
    """Returns x to the nearest eighth: sums of such numbers are exact, so that equal keys have equal scores on any
    hardware."""
    return (x * 8).round() / 8


def many_chunks() -> moc.ShotLayout:
    """Returns two samples, 208 chunks of one token or two, blocks of queries across shots and samples."""
    first = [moc.Shot(2, (30, 1, 1)), moc.Shot(1, (120, 1, 1)), moc.Shot(0, (17, 1, 2))]
    second = [moc.Shot(2, (9, 1, 1)), moc.Shot(1, (26, 1, 1))]
    return moc.ShotLayout.pack([moc.ShotLayout.build(first, 3, 2), moc.ShotLayout.build(second, 0, 2)]).rechunk(1)


@interpreted
@pytest.mark.parametrize(
    ("top_k", "causal", "own", "inputs"),
    [
        (17, True, "shot", "periodic"),
        pytest.param(40, False, "shot", "random", marks=pytest.mark.slow),  # like "far" but for one chunk
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
    elif inputs == "equal":  # scores are exactly equal, in whatever order products are summed
        q, k = eighths(q), torch.ones_like(k)
    elif inputs == "far":
        k[50] *= 1e6
    config = moc.MoCConfig(top_k=top_k, causal=causal, own_anchor=own)
    first = 100 if inputs == "periodic" else 0
    routes = triton_routing.route(q[first:], k, layout, config)
    if inputs == "equal":
        assert same_chunks(routes, routing.route(q, k, layout, config))
    else:
        assert_same_choice(routes, q[first:], k, layout, config)


@interpreted
def test_shortlists_take_what_they_can_and_say_what_they_leave(monkeypatch):
    from moc.kernels import triton_routing, triton_shortlist

    layout = moc.ShotLayout.build([moc.Shot(0, (150, 1, 1)), moc.Shot(0, (100, 1, 1))], 0, chunk_tokens=1)
    q, k, _ = attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=2)
    q[:, 1], k[:, 1] = eighths(q[:, 1]), 1.0
    found, shortlist = [], triton_shortlist.shortlist_routes
    monkeypatch.setattr(
        triton_routing, "shortlist_routes", lambda *a, **s: found.append(shortlist(*a, **s)) or found[0]
    )
    monkeypatch.setattr(triton_shortlist, "MAX_ENTRIES", 1)
    config = moc.MoCConfig(top_k=20)
    routes = triton_routing.route(q, k, layout, config)
    assert_same_choice(routes[:1], q[:, :1], k[:, :1], layout, config)
    assert same_chunks(routes[1:], routing.route(q[:, 1:], k[:, 1:], layout, config))
    left = found[0] > triton_shortlist.list_capacity(20)
    assert not left[:, :128].any()  # queries of the first shot have no candidates
    assert left[:, 128:192].all()  # this block lies across the cut
    assert not left[0, 192:].any()
    assert left[1, 192:].all()  # this head's scores are all equal


@interpreted
@pytest.mark.parametrize("top_k", [3, 12, 20])
def test_triton_ties_go_to_the_lowest_chunk(top_k):
    """They are ranked as one walks and, at 20, by shortlists, which take a block of 64 queries of one shot."""
    from moc.kernels import triton_routing

    layout = moc.ShotLayout.build([moc.Shot(0, (64, 1, 1)), moc.Shot(1, (40, 1, 1))], 0, chunk_tokens=1)
    q, k, _ = (x.sign() for x in attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=1))
    config = moc.MoCConfig(top_k=top_k, causal=False)
    assert same_chunks(triton_routing.route(q, k, layout, config), routing.route(q, k, layout, config))


@interpreted
@pytest.mark.parametrize("drops", [None, DROPS])
@pytest.mark.parametrize(
    ("subchunks", "causal", "own", "dtype", "head_dim"),
    [
        (2, True, "shot", torch.float32, 16),
        (3, False, "chunk", torch.float32, 24),
        (4, False, "shot", torch.float16, 64),
        (3, True, "none", torch.float16, 16),
    ],
)
def test_triton_routes_by_subchunks(subchunks, causal, own, dtype, head_dim, drops):
    """Chunks have 2 or 4 tokens, some fewer than subchunks; queries are all, or the last ones of the stream."""
    from moc.kernels import triton_backend

    layout = two_samples(4)
    config = moc.MoCConfig(top_k=2, causal=causal, own_anchor=own, descriptor_subchunks=subchunks)
    q, k, _ = attention_tensors(layout, dtype=dtype, head_dim=head_dim)
    q = 2 * q  # then some choices change with the scale of scores
    assert attention._router(q, config, moc.Execution(backend="triton")) is triton_backend
    for first in (0, layout.groups[2].start):
        routes = moc.route(q[first:], k, layout, config, drops, backend="triton")
        assert_same_choice(routes, q[first:], k, layout, config, drops)


@interpreted
@settings(max_examples=15)
@given(streams(), configs(), seeds, st.integers(2, 5))
def test_triton_routes_by_subchunks_on_random_streams(stream, config, seed, subchunks):
    from moc.kernels import triton_routing

    layout, config = stream.layout(), replace(config, descriptor_subchunks=subchunks)
    q, k, _ = attention_tensors(layout, seed, dtype=torch.float32, head_dim=16)
    assert_same_choice(triton_routing.route(q, k, layout, config), q, k, layout, config)


@interpreted
@pytest.mark.parametrize("top_k", [3, 20])
@pytest.mark.parametrize("subchunks", [2, 4])
def test_triton_ties_of_subchunks_go_to_the_lowest_chunk(subchunks, top_k):
    """No shortlist takes 20 of them."""
    from moc.kernels import triton_routing

    layout = moc.ShotLayout.build([moc.Shot(4, (30, 1, 4)), moc.Shot(0, (12, 1, 4))], 4, chunk_tokens=4)
    q, k = with_ties(layout, subchunks, dtype=torch.float32)
    config = moc.MoCConfig(top_k=top_k, causal=False, own_anchor="chunk", descriptor_subchunks=subchunks)
    assert same_chunks(triton_routing.route(q, k, layout, config), routing.route(q, k, layout, config))


@interpreted
def test_triton_operator_passes_opcheck_compile_and_recomputation():
    from torch.utils.checkpoint import checkpoint

    from moc.kernels import triton_backend

    layout = moc.ShotLayout.build([moc.Shot(1, (2, 2, 2)), moc.Shot(1, (1, 2, 2))], 1, chunk_tokens=4)
    config = moc.MoCConfig(top_k=1)
    q, k, v = attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=1, requires_grad=True)
    routes = triton_backend.route(q, k, layout, config)
    tables, numbers = triton_backend._flat(anchors.anchor_plan(layout, config, layout.num_tokens))
    settings = (tables, numbers, layout.chunk_tokens, layout.max_chunk_tokens, "auto", False)
    for table in (routes, routes.new_empty(0, 0, 0)):  # the empty table is for dense attention and top_k=0
        arguments = (q, k, v, table, layout.chunk_cu_seqlens, *settings)
        torch.library.opcheck(torch.ops.moc.attend, arguments, test_utils=("test_schema", "test_faketensor"))

    def attend(q, k, v, kept=None):
        return moc.moc_attention(q, k, v, layout, config, backend="triton", drops=DROPS, kept=kept)

    direction = torch.randn_like(q)
    expected = torch.autograd.grad(attend(q, k, v), (q, k, v), direction)
    attend_kept = partial(attend, kept=Kept())
    for call in (torch.compile(attend, fullgraph=True, backend="aot_eager"),
                 lambda *x: checkpoint(attend, *x, use_reentrant=False),
                 lambda *x: checkpoint(attend_kept, *x, use_reentrant=False)):  # fmt: skip
        for mine, other in zip(torch.autograd.grad(call(q, k, v), (q, k, v), direction), expected, strict=True):
            assert torch.equal(mine, other)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        torch.autograd.grad(attend(q, k, v).sum(), q, create_graph=True)


@interpreted
def test_the_operators_of_routing_pass_opcheck():
    from moc.kernels import triton_drops, triton_routing  # noqa: F401  (define them)

    layout = moc.ShotLayout.build([moc.Shot(1, (2, 2, 2)), moc.Shot(1, (1, 2, 2))], 1, chunk_tokens=4)
    q, k, _ = attention_tensors(layout, dtype=torch.float32, head_dim=16, num_heads=1)
    tables = (layout.token_chunk, candidate_runs(layout, moc.MoCConfig()), layout.chunk_is_text)
    starts, log_shares = routing.subchunk_tables(layout, 2)
    torch.library.opcheck(torch.ops.moc.route, (q, k, starts, *tables, 2, log_shares))
    arguments = (q, k, layout.chunk_cu_seqlens, *tables, 2)
    torch.library.opcheck(torch.ops.moc.route, arguments)
    routes = torch.ops.moc.route(*arguments)
    base = torch.tensor([routing.drop_base(moc.DropKey(1, 2, 3))])
    samples = (layout.token_sample, layout.sample_cu_seqlens, layout.sample_position)
    torch.library.opcheck(torch.ops.moc.drop_routes, (routes, *tables, *samples, base, 1.0, 0.5, 2, 4))
