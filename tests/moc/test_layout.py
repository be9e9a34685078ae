"""These tests are about the stream: tokens in order, chunks that never cross a shot or a modality, and layouts that
rechunk and pack."""

import gc
import math
import pickle
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moc
from moc.context import candidate_runs
from moc.errors import UserError
from tests import brute_force
from tests.strategies import Stream, shots, streams

INT_TABLES = [
    *(
        "sample_position",
        "sample_cu_seqlens",
        "group_cu_seqlens",
        "chunk_cu_seqlens",
        "chunk_group",
        "chunk_sample",
        "group_sample",
    ),
    *("group_shot", "group_first_chunk", "sample_first_chunk", "token_chunk", "token_group", "token_sample"),
    *("token_shot_chunk", "token_video_chunk"),
]
TABLES = {
    **dict.fromkeys(INT_TABLES, torch.int32),
    **dict.fromkeys(["chunk_is_text", "token_is_text"], torch.bool),
    **dict.fromkeys(["text_index", "video_index"], torch.int64),
}

wide = streams(max_samples=3, max_shots=4, max_size=(5, 4, 3), max_text=4, max_chunk_tokens=40)


def assert_same(a: moc.ShotLayout, b: moc.ShotLayout):
    for name in TABLES:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.segments, a.groups, a.chunks) == (b.segments, b.groups, b.chunks)
    assert (a.sample_ranges, a.num_tokens, a.chunk_tokens) == (b.sample_ranges, b.num_tokens, b.chunk_tokens)


@given(wide)
def test_tokens_lie_where_the_definition_puts_them(stream):
    layout, tokens = stream.layout(), brute_force.tokens_of(stream)
    assert layout.num_tokens == len(tokens)
    assert layout.token_sample.tolist() == [token.sample for token in tokens]
    assert layout.group_shot[layout.token_group].tolist() == [token.shot for token in tokens]
    assert layout.token_is_text.tolist() == [token.is_text for token in tokens]
    assert layout.token_chunk.tolist() == [token.chunk for token in tokens]
    assert layout.token_shot_chunk.tolist() == [-1 if token.shot < 0 else token.chunk for token in tokens]
    assert layout.token_video_chunk.tolist() == [-1 if token.is_text else token.chunk for token in tokens]
    assert layout.text_index.tolist() == [i for i, token in enumerate(tokens) if token.is_text]
    assert layout.video_index.tolist() == [i for i, token in enumerate(tokens) if not token.is_text]


@given(wide)
def test_python_side_and_tensors_agree(stream):
    layout = stream.layout()
    for name, dtype in TABLES.items():
        assert getattr(layout, name).dtype == dtype, name
    assert layout.num_samples == len(stream.samples)
    assert layout.num_shots == sum(len(shots) for _, shots in stream.samples)
    assert layout.num_groups == layout.num_samples + layout.num_shots == len(layout.groups)
    assert layout.num_chunks == len(layout.chunks) == len(layout.chunk_cu_seqlens) - 1

    assert layout.max_chunk_tokens == max(chunk.length for chunk in layout.chunks)

    starts = layout.chunk_cu_seqlens.tolist()
    assert starts == [chunk.start for chunk in layout.chunks] + [layout.num_tokens]
    assert starts[1:] == [chunk.start + chunk.length for chunk in layout.chunks]
    assert layout.chunk_group.tolist() == [chunk.group for chunk in layout.chunks]
    assert layout.chunk_sample.tolist() == [chunk.sample for chunk in layout.chunks]
    assert layout.chunk_is_text.tolist() == [chunk.kind == "text" for chunk in layout.chunks]

    assert layout.group_cu_seqlens.tolist() == [group.start for group in layout.groups] + [layout.num_tokens]
    assert layout.group_sample.tolist() == [group.sample for group in layout.groups]
    assert layout.group_shot.tolist() == [group.shot for group in layout.groups]
    for index, group in enumerate(layout.groups):
        inside = [i for i, chunk in enumerate(layout.chunks) if chunk.group == index]
        assert list(range(group.first_chunk, group.first_chunk + group.num_chunks)) == inside
        assert layout.group_first_chunk[index : index + 2].tolist() == [
            group.first_chunk,
            group.first_chunk + group.num_chunks,
        ]
    ends = layout.sample_cu_seqlens.tolist()
    assert list(layout.sample_ranges) == list(pairwise(ends))
    assert [layout.chunk_sample.tolist().count(b) for b in range(layout.num_samples)] == (
        layout.sample_first_chunk.diff().tolist()
    )


