"""These tests are about codecs: the interface, what every kind keeps to, and AutoencoderKLWan."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from moc.errors import UserError
from models.encoders.codec import CodecConfig, CodecKind
from models.encoders.lapped import LappedCodec
from models.encoders.pair import build_codec
from models.encoders.vae import WanCodec

WAN21 = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
WAN22 = {
    **{"base_dim": 8, "z_dim": 6, "num_res_blocks": 1, "is_residual": True, "patch_size": 2},
    **{"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, "temperal_downsample": [False, True, True]},
}


def moving_gradient(frames: int = 9, height: int = 32, width: int = 48) -> Tensor:
    """Returns a smooth, coloured, moving picture: float [3, F, H, W]."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.sin(x / 9 + t / 5), torch.cos(y / 7 - t / 6), torch.sin((x + y) / 11)]) * 0.9


def psnr(a: Tensor, b: Tensor) -> float:
    """Returns peak signal to noise of values in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def wan_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    settings = WAN21 if request.param == "2.1" else WAN22
    channels = settings["z_dim"]
    folder = tmp_path_factory.mktemp("vae")
    vae = AutoencoderKLWan(
        **settings, latents_mean=[0.1 * c for c in range(channels)], latents_std=[1.0 + c for c in range(channels)]
    )
    vae.save_pretrained(folder)
    return folder


def test_frames_and_sizes_are_checked() -> None:
    codec = LappedCodec()
    assert [codec.latent_frames(f) for f in (1, 5, 17)] == [1, 2, 5]
    assert [codec.pixel_frames(t) for t in (1, 2, 5)] == [1, 5, 17]
    with pytest.raises(ValueError, match=r"8 frames cannot be encoded: the codec takes 4n \+ 1 frames \(5 or 9\)"):
        codec.encode(torch.zeros(3, 8, 16, 16))
    with pytest.raises(ValueError, match="20x16 is not a multiple of 8"):
        codec.encode(torch.zeros(3, 1, 20, 16))
    with pytest.raises(ValueError, match="takes float"):
        codec.encode(torch.zeros(3, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"codec\.channels=65"):
        CodecConfig(channels=65)


def test_streams_join_to_the_whole(wan_folder: Path) -> None:
    wan = build_codec(CodecConfig(CodecKind.wan, str(wan_folder)))
    for codec, pieces in ((LappedCodec(), 2), (wan, 9)):
        latent = torch.randn(codec.latent_channels, 9, 2, 4)
        pieces_of = list(codec.decode_stream(latent))
        assert len(pieces_of) == pieces
        assert torch.cat(pieces_of, 1).shape == (3, 33, 2 * codec.spatial_factor, 4 * codec.spatial_factor)
        assert torch.equal(torch.cat(pieces_of, 1), codec.decode(latent))


def test_wan_codec_is_diffusers_vae_with_normalized_latents(wan_folder: Path) -> None:
    codec = WanCodec(CodecConfig(CodecKind.wan, str(wan_folder)))
    vae = AutoencoderKLWan.from_pretrained(wan_folder)
    video = moving_gradient(frames=5, height=32, width=64)
    with torch.no_grad():
        mode = vae.encode(video[None]).latent_dist.mode()[0]
        shape = (-1, 1, 1, 1)
        mean, std = (torch.tensor(vae.config[key]).view(shape) for key in ("latents_mean", "latents_std"))
        expected = vae.decode(mode[None]).sample[0]
    latent = codec.encode(video)
    torch.testing.assert_close(latent, (mode - mean) / std)
    assert latent.shape[1:] == (2, 32 // codec.spatial_factor, 64 // codec.spatial_factor)
    torch.testing.assert_close(codec.decode(latent), expected, rtol=0, atol=1e-5)


def test_autocast_changes_nothing(wan_folder: Path) -> None:
    for codec in (LappedCodec(), build_codec(CodecConfig(CodecKind.wan, str(wan_folder)))):
        video = moving_gradient(frames=5, height=32, width=32)
        latent = codec.encode(video)
        decoded = codec.decode(latent)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(codec.encode(video), latent)
            for piece in codec.decode_stream(latent):
                assert torch.is_autocast_enabled("cpu")
                assert torch.equal(piece, decoded[:, : piece.shape[1]])
                decoded = decoded[:, piece.shape[1] :]


def test_each_call_starts_afresh(wan_folder: Path) -> None:
    codec = WanCodec(CodecConfig(CodecKind.wan, str(wan_folder)))
    latent = torch.randn(codec.latent_channels, 3, 2, 2)
    first = codec.decode(latent)
    next(codec.decode_stream(torch.randn_like(latent)))  # abandoned half way
    assert torch.equal(codec.decode(latent), first)


@pytest.mark.parametrize("size", [(32, 320), (320, 32)])
def test_tiles_are_those_of_diffusers(wan_folder: Path, size: tuple[int, int]) -> None:
    codec = WanCodec(CodecConfig(CodecKind.wan, str(wan_folder), tiling=True))
    plain = WanCodec(CodecConfig(CodecKind.wan, str(wan_folder)))
    vae, patch = AutoencoderKLWan.from_pretrained(wan_folder), codec.patch_size
    video = moving_gradient(5, *size)
    latent, whole = codec.encode(video), plain.encode(video)
    assert 0 < (latent - whole).square().mean() < 0.05 * whole.var()  # a tile sees nothing beyond its edge
    with torch.no_grad():
        vae.enable_tiling(256 // patch, 256 // patch, 192 // patch, 192 // patch)  # it encodes tiles of patches
        mode = vae.encode(video[None]).latent_dist.mode()[0]
        torch.testing.assert_close(latent, (mode - codec.mean) / codec.std)
        vae.enable_tiling(256, 256, 192, 192)  # and decodes tiles of pixels
        torch.testing.assert_close(codec.decode(latent), vae.decode(mode[None]).sample[0], rtol=0, atol=1e-5)


def test_the_fingerprint_tells_whatever_changes_latents(wan_folder: Path, tmp_path: Path) -> None:
    def print_of(folder: Path, **changes) -> str:
        return WanCodec(CodecConfig(CodecKind.wan, str(folder), **changes)).fingerprint

    def changed(name: str, weight: float = 0.0, **scales: float) -> str:
        vae = AutoencoderKLWan.from_pretrained(wan_folder)
        vae.register_to_config(**{key: [value] * vae.config.z_dim for key, value in scales.items()})
        vae.post_quant_conv.bias.data += weight
        vae.save_pretrained(tmp_path / name)
        return print_of(tmp_path / name)

    others = {
        *(print_of(wan_folder, tiling=True), print_of(wan_folder, continuous=True), changed("weights", weight=1.0)),
        *(changed("mean", latents_mean=2.0), changed("std", latents_std=2.0)),
    }
    assert len(others - {print_of(wan_folder)}) == 5
    assert changed("same") == print_of(wan_folder)


def test_a_missing_vae_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a diffusers folder of AutoencoderKLWan"):
        build_codec(CodecConfig(CodecKind.wan, str(tmp_path)))
