"""These tests are about order, drops, packing and the loader: nothing lost or doubled, the same for any ranks and
workers, exact resume."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moc
from data.cache.store import FileStore
from data.cache.writer import NULL_GLOBAL, NULL_SHOT
from data.errors import DataError
from data.loading.dataset import DataConfig, Kind, ShotDataset, SourceConfig, open_dataset
from data.loading.endless import open_loader
from data.loading.loader import build_loader
from data.loading.order import Draw, SampleOrder, Source
from data.loading.packing import Step, deal, plan_steps
from data.loading.parcel import unwrap, wrap
from moc.errors import UserError
from tests.caches import scene, write_cache

SPEC = moc.StreamSpec()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    scenes = [scene(n, shots=1 + n % 3, frames=2 + n % 4, variants=1 + n % 2) for n in range(12)]
    return str(write_cache(tmp_path_factory.mktemp("cache"), scenes))


def config(cache, **changes):
    return DataConfig(**{"path": cache, "batch_tokens": 500, "workers": 0, "drop_captions": 0.0} | changes)


def loader(settings, rank=0, world_size=1, accumulation=1, start_position=0):
    return build_loader(
        settings, SPEC, 64, rank=rank, world_size=world_size, accumulation=accumulation, start_position=start_position
    )


def steps(made, count):
    """Returns positions of each step of one rank, by micro-batch."""
    return [[batch.layout.positions for batch in step] for step in islice(made, count)]


def merged(*ranks):
    """Returns the set of positions of each step over all ranks."""
    return [sorted(p for step in by_rank for batch in step for p in batch) for by_rank in zip(*ranks, strict=True)]


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 5)), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_epoch_holds_each_item_once(sizes, seed):
    sources, first = [], 0
    for size, weight in sizes:
        sources.append(Source(tuple(range(first, first + size)), weight))
        first += size
    order = SampleOrder(sources, seed)
    seen = Counter(order[p] for p in range(400))
    assert max(seen.values()) == 1  # (item, epoch) never twice
    for source in sources:
        epochs = Counter(epoch for item, epoch in seen if item in source.items)
        assert all(count == len(source.items) for epoch, count in epochs.items() if epoch < max(epochs))


def test_mixing_weights_are_met_exactly():
    order = SampleOrder([Source((0, 1), 3.0), Source((2,), 1.0)], seed=5)
    for block in range(3):
        items = [order[p][0] for p in range(1000 * block, 1000 * (block + 1))]
        assert sum(item == 2 for item in items) == 250
    assert len({order[p] for p in range(3000)}) == 3000  # (item, epoch) never twice
    early, later = ([order[p][0] for p in range(first, first + 100)] for first in (0, 1000))
    assert [item == 2 for item in early] != [item == 2 for item in later]  # each block is mixed anew
    assert 5 < sum(item == 2 for item in early) < 45  # the sources are mixed, not one after the other


FIXED_ORDER = [8, 4, 1, 6, 3, 2, 7, 5, 9, 0, 2, 7]


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 2), [333, 667]), ((2, 1), [667, 333]), ((1, 1, 2000), [1, 1, 998])]
)
def test_mixing_weights_are_met_to_the_nearest_whole_number_and_none_is_left_out(weights, counts):
    order = SampleOrder([Source((number,), weight) for number, weight in enumerate(weights)], seed=0)
    for first in (0, 1000):
        found = Counter(order[position][0] for position in range(first, first + 1000))
        assert [found[number] for number in range(len(weights))] == counts


@pytest.mark.parametrize("num_sources", [100, 700, 1001, 1500])
def test_none_of_many_sources_is_left_out_or_drawn_far_more_often_than_its_equals(num_sources):
    order = SampleOrder([Source((number,)) for number in range(num_sources)], seed=0)
    found = Counter(order[position][0] for position in range(num_sources * 30))
    assert found.keys() == set(range(num_sources))
    assert max(found.values()) < 1.5 * min(found.values())


def test_the_order_of_a_hundred_sources_is_that_of_a_thousand_positions():
    """Runs that go on from before blocks grew with the sources keep their order."""
    order = SampleOrder([Source((number,)) for number in range(100)], seed=0)
    assert set(Counter(order[position][0] for position in range(1000)).values()) == {10}


def test_the_order_is_fixed_for_ever():
    """The order belongs to a run's meaning: a change of numpy or of this code must not move it."""
    order = SampleOrder([Source(tuple(range(10)))], seed=7)
    assert [order[p][0] for p in range(12)] == FIXED_ORDER
    assert order[3] == (FIXED_ORDER[3], 0)
    assert order[11] == (FIXED_ORDER[11], 1)


