"""AutoencoderKLWan has the codec interface here (Wan2.1: 16 channels, 4x8x8; Wan2.2: 48 channels, 4x16x16).

Encoder and decoder run one latent frame at a time with the causal convolutions' feature caches, as diffusers' own
`encode` and `decode` do, so that a video may go on where its last piece ended and memory does not grow with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor, nn

from moc.errors import UserError
from moc.training.checkpoint import read_json
from models.checkpoints.strict import load_folder
from models.checkpoints.tensors import download_hint
from models.encoders.codec import Codec, CodecConfig, in_fp32
from models.encoders.fingerprint import fingerprint, weights_digest

TILE, TILE_STRIDE = 256, 192  # pixels, as in diffusers
# So many maps of full size and of the decoder's fewest channels are held while a latent frame is decoded: what
# convolutions keep of the frames before, and what four frames go through. Tensors are 52 of them, and 91 in Wan2.2's
# residual decoder; with what a GPU's convolutions need besides, the first come to 59 (docs/benchmarks/sampling.md).
MAPS, RESIDUAL_MAPS = 60, 100

Features = list  # earlier frames that each causal convolution keeps: a tensor, a mark, or None


@dataclass(frozen=True)
class Scale:
    """A scale says how many pixels of the whole frame one value of a network's input and of its output stands for."""

    input: int
    output: int


class WanCodec(Codec):
    """This codec runs AutoencoderKLWan in fp32 from `config.path`; latents are normalized by the means and deviations
    of its config.

    With tiling, frames over 256 pixels a side are coded in overlapping tiles that are blended as diffusers does it,
    eight latent frames at a time. Features of the tiles not at work wait in host memory: together they are larger than
    those of a whole frame.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        if config.path is None:
            raise UserError("codec.kind=wan needs codec.path=FOLDER, a diffusers folder of AutoencoderKLWan")
        file = Path(config.path, "config.json")
        record = read_json(file) if file.is_file() else {}
        kind = record.get("_class_name")
        if kind != "AutoencoderKLWan":
            raise UserError(
                f"codec.path={config.path!r} is not a diffusers folder of AutoencoderKLWan (its config.json: {kind})"
                f"{download_hint(config.path)}"
            )
        self.vae = load_folder(file.parent, lambda: AutoencoderKLWan.from_config(record), torch.float32)
        self.eval().requires_grad_(False)
        settings = self.vae.config
        self.continuous, self.tiling = config.continuous, config.tiling
        self.latents_at_once = 8 if config.tiling else 1
        self.latent_channels = settings.z_dim
        self.spatial_factor = settings.scale_factor_spatial
        self.patch_size = settings.patch_size or 1
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(settings.latents_mean).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.latents_std).view(-1, 1, 1, 1), persistent=False)
        scales = settings.latents_mean, settings.latents_std
        self.fingerprint = fingerprint("wan", weights_digest(self.vae), *scales, config.tiling, config.continuous)

    @torch.no_grad()
    @in_fp32
    def encode_piece(self, frames: Tensor, memory: dict, first: bool) -> Tensor:
        vae, factor = self.vae, self.temporal_factor

        def run(patches: Tensor, features: Features) -> Tensor:
            runs = patches.split([1] * first + [factor] * (patches.shape[2] // factor), dim=2)
            hidden = (vae.encoder(run, feat_cache=features, feat_idx=[0]) for run in runs)
            return torch.cat([vae.quant_conv(x) for x in hidden], dim=2)

        patches = patchify(frames[None].float(), self.patch_size)
        moments = self._in_tiles(run, vae.encoder, patches, memory, Scale(self.patch_size, self.spatial_factor))
        mode = moments.chunk(2, dim=1)[0]
        return (mode[0] - self.mean) / self.std

    @torch.no_grad()
    @in_fp32
    def decode_piece(self, latent: Tensor, memory: dict, first: bool) -> Tensor:
        vae = self.vae

        def run(latent: Tensor, features: Features) -> Tensor:
            hidden = (vae.post_quant_conv(frame) for frame in latent.split(1, dim=2))
            frames = [
                vae.decoder(x, feat_cache=features, feat_idx=[0], first_chunk=first and i == 0)
                for i, x in enumerate(hidden)
            ]
            return torch.cat(frames, dim=2)

        unnormalized = (latent.float() * self.std + self.mean)[None]
        patches = self._in_tiles(run, vae.decoder, unnormalized, memory, Scale(self.spatial_factor, self.patch_size))
        return unpatchify(patches, self.patch_size)[0].clamp(-1, 1)

    def decoding_bytes(self, height: int, width: int) -> float:
        if self.tiling:
            height, width = min(height, TILE), min(width, TILE)
        settings = self.vae.config
        maps = RESIDUAL_MAPS if settings.is_residual else MAPS
        return 4.0 * maps * (settings.decoder_base_dim or settings.base_dim) * height * width / self.patch_size**2

    def _in_tiles(
        self, run: Callable[[Tensor, Features], Tensor], network: nn.Module, x: Tensor, memory: dict, scale: Scale
    ) -> Tensor:
        """Applies `run` to x [1, c, t, h, w] whole, or tile by tile; `memory` holds the features that the network keeps
        of each, which `run` updates."""
        size, stride = TILE // scale.input, TILE_STRIDE // scale.input
        height, width = x.shape[-2:]
        if not self.tiling or max(height, width) <= size:
            return run(x, memory.setdefault("whole", no_features(network)))
        rows = []
        for top in range(0, height, stride):
            row = []
            for left in range(0, width, stride):
                features = moved(memory.get((top, left), no_features(network)), x.device)
                row.append(run(x[..., top : top + size, left : left + size], features))
                memory[top, left] = moved(features, torch.device("cpu"))
            rows.append(row)
        return self._blended(rows, TILE // scale.output, TILE_STRIDE // scale.output)

    def _blended(self, rows: list[list[Tensor]], size: int, stride: int) -> Tensor:
        """Returns one picture of overlapping tiles."""
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                if i:
                    self.vae.blend_v(rows[i - 1][j], tile, size - stride)
                if j:
                    self.vae.blend_h(row[j - 1], tile, size - stride)
        return torch.cat([torch.cat([tile[..., :stride, :stride] for tile in row], dim=-1) for row in rows], dim=-2)


def no_features(network: nn.Module) -> Features:
    """Returns the feature cache of a network that has seen nothing."""
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in network.modules())


def moved(features: Features, device: torch.device) -> Features:
    """Returns the feature cache on a device."""
    return [x.to(device) if isinstance(x, Tensor) else x for x in features]
