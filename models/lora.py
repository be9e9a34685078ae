"""Either model can have a LoRA, through peft, and does what a trainer asks: it saves and restores itself, wholly.

A model with an adapter saves the adapter alone, in the form that diffusers' pipelines load (`load_lora_weights`), with
`lora.json` beside it: rank, target layers, and which weights it adapts. `open_checkpoint`
(models/checkpoints/opening.py) reads such a folder as the two merged.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from moc.errors import UserError
from moc.training.checkpoint import check_indexes, read_json
from moc.training.storage import read_tensors
from models.checkpoints.tensors import Shapes, TensorSource, check_tensors, shapes

SETTINGS = "lora.json"
PREFIX = "transformer."  # begins the adapter's names in a pipeline's file


@dataclass(frozen=True)
class Lora:
    """These are the settings of an adapter. targets: what its layers' names end in. base: path of the weights that it
    adapts, and fingerprint: which those are, should others come to lie there (`Checkpoint.fingerprint`)."""

    rank: int
    targets: Sequence[str]
    base: str
    fingerprint: str

    def save(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """Returns the layers of the model to adapt, by name; raises UserError where no name ends in a target."""
        # Only linears take adapters: the models call each. Wan's patch_embedding, a Conv3d, only lends its weights.
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for target in self.targets:
            if not any(_ends_in(name, target) for name in linears):
                known = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in linears)
                raise UserError(f"LoRA target {target!r} is no linear layer of this model; it has {', '.join(known)}")
        return {name: linears[name] for name in linears if any(_ends_in(name, target) for target in self.targets)}

    def shapes(self, model: nn.Module) -> Shapes:
        """Returns the shapes of the adapter's tensors for a model without it, by their names in the file."""
        expected: dict[str, tuple[int, ...]] = {}
        for name, linear in self.linears(model).items():
            a, b = _names(name)
            expected |= {a: (self.rank, linear.in_features), b: (linear.out_features, self.rank)}
        return expected


def _ends_in(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _names(linear: str) -> tuple[str, str]:
    """Returns the names of the two tensors that adapt a layer."""
    return f"{PREFIX}{linear}.lora_A.weight", f"{PREFIX}{linear}.lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """This is a trained adapter on disk."""

    lora: Lora
    source: TensorSource

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """Returns a tensor of the base with what the adapter adds, in fp32 to be rounded once; as it is where that is
        nothing.

        name: the tensor's, as diffusers has it.
        """
        a, b = _names(name.removesuffix(".weight"))
        if a not in self.source.shapes:
            return weight
        # The factor lora_alpha / rank is 1.
        return weight.float().addmm_(self.source.read(b).float(), self.source.read(a).float())


class Trainable(ModelMixin, nn.Module, ConfigMixin):
    """This is a diffusers model that can have an adapter. peft is imported where one is: it takes seconds."""

    # Diffusers' classes give a model these, which type checkers are not shown (pyproject.toml).
    config: Any
    save_config: Callable[[str | Path], None]
    to_json_string: Callable[[], str]
    enable_gradient_checkpointing: Callable[[], None]
    _gradient_checkpointing_func: Callable[..., Any]
    _keep_in_fp32_modules: ClassVar[Sequence[str] | None]
    lora: Lora | None = None

    def add_lora(self, lora: Lora) -> None:
        """Freezes the model and adds an adapter in fp32 to each linear it names; raises UserError for unknown
        targets."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        targets = list(lora.linears(self))
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets), self)
        for layer in self.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_A.float()  # peft made them in the dtype of the weights
                layer.lora_B.float()
                layer.cast_input_dtype_enabled = False  # peft's cast to fp32 would take memory, and autocast undo it
        self.lora = lora

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Reads as diffusers does, but raises UserError, listing names, unless the tensors are exactly the model's:
        diffusers would draw those that are missing and warn, and read whatever an index names."""
        wants_info = kwargs.pop("output_loading_info", False)
        check_indexes(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to name all mistakes in one error
        model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        expected = shapes(model.state_dict())
        unexpected = dict.fromkeys(info["unexpected_keys"], ())
        mismatched = {name: tuple(found) for name, found, _ in info["mismatched_keys"]}
        found = {n: size for n, size in expected.items() if n not in info["missing_keys"]} | unexpected | mismatched
        check_tensors(pretrained_model_name_or_path, cls.__name__, found, expected)
        return (model, info) if wants_info else model

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Writes a diffusers folder; with an adapter, the adapter's file and lora.json in place of the weights."""
        if self.lora is None:
            super().save_pretrained(folder, **kwargs)
            return
        self.save_settings(Path(folder))
        file = Path(folder, f"{self.weights_stem}.safetensors")
        save_file(self.stored(self.state_dict()), file, metadata={"format": "pt"})

    def save_settings(self, folder: Path) -> None:
        """Writes what `save_pretrained` does, but for the weights."""
        self.save_config(folder)
        if self.lora is not None:
            self.lora.save(folder)

    @property
    def weights_stem(self) -> str:
        """Says what the files of the weights that `save_pretrained` writes are called, but for their ending."""
        return "diffusion_pytorch_model" if self.lora is None else "pytorch_lora_weights"

    def stored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns those of the tensors of a state dict that `save_pretrained` writes, by their names in its files; an
        adapter's are those of a pipeline's file."""
        if self.lora is None:
            return state
        from peft import get_peft_model_state_dict

        return {PREFIX + name: tensor for name, tensor in get_peft_model_state_dict(self, state).items()}

    def load_weights(self, folder: str | Path) -> None:
        """Restores, in place, what `save_pretrained` of the same model wrote; raises UserError for another model's.
        Where the model is sharded, each process reads its own rows."""
        source, adapter = TensorSource(folder), read_lora(Path(folder))
        weights, kind = self.stored(self.state_dict()), type(self).__name__
        if self.lora is not None:
            if adapter is not None and adapter.fingerprint != self.lora.fingerprint:
                raise UserError(
                    f"{folder} holds a LoRA of {adapter.base}, whose weights are not those of {self.lora.base}: "
                    "set model.path to the former"
                )
            kind = f"LoRA of rank {self.lora.rank} on {list(self.lora.targets)}"
        check_tensors(folder, kind, source.shapes, shapes(weights))
        read_tensors(Path(folder), weights)


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "rank": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "targets": ("a list of names", lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)),
    "base": ("a path", lambda value: isinstance(value, str)),
    "fingerprint": ("a text", lambda value: isinstance(value, str)),
}


def read_lora(folder: Path) -> Lora | None:
    """Returns the settings beside an adapter; None where the folder holds none. Raises UserError for what is no
    lora.json."""
    file = folder / SETTINGS
    if not file.is_file():
        return None
    values = read_json(file)
    problems = [f"lacks {name}" for name in RULES if name not in values]
    problems += [f"has an unknown field {name}" for name in values if name not in RULES]
    problems += [
        f"{name}={values[name]!r} is not {rule}"
        for name, (rule, holds) in RULES.items()
        if name in values and not holds(values[name])
    ]
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}; restore the file as training wrote it")
    return Lora(**values)