def test_order_differs_by_seed_and_epoch():
    source = [Source(tuple(range(50)))]
    one, two = SampleOrder(source, 1), SampleOrder(source, 2)
    first = [one[p][0] for p in range(50)]
    assert first != [two[p][0] for p in range(50)]
    assert first != [one[p][0] for p in range(50, 100)]


def test_sources_of_one_size_are_shuffled_apart():
    mixed = SampleOrder([Source(tuple(range(20))), Source(tuple(range(20, 40)))], seed=1)
    items = [mixed[p][0] for p in range(100)]
    one, other = ([item % 20 for item in items if item // 20 == source][:20] for source in range(2))
    assert sorted(one) == sorted(other) == list(range(20))
    assert one != other


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_dealing_loses_nothing_and_balances(tokens, bins):
    if bins > len(tokens):
        return
    draws = tuple(Draw(position, 0) for position in range(len(tokens)))
    dealt = deal(Step(0, len(tokens), draws, tuple(tokens)), bins)
    assert sorted(d.position for batch in dealt for d in batch) == list(range(len(tokens)))
    loads = [sum(tokens[d.position] for d in batch) for batch in dealt]
    assert min(len(batch) for batch in dealt) >= 1
    assert max(loads) - min(loads) <= max(tokens)


def test_steps_fill_the_budget_in_order():
    sizes = [30, 30, 50, 10, 90, 5, 5]
    planned = plan_steps(lambda p: Draw(p, p % 7), lambda draw: sizes[draw.item], 100, start=0)
    assert [(s.start, s.end) for s in islice(planned, 4)] == [(0, 2), (2, 4), (4, 7), (7, 9)]


def test_steps_do_not_depend_on_ranks(cache):
    alone = steps(loader(config(cache)), 12)
    pair = [steps(loader(config(cache), rank, 2, accumulation=2), 12) for rank in range(2)]
    assert merged(alone) == merged(*pair)
    assert all(len(step) == 2 and all(step) for rank in pair for step in rank)
    run = [p for step in merged(alone) for p in step]
    assert run == list(range(len(run)))


def test_ranks_of_a_sequence_parallel_group_read_the_same(cache):
    """Groups of two processes pass the group's rank: a group has the same batches, and each sample is in one group."""
    settings = config(cache, drop_captions=0.3, drop_shot_caption=0.3, drop_to_still=0.3)
    processes = [[list(islice(loader(settings, rank, 2), 4)) for _ in range(2)] for rank in range(2)]
    for one, other in processes:
        for a, b in ((a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)):
            assert a.layout.positions == b.layout.positions
            assert a.layout.chunks == b.layout.chunks
            for x, y in zip((*a.latents, *a.text), (*b.latents, *b.text), strict=True):
                assert torch.equal(x, y)
    run = [p for step in merged(*(steps(iter(process[0]), 4) for process in processes)) for p in step]
    assert run == list(range(len(run)))


def test_steps_do_not_depend_on_workers(cache):
    assert steps(loader(config(cache, workers=2)), 8) == steps(loader(config(cache)), 8)


def test_resume_on_another_number_of_ranks(cache):
    settings = config(cache, drop_captions=0.3, drop_to_still=0.3)
    whole = merged(steps(loader(settings), 9))
    pair = [loader(settings, rank, 2) for rank in range(2)]
    first = merged(*(steps(made, 4) for made in pair))
    states = {made.state()["position"] for made in pair}
    assert len(states) == 1
    rest = loader(settings, start_position=states.pop())
    assert first + merged(steps(rest, 5)) == whole


def test_state_counts_what_was_given_out_not_what_was_read_ahead(cache):
    made = loader(config(cache, workers=2, prefetch=8))
    assert made.state() == {"position": 0, "epoch": 0}
    iterator = iter(made)
    last = max(p for batch in next(iterator) for p in batch.layout.positions)
    assert made.state()["position"] == last + 1
    for _ in range(6):
        next(iterator)
    assert made.state()["epoch"] == made.state()["position"] // 12


def test_batches_hold_the_right_scenes(cache):
    for step in islice(loader(config(cache)), 6):
        for batch in step:
            assert batch.layout.num_tokens <= 500
            assert len(batch.latents) == batch.layout.num_shots
            numbers = [int(latent.flatten()[0]) for latent in batch.latents]
            wanted = [int(name.removeprefix("scene")) for name in batch.ids]
            assert [n for n in wanted for _ in range(1 + n % 3)] == numbers
            assert all(x.dtype == torch.float32 for x in (*batch.to("cpu").latents, *batch.to("cpu").text))


def test_a_shot_that_goes_on_without_a_cut_says_so(tmp_path):
    cuts = [True, False, True]
    dataset = open_dataset(config(str(write_cache(tmp_path, [replace(scene(1, shots=3), cuts=cuts)]))))
    batch = moc.make_batch([dataset[0]], SPEC, 64)
    assert [shot.cut for shot in batch.layout.samples[0][1]] == cuts


def test_token_counts_match_the_batches(cache):
    dataset = open_dataset(config(cache))
    settings = config(cache, drop_captions=0.2, drop_global_caption=0.3, drop_shot_caption=0.3, drop_to_still=0.3)
    for spec in (SPEC, moc.StreamSpec(patch=(1, 1, 2), text_in_stream=False)):
        for position in range(40):
            draw = dataset.draw(position, position % 12, settings)
            batch = moc.make_batch([dataset.sample(draw)], spec, 64)
            assert batch.layout.num_tokens == dataset.num_tokens(draw, spec)
            assert batch.layout.num_tokens <= dataset.max_tokens(draw.item, spec)


def test_a_null_caption_longer_than_any_other_counts_among_the_most_tokens(cache):
    dataset = open_dataset(config(cache))
    for key in (NULL_GLOBAL, NULL_SHOT):
        dataset.caches[0].text[key]["shape"][0] = 50
    dropped = Draw(0, 2, drop_global_caption=True, drop_shot_captions=(True, True, True))
    assert dataset.max_tokens(2, SPEC) == dataset.num_tokens(dropped, SPEC) > dataset.num_tokens(Draw(0, 2), SPEC)


def test_drops_come_at_their_rates(cache):
    dataset = open_dataset(config(cache))
    settings = config(cache, drop_captions=0.2, drop_global_caption=0.5, drop_shot_caption=0.25, drop_to_still=0.1)
    draws = [dataset.draw(position, 2, settings) for position in range(4000)]
    keys = [dataset.text_keys(draw) for draw in draws]
    shots = [key for sample in keys for key in sample[1:]]
    assert sum(k[0] == NULL_GLOBAL for k in keys) / 4000 == pytest.approx(0.2 + 0.8 * 0.5, abs=0.03)
    assert sum(k == NULL_SHOT for k in shots) / len(shots) == pytest.approx(0.2 + 0.8 * 0.25, abs=0.03)
    every = sum(all(k in (NULL_GLOBAL, NULL_SHOT) for k in sample) for sample in keys) / 4000
    assert every == pytest.approx(0.2 + 0.8 * 0.5 * 0.25**3, abs=0.03)
    stills = [still for draw in draws for still in draw.to_still]
    assert sum(stills) / len(stills) == pytest.approx(0.1, abs=0.02)
    variants = Counter(dataset.text_keys(dataset.draw(p, 1, config(cache)))[0] for p in range(400))
    assert len(variants) == 2
    assert min(variants.values()) > 150


def test_shots_lose_captions_and_frames_independently(cache):
    """One number that drew both would leave every still without its caption."""
    dataset = open_dataset(config(cache))
    settings = config(cache, drop_shot_caption=0.5, drop_to_still=0.5)
    draws = [dataset.draw(position, 2, settings) for position in range(200)]
    pairs = Counter(pair for draw in draws for pair in zip(draw.drop_shot_captions, draw.to_still, strict=True))
    assert min(pairs[one, other] for one in (False, True) for other in (False, True)) > 90  # of 600, 150 expected


def test_stills_and_dropped_captions_in_the_sample(cache):
    dataset = open_dataset(config(cache))
    draw = Draw(0, 2, drop_global_caption=True, drop_shot_captions=(False, True, False), to_still=(True, False, False))
    sample = dataset.sample(draw)
    whole = dataset[2]
    assert sample.latents[0].shape[1] == 1
    assert torch.equal(sample.latents[0], whole.latents[0][:, :1])
    assert torch.equal(sample.latents[1], whole.latents[1])
    assert [len(text) for text in sample.text] == [1, 2, 1, 2]
    assert sample.text[0].abs().max() == 0


def test_validation_is_held_out_and_fixed(cache):
    made = loader(config(cache, validation=3))
    held = [batch.ids[0] for batch in made.held_out()]
    assert len(held) == len(set(held)) == 3
    trained = {name for step in islice(made, 20) for batch in step for name in batch.ids}
    assert trained.isdisjoint(held)
    assert len(trained) == 9
    held_out = [[b.ids[0] for b in loader(config(cache, validation=3), rank, 2).held_out()] for rank in range(2)]
    assert sorted(held_out[0] + held_out[1]) == sorted(held)
    with pytest.raises(DataError, match="none to train"):
        loader(config(cache, validation=12))
    assert len(open_dataset(config(cache)).split(12).held_out) == 12  # evaluation may hold out all


def test_a_scene_of_several_sources_is_held_out_of_all_and_evaluated_as_the_first_has_it(cache):
    dataset = open_dataset(config(None, sources=[SourceConfig(cache), SourceConfig(cache, 2.0)]))
    split = dataset.split(3)
    assert all(item < 12 for item in split.held_out)
    assert [dataset.items[item][1].id for item in split.held_out] == [
        dataset.items[item][1].id for item in open_dataset(config(cache)).split(3).held_out
    ]
    assert {item % 12 for item in split.training_items}.isdisjoint(split.held_out)


def test_named_scenes_are_never_trained_on(cache):
    settings = config(cache, held_out=["scene1*", "scene3"])
    named = {"scene1", "scene10", "scene11", "scene3"}
    dataset = open_dataset(settings)
    assert {dataset.items[i][1].id for i in dataset.split(0).training_items} == {f"scene{i}" for i in range(12)} - named
    made = loader(config(cache, held_out=settings.held_out, validation=2))
    assert {batch.ids[0] for batch in made.held_out()} < named
    assert named.isdisjoint(name for step in islice(made, 20) for batch in step for name in batch.ids)
    for changes, said in (
        ({"held_out": ["scen"]}, "'scen' names no scene"),
        ({"held_out": ["scene3"], "validation": 2}, "2 is more than the 1 scene that"),
        ({"held_out": ["*"]}, r"data\.held_out=\['\*'\]: what is held out of 12 scenes leaves none to train"),
    ):
        with pytest.raises(DataError, match=said):
            loader(config(cache, **changes))


def test_sources_select_and_mix(cache, tmp_path):
    stills = str(write_cache(tmp_path / "stills", [scene(90 + n, 1, 1, kind="image") for n in range(3)]))
    mix = [SourceConfig(stills, 0.25, Kind.image), SourceConfig(cache, 0.75, Kind.multi)]
    made = loader(config(None, sources=mix))
    ids = [name for step in islice(made, 60) for batch in step for name in batch.ids]
    numbers = [int(name.removeprefix("scene")) for name in ids]
    assert sum(n >= 90 for n in numbers) / len(numbers) == pytest.approx(0.25, abs=0.08)
    assert all(n >= 90 or n % 3 > 0 for n in numbers)


def test_what_cannot_be_loaded_is_said(cache, tmp_path):
    with pytest.raises(DataError, match="no scene of kind image"):
        open_dataset(config(None, sources=[SourceConfig(cache, 1.0, Kind.image)]))
    with pytest.raises(DataError, match=r"set data\.path"):
        open_dataset(config(None))
    other = str(write_cache(tmp_path, [scene(1)], recipe={"codec": "another", "text": "t"}))
    with pytest.raises(DataError, match="prepare both with one"):
        ShotDataset([SourceConfig(cache), SourceConfig(other)])
    with pytest.raises(DataError, match="over the budget of 20"):
        loader(config(cache, batch_tokens=20))
    with pytest.raises(DataError, match="raise the budget to"):
        loader(config(cache), world_size=8)
    with pytest.raises(UserError, match="drop_captions is a probability"):
        config(cache, drop_captions=1.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_met_while_training_is_one_message(tmp_path, workers):
    folder = write_cache(tmp_path, [scene(n) for n in range(4)], shard_bytes=1 << 20)
    made = loader(config(str(folder), workers=workers))
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    shard.write_bytes(data)
    with pytest.raises(DataError, match="fails its checksum"):
        steps(made, 8)


def test_parcels_arrive_as_they_were_sent(cache):
    content = {
        "a": [torch.arange(5), torch.rand(3, 2).T.half()],
        "b": ("text", torch.tensor(True)),
        "c": torch.empty(0, 4),
    }
    arrived = unwrap(wrap(content))
    assert torch.equal(arrived["a"][0], content["a"][0])
    assert torch.equal(arrived["a"][1], content["a"][1])
    assert arrived["b"][0] == "text"
    assert arrived["b"][1].item() is True
    assert arrived["c"].shape == (0, 4)
    batch = moc.make_batch([open_dataset(config(cache))[3]], SPEC, 64)
    again = unwrap(wrap(batch))
    assert again.ids == batch.ids
    assert again.layout.chunks == batch.layout.chunks
    assert torch.equal(again.layout.token_chunk, batch.layout.token_chunk)
    assert all(torch.equal(a, b) for a, b in zip(again.latents, batch.latents, strict=True))


@pytest.mark.gpu
def test_batches_are_pinned_for_the_gpu(cache):
    step = next(iter(loader(config(cache, workers=2))))
    assert all(x.is_pinned() for x in (*step[0].latents, *step[0].text))


def test_a_parcel_is_two_things_to_look_into_however_many_tensors_it_holds():
    few, many = (wrap([torch.randn(2, 3) for _ in range(count)]) for count in (1, 500))
    assert [type(batch) for batch in few] == [type(batch) for batch in many] == [bytes, torch.Tensor]


def test_a_run_reads_its_index_once(cache, monkeypatch):
    """The index of a large cache takes minutes and gigabytes."""
    dataset, wanted = open_dataset(config(cache)), steps(loader(config(cache)), 2)
    for name in ("read_bytes", "size"):
        monkeypatch.setattr(FileStore, name, pytest.fail)
    made = open_loader(dataset, config(cache), SPEC, 64)
    assert steps(made, 2) == wanted
    assert dataset.caches[0]._open == {}  # the loader reads with files of its own
