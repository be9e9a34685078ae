"""These tests are about positions and rotation: the claims of LCT about where tokens stand."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from moc import Shot, ShotLayout
from models.rope import axis_dims, interleaved_positions, rotary_table, rotate, running_positions

SHOTS = [Shot(4, (2, 3, 5)), Shot(0, (3, 2, 2)), Shot(2, (1, 1, 1))]


def group_slices(layout: ShotLayout) -> list[slice]:
    return [slice(group.start, group.end) for group in layout.groups]


def test_text_runs_on_the_diagonal_and_video_starts_at_its_end() -> None:
    layout = ShotLayout.build(SHOTS, global_text_tokens=3)
    positions = interleaved_positions(layout)
    _, first, second, third = group_slices(layout)
    assert positions[:7].tolist() == [[i, i, i] for i in range(7)]  # the global text, then the first shot's text
    assert positions[first][4:][0].tolist() == [7, 7, 7]
    assert positions[first][-1].tolist() == [8, 9, 11]  # 7 + (T, H, W) - 1
    assert positions[second][0].tolist() == [12, 12, 12]  # past the largest coordinate, 11; no text in between
    assert positions[third][0].tolist() == [15, 15, 15]
    assert positions[third][2].tolist() == [17, 17, 17]


def test_offsets_inside_a_shot_are_those_of_the_single_shot_model() -> None:
    layout = ShotLayout.build(SHOTS, global_text_tokens=3)
    positions = interleaved_positions(layout)
    for shot, inside in zip(SHOTS, group_slices(layout)[1:], strict=True):
        alone = interleaved_positions(ShotLayout.build([shot]))
        moved = positions[inside] - alone
        assert (moved == moved[0, 0]).all()


@pytest.mark.parametrize("positions", [interleaved_positions, running_positions])
def test_samples_start_anew(positions) -> None:
    video_only = [Shot(0, shot.grid) for shot in SHOTS]
    one = ShotLayout.build(video_only)
    other = ShotLayout.build(video_only[:1])
    packed = ShotLayout.pack([other, one])
    assert torch.equal(positions(packed), torch.cat([positions(other), positions(one)]))


def test_running_time_has_a_gap_at_each_true_cut() -> None:
    first, last = Shot(0, (2, 1, 2)), Shot(0, (1, 1, 2))
    layout = ShotLayout.build([first, Shot(0, (1, 1, 2)), last])
    assert running_positions(layout)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert running_positions(layout, gap=2.5)[:, 0].tolist() == [0, 0, 1, 1, 4.5, 4.5, 8, 8]
    assert running_positions(layout)[:, 2].tolist() == [0, 1] * 4
    going_on = ShotLayout.build([first, Shot(0, (1, 1, 2), cut=False), last])
    assert running_positions(going_on, gap=2.5)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 5.5, 5.5]


def test_table_is_wans() -> None:
    assert axis_dims(128) == (44, 42, 42)
    latent = torch.zeros(1, 16, 3, 8, 6)
    cos, sin = WanRotaryPosEmbed(128, (1, 2, 2), 1024)(latent)
    ours = rotary_table(running_positions(ShotLayout.build([Shot(0, (3, 4, 3))])), 128)
    torch.testing.assert_close(ours[0], cos[0, :, 0, ::2].float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1], sin[0, :, 0, 1::2].float(), rtol=0, atol=1e-6)


def test_angles_are_exact_far_into_a_film() -> None:
    position = torch.tensor([[12345.0, 0.0, 0.0]], dtype=torch.float64)
    angles = [12345 * 10000 ** (-pair / 22) for pair in range(22)]
    cos, sin = (values[0, :22].double() for values in rotary_table(position, 128))
    torch.testing.assert_close(cos, torch.tensor([math.cos(a) for a in angles], dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, torch.tensor([math.sin(a) for a in angles], dtype=torch.float64), rtol=0, atol=1e-7)


def test_scores_depend_on_relative_position_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 24)
    near = torch.tensor([[5.0, 3.0, 9.0]], dtype=torch.float64)
    step = torch.tensor([[2.0, -1.0, 4.0]], dtype=torch.float64)

    def score(shift: float) -> torch.Tensor:
        at_q, at_k = (rotary_table(p + shift, 24) for p in (near, near + step))
        return (rotate(q, at_q) * rotate(k, at_k)).sum()

    torch.testing.assert_close(score(0.0), score(1000.0), rtol=0, atol=1e-4)
    assert (score(0.0) - (rotate(q, rotary_table(near, 24)) * rotate(k, rotary_table(near, 24))).sum()).abs() > 1e-2
