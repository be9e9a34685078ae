"""LoRAs of any maker are merged into the weights that they are read with (`lora=PATH` in sampling).

It reads the names of diffusers and peft (`transformer.`, `base_model.model.`, lora_A and lora_B), of ComfyUI and
DiffSynth (`diffusion_model.` before the release's names), and of kohya and musubi-tuner (`lora_unet_` with underscores
for dots, lora_down and lora_up, alpha). Distilled releases add whole differences (diff, diff_b). diffusers has
converters of these names too, which leave out what they do not know; here every tensor is merged or refused.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moc.errors import UserError
from moc.training.checkpoint import read_json
from models.checkpoints.contents import Contents
from models.checkpoints.names import COMFYUI_PREFIX, to_original_name
from models.checkpoints.tensors import Shapes, TensorSource, listed

LOW_NOISE = "transformer_2."  # begins the low-noise expert's names in a file with LoRAs of both
PREFIXES = (COMFYUI_PREFIX, "base_model.model.", "diffusion_model.", "transformer.", LOW_NOISE, "lora_unet_")
TENSOR_NAME = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up))(?:\.\w+)?\.(?P<kind>weight|bias)"
    r"|(?P<other>.+)\.(?P<what>alpha|diff|diff_b)"
)
FACTORS = {"up_weight", "down_weight"}
KINDS = FACTORS | {"up_bias", "alpha", "diff", "diff_b"}


@dataclass(frozen=True)
class LoraChoice:
    """These settings name a LoRA to sample with. weight: how much of it is added; 1 is as it was trained."""

    path: Path
    weight: float = 1.0


def read_choices(setting: Any) -> tuple[LoraChoice, ...]:
    """Returns the LoRAs of a setting: a path, or a list of paths and of {path: PATH, weight: NUMBER}. Raises
    UserError."""
    found = []
    for one in setting if isinstance(setting, list | tuple) else [] if setting is None else [setting]:
        fields = {"path": one} if isinstance(one, str) else one
        fields = fields if isinstance(fields, dict) else {}
        path, weight = fields.get("path"), fields.get("weight", 1.0)
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        if not is_number or not isinstance(path, str) or not path.strip() or fields.keys() - {"path", "weight"}:
            raise UserError(
                f"lora={one!r} must be a path, or {{path: PATH, weight: NUMBER}}, or a list of such; null takes none"
            )
        found.append(LoraChoice(Path(path), float(weight)))
    return tuple(found)


@dataclass(frozen=True)
class MergedLora:
    """This is a LoRA beside weights, ready to be merged. factors: a weight's up and down matrices, by name, and their
    scale; differences: the names of what is added to a tensor; both by diffusers' names of the tensors."""

    source: TensorSource
    weight: float
    factors: dict[str, tuple[str, str, float]]
    differences: dict[str, list[str]]

    @classmethod
    def open(cls, choice: LoraChoice, tensors: Shapes, low_noise: bool = False) -> "MergedLora":
        """Finds which tensor of a model each of the file's belongs to. tensors: the shapes of the model's, by
        diffusers' names. low_noise: the model is the low-noise one of two. Raises UserError where one fits no layer."""
        path = Contents(choice.path).model_path("ema")
        source = TensorSource(path)
        by_layer = _by_layer(_of_expert(source.names(), low_noise), tensors, choice.path)
        scaling = _scaling(source, path)
        factors: dict[str, tuple[str, str, float]] = {}
        differences: dict[str, list[str]] = {}
        for layer, found in by_layer.items():
            if found.keys() & FACTORS:
                if not found.keys() >= FACTORS:
                    raise UserError(f"{choice.path} holds one half of the LoRA of {layer}; fetch it again")
                factors[f"{layer}.weight"] = found["up_weight"], found["down_weight"], _scale(source, found, scaling)
            for kind, target in (("diff", "weight"), ("diff_b", "bias"), ("up_bias", "bias")):
                if kind in found:
                    differences.setdefault(f"{layer}.{target}", []).append(found[kind])
        merged = cls(source, choice.weight, factors, differences)
        merged._check(choice.path, tensors)
        return merged

    def _check(self, path: Path, tensors: Shapes) -> None:
        """Raises UserError where a shape is not the model's."""
        misshapen = []
        for name, (up, down, _) in self.factors.items():
            (rows, *ranks), (rank, *columns) = self.source.shapes[up], self.source.shapes[down]
            size = math.prod(tensors[name])
            if (rows, rows * math.prod(columns)) != (tensors[name][0], size) or math.prod(ranks) != rank:
                misshapen.append(f"{up} {self.source.shapes[up]}, {down} {self.source.shapes[down]}")
        for name, added in self.differences.items():
            found = {one: self.source.shapes[one] for one in added}
            misshapen += [f"{one} {shape}" for one, shape in found.items() if shape != tensors.get(name)]
        if misshapen:
            raise UserError(f"{path} is no LoRA of this model: {listed({'misshapen': misshapen})}; name another")

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor of the model with what the LoRA adds, in fp32; as it is where that is nothing."""
        if name in self.factors:
            up, down, scale = self.factors[name]
            added = self.source.read(up).float().flatten(1) @ self.source.read(down).float().flatten(1)
            tensor = tensor.float() + self.weight * scale * added.view(tensor.shape)
        for difference in self.differences.get(name, ()):
            tensor = tensor.float() + self.weight * self.source.read(difference).float()
        return tensor


def _layer_names(layers: Iterable[str]) -> dict[str, str]:
    """Returns diffusers' name of a layer by every name that the layer goes by."""
    known: dict[str, str] = {}
    for layer in layers:
        original = (to_original_name(f"{layer}.weight") or "").removesuffix(".weight")
        for name in filter(None, (layer, original)):
            known |= {name: layer, name.replace(".", "_"): layer}
    return known


