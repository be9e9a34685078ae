"""The plain embedded codec: a training-free orthonormal space-time transform, for runs without any download.

`models/lapped.py` keeps more in as many channels; this one stays for what was trained on its latents, as the demo."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.codec import Codec, CodecConfig, in_fp32
from models.fingerprint import fingerprint

BLOCK = (4, 8, 8)
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


def block_transform() -> Tensor:
    """The DCT of a block in opponent colours: float64 [768, 768], orthonormal, a row for each (colour, t, u, v)."""
    time, space = dct_matrix(BLOCK[0]), dct_matrix(BLOCK[1])
    full = torch.einsum("ai,bj,ck,dl->abcdijkl", opponent_matrix(), time, space, space)
    return full.flatten(4).flatten(0, 3)


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
    latents_at_once = 8
    smoothing_rounds = 3

    basis: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig | None = None) -> None:
        super().__init__()
        config = config or CodecConfig()
        self.latent_channels, self.continuous = config.channels, config.continuous
        law = amplitudes().flatten()
        kept = law.argsort(descending=True, stable=True)[: config.channels]
        self.register_buffer("basis", block_transform()[kept].float(), persistent=False)
        scale = AMPLITUDE * (law[kept] / AMPLITUDE) ** config.whitening
        self.register_buffer("scale", scale.float(), persistent=False)
        self.fingerprint = fingerprint(
            "transform", BLOCK, AMPLITUDE, OPPONENT, TEMPO, config.channels, config.whitening, config.continuous
        )

    @in_fp32
    def encode_piece(self, frames: Tensor, memory: dict, first: bool) -> Tensor:
        if first:  # a latent frame of its own: the frame repeated
            frames = torch.cat([frames[:, :1].expand(-1, BLOCK[0] - 1, -1, -1), frames], dim=1)
        blocks = to_blocks(frames.float())
        return (blocks @ self.basis.T / self.scale).permute(3, 0, 1, 2).contiguous()

    @in_fp32
    def decode_piece(self, latent: Tensor, memory: dict, first: bool) -> Tensor:
        video = self._decode_blocks(latent)
        if first:
            still = video[:, : BLOCK[0]].mean(1, keepdim=True)
            video = torch.cat([still, video[:, BLOCK[0] :]], dim=1)
        return video.clamp(-1, 1)

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
