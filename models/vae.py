"""Codecs: video to latents and back, behind one interface.

- `TransformCodec`: a training-free orthonormal space-time transform, for runs without any download
- `WanCodec`: AutoencoderKLWan (Wan2.1: 16 channels, 4x8x8; Wan2.2: 48 channels, 4x16x16) from a local diffusers folder

A video is float [3, F, H, W] in [-1, 1] with F = 4n + 1 frames; its latent is [C, n + 1, H / s, W / s]: the first
latent frame stands for the first frame alone, so that a still image is one latent frame. Each shot is encoded apart.

Shape letters: F frames, C T H W of a latent.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from einops import rearrange
from torch import Tensor, nn

from models.fingerprint import fingerprint, weights_digest


class CodecKind(StrEnum):
    transform = "transform"
    wan = "wan"


@dataclass(frozen=True)
class CodecConfig:
    """Which codec. `path`: folder of an AutoencoderKLWan, for wan. The rest is the transform codec's.

    channels: coefficients kept of each block's 768, at most 64 (1/12 of the pixel values).
    whitening: 0 divides every coefficient by one constant, so that latent error is pixel error; 1 brings every channel
    to about unit variance, so that detail costs a diffusion model as much as the picture does.
    tiling: wan only: decode in spatial tiles, for large frames on small GPUs.
    """

    kind: CodecKind = CodecKind.transform
    path: str = ""
    channels: int = 64
    whitening: float = 0.5
    tiling: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"codec.channels={self.channels} must lie in [1, {MAX_CHANNELS}]")
        if not 0 <= self.whitening <= 1:
            raise ValueError(f"codec.whitening={self.whitening} must lie in [0, 1]")


class Codec(nn.Module):
    """What data, trainer and sampler rely on."""

    latent_channels: int
    temporal_factor: int = 4
    spatial_factor: int
    fingerprint: str

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a shot; raises ValueError unless frames = 4n + 1."""
        if frames < 1 or (frames - 1) % self.temporal_factor:
            below = max(1, frames - (frames - 1) % self.temporal_factor)
            raise ValueError(
                f"a shot of {frames} frames cannot be encoded: the codec takes {self.temporal_factor}n + 1 frames "
                f"({below} or {below + self.temporal_factor})"
            )
        return 1 + (frames - 1) // self.temporal_factor

    def pixel_frames(self, latent_frames: int) -> int:
        """Frames that `latent_frames` decode to."""
        return 1 + (latent_frames - 1) * self.temporal_factor

    def check_video(self, video: Tensor) -> None:
        """Raises ValueError unless video is float [3, 4n + 1, H, W] with sizes the codec can divide."""
        if video.dim() != 4 or video.shape[0] != 3 or not video.is_floating_point():
            raise ValueError(f"video is {video.dtype} {tuple(video.shape)}; the codec takes float [3, F, H, W]")
        self.latent_frames(video.shape[1])
        height, width = video.shape[2:]
        if height % self.spatial_factor or width % self.spatial_factor:
            raise ValueError(f"frame size {height}x{width} is not a multiple of {self.spatial_factor}")

    def encode(self, video: Tensor) -> Tensor:
        """float [3, F, H, W] in [-1, 1] -> fp32 [C, T, H / s, W / s]."""
        raise NotImplementedError

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """Pieces float [3, f, H, W] of the video in order, in memory independent of its length."""
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Tensor:
        """[C, T, H', W'] -> fp32 [3, F, H, W] in [-1, 1]."""
        return torch.cat(list(self.decode_stream(latent)), dim=1)


def in_fp32(method: Callable) -> Callable:
    """Takes a codec's method out of autocast: what a latent means must not depend on the caller's precision."""

    @wraps(method)
    def run(self: Codec, x: Tensor, *args):
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args)

    return run


# The embedded transform codec

