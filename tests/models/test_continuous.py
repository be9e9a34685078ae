"""These tests are about codecs over the shots of a sample, apart and as one video: exact, and streaming."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.encoders.codec import in_pieces
from tests.codecs import TinyCodecs, Watch, decode_shots, encode_shots, split, whole
from tests.encoders import PoolCodec
from tests.models.test_vae import moving_gradient

KINDS = ("lapped", "wan 2.1", "wan 2.2")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> TinyCodecs:
    return TinyCodecs(tmp_path_factory.mktemp("codecs"))


# Frames and latent frames


def test_the_lengths_of_shots() -> None:
    apart, continuous = PoolCodec(), PoolCodec(continuous=True)
    for codec, shot in ((apart, 0), (apart, 3), (continuous, 0)):
        assert [codec.pixel_frames(t, shot) for t in (1, 2, 5)] == [1, 5, 17]
        assert [codec.whole_frames(f, shot) for f in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 5, 5, 9]
        assert [codec.nearest_frames(f, shot) for f in (0.2, 2, 3.5, 7.5)] == [1, 1, 5, 9]
    assert [continuous.pixel_frames(t, 1) for t in (1, 2, 5)] == [4, 8, 20]
    assert [continuous.whole_frames(f, 1) for f in (0, 1, 3, 4, 7, 8)] == [0, 0, 0, 4, 4, 8]
    assert [continuous.nearest_frames(f, 2) for f in (-3, 1, 5.5, 6.5)] == [4, 4, 4, 8]
    for codec in (apart, continuous):
        for shot in (0, 1):
            assert [codec.latent_frames(codec.pixel_frames(t, shot), shot) for t in (1, 2, 9)] == [1, 2, 9]
    with pytest.raises(
        ValueError, match=r"a shot of 9 frames cannot be encoded: the codec takes 4n frames \(8 or 12\)"
    ):
        continuous.latent_frames(9, 1)
    with pytest.raises(ValueError, match=r"a shot of 2 frames .* takes 4n frames \(4 or 8\)"):
        continuous.latent_frames(2, 1)


def test_frames_come_in_other_pieces() -> None:
    frames = torch.arange(20).view(1, 20, 1, 1)
    for pieces in ([20], [1, 19], [7, 0, 3, 10], [1] * 20):
        found = [piece.flatten().tolist() for piece in in_pieces(frames.split(pieces, dim=1), 5, 4)]
        assert found == [[*range(5)], [*range(5, 9)], [*range(9, 13)], [*range(13, 17)], [*range(17, 20)]]
    assert list(in_pieces([], 5, 4)) == []


# Exactness


@pytest.mark.parametrize("kind", KINDS)
def test_continuous_shots_are_one_video_cut_up(build: TinyCodecs, kind: str) -> None:
    codec, lengths = build(kind), [3, 1, 10, 2]
    video = 0.9 * moving_gradient(codec.pixel_frames(sum(lengths)))  # so that no codec clamps values
    expected, decoded = whole(codec, video)
    latents = encode_shots(codec, split(video, codec, lengths))
    assert [latent.shape[1] for latent in latents] == lengths
    torch.testing.assert_close(torch.cat(latents, 1), expected, rtol=1e-5, atol=1e-5)
    shots = decode_shots(codec, latents)
    assert [shot.shape[1] for shot in shots] == [9, 4, 40, 8]
    if kind == "lapped":  # decoding smooths each piece on its own, but encoding again gives the same latents
        torch.testing.assert_close(whole(codec, torch.cat(shots, 1))[0], expected, rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(torch.cat(shots, 1), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shots_apart_know_nothing_of_each_other(build: TinyCodecs, kind: str) -> None:
    codec = build(kind, continuous=False)
    video = moving_gradient(14)
    shots = split(video, codec, [2, 3])
    latents = encode_shots(codec, shots)
    for shot, latent, decoded in zip(shots, latents, decode_shots(codec, latents), strict=True):
        expected = whole(codec, shot)
        torch.testing.assert_close(latent, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoded, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_shot_is_the_same_in_both_modes(build: TinyCodecs, kind: str) -> None:
    apart, continuous = build(kind, continuous=False), build(kind)
    video = moving_gradient(13)
    latent = apart.encode(video)
    assert torch.equal(continuous.encode(video), latent)
    assert torch.equal(continuous.decode(latent), apart.decode(latent))
    assert apart.fingerprint != continuous.fingerprint


@pytest.mark.parametrize("kind", ["wan 2.1", "wan 2.2"])
def test_a_later_shot_depends_on_the_ones_before(build: TinyCodecs, kind: str) -> None:
    codec = build(kind)
    latents = [torch.randn(codec.latent_channels, 2, 2, 2) for _ in range(2)]
    after = decode_shots(codec, latents)[1]
    assert not torch.allclose(decode_shots(codec, [-latents[0], latents[1]])[1], after, atol=1e-3)
    second = decode_shots(build(kind, continuous=False), latents)[1]
    assert (after.shape[1], second.shape[1]) == (8, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_between_shots_leaves_the_stream_alone(build: TinyCodecs, kind: str) -> None:
    codec = build(kind)
    shots = split(moving_gradient(17), codec, [2, 3])
    encode, decode = codec.shot_encoder(), codec.shot_decoder()
    expected = encode_shots(codec, shots)
    frames = decode_shots(codec, expected)
    for shot, latent, shown in zip(shots, expected, frames, strict=True):
        still = codec.encode(shots[0][:, :1])
        assert torch.equal(encode([shot]), latent)
        codec.decode(still)
        assert torch.equal(torch.cat(list(decode(latent)), 1), shown)


@pytest.mark.parametrize("kind", ["wan 2.1", "wan 2.2"])
def test_tiles_stream_as_diffusers_tiles_the_whole(build: TinyCodecs, kind: str) -> None:
    codec, lengths = build(kind, tiling=True), [2, 3]
    codec.latents_at_once = 2
    video = moving_gradient(17, 16, 320)
    latents = encode_shots(codec, split(video, codec, lengths))
    frames = torch.cat(decode_shots(codec, latents), 1)
    assert not torch.allclose(frames, torch.cat(decode_shots(build(kind), latents), 1), atol=1e-4)
    codec.vae.enable_tiling()
    with torch.no_grad():
        joined = torch.cat(latents, 1)
        if kind == "wan 2.1":  # for models with patches of 2 x 2 diffusers encodes in tiles twice as large
            torch.testing.assert_close(joined, whole(codec, video)[0], rtol=1e-5, atol=1e-5)
        expected = codec.vae.decode((joined * codec.std + codec.mean)[None]).sample[0]
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


# Memory


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_holds_few_frames(build: TinyCodecs, kind: str) -> None:
    codec, watch = build(kind), Watch()
    encode = codec.shot_encoder()
    limit = 4 * codec.latents_at_once + 2 * 6
    for length in (17, 12, 60):

        def pieces(length: int = length) -> Iterator[Tensor]:
            return (watch(torch.zeros(3, min(6, length - at), 16, 16)) for at in range(0, length, 6))

        encode(pieces())
        assert 6 <= watch.most <= limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("continuous", [False, True])
def test_streams_do_not_grow(build: TinyCodecs, kind: str, continuous: bool) -> None:
    codec = build(kind, continuous)
    encode, decode = codec.shot_encoder(), codec.shot_decoder()
    after_short: tuple[int, int] | None = None
    for length in (3, 24):
        latent = encode([torch.zeros(3, codec.pixel_frames(length, encode.shot), 16, 16)])
        pieces = list(decode(latent))
        assert max(piece.shape[1] for piece in pieces) <= 4 * codec.latents_at_once
        sizes = held_bytes(encode.memory), held_bytes(decode.memory)
        assert sizes == (after_short or sizes)
        after_short = sizes


def held_bytes(memory: dict) -> int:
    return sum(x.nbytes for features in memory.values() for x in features if isinstance(x, Tensor))