@given(wide)
def test_groups_and_segments_tell_the_shots(stream):
    layout = stream.layout()
    expected = []
    for sample, (text, sample_shots) in enumerate(stream.samples):
        expected.append((sample, -1, text, 0, None))
        expected += [(sample, i, s.text_tokens, math.prod(s.grid), s.grid) for i, s in enumerate(sample_shots)]
    assert [(g.sample, g.shot, g.text_tokens, g.video_tokens, g.grid) for g in layout.groups] == expected

    start = 0
    for segment in layout.segments:
        group = layout.groups[segment.group]
        assert (segment.sample, segment.shot, segment.start) == (group.sample, group.shot, start)
        assert segment.length == (group.text_tokens if segment.kind == "text" else group.video_tokens) > 0
        assert segment.grid == (group.grid if segment.kind == "video" else None)
        start += segment.length
    assert start == layout.num_tokens


@given(shots(max_size=(9, 6, 5), max_text=3), st.integers(1, 80))
def test_chunk_rules(shot, chunk_tokens):
    layout = moc.ShotLayout.build([shot], chunk_tokens=chunk_tokens)
    frames, height, width = shot.grid
    text = [chunk.length for chunk in layout.chunks if chunk.kind == "text"]
    video = [chunk.length for chunk in layout.chunks if chunk.kind == "video"]
    assert text == [shot.text_tokens] * (shot.text_tokens > 0)
    assert sum(video) == math.prod(shot.grid)
    if height * width <= chunk_tokens:
        assert_even(video, frames, unit=height * width, most=chunk_tokens // (height * width))
        return
    per_frame = len(video) // frames
    for frame in range(frames):
        assert_even(video[frame * per_frame : (frame + 1) * per_frame], height, width, max(1, chunk_tokens // width))


def assert_even(lengths: list[int], total: int, unit: int, most: int):
    """Checks that these are `total` units in as few numbers of at most `most` as can be, differing by at most one unit,
    longer first."""
    sizes = [length / unit for length in lengths]
    assert sum(sizes) == total
    assert len(sizes) == math.ceil(total / most)
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("grid", "chunk_tokens", "expected"),
    [
        ((36, 20, 32), 1280, [1280] * 18),
        ((36, 20, 32), 640, [640] * 36),
        ((36, 20, 32), 320, [320] * 72),
        ((36, 20, 32), 160, [160] * 144),
        ((7, 2, 5), 30, [30, 20, 20]),  # three frames at most: 3 + 2 + 2, not 3 + 3 + 1
        ((10, 1, 1), 4, [4, 3, 3]),
        ((2, 5, 3), 6, [6, 6, 3, 6, 6, 3]),  # a frame is too large, so each is split into rows 2 + 2 + 1
        ((1, 3, 100), 10, [100, 100, 100]),  # a chunk has at least one row
        ((5, 2, 2), 4, [4] * 5),  # exactly one frame
        ((1, 4, 4), 1000, [16]),  # one-frame shot
    ],
)
def test_chunks_worked_out_by_hand(grid, chunk_tokens, expected):
    layout = moc.ShotLayout.build([moc.Shot(0, grid)], chunk_tokens=chunk_tokens)
    assert layout.chunk_cu_seqlens.diff().tolist() == expected


def test_a_shot_takes_any_sequence_and_begins_with_a_true_cut_unless_told():
    assert moc.Shot(0, [1, 1, 1]) == moc.Shot(0, (1, 1, 1), cut=True)
    continued = moc.ShotLayout.build([moc.Shot(0, (1, 1, 1)), moc.Shot(0, (1, 1, 1), cut=False)])
    assert [shot.cut for shot in continued.rechunk(3).samples[0][1]] == [True, False]


def test_empty_texts_have_no_chunk_and_no_segment():
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 1, 2)), moc.Shot(3, (1, 1, 2))], chunk_tokens=8)
    assert [(chunk.kind, chunk.length) for chunk in layout.chunks] == [("video", 2), ("text", 3), ("video", 2)]
    assert [(s.kind, s.shot) for s in layout.segments] == [("video", 0), ("text", 1), ("video", 1)]
    assert layout.num_groups == 3  # the global text is a group, though it has no tokens


@given(wide, st.integers(1, 40))
def test_rechunk_is_the_same_stream_with_other_chunks(stream, chunk_tokens):
    layout = stream.layout()
    before = [tensor.clone() for tensor in (layout.chunk_cu_seqlens, layout.token_chunk)]
    other = layout.rechunk(chunk_tokens)
    assert_same(other, Stream(stream.samples, chunk_tokens).layout())
    assert_same(other.rechunk(stream.chunk_tokens), layout)
    for name in ("token_sample", "token_group", "token_is_text", "group_cu_seqlens", "sample_cu_seqlens"):
        assert torch.equal(getattr(other, name), getattr(layout, name)), name
    assert other.segments == layout.segments
    assert torch.equal(before[0], layout.chunk_cu_seqlens)
    assert torch.equal(before[1], layout.token_chunk)


