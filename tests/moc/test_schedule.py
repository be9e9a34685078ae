"""These tests are about chunk size and top_k by training step."""

import pytest

import moc
from moc.errors import UserError
from moc.schedule import MoCSchedule, Stage

PAPER = MoCSchedule([Stage(0, 10240, 5), Stage(100, 5120, 5), Stage(200, 2560, 4), Stage(300, 1280, 3)])


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, (10240, 5)), (99, (10240, 5)), (100, (5120, 5)), (299, (2560, 4)), (300, (1280, 3)), (10**6, (1280, 3))],
)
def test_a_stage_holds_from_its_step_on(step, expected):
    config = PAPER.at(step, moc.MoCConfig())
    assert (config.chunk_tokens, config.top_k) == expected


def test_other_settings_stay():
    config = moc.MoCConfig(causal=False, own_anchor="chunk", drop_in_max=1)
    changed = PAPER.at(150, config).to_dict()
    assert changed == {**config.to_dict(), "chunk_tokens": 5120, "top_k": 5}


def test_before_the_first_stage_the_config_stands():
    config = moc.MoCConfig(chunk_tokens=77, top_k=2)
    assert MoCSchedule().at(5, config) == config
    late = MoCSchedule([Stage(10, 64, 3)])
    assert late.at(9, config) == config
    assert late.at(10, config).chunk_tokens == 64


@pytest.mark.parametrize("steps", [(5, 3), (2, 2), (-1, 4)])
def test_steps_must_increase(steps):
    with pytest.raises(UserError, match=r"schedule steps.*increasing"):
        MoCSchedule([Stage(step, 64, 3) for step in steps])


@pytest.mark.parametrize(("values", "message"), [((0, 3), "chunk_tokens=0"), ((64, -1), "top_k=-1")])
def test_a_bad_stage_is_refused_before_training_reaches_it(values, message):
    with pytest.raises(UserError, match=message):
        Stage(1000, *values)
