"""This module finds a checkpoint on disk and loads it strictly; `export.py` beside it writes it in other forms.

It reads a diffusers folder (sharded or not), a file or folder with the Wan release's original names, with or without
ComfyUI's prefix (HoloCine's files are such), a training run or checkpoint, also of a LoRA, which reads as merged into
its base. Names inside this module are diffusers'.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from moc import MoCConfig
from moc.errors import UserError
from moc.training.checkpoint import read_json
from models.checkpoints.contents import Contents
from models.checkpoints.loras import LoraChoice, MergedLora
from models.checkpoints.names import COMFYUI_PREFIX, to_diffusers_name
from models.checkpoints.tensors import TensorSource, check_tensors, listed, shapes
from models.earlier import cut_gap
from models.encoders.fingerprint import VALUES_PER_TENSOR, tensors_digest
from models.frozen import Base, packed_tensors, replace_linears
from models.lora import Adapter, Lora, read_lora
from models.mmdit import MMDiT
from models.stream import StreamModel
from models.wan import WanTransformer3DModel

CLASSES: dict[str, type[StreamModel]] = {"MMDiT": MMDiT, "WanTransformer3DModel": WanTransformer3DModel}
RELEASE_CLASS = "WanModel"  # stands in the release's config.json; the tensors' shapes tell its settings as well
HEAD_DIM = 128  # every Wan model has it; files without a config do not tell it


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint is a model on disk. root: the training checkpoint or pipeline it belongs to, or its own path. form:
    diffusers, original or comfyui names. config: its class's arguments. stored: diffusers name -> the name in the file.
    moc: attention settings kept beside the weights. adapters: LoRAs of the stored weights, each trained on top of the
    ones before it. loras: those of others, merged after these."""

    root: Path
    form: str
    kind: str
    config: dict[str, Any]
    source: TensorSource
    stored: dict[str, str]
    moc: MoCConfig | None
    adapters: tuple[Adapter, ...] = ()
    loras: tuple[MergedLora, ...] = ()

    @property
    def path(self) -> Path:
        """Returns the model's own file or folder, or the adapter's where the checkpoint is a LoRA."""
        return self.adapters[-1].source.path if self.adapters else self.source.path

    def read(self, name: str) -> Tensor:
        """Returns one tensor, as stored; where a LoRA is merged into it fp32, for the caller to round."""
        weight = self.source.read(self.stored[name])
        for adapter in self.adapters:
            weight = adapter.merge(name, weight)
        for lora in self.loras:
            weight = lora.merge(name, weight)
        return weight

    def with_loras(self, choices: Sequence[LoraChoice], low_noise: bool = False) -> "Checkpoint":
        """Returns this checkpoint with LoRAs merged. low_noise: it is the low-noise one of two. Raises UserError for
        those of another model."""
        tensors = {name: self.source.shapes[key] for name, key in self.stored.items()}
        return replace(self, loras=tuple(MergedLora.open(choice, tensors, low_noise) for choice in choices))

    def fingerprint(self) -> str:
        """Returns a hash of the weights: names, shapes, dtypes and of each tensor 4096 values. Form and path do not
        count."""
        sources = [(self.source, self.stored)] + [(a.source, {n: n for n in a.source.names()}) for a in self.adapters]
        return tensors_digest(
            (name, source.shapes[key], source.sample(key, VALUES_PER_TENSOR))
            for source, stored in sources
            for name, key in sorted(stored.items())
        )

    def empty_model(self) -> StreamModel:
        """Returns the model on the meta device; raises UserError, listing names, unless the tensors are exactly its
        own."""
        try:
            with init_empty_weights():
                model = CLASSES[self.kind](**self.config)
        except ValueError as error:  # the class itself refuses these settings
            raise UserError(f"{self.source.path}: {error}") from None
        except (TypeError, RuntimeError, ArithmeticError) as error:
            said = f"{self.source.path}/config.json does not describe a {self.kind}: {error}"
            raise UserError(f"{said}; fetch it again") from None
        found = {name: self.source.shapes[key] for name, key in self.stored.items()}
        check_tensors(self.source.path, self.kind, found, shapes(model.state_dict()))
        for adapter in self.adapters:
            check_tensors(adapter.source.path, "LoRA", adapter.source.shapes, adapter.lora.shapes(model))
        return model

    def dtypes(self, model: StreamModel, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """Returns the dtype that each weight of `model` is held in where `dtype` is asked for: norms, modulation and
        the time embedder in fp32, whatever it is. None: as they are stored."""
        names, wide = list(model.state_dict()), set[str](model._keep_in_fp32_modules or ())
        if dtype is None:
            return {name: self.source.dtypes[self.stored[name]] for name in names}
        return {name: torch.float32 if wide & set(name.split(".")) else dtype for name in names}

    def describe(self) -> str:
        """Returns one line for the user: what the file is."""
        count = sum(torch.Size(self.source.shapes[key]).numel() for key in self.stored.values())
        dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in self.source.dtypes.values()})
        what = "multi-shot MMDiT" if self.kind == "MMDiT" else WAN_NAMES.get(_size(self.config), "a Wan model")
        amount = f"{count / 1e9:.3f} B" if count >= 1e8 else f"{count / 1e6:.1f} M"
        size = f"{amount} parameters in {len(self.stored)} tensors"
        loras = (f"LoRA of rank {a.lora.rank} on {a.lora.base}, merged: " for a in reversed(self.adapters))
        return f"{''.join(loras)}{what}: {size}, {', '.join(dtypes)}, {self.form} names"