def _bare(layer: str) -> str:
    """Returns a layer's name without what makers put before it."""
    while prefix := next((prefix for prefix in PREFIXES if layer.startswith(prefix)), ""):
        layer = layer.removeprefix(prefix)
    return layer


def _of_expert(names: Sequence[str], low_noise: bool) -> list[str]:
    """Keeps the names of one expert where a file holds LoRAs of two; all names of any other file."""
    of_low = [name for name in names if LOW_NOISE in name]
    return of_low if of_low and low_noise else [name for name in names if LOW_NOISE not in name]


def _by_layer(names: Sequence[str], tensors: Shapes, path: Path) -> dict[str, dict[str, str]]:
    """Returns the file's names of each layer's tensors, by diffusers' name of the layer and then by kind. Raises
    UserError where a name is of no layer or of a kind that is not read, or two names are of one layer and kind."""
    layers = _layer_names(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    by_layer: dict[str, dict[str, str]] = {}
    unknown, repeated = [], []
    for name in names:
        match = TENSOR_NAME.fullmatch(name)
        layer = layers.get(_bare(match["layer"] or match["other"])) if match else None
        kind = (match["what"] or f"{'down' if match['down'] else 'up'}_{match['kind']}") if match else ""
        if layer is None or kind not in KINDS:
            unknown.append(name)
        elif by_layer.setdefault(layer, {}).setdefault(kind, name) != name:
            repeated.append(name)
    if unknown or repeated or not by_layer:
        why = listed({"unknown tensors": unknown, "of a layer that has them already": repeated}) or "it holds nothing"
        raise UserError(f"{path} is no LoRA of this model: {why}; name another")
    return by_layer


def _scale(source: TensorSource, found: dict[str, str], scaling: Callable[[int], float]) -> float:
    """Returns the scale of a layer's two matrices. found: names by kind. scaling: see `_scaling`. Raises UserError
    where they are no matrices, or alpha is not one number."""
    for name in (found["up_weight"], found["down_weight"]):
        shape = source.shapes[name]
        if len(shape) < 2 or 0 in shape:
            raise UserError(f"{source.path}: {name} has the shape {shape} and must be a matrix; fetch it again")
    rank = source.shapes[found["down_weight"]][0]
    if "alpha" not in found:
        return scaling(rank)
    alpha = source.read(found["alpha"]).float()
    if alpha.numel() != 1 or not alpha.isfinite():
        raise UserError(
            f"{source.path}: {found['alpha']} {alpha.flatten()[:3].tolist()} must be one finite number; fetch it again"
        )
    return alpha.item() / rank


def _scaling(source: TensorSource, path: Path) -> Callable[[int], float]:
    """Returns how much a LoRA without alphas of its own is scaled, by its rank: as peft's settings beside it, or
    diffusers' in its header, say; 1 where nothing does."""
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    settings = read_json(beside) if beside.is_file() else _header_settings(source, path)
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, int | float | None):
        raise UserError(f"{path}: lora_alpha={alpha!r} of its settings must be a number; fetch it again")
    if settings.get("alpha_pattern"):
        raise UserError(f"{path}: its settings have an alpha for each layer (alpha_pattern), which is not supported")
    if alpha is None:
        return lambda rank: 1.0
    return lambda rank: alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _header_settings(source: TensorSource, path: Path) -> dict[str, Any]:
    said = source.header().get("lora_adapter_metadata", "{}")
    try:
        return {key.removeprefix("transformer."): value for key, value in json.loads(said).items()}
    except (ValueError, AttributeError):
        raise UserError(f"{path}: lora_adapter_metadata={said[:60]!r} is no JSON object; fetch it again") from None
