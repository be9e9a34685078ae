"""This package builds or loads the models, codecs and text encoders that a configuration names."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moc import MoCConfig
from moc.errors import UserError, check_least
from moc.training import Parallel
from moc.training.swap import Swap
from models.checkpoints.contents import Contents
from models.checkpoints.experts import BOUNDARY, Experts, check_order
from models.checkpoints.loras import LoraChoice
from models.checkpoints.opening import load_checkpoint, open_checkpoint
from models.encoders.codec import CodecConfig
from models.encoders.pair import Encoders, EncodersConfig, build_codec, build_encoders, load_codec, load_encoders
from models.encoders.text import TextConfig, build_text_encoder
from models.fresh import drawn_apart
from models.frozen import Base
from models.lora import Lora
from models.mmdit import MMDiT
from models.rope import check_heads
from models.stream import StreamModel
from models.wan import WanTransformer3DModel

__all__ = [
    "CodecConfig",
    "Contents",
    "Encoders",
    "EncodersConfig",
    "Experts",
    "Family",
    "ModelConfig",
    "TextConfig",
    "build_codec",
    "build_encoders",
    "build_model",
    "build_text_encoder",
    "load_codec",
    "load_denoiser",
    "load_encoders",
    "load_model",
    "move_model",
    "save_model",
]


class Family(StrEnum):
    """A family is a kind of transformer: the model of LCT with text in its stream, or that of Wan."""

    mmdit = "mmdit"
    wan = "wan"


FAMILIES = {Family.mmdit: MMDiT, Family.wan: WanTransformer3DModel}


@dataclass(frozen=True)
class ModelConfig:
    """These settings name a model and its sizes.

    family: the kind of transformer.
    path: weights to start from (anything `load_model` reads), from which the sizes then come; null starts from fresh
    ones.
    dim: the width of a token.
    num_layers: the number of blocks.
    num_heads: the attention heads of a block.
    ffn_dim: the width of the hidden layer of a block's feed-forward network.
    input_skip: see `models.layers.Output`.
    frame_place: see `models.layers.FramePlace`.
    cut_gap: latent frames left out of the running time at each true cut (wan); null takes that of the weights at path,
    or 0.
    lora_rank: above 0, train adapters of that rank.
    lora_targets: the linears that have adapters, by the ends of their names (wan: to_q to_k to_v to_out.0 net.0.proj
    net.2; mmdit: to_qkv to_out ffn.0 ffn.2).
    lora_base: how the linears of the blocks under adapters are kept: fp32, bf16, or fp8 or int8 with a scale a row.
    """

    family: Family = Family.mmdit
    path: str | None = None
    dim: int = 128
    num_layers: int = 3
    num_heads: int = 4
    ffn_dim: int = 512
    input_skip: bool = False
    frame_place: bool = False
    cut_gap: float | None = None
    lora_rank: int = 0
    lora_targets: list[str] = field(default_factory=list)
    lora_base: Base = Base.fp32

    def __post_init__(self) -> None:
        check_least(self, "model", 1, "dim", "num_layers", "num_heads", "ffn_dim")
        if self.cut_gap is not None:
            check_least(self, "model", 0, "cut_gap")
            if self.family != Family.wan:
                raise UserError(f"model.cut_gap={self.cut_gap} is for model.family=wan; leave it at null")
        if self.lora_rank < 0 or (self.lora_rank > 0) != bool(self.lora_targets):
            raise UserError(
                f"model.lora_rank={self.lora_rank} must be 0, or above 0 with model.lora_targets=[NAME, ...]"
            )
        if self.lora_base != Base.fp32 and not self.lora_rank:
            raise UserError(f"model.lora_base={self.lora_base} is of weights under an adapter: set model.lora_rank")


def build_model(config: ModelConfig, latent_channels: int, text_dim: int) -> StreamModel:
    """Returns a model with the weights of `config.path`, on the CPU, or with fresh random ones, on torch's default
    device; in fp32 but for `lora_base`.

    Raises UserError where the model there is of another family.

    latent_channels, text_dim: widths of the latents and text features it will see.
    """
    if config.lora_rank and not config.path:
        raise UserError("a LoRA needs weights to adapt: set model.path")
    if config.path:
        checkpoint = open_checkpoint(config.path)
        if checkpoint.kind != FAMILIES[config.family].__name__:
            raise UserError(
                f"model.path={config.path} holds a {checkpoint.kind}, not one of model.family={config.family}; "
                "set the family that fits (for Wan's weights: model=wan)"
            )
        if config.cut_gap is not None:
            checkpoint = replace(checkpoint, config=checkpoint.config | {"cut_gap": config.cut_gap})
        model = load_checkpoint(checkpoint, base=config.lora_base)
        if config.lora_rank:
            base = str(checkpoint.path.resolve())  # names the checkpoint, since the run may train on
            model.add_lora(Lora(config.lora_rank, config.lora_targets, base, checkpoint.fingerprint()))
        return model
    return drawn_apart(partial(_fresh, config, latent_channels, text_dim))


def _fresh(config: ModelConfig, latent_channels: int, text_dim: int) -> StreamModel:
    if config.family == Family.mmdit:
        sizes = {
            name: getattr(config, name)
            for name in ("dim", "num_layers", "num_heads", "ffn_dim", "input_skip", "frame_place")
        }
        return MMDiT(latent_channels=latent_channels, text_dim=text_dim, **sizes)
    check_heads(config.dim, config.num_heads)
    return WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cut_gap=config.cut_gap or 0.0,
    )


def load_model(
    path: str | Path | Contents,
    dtype: torch.dtype | None = torch.float32,
    weights: str = "ema",
    loras: Sequence[LoraChoice] = (),
    low_noise: bool = False,
    base: Base = Base.fp32,
) -> StreamModel:
    """Returns the model at `path`, on the CPU: a run or training checkpoint, a diffusers folder, a file with original
    names, or `Contents.sound` of one of them.

    An adapter comes merged into its base.
    dtype: of its weights, norms and time embedding excepted; None as they are stored.
    weights: "ema" or "model", where a training checkpoint has both. loras: others' adapters, merged in turn.
    low_noise: the model is the low-noise one of two, of which a LoRA may be. base: how the linears of the blocks are
    kept, frozen; fp32 is as all weights are.
    Raises UserError where the tensors are not exactly those of a model that is known.
    """
    return load_checkpoint(open_checkpoint(path, weights).with_loras(loras, low_noise), dtype, base)


def load_denoiser(
    path: str | Path | Contents,
    low_noise: str | Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    loras: Sequence[LoraChoice] = (),
    low_noise_loras: Sequence[LoraChoice] | None = None,
    base: Base = Base.fp32,
) -> StreamModel | Experts:
    """Loads what a sampler calls, on the CPU: the model at `path`, as `load_model` finds it, or two experts.

    path: of a folder with both (see `Contents.experts`), or of the high-noise one. low_noise: then the path of the
    other one. The boundary is where the high-noise one's noise levels begin (`Contents.own_flow`), else the release's.
    loras: merged into the model, or into both experts; low_noise_loras: into the low-noise one instead. base: as in
    `load_model`.
    Raises UserError where the two are no pair, are one, or are swapped.
    """
    contents = Contents.at(path)
    pair = contents.experts
    if low_noise:
        if pair:
            raise UserError(
                f"{contents.path} holds two experts; with low_noise_checkpoint={low_noise} name the high-noise one"
            )
        pair = contents.path, Path(low_noise)
    if pair is None:
        if low_noise_loras is not None:
            raise UserError("low_noise_lora is for a pair of experts; this model is a single one: set lora")
        return load_model(path, dtype, loras=loras, base=base)
    high, low = (Contents(expert) for expert in pair)
    if high.model_path("ema").resolve() == low.model_path("ema").resolve():
        raise UserError(f"{high.path} and {low.path} are one model; name the high-noise expert and the low-noise one")
    starts = high.own_flow.sigma_min, low.own_flow.sigma_min
    if starts[0] < starts[1]:
        raise UserError(
            f"{high.path} is for noise levels from {starts[0]} on, {low.path} from {starts[1]}: "
            "the high-noise expert is checkpoint, the other one low_noise_checkpoint"
        )
    if starts[0] == starts[1]:
        check_order(*pair)
    of_low = loras if low_noise_loras is None else low_noise_loras
    low_model = load_model(low.path, dtype, loras=of_low, low_noise=True, base=base)
    return Experts(load_model(high.path, dtype, loras=loras, base=base), low_model, starts[0] or BOUNDARY)


def move_model(model: Any, parallel: Parallel, offload: bool = False, swap_blocks: int = 0) -> nn.Module:
    """Returns the model, ready to sample, on the device of this process or those of its team. offload: of two experts
    the one in use alone. swap_blocks: of each expert, so many blocks wait in the host's memory. Raises UserError where
    there are not two experts to offload, not so many blocks, or a team holds them."""
    model.eval().requires_grad_(False)
    experts = (model.high, model.low) if isinstance(model, Experts) else (model,)
    if swap_blocks and parallel.is_sharded:
        raise UserError("swap_blocks is for a model that one process holds: leave out parallel.shard and .sequence")
    if not offload:
        for expert in experts:
            if swap_blocks:
                Swap(expert, swap_blocks, parallel.device)
            else:
                parallel.spread(expert)
        return model
    if not isinstance(model, Experts):
        raise UserError("offload=true is for a pair of experts, of which one waits in CPU memory; this model is one")
    if parallel.is_sharded:
        raise UserError("offload=true is for experts that one process holds: leave out parallel.shard and .sequence")
    model.offload(parallel.device)
    return model


def save_model(model: StreamModel, folder: str | Path, config: MoCConfig) -> None:
    """Writes a diffusers folder, and the attention settings as `moc.json` beside the weights."""
    model.save_pretrained(folder)
    config.save(folder)