WAN_NAMES: dict[tuple[int, ...], str] = {
    (12, 8960, 30, 16): "Wan2.1-T2V-1.3B",
    (40, 13824, 40, 16): "Wan2.1-T2V-14B, an expert of Wan2.2-T2V-A14B, or HoloCine (same shapes)",
    (24, 14336, 30, 48): "Wan2.2-TI2V-5B",
}


def _size(config: dict[str, Any]) -> tuple[int, ...]:
    return tuple(config[key] for key in ("num_attention_heads", "ffn_dim", "num_layers", "in_channels"))


def open_checkpoint(path: str | Path | Contents, weights: str = "ema") -> Checkpoint:
    """Finds out what `path` holds, without reading whole tensors; `Contents` were looked through for damage before.

    weights: ema or model, of a training checkpoint.

    Raises UserError where it is no model, or more than one, or a LoRA whose base is not what it was.
    """
    contents = Contents.sound(path, weights)
    root, path = contents.root, contents.model_path(weights)
    lora = read_lora(path)
    if lora is not None:
        base = _open_base(lora, path)
        adapters = (*base.adapters, Adapter(lora, TensorSource(path)))
        config = base.config | _gap(path, base.kind, _read_config(path))
        return replace(base, root=root, config=config, moc=Contents(path).stored_moc or base.moc, adapters=adapters)
    settings = _read_config(path)
    kind = settings.get("_class_name", RELEASE_CLASS)
    if kind not in (*CLASSES, RELEASE_CLASS):
        known = ", ".join((*CLASSES, RELEASE_CLASS))
        raise UserError(f"{path}/config.json is of a {kind}; only models of {known} are read, name one of those")
    source = TensorSource(path)
    form, stored = ("diffusers", {name: name for name in source.names()}) if kind == "MMDiT" else _wan_names(source)
    if kind == RELEASE_CLASS:
        kind = "WanTransformer3DModel"
        config = _infer_wan_config({name: source.shapes[key] for name, key in stored.items()}, path)
    else:
        config = _class_config(CLASSES[kind], settings, path)
    config |= _gap(path, kind, settings)
    return Checkpoint(root, form, kind, config, source, stored, Contents(path).stored_moc)


def _gap(path: Path, kind: str, settings: dict[str, Any]) -> dict[str, float]:
    return {"cut_gap": cut_gap(settings, Contents(path).moc_folder)} if kind == "WanTransformer3DModel" else {}


