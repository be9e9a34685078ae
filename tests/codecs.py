"""This module has codecs for tests: tiny ones of every kind, whole samples through them, and a watch on the frames they
hold."""

import weakref
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.encoders.codec import Codec, CodecConfig, CodecKind
from models.encoders.pair import build_codec
from models.encoders.vae import WanCodec
from tests.models.test_vae import WAN21, WAN22


def save_tiny_wan(folder: Path, settings: dict = WAN21) -> Path:
    """Returns a folder of a random AutoencoderKLWan."""
    torch.manual_seed(0)
    channels = settings["z_dim"]
    vae = AutoencoderKLWan(
        **settings, latents_mean=[0.1 * c for c in range(channels)], latents_std=[1.0 + c for c in range(channels)]
    )
    vae.save_pretrained(folder)
    return folder


class TinyCodecs:
    """This object makes codecs by kind: "wan 2.1", "wan 2.2", or a CodecKind that needs no weights."""

    def __init__(self, folder: Path) -> None:
        self.wan = {f"wan 2.{n}": save_tiny_wan(folder / str(n), settings) for n, settings in ((1, WAN21), (2, WAN22))}

    def __call__(self, kind: str, continuous: bool = True, tiling: bool = False) -> Codec:
        if kind in self.wan:
            return build_codec(CodecConfig(CodecKind.wan, str(self.wan[kind]), tiling=tiling, continuous=continuous))
        return build_codec(CodecConfig(CodecKind(kind), channels=16, continuous=continuous))


def split(video: Tensor, codec: Codec, latents: list[int]) -> list[Tensor]:
    """Returns the shots of a video by their latent frames."""
    lengths = [codec.pixel_frames(length, shot) for shot, length in enumerate(latents)]
    return list(video.split(lengths, dim=1))


def encode_shots(codec: Codec, shots: list[Tensor]) -> list[Tensor]:
    """Returns each shot in uneven pieces of a few frames."""
    encode = codec.shot_encoder()
    return [encode(shot.split(3, dim=1)) for shot in shots]


def decode_shots(codec: Codec, latents: list[Tensor]) -> list[Tensor]:
    decode = codec.shot_decoder()
    return [torch.cat(list(decode(latent)), dim=1) for latent in latents]


def whole(codec: Codec, video: Tensor) -> tuple[Tensor, Tensor]:
    """Returns latent and decoded video of one causal pass over the whole, by diffusers itself for Wan."""
    if not isinstance(codec, WanCodec):
        alone = type(codec)(CodecConfig(channels=16))
        latent = alone.encode(video)
        return latent, alone.decode(latent)
    with torch.no_grad():
        mode = codec.vae.encode(video[None]).latent_dist.mode()
        return ((mode - codec.mean) / codec.std)[0], codec.vae.decode(mode).sample[0]


class Watch:
    """A watch hands out frames whose memory it watches. most: the frames of the pieces that were held at once."""

    def __init__(self) -> None:
        self.arrays: list[tuple[weakref.ref, int]] = []
        self.most = 0

    def __call__(self, frames: Tensor) -> Tensor:
        array = frames.numpy().copy()
        self.arrays.append((weakref.ref(array), frames.shape[1]))
        self.most = max(self.most, sum(length for held, length in self.arrays if held() is not None))
        return torch.from_numpy(array)  # every view of this tensor keeps the array alive


class HeldTensors(TorchDispatchMode):
    """Watches what operators return. most: the bytes that were held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self._sizes = 0, 0, dict[int, int]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (memory := tensor.untyped_storage())._cdata not in self._sizes:
                self._sizes[memory._cdata] = memory.nbytes()
                self.now += memory.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(memory, self._forget, memory._cdata)
        return out

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
