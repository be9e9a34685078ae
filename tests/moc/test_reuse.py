"""These tests are about steps that take an earlier velocity: when the model is not asked, what that costs, and how a
film goes on."""

from dataclasses import replace
from itertools import groupby, pairwise

import pytest
import torch

from moc.diffusion import SamplingConfig, sample_shots
from moc.diffusion.reuse import StepReuse
from moc.diffusion.steps import Step
from moc.errors import UserError
from tests.moc.test_samplers import Recording
from tests.moc.test_samplers import film as field_film
from tests.moc.test_samplers import story as plain_story
from tests.models.test_kv_cache import FLOW, FORWARD, build, story

CONFIG = SamplingConfig(steps=12, guidance_scale=2.0)


def way(is_dense=False):
    """Returns how a step of shot 7 is asked."""
    return Step(torch.ones(8), torch.zeros(8), [7], [7], {7: 0}, is_dense), {7: 1.0}, False


def film(model, what, config, start=None):
    """Returns latents of a film, where it stood after each step, and how often the model was called."""
    stops, calls = [], []
    hook = model.register_forward_hook(lambda *_: calls.append(None))
    arguments = (model, model.stream, FORWARD, FLOW, what, config, stops.append)
    shots = dict(sample_shots(*arguments, start=start))
    hook.remove()
    return shots, stops, len(calls)


def gaussian(latents, sigma, texts):
    """Returns the velocity where a shot's data are N(2, 0.5^2) in each value, and lean to the mean of all shots."""
    gains = [(s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2) for s in sigma]
    mean = torch.stack(latents).mean()
    return [g * (x - (1 - s) * 2) - 2 + 0.1 * mean for g, x, s in zip(gains, latents, sigma, strict=True)]


@pytest.mark.parametrize("lag", [0.0, 0.3, 1.0])
def test_its_error_grows_from_nothing_with_the_threshold(lag):
    config = SamplingConfig(steps=40, lag=lag, guidance_scale=1.0)

    def shots_of(threshold):
        model, stops = Recording(gaussian), []
        shots = field_film(model, replace(config, step_cache=threshold), plain_story(3), on_step=stops.append)
        assert len(model.calls) == len(stops) - stops[-1].reused
        return [latent for _, latent in shots], stops[-1].reused

    plain, _ = shots_of(None)
    reused, errors = [], []
    for threshold in (0.0, 0.01, 0.03, 0.1):
        shots, count = shots_of(threshold)
        reused.append(count)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(shots, plain, strict=True)))
    assert (reused[0], errors[0]) == (0, 0)
    assert all(few < many for few, many in pairwise(reused)), reused
    assert all(small < large for small, large in pairwise(errors)), errors


@pytest.mark.parametrize(("lag", "solver"), [(0.0, "euler"), (0.3, "unipc"), (1.0, "dpmpp")])
@pytest.mark.parametrize("name", ["mmdit", "wan"])
def test_a_film_goes_on_from_any_step_with_the_same_bits(name, lag, solver):
    model, what = build(name), story(3)
    config = replace(CONFIG, steps=10, lag=lag, solver=solver, step_cache=5.0)
    whole, stops, calls = film(model, what, config)
    assert stops[-1].reused > 0
    assert calls < 2 * len(stops)
    for stop in stops[3:-1:5]:
        rest, own_stops, _ = film(model, what, config, stop)
        assert all(torch.equal(latent, whole[index]) for index, latent in rest.items())
        assert own_stops[-1].reused == stops[-1].reused
        assert len(own_stops) == len(stops) - stop.step


def test_it_is_the_latents_way_times_the_rate_of_the_last_two():
    """The velocity changed by 0.1 on a way of 1, so that another way of 2 is thought to change it by 0.2 of 1.1."""
    reuse, zero = StepReuse(0.19), torch.zeros(1, 1, 2, 2)
    for latent, velocity in ((0.0, 1.0), (1.0, 1.1)):
        assert reuse.known(*way(), {7: zero + latent}) is None
        reuse.keep(*way(), {7: zero + latent}, {7: zero + velocity, 8: zero})
    known = reuse.known(*way(), {7: zero + 3})
    assert known is not None
    assert torch.equal(known[7], zero + 1.1)
    assert reuse.known(*way(), {7: zero - 2}) is None  # a change of 0.3 in a velocity of 1.1
    assert reuse.known(*way(), {7: zero + 3, 8: zero}) is None  # shot 8 was never asked about
    assert reuse.reused == 1
    assert reuse.remembered(8) == {}


def test_a_step_that_is_asked_otherwise_asks():
    """Nothing is taken over between dense steps and others, in and out of guidance's interval, where shots begin or
    end, and from another expert."""
    reuse, zero = StepReuse(100.0), torch.zeros(1, 1, 2, 2)
    for latent in (0.0, 1.0):
        reuse.keep(*way(), {7: zero + latent}, {7: zero + 1 + latent})
    assert reuse.known(*way(), {7: zero + 1}) is not None
    assert reuse.known(*way(is_dense=True), {7: zero + 1}) is None
    reuse.keep(*way(is_dense=True), {7: zero + 2}, {7: zero + 3})
    assert reuse.known(*way(is_dense=True), {7: zero + 2}) is None  # the rate of dense steps is not known yet
    model, what = build("experts"), story(2)
    calls = []
    for expert in (model.high, model.low):
        expert.register_forward_hook(lambda module, *_: calls.append(module))
    config = replace(CONFIG, steps=8, lag=0.0, dense_steps=2, guidance_interval=[0.0, 0.3], step_cache=100.0)
    list(sample_shots(model, model.high.stream, FORWARD, FLOW, what, config))
    levels = FLOW.shifted(1 - torch.arange(8) / 8).tolist()
    ways = groupby(enumerate(levels), lambda at: (at[0] < 2, at[1] >= model.boundary, at[1] <= 0.3))
    asked = {way: min(2, len(list(steps))) * (1 + way[2]) for way, steps in ways}
    assert len(asked) == 4
    assert calls.count(model.high) == sum(number for (_, is_high, _), number in asked.items() if is_high)
    assert len(calls) == sum(asked.values())


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_a_threshold_is_a_number(threshold):
    with pytest.raises(UserError, match=r"sampler\.step_cache"):
        SamplingConfig(step_cache=threshold)
