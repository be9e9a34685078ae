"""These tests are about the lapped codec: orthonormal, exact where it stores, and good enough for storyworld."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.manifest import load_manifest
from data.media.decode import open_video
from data.storyworld import Mode, StoryworldConfig, generate
from models.encoders.codec import CodecConfig
from models.encoders.lapped import LappedCodec, border_rotation, kept_coefficients, variation_gradient
from models.encoders.pair import build_codec
from tests.composing import REQUIRED, parsed
from tests.models.test_vae import moving_gradient, psnr


def storyworld_shots(folder: Path, scenes: int, **settings) -> list[Tensor]:
    """Returns the shots of a world in both modes, all else by default, each float [3, F, H, W] in [-1, 1]."""
    shots = []
    for mode in Mode:
        generate(StoryworldConfig(output=str(folder / mode), scenes=scenes, mode=mode, workers=1, **settings))
        for record in load_manifest(folder / mode / "manifest.jsonl"):
            film = open_video(folder / mode / record.video)
            for shot in record.shots:
                frames = torch.as_tensor(film.read(shot.start, shot.end))
                shots.append(frames.permute(3, 0, 1, 2).float() / 127.5 - 1)
    return shots


def mean_psnr(codec: LappedCodec, shots: list[Tensor]) -> float:
    return sum(psnr(codec.decode(codec.encode(shot)), shot) for shot in shots) / len(shots)


def test_by_default_a_twelfth_of_the_values_holds_storyworld_at_30_db(tmp_path: Path) -> None:
    shots = storyworld_shots(tmp_path, scenes=3)
    assert len(shots) == 24
    codec = build_codec(parsed("prepare", *REQUIRED["prepare"]).encoders.codec)
    for shot in shots:
        assert shot.shape == (3, 17, 64, 96)
        assert 12 * codec.encode(shot).numel() <= shot.numel()  # the bound counts the first frame too
    assert mean_psnr(codec, shots) >= 30


def test_larger_frames_hold_more(tmp_path: Path) -> None:
    small, large = (storyworld_shots(tmp_path / str(n), scenes=1, shots=[2], size=[64 * n, 96 * n]) for n in (1, 2))
    assert mean_psnr(LappedCodec(), large) > max(30, mean_psnr(LappedCodec(), small) + 1)


def test_every_stored_value_survives() -> None:
    codec = LappedCodec()
    video = moving_gradient(frames=17) * 0.9  # within the range, so that nothing is clamped
    latent = codec.encode(video)
    assert latent.shape == (54, 5, 4, 6)
    torch.testing.assert_close(codec.encode(codec.decode(latent)), latent, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_coefficients_are_orthonormal(first: bool) -> None:
    codec = LappedCodec()
    torch.manual_seed(0)
    stored = torch.randn(2, 2, 3, 54)
    basis, _ = codec._of_latents(2, first)
    video = codec._synthesized(stored, basis)
    assert video.shape == (3, 8, 16, 24)
    torch.testing.assert_close(video.square().sum(), stored.square().sum())
    torch.testing.assert_close(codec._analyzed(video, basis), stored, rtol=0, atol=1e-5)


def test_borders_turn_and_constants_stay() -> None:
    rotation = border_rotation()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(8, dtype=torch.float64))
    assert (rotation - torch.eye(8)).abs().max() > 0.1
    codec = LappedCodec()
    latent = codec.encode(torch.full((3, 5, 16, 24), 0.5))
    assert latent[0].min() > 0
    torch.testing.assert_close(latent[1:], torch.zeros_like(latent[1:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(latent), torch.full((3, 5, 16, 24), 0.5))


def test_the_first_latent_frame_holds_space_alone() -> None:
    first, later = kept_coefficients(54)
    time = torch.stack([first, later]) // 64 % 4
    assert not time[0].any()
    assert time[1].any()
    assert first.unique().numel() == later.unique().numel() == 54
    assert torch.equal(first[time[1] == 0], later[time[1] == 0])
    codec, video = LappedCodec(), moving_gradient()
    latent, still = codec.encode(video), codec.encode(video[:, :1])
    torch.testing.assert_close(latent[:, :1], still)
    assert codec.decode(still).shape == (3, 1, 32, 48)
    assert psnr(codec.decode(still), video[:, :1]) > 40


def test_without_still_detail_a_channel_is_one_frequency() -> None:
    """The first latent frame then has 0 in the channels of motion, and decodes the same whatever a model puts there."""
    first, later = kept_coefficients(54, still_detail=False)
    assert torch.equal(first, later)
    assert torch.equal(later, kept_coefficients(54)[1])
    moves = later // 64 % 4 > 0
    codec, full, video = LappedCodec(CodecConfig(still_detail=False)), LappedCodec(), moving_gradient(9)
    latent = codec.encode(video)
    assert moves.sum() > 10
    torch.testing.assert_close(latent[moves, 0], torch.zeros_like(latent[moves, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(latent[:, 1:], full.encode(video)[:, 1:])
    still = latent[:, :1].clone()
    disturbed = torch.where(moves[:, None, None, None], still + 1, still)
    torch.testing.assert_close(codec.encode(codec.decode(disturbed))[~moves], still[~moves], rtol=0, atol=0.05)
    assert codec.fingerprint != full.fingerprint


def test_the_demo_s_first_frames_are_as_good_as_the_rest(tmp_path: Path) -> None:
    """Without detail of their own they lose some 2 dB and still keep no less than the frames after them."""
    shots = [shot[:, :9] for shot in storyworld_shots(tmp_path, scenes=2)]
    codec = LappedCodec(CodecConfig(channels=32, whitening=0.3, still_detail=False))
    decoded = [codec.decode(codec.encode(shot)) for shot in shots]
    first, rest = (
        sum(psnr(a[:, run], b[:, run]) for a, b in zip(decoded, shots, strict=True)) / len(shots)
        for run in (slice(0, 1), slice(1, None))
    )
    assert first >= rest >= 26


def test_the_gradient_of_variation_is_autograd_s() -> None:
    torch.manual_seed(0)
    video = torch.randn(3, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    derivative = 0
    for dim in (1, 2, 3):
        before, after = [0] * 8, [0] * 8
        before[2 * (3 - dim)], after[2 * (3 - dim) + 1] = 1, 1
        square = video.diff(dim=dim).square().sum(0, keepdim=True)
        derivative += (torch.nn.functional.pad(square, before) + torch.nn.functional.pad(square, after)) / 2
    (expected,) = torch.autograd.grad((derivative + 1e-2).sqrt().sum(), video)
    torch.testing.assert_close(variation_gradient(video.detach()), expected)


def test_decoding_does_not_amplify_noise() -> None:
    """The latents of a model are not exact, and neither are two devices."""
    codec = LappedCodec()
    torch.manual_seed(0)
    noise = 1e-3 * torch.randn(54, 5, 4, 6)
    for video in (moving_gradient(17), torch.full((3, 17, 32, 48), 0.5)):
        latent = codec.encode(video)
        _, scale = codec._of_latents(5, True)
        expected = (noise.permute(1, 2, 3, 0) * scale).square().sum() / (3 * 20 * 32 * 48)
        error = (codec.decode(latent + noise) - codec.decode(latent)).square().mean()
        assert error < 1.5 * expected


def test_whitening_changes_scales_only() -> None:
    plain, half, white = (LappedCodec(CodecConfig(whitening=w)) for w in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half.scale.square(), plain.scale * white.scale)
    video = moving_gradient()
    torch.testing.assert_close(plain.decode(plain.encode(video)), white.decode(white.encode(video)))
    few = LappedCodec(CodecConfig(channels=32))
    assert len({plain.fingerprint, half.fingerprint, white.fingerprint, few.fingerprint}) == 4


def test_edges_do_not_depend_on_the_rest() -> None:
    """The smallest frame is one block, and a block sees half a block around it."""
    codec = LappedCodec()
    assert codec.decode(codec.encode(moving_gradient(5, 8, 8))).shape == (3, 5, 8, 8)
    video = moving_gradient(5, 16, 48)
    other = video.clone()
    other[..., 28:] = 0
    latents = codec.encode(video), codec.encode(other)
    torch.testing.assert_close(latents[0][..., :3], latents[1][..., :3])
    assert not torch.allclose(latents[0][..., 3], latents[1][..., 3])
