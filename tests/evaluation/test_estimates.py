"""These tests are about intervals: those of means are Student's; those of shares count scenes, not readings that are
right or wrong together."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp, ttest_ind

from evaluation.estimates import estimate, share_interval, wilson
from evaluation.films.scores import difference


def test_wilson_interval():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    assert wilson(0, 0) == (0.0, 1.0)


def test_readings_of_one_scene_that_are_alike_count_as_one():
    of_scenes = torch.tensor([True] * 60 + [False] * 20)
    assert share_interval(of_scenes[:, None].expand(-1, 3)) == pytest.approx(wilson(60, 80), abs=2e-3)


def test_readings_that_are_independent_all_count():
    right = torch.tensor([[a, b] for a in (0, 1) for b in (0, 1)] * 50, dtype=torch.bool)
    assert share_interval(right) == pytest.approx(wilson(200, 400), abs=1e-3)
    opposed = torch.tensor([[True, False]] * 50)  # more alike than chance has them: no more than all count
    assert share_interval(opposed) == wilson(50, 100)


@pytest.mark.parametrize("right", [[[1, 1]], [[0, 0], [0, 0]], [[1, 1], [1, 1], [1, 1]]], ids=str)
def test_readings_that_are_all_alike_have_an_interval(right):
    readings = torch.tensor(right, dtype=torch.bool)
    assert share_interval(readings) == wilson(int(readings.sum()), readings.numel())


def test_the_interval_holds_as_often_as_it_says():
    draw = np.random.default_rng(0)
    shares = draw.beta(2, 1, (400, 60, 1))  # two readings of a scene share its chance; the mean is 2/3
    right = torch.from_numpy(draw.random((400, 60, 2)) < shares)
    held = [low <= 2 / 3 <= high for low, high in map(share_interval, right)]
    assert 0.92 <= np.mean(held) <= 0.98


def test_error_bars_are_students():
    values = torch.tensor([[1.0, 2.0, 4.0, 3.0, 0.0]] * 3 + [[3.0, 4.0, 4.0, 8.0, 6.0]] * 3)
    found = estimate(values)
    assert (found.mean, found.count) == (3.5, 6)
    for half, means in ((found.scenes, values.mean(1)), (found.draws, values.mean(0))):
        low, high = ttest_1samp(means.numpy(), 0).confidence_interval(0.95)
        assert half == pytest.approx((high - low) / 2, rel=1e-6)
    few = estimate(values[:4])  # that of two values may be ten times as wide as they lie apart
    assert math.isnan(few.scenes)
    assert str(few) == f"{values[:4].mean():.4f}"
    assert not math.isnan(few.draws)
    assert math.isnan(estimate(values[:, :4]).draws)


def test_differences_have_welchs_interval():
    one, other = torch.tensor([0.9, 0.8, 0.85, 0.8, 0.9]), torch.tensor([0.5, 0.7, 0.6, 0.5, 0.7, 0.6])
    found = difference(one, other)
    assert found["mean"] == pytest.approx(0.25)
    low, high = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert found["half"] == pytest.approx((high - low) / 2, abs=1e-4)
    assert difference(one[:1].repeat(5), other[:1].repeat(5))["half"] == 0
    assert difference(one, other[:4]) == {"mean": pytest.approx(0.275), "half": None}
    assert difference(one, other[:0]) is None