@given(wide)
def test_pack_sets_samples_one_after_another(stream):
    layouts, packed = stream.layouts(), stream.layout()
    assert packed.num_tokens == sum(layout.num_tokens for layout in layouts)
    token, chunk, group = 0, 0, 0
    for sample, layout in enumerate(layouts):
        assert packed.sample_ranges[sample] == (token, token + layout.num_tokens)
        inside = slice(token, token + layout.num_tokens)
        assert torch.equal(packed.token_chunk[inside] - chunk, layout.token_chunk)
        assert torch.equal(packed.token_group[inside] - group, layout.token_group)
        assert torch.equal(packed.token_is_text[inside], layout.token_is_text)
        assert set(packed.token_sample[inside].tolist()) == {sample}
        token, chunk, group = token + layout.num_tokens, chunk + layout.num_chunks, group + layout.num_groups


@given(streams(max_samples=3))
def test_pack_is_associative(stream):
    layouts = stream.layouts()
    assert_same(moc.ShotLayout.pack(layouts[:1]), layouts[0])
    nested = moc.ShotLayout.pack([moc.ShotLayout.pack(layouts[:2]), *layouts[2:]])
    assert_same(nested, moc.ShotLayout.pack(layouts))


def test_to_moves_every_table_and_leaves_the_original():
    layout = moc.ShotLayout.build([moc.Shot(2, (3, 2, 2)), moc.Shot(0, (1, 2, 2))], 3, chunk_tokens=8)
    moved = layout.to("meta")
    for name, dtype in TABLES.items():
        tensor = getattr(moved, name)
        assert (tensor.device.type, tensor.dtype, tensor.shape) == ("meta", dtype, getattr(layout, name).shape)
        assert tensor.storage_offset() * tensor.itemsize % 16 == 0
        assert getattr(layout, name).device.type == "cpu"
    assert layout.to("cpu").device == layout.device
    assert moved.rechunk(4).device.type == "meta"
    assert moved.groups == layout.groups
    kept = weakref.ref(moved)
    del moved
    gc.collect()
    assert kept() is None  # a held-out batch on the CPU keeps no reference to its moved copy


def test_the_same_stream_at_other_positions_shares_its_tables():
    shots = [moc.Shot(2, (3, 2, 2)), moc.Shot(1, (2, 2, 2))]
    one = moc.ShotLayout.pack([moc.ShotLayout.build(shots, 3, 4, position=5), moc.ShotLayout.build(shots, 3, 4, 6)])
    made = one.memo("a table", lambda: object())
    other = one.at([8, 2])
    assert (other.positions, other.sample_position.tolist()) == ((8, 2), [8, 2])
    assert (one.positions, one.sample_position.tolist()) == ((5, 6), [5, 6])
    assert other.memo("a table", lambda: object()) is made
    assert other.token_chunk is one.token_chunk
    assert one.at([5, 6]) is one
    assert other.is_stream_of(one.samples, one.chunk_tokens)
    assert not other.is_stream_of(one.samples, 8)
    assert not other.is_stream_of(one.samples[:-1], one.chunk_tokens)
    assert (other.rechunk(8).positions, one.rechunk(8).positions) == ((8, 2), (5, 6))
    assert other.rechunk(8).chunk_cu_seqlens is one.rechunk(8).chunk_cu_seqlens  # the tables are made only once
    with pytest.raises(ValueError, match="1 positions for 2 samples"):
        one.at([1])


def test_what_a_compiled_call_makes_is_its_own():
    """Kept, it would be memory that the next replay of a CUDA graph overwrites."""
    layout = moc.ShotLayout.build([moc.Shot(2, (3, 2, 2)), moc.Shot(1, (2, 2, 2))], 3, chunk_tokens=8)
    config = moc.MoCConfig(top_k=1)
    compiled = torch.compile(lambda: candidate_runs(layout, config), backend="eager", fullgraph=True)
    within = compiled()
    expected = within.clone()
    within.zero_()
    assert torch.equal(candidate_runs(layout, config), expected)
    assert torch.equal(compiled(), expected)


def test_every_table_is_known_here_and_moved():
    layout = moc.ShotLayout.build([moc.Shot(2, (3, 2, 2))], 3, chunk_tokens=8)
    tensors = {name for name, value in vars(layout).items() if isinstance(value, torch.Tensor)}
    assert set(TABLES) == {"sample_position", *layout._TABLES} == tensors


def test_a_layout_survives_the_trip_from_a_loader_worker():
    layout = moc.ShotLayout.build([moc.Shot(2, (3, 2, 2))], 3, chunk_tokens=8)
    assert_same(pickle.loads(pickle.dumps(layout)), layout)
    sent = pickle.dumps(layout)
    layout.rechunk(4)
    assert pickle.dumps(layout) == sent  # plans are not sent
    assert_same(pickle.loads(sent).rechunk(4), layout.rechunk(4))


