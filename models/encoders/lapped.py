"""The embedded codec is a training-free lapped transform, decoded to the flattest picture that fits.

- Overlap: values within half a block of a border between two blocks are rotated across it before the blocks are
  transformed (Malvar's lapped orthogonal transform as a pre-filter, which leaves constants alone), in both directions
  of a frame. All of it stays orthonormal, and a coefficient sees 16 x 16 pixels at the cost of 8 x 8.
- Which coefficients: the largest of a fixed law stay. The first latent frame has one frame to hold, so all channels
  go to the frequencies of space (unless `still_detail` is off).
- Decoding: of all videos with the stored coefficients, it finds nearly the one of least total variation over space and
  time, which is what flat colours and sharp edges have in common.

No weights are trained; the constants of the law and of the descent were chosen by hand on storyworld. At its defaults
(64x96, 17 frames a shot) 54 channels store 1/12.09 of the pixel values and hold 30.3 dB on average over shots of seeds
not looked at before, 26 dB at worst; at 128x192 they hold 32.4 dB.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from models.encoders.codec import Codec, CodecConfig, in_fp32
from models.encoders.fingerprint import fingerprint

BLOCK = (4, 8, 8)
HALF = BLOCK[1] // 2
# A coefficient's typical amplitude is AMPLITUDE * OPPONENT[colour] / (1 + 4 f) ** DECAY, f = TEMPO t + u + v, with
# (t, u, v) its frequency.
AMPLITUDE = 10.0
OPPONENT = (1.0, 0.5, 0.35)
TEMPO = 1.5
DECAY = 1.2
SOFT = 1e-2  # added to squared derivatives of pixels, so that total variation has a gradient everywhere


def dct_matrix(size: int) -> Tensor:
    """Returns the orthonormal DCT-II: float64 [size, size], row k the k-th frequency."""
    n = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * (n + 0.5) * n[:, None]) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def opponent_matrix() -> Tensor:
    """Returns orthonormal luma, red-blue and green-magenta axes of RGB: float64 [3, 3] (the DCT of three samples)."""
    return dct_matrix(3)


def block_transform() -> Tensor:
    """Returns the DCT of a block in opponent colours: float64 [768, 768], orthonormal, a row for each (colour, t, u,
    v)."""
    time, space = dct_matrix(BLOCK[0]), dct_matrix(BLOCK[1])
    full = torch.einsum("ai,bj,ck,dl->abcdijkl", opponent_matrix(), time, space, space)
    return full.flatten(4).flatten(0, 3)


def amplitudes() -> Tensor:
    """Returns the law above for every coefficient: float64 [3, 4, 8, 8] (colour, t, u, v)."""
    t, u, v = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in BLOCK), indexing="ij")
    opponent = torch.tensor(OPPONENT, dtype=torch.float64)[:, None, None, None]
    return AMPLITUDE * opponent * (1 + 4 * (TEMPO * t + u + v)) ** -DECAY


def kept_coefficients(channels: int, still_detail: bool = True) -> Tensor:
    """Returns the one of a block's 768 coefficients that each channel holds: int64 [2, C], of first latent frames, of
    others.

    A channel of temporal frequency 0 holds the same coefficient in both. In first latent frames each other channel
    holds the next one of temporal frequency 0, or without `still_detail` its own, which is 0 where nothing moves.
    """
    law = amplitudes()
    still = torch.zeros_like(law, dtype=torch.bool)
    still[:, 0] = True
    order = law.flatten().argsort(descending=True, stable=True)
    later = order[:channels]
    if not still_detail:
        return torch.stack([later, later])
    of_space = order[still.flatten()[order]][:channels]
    steady = still.flatten()[later]
    first = torch.empty_like(later)
    first[steady], first[~steady] = of_space.tensor_split([int(steady.sum())])
    return torch.stack([first, later])


def border_rotation() -> Tensor:
    """Returns the rotation of the 8 values around a border of blocks: float64 [8, 8], orthonormal.

    What is mirrored at the border stays; of the rest, the DCT-IV is put in the place of the DCT-II.
    """
    n = torch.arange(HALF, dtype=torch.float64) + 0.5
    dct_iv = torch.cos(torch.pi / HALF * n * n[:, None]) * (2 / HALF) ** 0.5
    one, flip = torch.eye(HALF, dtype=torch.float64), torch.eye(HALF, dtype=torch.float64).flip(0)
    butterfly = torch.cat([torch.cat([one, flip], 1), torch.cat([flip, -one], 1)]) / 2**0.5
    turn = torch.block_diag(one, flip @ dct_matrix(HALF).T @ dct_iv @ flip)
    return butterfly @ turn @ butterfly


class LappedCodec(Codec):
    """This is the codec that the module describes. Every stored coefficient survives decoding exactly.

    Channels are ordered by expected amplitude; a coefficient is divided by A (a / A) ** whitening, where a is its
    amplitude in the law and A the largest.
    """

    spatial_factor = BLOCK[1]
    latents_at_once = 8
    # Descent on the total variation with Nesterov's momentum; more rounds add 0.1 dB at most. The first steps are too
    # long for flat areas, where noise grows, the last short enough to take it back: slower cooling would leave it.
    rounds, step, cooling, momentum = 6, 0.04, 0.75, 0.85

    basis: Tensor
    scale: Tensor
    rotation: Tensor

    def __init__(self, config: CodecConfig | None = None) -> None:
        super().__init__()
        config = config or CodecConfig()
        self.latent_channels, self.continuous = config.channels, config.continuous
        kept = kept_coefficients(config.channels, config.still_detail)
        self.register_buffer("basis", block_transform()[kept].float(), persistent=False)  # [2, C, 768]
        scale = AMPLITUDE * (amplitudes().flatten()[kept] / AMPLITUDE) ** config.whitening
        self.register_buffer("scale", scale.float(), persistent=False)  # [2, C]
        rotation = torch.kron(border_rotation(), border_rotation())
        self.register_buffer("rotation", rotation.float(), persistent=False)
        law = (BLOCK, AMPLITUDE, OPPONENT, TEMPO, DECAY) + (() if config.still_detail else ("motion alone",))
        self.fingerprint = fingerprint("lapped", law, config.channels, config.whitening, config.continuous)

    @in_fp32
    def encode_piece(self, frames: Tensor, memory: dict, first: bool) -> Tensor:
        if first:  # the first frame is encoded as if it were repeated
            frames = torch.cat([frames[:, :1].expand(-1, BLOCK[0] - 1, -1, -1), frames], dim=1)
        basis, scale = self._of_latents(frames.shape[1] // BLOCK[0], first)
        return (self._analyzed(frames.float(), basis) / scale).permute(3, 0, 1, 2).contiguous()

    @in_fp32
    def decode_piece(self, latent: Tensor, memory: dict, first: bool) -> Tensor:
        basis, scale = self._of_latents(latent.shape[1], first)
        video = self._flattest(latent.float().permute(1, 2, 3, 0) * scale, basis)
        if first:
            video = torch.cat([video[:, : BLOCK[0]].mean(1, keepdim=True), video[:, BLOCK[0] :]], dim=1)
        return video.clamp(-1, 1)

    def decoding_bytes(self, height: int, width: int) -> float:
        frames = self.latents_at_once * BLOCK[0]
        return 4.0 * 13 * 3 * frames * height * width  # the descent holds 13 videos of a piece at once

    def _of_latents(self, num_latents: int, first: bool) -> tuple[Tensor, Tensor]:
        """Returns basis [T, C, 768] and scale [T, 1, 1, C] of each latent frame of a piece."""
        later = (torch.arange(num_latents, device=self.basis.device) >= first).long()
        return self.basis[later], self.scale[later][:, None, None]

    def _analyzed(self, video: Tensor, basis: Tensor) -> Tensor:
        """Returns the coefficients [T, H', W', C] of a video [3, 4 T, H, W]."""
        return torch.einsum("thwk,tck->thwc", to_blocks(across_borders(video, self.rotation)), basis)

    def _synthesized(self, coefficients: Tensor, basis: Tensor) -> Tensor:
        """Returns the video of these coefficients, all others 0."""
        blocks = torch.einsum("thwc,tck->thwk", coefficients, basis)
        return across_borders(from_blocks(blocks), self.rotation.T)

    def _flattest(self, stored: Tensor, basis: Tensor) -> Tensor:
        """Returns the video [3, 4 T, H, W] with coefficients `stored` and little total variation."""
        video = ahead = self._synthesized(stored, basis)
        for index in range(self.rounds):
            moved = ahead - self.step * self.cooling**index * variation_gradient(ahead)
            before, video = video, moved + self._synthesized(stored - self._analyzed(moved, basis), basis)
            ahead = video + self.momentum * (video - before)
        return video


def to_blocks(video: Tensor) -> Tensor:
    """Returns the values of each block of [3, F, H, W]: [F / 4, H / 8, W / 8, 768]."""
    return rearrange(video, "c (t a) (h b) (w d) -> t h w (c a b d)", a=BLOCK[0], b=BLOCK[1], d=BLOCK[2])


def from_blocks(blocks: Tensor) -> Tensor:
    """Returns the inverse of `to_blocks`."""
    sizes = {"c": 3, "a": BLOCK[0], "b": BLOCK[1], "d": BLOCK[2]}
    return rearrange(blocks, "t h w (c a b d) -> c (t a) (h b) (w d)", **sizes)


def across_borders(video: Tensor, rotation: Tensor) -> Tensor:
    """Returns [3, F, H, W] with each 8 x 8 patch around a corner of blocks turned by `rotation` [64, 64].

    Beyond its edges a frame is mirrored, which no rotation changes.
    """
    for dim in (-2, -1):
        low, high = video.narrow(dim, 0, HALF), video.narrow(dim, video.shape[dim] - HALF, HALF)
        video = torch.cat([low.flip(dim), video, high.flip(dim)], dim=dim)
    patches = rearrange(video, "c f (h b) (w d) -> c f h w (b d)", b=BLOCK[1], d=BLOCK[2]) @ rotation.T
    turned = rearrange(patches, "c f h w (b d) -> c f (h b) (w d)", b=BLOCK[1], d=BLOCK[2])
    return turned[..., HALF:-HALF, HALF:-HALF]


def variation_gradient(video: Tensor) -> Tensor:
    """Returns the gradient of the total variation of [3, F, H, W], summing sqrt(SOFT + squared derivative) over pixels.

    The derivative is that of all colours by time and space together, so that an edge is an edge in all; its square is
    the mean of those to either side.
    """
    squares, gradient = torch.full_like(video[0], SOFT), torch.zeros_like(video)
    steps = [video.diff(dim=dim) for dim in (1, 2, 3)]
    for dim, step in enumerate(steps):
        half = step.square().sum(0) / 2
        for side in (0, 1):
            squares.narrow(dim, side, half.shape[dim]).add_(half)
    inverse = squares.rsqrt()
    for dim, step in enumerate(steps):
        length = step.shape[dim + 1]
        pull = step * (inverse.narrow(dim, 0, length) + inverse.narrow(dim, 1, length)) / 2
        gradient.narrow(dim + 1, 1, length).add_(pull)
        gradient.narrow(dim + 1, 0, length).sub_(pull)
    return gradient