def _open_base(lora: Lora, path: Path) -> Checkpoint:
    """Returns the weights that the LoRA at `path` adapts."""
    if not Path(lora.base).exists():
        raise UserError(
            f"{path} holds a LoRA of {lora.base}, which does not exist: put it back, or set base in "
            f"{path}/lora.json to where these weights now are"
        )
    base = open_checkpoint(lora.base)
    if base.fingerprint() != lora.fingerprint:
        raise UserError(
            f"{path} holds a LoRA of {lora.base}, where other weights lie now than it was trained on: put those back, "
            f"or set base in {path}/lora.json to where they are"
        )
    return base


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    return read_json(file) if file.is_file() else {}


def _wan_names(source: TensorSource) -> tuple[str, dict[str, str]]:
    """Returns the form of a file of the Wan family, and its stored names by those of diffusers."""
    names = source.names()
    if any(name.startswith("condition_embedder.") or ".attn1." in name for name in names):
        return "diffusers", {name: name for name in names}
    renamed = {name: to_diffusers_name(name) for name in names}
    times = Counter(renamed.values())
    unknown = [name for name, new in renamed.items() if new is None]
    twice = [name for name, new in renamed.items() if new is not None and times[new] > 1]
    if len(unknown) == len(names):
        raise UserError(
            f"{source.path} is no model of the Wan family, nor one of ours: it holds {names[:5]}; name another"
        )
    if unknown or twice:
        raise UserError(
            f"{source.path} is not a text-to-video model of the Wan family: "
            + listed({"unknown tensors": unknown, "names of tensors with and without a prefix": twice})
            + "; name another"
        )
    form = "comfyui" if any(name.startswith(COMFYUI_PREFIX) for name in names) else "original"
    return form, {new: name for name, new in renamed.items() if new is not None}


def _class_config(kind: type[StreamModel], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the class's arguments from a config.json; a setting it does not know must be empty."""
    known = signature(kind.__init__).parameters.keys() - {"self"}
    unknown = [key for key, value in settings.items() if key not in known and not key.startswith("_") and value]
    if unknown:
        said = f"{path}/config.json has settings {unknown} that this {kind.__name__} does not know"
        raise UserError(f"{said}; name another model")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items() if key in known}


def _infer_wan_config(shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """Returns the class's arguments as the tensors' shapes tell them."""
    embedder = "condition_embedder.{}_embedder.linear_1.weight"
    patch, ffn, out = "patch_embedding.weight", "blocks.0.ffn.net.0.proj.weight", "proj_out.bias"
    text, time = embedder.format("text"), embedder.format("time")
    axes = {patch: 5, ffn: 2, out: 1, text: 2, time: 2}
    wrong = [name for name, count in axes.items() if len(shapes.get(name, ())) != count]
    if wrong:
        raise UserError(f"{path} is not a whole Wan model: missing or misshapen are {wrong}; fetch it again")
    dim, channels, *patch_size = shapes[patch]
    if dim % HEAD_DIM:
        raise UserError(f"{path} has width {dim}, not a multiple of {HEAD_DIM}: it is no Wan model; name another")
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    return {
        "patch_size": tuple(patch_size),
        "num_attention_heads": dim // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": channels,
        "out_channels": shapes[out][0] // math.prod(patch_size),
        "text_dim": shapes[text][1],
        "freq_dim": shapes[time][1],
        "ffn_dim": shapes[ffn][0],
        "num_layers": max(blocks) + 1,
    }


def load_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float32, base: Base = Base.fp32
) -> StreamModel:
    """Returns the model on the CPU. dtype: of its weights (norms and time embedding stay fp32), None as they are
    stored. base: how the linears of its blocks are kept, frozen unless it is fp32; each is packed as it is read.

    Raises UserError unless the stored tensors are exactly the model's.
    """
    model = checkpoint.empty_model()
    dtypes = checkpoint.dtypes(model, dtype)
    frozen = replace_linears(model, base)
    state: dict[str, Tensor] = {}
    for name, target in dtypes.items():
        state.update(packed_tensors(name, checkpoint.read(name).to(target), frozen, base))
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