BLOCK = (4, 8, 8)
MAX_CHANNELS = 3 * math.prod(BLOCK) // 12
# Typical amplitude of a video's coefficients in the orthonormal transform of values in [-1, 1], as a fixed law of
# 1/f kind: AMPLITUDE * OPPONENT[colour] / (1 + 4 f) ** 1.1, f = sqrt((TEMPO t)^2 + (u + v)^2), (t, u, v) the frequency.
AMPLITUDE = 10.0
OPPONENT = (1.0, 0.4, 0.4)
TEMPO = 1.5


def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II: float64 [size, size], row k the k-th frequency."""
    n = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * (n + 0.5) * n[:, None]) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def opponent_matrix() -> Tensor:
    """Orthonormal luma, red-blue and green-magenta axes of RGB: float64 [3, 3] (the DCT of three samples)."""
    return dct_matrix(3)


def amplitudes() -> Tensor:
    """The law above for every coefficient: float64 [3, 4, 8, 8] (colour, t, u, v)."""
    t, u, v = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in BLOCK), indexing="ij")
    frequency = ((TEMPO * t) ** 2 + (u + v) ** 2).sqrt()
    opponent = torch.tensor(OPPONENT, dtype=torch.float64)[:, None, None, None]
    return AMPLITUDE * opponent * (1 + 4 * frequency) ** -1.1


class TransformCodec(Codec):
    """DCT of 4x8x8 blocks in an orthonormal opponent colour space; the largest coefficients of a fixed law are kept.

    Nothing is fitted to data. Channels are ordered by expected amplitude; channel c is divided by
    A (a_c / A) ** whitening, where a_c is its amplitude in the law and A the largest. Decoding does not leave the other
    coefficients zero, which shows the blocks: it takes those of the smoothed picture, in a few rounds, so that the
    result keeps every stored coefficient exactly and has soft seams (0.3 to 0.7 dB).
    """

    spatial_factor = BLOCK[1]
    frames_at_once = 8  # latent frames that `decode_stream` decodes at a time
    smoothing_rounds = 3

    basis: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig | None = None) -> None:
        super().__init__()
        config = config or CodecConfig()
        self.latent_channels = config.channels
        law = amplitudes().flatten()
        kept = law.argsort(descending=True, stable=True)[: config.channels]
        time, space = dct_matrix(BLOCK[0]), dct_matrix(BLOCK[1])
        full = torch.einsum("ai,bj,ck,dl->abcdijkl", opponent_matrix(), time, space, space)
        self.register_buffer("basis", full.reshape(law.numel(), law.numel())[kept].float(), persistent=False)
        scale = AMPLITUDE * (law[kept] / AMPLITUDE) ** config.whitening
        self.register_buffer("scale", scale.float(), persistent=False)
        self.fingerprint = fingerprint(
            "transform", BLOCK, AMPLITUDE, OPPONENT, TEMPO, config.channels, config.whitening
        )

    @in_fp32
    def encode(self, video: Tensor) -> Tensor:
        self.check_video(video)
        first = video[:, :1].expand(-1, self.temporal_factor - 1, -1, -1)
        blocks = to_blocks(torch.cat([first, video], dim=1).float())
        return (blocks @ self.basis.T / self.scale).permute(3, 0, 1, 2).contiguous()

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        for start in range(0, latent.shape[1], self.frames_at_once):
            video = self._decode_blocks(latent[:, start : start + self.frames_at_once])
            if start == 0:  # the first latent frame is one frame, repeated
                still = video[:, : BLOCK[0]].mean(1, keepdim=True)
                video = torch.cat([still, video[:, BLOCK[0] :]], dim=1)
            yield video.clamp(-1, 1)

    @in_fp32
    def _decode_blocks(self, latent: Tensor) -> Tensor:
        """[C, T, H', W'] -> [3, 4 T, H, W]."""
        stored = latent.float().permute(1, 2, 3, 0) * self.scale
        video = from_blocks(stored @ self.basis)
        for _ in range(self.smoothing_rounds):
            smooth = to_blocks(smoothed(video))
            video = from_blocks(smooth + (stored - smooth @ self.basis.T) @ self.basis)
        return video


def to_blocks(video: Tensor) -> Tensor:
    """[3, F, H, W] -> the values of each block [F / 4, H / 8, W / 8, 768]."""
    return rearrange(video, "c (t a) (h b) (w d) -> t h w (c a b d)", a=BLOCK[0], b=BLOCK[1], d=BLOCK[2])


def from_blocks(blocks: Tensor) -> Tensor:
    """The inverse of `to_blocks`."""
    sizes = {"c": 3, "a": BLOCK[0], "b": BLOCK[1], "d": BLOCK[2]}
    return rearrange(blocks, "t h w (c a b d) -> c (t a) (h b) (w d)", **sizes)


def smoothed(video: Tensor) -> Tensor:
    """Each frame of [3, F, H, W] under the binomial 3 x 3 filter; edges repeat."""
    padded = F.pad(video, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


# Wan


class WanCodec(Codec):
    """AutoencoderKLWan in fp32 from `config.path`; latents are normalized by the means and deviations of its config.

    Encoding and decoding run one latent frame at a time with the causal convolutions' caches, so memory does not grow
    with length. With tiling, frames too large are coded in overlapping tiles (of the whole shot, so memory grows).
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        file = Path(config.path, "config.json")
        kind = json.loads(file.read_text()).get("_class_name") if file.is_file() else None
        if kind != "AutoencoderKLWan":
            raise ValueError(
                f"codec.path={config.path!r} is not a diffusers folder of AutoencoderKLWan (its config.json: {kind})"
            )
        self.vae = AutoencoderKLWan.from_pretrained(config.path, torch_dtype=torch.float32, local_files_only=True)
        self.eval().requires_grad_(False)
        if config.tiling:
            self.vae.enable_tiling()
        settings = self.vae.config
        self.latent_channels = settings.z_dim
        self.spatial_factor = settings.scale_factor_spatial
        self.register_buffer("mean", torch.tensor(settings.latents_mean).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.latents_std).view(-1, 1, 1, 1), persistent=False)
        self.fingerprint = fingerprint("wan", weights_digest(self.vae), config.tiling)

    @torch.no_grad()
    @in_fp32
    def encode(self, video: Tensor) -> Tensor:
        self.check_video(video)
        mode = self.vae.encode(video[None].float()).latent_dist.mode()[0]
        return (mode - self.mean) / self.std

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        if self.vae.use_tiling:
            yield self._decode_tiled(latent)
            return
        self.vae.clear_cache()
        cache = self.vae._feat_map  # this stream's own: the next call of `clear_cache` makes another
        for index in range(latent.shape[1]):
            yield self._decode_frame(latent[:, index : index + 1], cache, index == 0)

    @torch.no_grad()
    @in_fp32
    def _decode_tiled(self, latent: Tensor) -> Tensor:
        return self.vae.decode(self._unnormalized(latent)).sample[0]

    @torch.no_grad()
    @in_fp32
    def _decode_frame(self, latent: Tensor, cache: list, first: bool) -> Tensor:
        """The frames of one latent frame [C, 1, H', W'], after those whose features `cache` holds."""
        hidden = self.vae.post_quant_conv(self._unnormalized(latent))
        video = self.vae.decoder(hidden, feat_cache=cache, feat_idx=[0], first_chunk=first)
        if self.vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=self.vae.config.patch_size)
        return video[0].clamp(-1, 1)

    def _unnormalized(self, latent: Tensor) -> Tensor:
        return (latent.float() * self.std + self.mean)[None]


def build_codec(config: CodecConfig) -> Codec:
    """The codec a configuration names, on the CPU."""
    return WanCodec(config) if config.kind == CodecKind.wan else TransformCodec(config)