@pytest.mark.gpu
def test_a_layout_comes_back_whole_from_a_busy_gpu():
    layout = moc.ShotLayout.build([moc.Shot(2, (30, 20, 32))] * 8, 3)
    moved = layout.to("cuda")
    torch.cuda._sleep(1 << 30)
    assert_same(moved.to("cpu"), layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moc.Shot(-1, (1, 1, 1)), "text_tokens=-1"),
        (lambda: moc.Shot(1.5, (1, 1, 1)), r"text_tokens=1.5 must be a whole number"),
        (lambda: moc.Shot(0, (1, 480 / 16, 1)), r"grid=\(1, 30.0, 1\) must be three whole sizes"),
        (lambda: moc.ShotLayout.build([moc.Shot(0, (1, 1, 1))], 2.0), "global_text_tokens=2.0 must be a whole"),
        (lambda: moc.ShotLayout.build([moc.Shot(0, (1, 1, 1))], chunk_tokens=64.0), "chunk_tokens=64.0 must be a"),
        (lambda: moc.Shot(0, (1, 1)), r"grid=\(1, 1\).*\(T, H, W\)"),
        (lambda: moc.Shot(0, (1, 0, 1)), r"grid=\(1, 0, 1\).*at least 1"),
        (lambda: moc.ShotLayout.build([]), "at least one shot"),
        (lambda: moc.ShotLayout.build([moc.Shot(0, (1, 1, 1))], -2), "global_text_tokens=-2"),
        (lambda: moc.ShotLayout.build([moc.Shot(0, (1, 1, 1))], chunk_tokens=0), "chunk_tokens=0"),
        (lambda: moc.ShotLayout.build([moc.Shot(0, (1, 1, 1))]).rechunk(-1), "chunk_tokens=-1"),
        (lambda: moc.ShotLayout.build([moc.Shot(0, (1, 1, 1))], position=-1), "position=-1"),
        (lambda: moc.ShotLayout.build([moc.Shot(0, (1, 1, 1))], position=2**31), "position=2147483648"),
        (lambda: moc.ShotLayout.pack([]), "at least one layout"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layouts_of_different_chunk_sizes_do_not_pack():
    layouts = [moc.ShotLayout.build([moc.Shot(0, (1, 1, 1))], chunk_tokens=c) for c in (2, 3)]
    with pytest.raises(ValueError, match=r"\[2, 3\]; rechunk"):
        moc.ShotLayout.pack(layouts)
    moc.ShotLayout.pack([layouts[0].rechunk(3), layouts[1]])


# From samples to a batch


def sample(frames=(2, 1), text=(3, 2, 0), size=(4, 6), **more) -> moc.Sample:
    return moc.Sample([torch.zeros(5, t, *size) for t in frames], [torch.zeros(n, 7) for n in text], **more)


def test_make_batch_lays_latents_and_text_out():
    batch = moc.make_batch([sample(id="a"), sample((3,), (0, 1), position=9, id="b")], moc.StreamSpec((1, 2, 3)), 8)
    assert [(g.sample, g.shot, g.text_tokens, g.grid) for g in batch.layout.groups] == [
        (0, -1, 3, None),
        (0, 0, 2, (2, 2, 2)),
        (0, 1, 0, (1, 2, 2)),
        (1, -1, 0, None),
        (1, 0, 1, (3, 2, 2)),
    ]
    assert (len(batch.latents), len(batch.text), batch.layout.chunk_tokens) == (3, 5, 8)
    assert (batch.layout.positions, batch.ids) == ((0, 9), ["a", "b"])


def test_text_stays_out_of_the_stream_of_a_cross_attention_model():
    batch = moc.make_batch([sample()], moc.StreamSpec((1, 2, 2), text_in_stream=False), 8)
    assert not batch.layout.token_is_text.any()
    assert [len(text) for text in batch.text] == [3, 2, 0]


def test_a_batch_moves_and_rechunks_as_a_whole():
    batch = moc.make_batch([sample()], moc.StreamSpec(), 8)
    assert_same(batch.rechunk(5).layout, batch.layout.rechunk(5))
    moved = batch.to("meta")
    assert {x.device.type for x in [*moved.latents, *moved.text, moved.layout.token_chunk]} == {"meta"}


def test_samples_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 texts for 2 shots"):
        sample(text=(1, 1))
    with pytest.raises(UserError, match=r"\(2, 5, 6\).*not divisible.*\(1, 2, 2\)"):
        moc.make_batch([sample(size=(5, 6))], moc.StreamSpec(), 8)


def test_a_stream_that_no_index_reaches_is_refused_before_it_is_laid_out():
    with pytest.raises(UserError, match="2250000001 tokens are no stream"):
        moc.ShotLayout.build([moc.Shot(1, (1000, 1500, 1500))])
