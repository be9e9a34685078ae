"""These tests are about films whose finished shots stay as cached keys and values: equal to films without, and
cheaper."""

from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch
from torch import nn

from moc import MoCConfig, Shot, ShotLayout
from moc.diffusion import Flow, SamplingConfig, Story, noise_key, sample_shots
from moc.errors import UserError
from moc.statistics import RoutingMap
from models.checkpoints.experts import Experts
from models.kv_cache import KVCache
from models.mmdit import MMDiT
from models.part import Part
from models.wan import WanTransformer3DModel
from tests.weights import randomized

CHANNELS, TEXT_DIM = 4, 12
SHAPE, TOKENS = (CHANNELS, 2, 4, 6), 12  # tokens of a shot's video
FORWARD = MoCConfig(chunk_tokens=6, top_k=2, text_anchor="global_and_own")
FLOW = Flow(shift=2.0)
STEPS = 3
CONFIG = SamplingConfig(steps=STEPS, guidance_scale=3.0, history_sigma=0.1)


def build(name: str) -> nn.Module:
    """Returns a small model with random weights everywhere."""
    if name == "experts":
        return Experts(build("wan"), build("wan"), boundary=0.6)
    if name == "wan":
        sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 64}
        model = WanTransformer3DModel(**sizes, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_DIM)
    else:
        model = MMDiT(latent_channels=CHANNELS, text_dim=TEXT_DIM, dim=48, num_layers=2, num_heads=2, ffn_dim=64)
    return randomized(model).eval()


def story(num_shots: int = 4, given: tuple[int, ...] = (), **others) -> Story:
    lengths = ([3, *islice(cycle([2, 4, 1, 3]), num_shots)], [2, *[1] * num_shots])
    texts = [[torch.randn(n, TEXT_DIM) for n in of_side] for of_side in lengths]
    return Story([SHAPE] * num_shots, *texts, {index: torch.randn(SHAPE) for index in given}, **others)


def film(model, what: Story, config: SamplingConfig, moc: MoCConfig = FORWARD):
    """Returns latents of a film, shares of its routing map, and the video tokens of each forward."""
    counted, routing = [], RoutingMap(len(what.shapes))
    experts = [model.high, model.low] if isinstance(model, Experts) else [model]

    def count(block, args, out) -> None:
        _, video = out if isinstance(model, MMDiT) else (None, out)
        counted.append(len(video))

    hooks = [expert.blocks[0].register_forward_hook(count) for expert in experts]
    shots = dict(sample_shots(model, model.stream, moc, FLOW, what, config, routing_map=routing))
    for hook in hooks:
        hook.remove()
    return shots, routing.shares(), counted


def assert_equal(one, other) -> None:
    assert one[0].keys() == other[0].keys()
    for index, latent in one[0].items():
        torch.testing.assert_close(latent, other[0][index], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one[1], other[1])


def test_a_cache_is_of_the_first_shots_of_one_story():
    """Its tokens end where a group ends, and no other story's tokens follow."""
    one = ShotLayout.build([Shot(2, (1, 2, 3))] * 2, global_text_tokens=3, chunk_tokens=6)
    assert Part(one, start=11).num_tokens == 8
    for layout, cached in ((one, 10), (ShotLayout.pack([one, one]), 11)):
        with pytest.raises(ValueError, match=f"holds {cached} tokens, which are not the first shots"):
            Part(layout, start=cached)


@pytest.mark.parametrize("given", [(), (0,), (1, 2)])
@pytest.mark.parametrize("name", ["mmdit", "wan", "experts"])
def test_films_with_and_without_the_cache_are_equal(name, given):
    model, what = build(name), story(given=given)
    cached, plain = film(model, what, CONFIG), film(model, what, replace(CONFIG, cache=False))
    assert_equal(cached, plain)
    assert cached[1].any()
    assert sum(cached[2]) < sum(plain[2])


