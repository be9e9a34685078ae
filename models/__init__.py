"""Models, codecs and text encoders: what a configuration names, built or loaded."""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from diffusers import ModelMixin

from moc import MoCConfig
from models.mmdit import MMDiT
from models.text import TextConfig, build_text_encoder
from models.vae import CodecConfig, build_codec

__all__ = [
    "CodecConfig",
    "ModelConfig",
    "TextConfig",
    "build_codec",
    "build_model",
    "build_text_encoder",
    "load_model",
    "save_model",
]


class Family(StrEnum):
    mmdit = "mmdit"


@dataclass(frozen=True)
class ModelConfig:
    """A model with the codec and the text encoder it is trained with.

    path: weights to start from (anything `load_model` reads); the sizes below then come from there.
    input_skip: see `models.layers.Output`.
    """

    family: Family = Family.mmdit
    path: str = ""
    latent_channels: int = 64
    text_dim: int = 128
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 512
    input_skip: bool = False
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)


def build_model(config: ModelConfig) -> ModelMixin:
    """A model with fresh random weights, or with those of `config.path`, in fp32 on the CPU."""
    if config.path:
        return load_model(config.path)
    names = ("latent_channels", "text_dim", "dim", "num_layers", "num_heads", "ffn_dim", "input_skip")
    return MMDiT(**{name: getattr(config, name) for name in names})


def load_model(path: str | Path) -> ModelMixin:
    """The model in a diffusers folder, in fp32 on the CPU; raises ValueError where there is none."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    if kind != "MMDiT":
        raise ValueError(f"{folder} holds a {kind}; this project reads MMDiT")
    return MMDiT.from_pretrained(folder, local_files_only=True)


def save_model(model: ModelMixin, folder: str | Path, config: MoCConfig) -> None:
    """Writes a diffusers folder, and the attention settings as `moc.json` beside the weights."""
    model.save_pretrained(folder)
    config.save(folder)
