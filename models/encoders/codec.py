"""Codecs turn video into latents and back, shot by shot, in memory independent of length.

A codec is causal: the first frame of a video is a latent frame of its own, so that a still image is one latent frame,
and every `temporal_factor` frames after it are one more. What a video is to it, `CodecConfig.continuous` says:

    false    each shot is a video of its own: temporal_factor * n + 1 frames, n + 1 latent frames
    true     the shots of a sample are one video, as HoloCine's weights were trained: the first as above, each later one
             temporal_factor * n frames, n latent frames, which depend on the shots before

Either way every cut lies between two latent frames, and one shot alone comes out the same. `shot` is the index of a
shot in its sample, from 0; this file alone knows how frames and latent frames go together. A picture that stands
between shots, as a reference for the next, is a video of its own in both: `encode` takes it, and streams do not.

Shape letters: F frames (f of a piece), C T H W of a latent.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps

import torch
from torch import Tensor, nn

from moc.errors import UserError


class CodecKind(StrEnum):
    """This setting says what encodes latents: the embedded transform, which has no weights, or the VAE of Wan."""

    lapped = "lapped"
    wan = "wan"


@dataclass(frozen=True)
class CodecConfig:
    """These settings name a codec and describe it.

    kind: `lapped`, which needs no download, or `wan`.
    path: wan only: the folder of an AutoencoderKLWan.
    channels: lapped only: coefficients kept of each block's 768, at most 64. A shot's first frame takes as much as four
    others, so 1/12 of the pixel values is 48 channels in shots of 9 frames, 54 in shots of 17, and tends to 64.
    whitening: lapped only: 0 divides every coefficient by one constant, so that latent error is pixel error; 1 brings
    every channel to about unit variance, so that detail costs a diffusion model as much as the picture does.
    still_detail: lapped only: a first latent frame, which holds one frame and so no motion, keeps finer detail of space
    in the channels of motion. false leaves them zero there: a channel is one frequency in all latent frames, which a
    small model learns sooner, and first frames lose detail (4 dB on storyworld).
    tiling: wan only: code large frames in spatial tiles, for small GPUs.
    continuous: the shots of a sample are one video to the codec (see the module's docstring).
    """

    kind: CodecKind = CodecKind.lapped
    path: str | None = None
    channels: int = 54
    whitening: float = 0.5
    still_detail: bool = True
    tiling: bool = False
    continuous: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= 64:
            raise UserError(f"codec.channels={self.channels} must lie in [1, 64]")
        if not 0 <= self.whitening <= 1:
            raise UserError(f"codec.whitening={self.whitening} must lie in [0, 1]")
        if self.path and self.kind is CodecKind.lapped:
            raise UserError(f"codec.path={self.path} is of the kind wan; say encoders=wan, or leave it out")


class Codec(nn.Module):
    """This is the interface that data, trainer and sampler rely on. A codec supplies `encode_piece` and
    `decode_piece`."""

    latent_channels: int
    temporal_factor: int = 4
    spatial_factor: int
    fingerprint: str
    continuous: bool = False
    latents_at_once: int = 1  # the number of latent frames in a piece

    def encode(self, video: Tensor) -> Tensor:
        """Encodes a sample's only shot or a still: float [3, F, H, W] in [-1, 1] -> fp32 [C, T, H / s, W / s]."""
        self.check_pixels(video)
        self.latent_frames(video.shape[1])
        return self.shot_encoder()([video])

    def decode(self, latent: Tensor) -> Tensor:
        """Decodes a sample's only shot: [C, T, H', W'] -> fp32 [3, F, H, W] in [-1, 1]."""
        return torch.cat(list(self.decode_stream(latent)), dim=1)

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """Returns the same in pieces float [3, f, H, W]."""
        return self.shot_decoder()(latent)

    def shot_encoder(self) -> "ShotEncoder":
        """Returns a new stream, for the shots of one sample in order."""
        return ShotEncoder(self)

    def shot_decoder(self) -> "ShotDecoder":
        """Returns a new stream, for the shots of one sample in order."""
        return ShotDecoder(self)

    def encode_piece(self, frames: Tensor, memory: dict, first: bool) -> Tensor:
        """Returns whole latents of the next frames of a video; first: these begin it. `memory`, at first empty, is the
        codec's own, for what it must know of the frames before."""
        raise NotImplementedError

    def decode_piece(self, latent: Tensor, memory: dict, first: bool) -> Tensor:
        """Returns the frames of the next latents of a video, in the same way."""
        raise NotImplementedError

    def decoding_bytes(self, height: int, width: int) -> float:
        """Returns bytes, roughly, that decoding pictures of that size takes besides the weights."""
        raise NotImplementedError

    # Frames and latent frames

    def begins_video(self, shot: int) -> bool:
        """Returns whether the shot is encoded afresh, not as going on from the one before."""
        return shot == 0 or not self.continuous

    def pixel_frames(self, latent_frames: int, shot: int = 0) -> int:
        """Returns frames that `latent_frames` of a shot decode to."""
        lone = int(self.begins_video(shot))  # the first frame of a video is a latent frame of its own
        return lone + (latent_frames - lone) * self.temporal_factor

    def whole_frames(self, frames: int, shot: int = 0) -> int:
        """Returns the longest run within `frames` that is whole latent frames; 0 where there is none."""
        lone = int(self.begins_video(shot))
        return max(0, lone + (frames - lone) // self.temporal_factor * self.temporal_factor)

    def nearest_frames(self, frames: float, shot: int = 0) -> int:
        """Returns the length of whole latent frames, one at least, nearest to `frames`."""
        lone = int(self.begins_video(shot))
        return self.pixel_frames(max(1, lone + round((frames - lone) / self.temporal_factor)), shot)

    def enclosing_frames(self, frames: int, shot: int = 0) -> int:
        """Returns the shortest length of whole latent frames that is at least `frames`."""
        return self.whole_frames(max(frames, self.pixel_frames(1, shot)) + self.temporal_factor - 1, shot)

    def latent_frames(self, frames: int, shot: int = 0) -> int:
        """Returns how many latent frames a shot has; raises ValueError where its frames are not whole ones."""
        lone = int(self.begins_video(shot))
        if frames < 1 or self.whole_frames(frames, shot) != frames:
            below = max(self.pixel_frames(1, shot), self.whole_frames(frames, shot))
            raise ValueError(
                f"a shot of {frames} frames cannot be encoded: the codec takes {self.temporal_factor}n"
                f"{' + 1' if lone else ''} frames ({below} or {below + self.temporal_factor})"
            )
        return lone + (frames - lone) // self.temporal_factor

    def check_pixels(self, video: Tensor) -> None:
        """Raises ValueError unless video is float [3, F, H, W] with sizes the codec can divide."""
        if video.dim() != 4 or video.shape[0] != 3 or not video.is_floating_point():
            raise ValueError(f"video is {video.dtype} {tuple(video.shape)}; the codec takes float [3, F, H, W]")
        height, width = video.shape[2:]
        if height % self.spatial_factor or width % self.spatial_factor:
            raise ValueError(f"frame size {height}x{width} is not a multiple of {self.spatial_factor}")


class ShotEncoder:
    """This object encodes the shots of one sample, one call each, in order."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self.shot = codec, 0
        self.memory: dict = {}

    def __call__(self, pieces: Iterable[Tensor]) -> Tensor:
        """Encodes the next shot's pieces float [3, f, H, W] in [-1, 1], of any lengths, to fp32 [C, T, H / s, W / s].

        Holds no more than a few frames besides the piece it was handed. Raises ValueError where the shot is not whole
        latent frames.
        """
        codec, first = self.codec, self.codec.begins_video(self.shot)
        if first:
            self.memory = {}
        head = codec.pixel_frames(codec.latents_at_once, self.shot)
        latents: list[Tensor] = []
        num_frames = 0
        for frames in in_pieces(pieces, head, codec.latents_at_once * codec.temporal_factor):
            codec.check_pixels(frames)
            num_frames += frames.shape[1]
            codec.latent_frames(num_frames, self.shot)
            latents.append(codec.encode_piece(frames, self.memory, first and not latents))
        codec.latent_frames(num_frames, self.shot)
        self.shot += 1
        return torch.cat(latents, dim=1)


class ShotDecoder:
    """This object decodes the shots of one sample, one call each, in order: a shot's frames come out as its latent is
    known."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self.shot = codec, 0
        self.memory: dict = {}

    def __call__(self, latent: Tensor) -> Iterator[Tensor]:
        """Decodes the next shot [C, T, H', W'] to pieces of frames float [3, f, H, W]; take all before the next one."""
        first = self.codec.begins_video(self.shot)
        if first:
            self.memory = {}
        self.shot += 1
        for start in range(0, latent.shape[1], self.codec.latents_at_once):
            piece = latent[:, start : start + self.codec.latents_at_once]
            yield self.codec.decode_piece(piece, self.memory, first and start == 0)


def in_pieces(pieces: Iterable[Tensor], head: int, length: int) -> Iterator[Tensor]:
    """Yields the frames of pieces [3, f, H, W], cut anew: one of `head` frames, then of `length`; the last may be
    short."""
    held: Tensor | None = None
    wanted = head
    for piece in pieces:
        held = torch.cat([held, piece], dim=1) if held is not None and held.shape[1] else piece
        while held.shape[1] >= wanted:
            yield held[:, :wanted]
            held, wanted = held[:, wanted:], length
    if held is not None and held.shape[1]:
        yield held


def in_fp32(method: Callable) -> Callable:
    """Takes a codec's method out of autocast: what a latent means must not depend on the caller's precision."""

    @wraps(method)
    def run(self: Codec, x: Tensor, *args):
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args)

    return run