@pytest.mark.parametrize("name", ["mmdit", "wan"])
def test_a_step_computes_the_new_shot_alone(name):
    """Each finished shot is run once more, to be remembered; a given one on its own, before the shot after it."""
    counted = film(build(name), story(given=(0,)), replace(CONFIG, guidance_scale=1.0))[2]
    assert counted == [TOKENS] * (1 + STEPS) * 3
    plain = film(build(name), story(given=(0,)), replace(CONFIG, guidance_scale=1.0, cache=False))[2]
    assert plain == [TOKENS * shots for shots in (2, 3, 4) for _ in range(STEPS)]


@pytest.mark.parametrize("references", [0, 1])
@pytest.mark.parametrize("name", ["mmdit", "wan", "experts"])
def test_shots_beyond_the_context_leave_the_same_film(name, references):
    """A shot that leaves takes with it what later ones saw of it; references stay."""
    model, what = build(name), story(7, given=(0, 1), num_references=references)
    config = replace(CONFIG, context_shots=2, guidance_scale=2.0)
    cached, plain = film(model, what, config), film(model, what, replace(config, cache=False))
    assert_equal(cached, plain)
    assert sum(cached[2]) < sum(plain[2])
    whole = film(model, what, replace(config, context_shots=None))
    assert not torch.allclose(cached[0][6], whole[0][6], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mmdit", "wan"])
def test_a_shot_of_a_long_film_is_that_of_one_that_begins_with_its_context(name):
    model, what, references = build(name), story(8, given=(0,), num_references=1), [0]
    config = replace(CONFIG, context_shots=2)
    shots = what.given | film(model, what, config)[0]
    stream = [*references, 5, 6, 7]
    short = Story(
        [SHAPE] * len(stream),
        *([text[0], *(text[1 + index] for index in stream)] for text in (what.text, what.negative)),
        given={number: shots[index] for number, index in enumerate(stream[:-1])},
        noise_keys=[noise_key(config.seed, index) for index in stream],
    )
    torch.testing.assert_close(film(model, short, CONFIG)[0][3], shots[7])


def memory_of(model, what: Story, config: SamplingConfig, monkeypatch) -> list[int]:
    """Bytes of the caches' memory whenever a layer was asked for its own. It must stay where it is."""
    taken, bytes_taken, extended = {}, [], KVCache.extended

    def watched(cache, layer, new, remember):
        kept = extended(cache, layer, new, remember)
        found = kept[0].data_ptr(), sum(cache.capacity * x[0].nbytes for x in kept)
        assert taken.setdefault((id(cache), layer), found) == found
        bytes_taken.append(sum(size for _, size in taken.values()))
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "extended", watched)
        film(model, what, config)
    return bytes_taken


def test_memory_is_taken_once_and_does_not_grow_with_the_film(monkeypatch):
    model, config = build("wan"), replace(CONFIG, context_shots=2, steps=2)
    short, long = (memory_of(model, story(shots), config, monkeypatch) for shots in (3, 9))
    layers, sides, width = 2, 2, 48
    assert short[-1] == long[-1] == 3 * TOKENS * layers * sides * 2 * width * 4
    assert long.index(long[-1]) < 2 * layers * sides  # the memory is full within the first step
    assert memory_of(model, story(9), replace(config, context_shots=None), monkeypatch)[-1] == 3 * long[-1]


@pytest.mark.parametrize("changes", [{}, {"context_shots": 1}], ids=str)
@pytest.mark.parametrize(
    ("name", "moc"),
    [("mmdit", FORWARD), ("wan", FORWARD), ("experts", FORWARD), ("wan", replace(FORWARD, descriptor="pre_rope"))],
)
def test_a_cache_in_the_host_gives_the_same_bits(name, moc, changes):
    model, what, config = build(name), story(given=(0,)), replace(CONFIG, **changes)
    here, there = (film(model, what, replace(config, offload_cache=offload), moc) for offload in (False, True))
    assert all(torch.equal(latent, there[0][index]) for index, latent in here[0].items())
    assert here[2] == there[2]


def test_a_layer_comes_while_the_one_before_it_computes(monkeypatch):
    """Each layer of a forward after the first one is on its way before it is asked."""
    asked, coming, extended = [], [], KVCache.extended

    def watched(cache, layer, new, remember):
        asked.append((layer, layer in cache._coming))
        kept = extended(cache, layer, new, remember)
        coming.append(len(cache._coming))
        return kept

    monkeypatch.setattr(KVCache, "extended", watched)
    film(build("wan"), story(2), replace(CONFIG, guidance_scale=1.0, offload_cache=True))
    assert asked == [(0, False), (1, True)] * (1 + 2 * STEPS)
    assert coming == [1, 0] * (1 + 2 * STEPS)


def test_more_than_the_host_has_left_is_not_taken(monkeypatch):
    """Taking it would have the system kill the process."""
    tensors, needed = (torch.randn(2, 1, 4), torch.randn(2, 1, 4)), 3 * 3 * 2 * 16
    for left, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("models.kv_cache.host_free_bytes", lambda left=left: left)
        cache = KVCache(capacity=3, num_layers=3, offload=True)
        if fits:
            assert cache.extended(0, tensors, remember=True)[0].shape == (2, 1, 4)
        else:
            with pytest.raises(torch.OutOfMemoryError, match="more than the host has left"):
                cache.extended(0, tensors, remember=True)


@pytest.mark.parametrize("offload", [False, True])
def test_a_cache_refuses_more_than_it_was_made_for(offload):
    cache = KVCache(capacity=3, num_layers=1, offload=offload)
    two = (torch.randn(2, 1, 4), torch.randn(2, 1, 4))
    cache.extended(0, two, remember=True)
    cache.num_tokens = 2
    with pytest.raises(ValueError, match="for 3 tokens is given 4"):
        cache.extended(0, two, remember=False)


@pytest.mark.parametrize("is_mine", [True, False])
def test_where_one_process_finds_no_memory_all_of_them_know_at_once(is_mine, monkeypatch):
    """Those that found some let go of it."""
    told = []

    def anyone(flag: bool) -> bool:
        told.append(flag)
        return True

    taken = KVCache._memory

    def second_fails(cache, like):
        if is_mine and cache._layers:
            raise torch.OutOfMemoryError("full")
        return taken(cache, like)

    monkeypatch.setattr(KVCache, "_memory", second_fails)
    cache = KVCache(capacity=2, num_layers=2, anyone=anyone)
    with pytest.raises(torch.OutOfMemoryError, match="full" if is_mine else "another process"):
        cache.extended(0, (torch.randn(2, 1, 4), torch.randn(2, 1, 4)), remember=True)
    assert told == [is_mine]
    assert not cache._layers


def test_both_experts_remember():
    model = build("experts")
    shots = len(film(model, story(), replace(CONFIG, guidance_scale=1.0))[2])
    assert shots == 4 * STEPS + 3 * 2


def test_a_wider_history_noise_is_remembered_as_it_is_seen():
    model, what = build("mmdit"), story()
    config = replace(CONFIG, history_sigma=0.4)
    assert_equal(film(model, what, config), film(model, what, replace(config, cache=False)))


@pytest.mark.parametrize(
    ("changes", "moc"),
    [
        ({"lag": 0.5}, FORWARD),
        ({"lag": 0.5, "context_shots": 1}, FORWARD),
        ({}, replace(FORWARD, text_anchor="all")),
        ({}, replace(FORWARD, dense_layers=1)),
        ({}, MoCConfig(dense=True, chunk_tokens=6)),
    ],
)
def test_what_would_change_the_film_is_sampled_without(changes, moc):
    model, what, config = build("mmdit"), story(), replace(CONFIG, guidance_scale=1.0, **changes)
    cached, plain = film(model, what, config, moc), film(model, what, replace(config, cache=False), moc)
    assert cached[2] == plain[2]
    assert all(torch.equal(latent, plain[0][index]) for index, latent in cached[0].items())


@pytest.mark.parametrize("name", ["mmdit", "wan"])
def test_dense_first_steps_see_everything_and_later_ones_the_cache(name):
    model, what = build(name), story()
    config = replace(CONFIG, dense_steps=1, guidance_scale=1.0)
    cached, plain = film(model, what, config), film(model, what, replace(config, cache=False))
    assert_equal(cached, plain)
    assert cached[2] == [12, 12, 12, 24, 12, 12, 12, 36, 12, 12, 12, 48, 12, 12, 12]
    sparse, dense = film(model, what, replace(config, dense_steps=0)), film(model, what, replace(config, dense_steps=3))
    all_dense = film(model, what, replace(config, dense_steps=0), replace(FORWARD, dense=True))
    assert all(torch.equal(latent, all_dense[0][index]) for index, latent in dense[0].items())
    assert not torch.allclose(cached[0][3], sparse[0][3], rtol=1e-3)
    assert not torch.allclose(cached[0][3], dense[0][3], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "offload", "fits_host", "moves", "computes_again"),
    [
        ("mmdit", None, True, 1, 0),
        ("experts", None, True, 1, 0),
        ("mmdit", None, False, 1, 1),
        ("mmdit", False, True, 0, 1),
        ("mmdit", True, False, 0, 1),
    ],
)
def test_a_memory_that_fills_up_costs_time_and_no_film(
    monkeypatch, caplog, name, offload, fits_host, moves, computes_again
):
    """From the third shot on keys and values do not fit, which shows once a pass has counted its routes. They move to
    the host, unless it is said where they lie; where they cannot, history is computed again."""
    model, what = build(name), story()
    forward = model.forward

    def filling(*args, cache=None, **kwargs):
        velocity = forward(*args, cache=cache, **kwargs)
        is_there = cache is not None and (cache[0] if name == "experts" else cache).offload
        if cache is not None and args[3].num_shots > 2 and not (is_there and fits_host):
            raise torch.OutOfMemoryError("full")
        return velocity

    plain = film(model, what, replace(CONFIG, cache=False))
    monkeypatch.setattr(model, "forward", filling)
    filled = film(model, what, replace(CONFIG, offload_cache=offload))
    assert_equal(filled, plain)
    assert max(filled[2]) == (4 if computes_again else 1) * TOKENS
    assert caplog.text.count("they lie in the host's from now on") == moves
    assert caplog.text.count("goes on without") == computes_again


@pytest.mark.parametrize("cache", [True, False])
def test_a_memory_that_is_too_small_without_the_cache_is_told(cache, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    model = build("mmdit")
    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        film(model, story(), replace(CONFIG, cache=cache))


def test_the_high_noise_expert_has_a_guidance_of_its_own():
    """Where both scales are 1 no negative is run; where one is, only under the other expert."""
    model, what = build("experts"), story(num_shots=2)
    levels = [FLOW.shifted(torch.tensor(1 - step / STEPS)) for step in range(STEPS)]
    num_high = sum(float(level) >= model.boundary for level in levels)
    assert 0 < num_high < STEPS
    for low, high, forwards in ((1.0, 2.0, STEPS + num_high), (2.0, 1.0, 2 * STEPS - num_high), (2.0, None, 2 * STEPS)):
        config = replace(CONFIG, guidance_scale=low, high_noise_guidance_scale=high, cache=False)
        assert len(film(model, what, config)[2]) == 2 * forwards  # a clean history changes nothing
    with pytest.raises(UserError, match="for a pair of experts"):
        film(build("wan"), what, replace(CONFIG, high_noise_guidance_scale=2.0))


@pytest.mark.parametrize("context", [None, 1, 2])
@pytest.mark.parametrize("name", ["mmdit", "wan", "experts"])
def test_a_story_goes_on_with_the_same_bits(name, context):
    """Its history is remembered anew, shot by shot as it was the first time."""
    model, stops, config = build(name), [], replace(CONFIG, context_shots=context)
    arguments = (model, model.high.stream if name == "experts" else model.stream, FORWARD, FLOW, story(), config)
    whole = dict(sample_shots(*arguments, on_step=stops.append))
    for stop in (stops[STEPS], stops[2 * STEPS - 1], stops[-2]):
        for index, latent in sample_shots(*arguments, start=stop):
            assert torch.equal(latent, whole[index])
