"""LoRA for either model, through peft, and the two things a trainer asks of a model: to save and to restore itself.

A model with an adapter saves the adapter alone, in the form that diffusers' pipelines load (`load_lora_weights`), with
`lora.json` beside it: rank, target layers, and the base weights. `models.load_model` merges the two.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from diffusers import WanPipeline
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from models.tensors import TensorSource, check_tensors, shapes

SETTINGS = "lora.json"
WEIGHTS = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."  # of the adapter's names in a pipeline's file


class Trainable(PeftAdapterMixin):
    """Mix in before ModelMixin."""

    lora: dict[str, Any] | None = None

    def add_lora(self, rank: int, targets: Sequence[str], base: str | Path) -> None:
        """Freezes the model and adds an adapter of a rank to each linear whose name ends in one of `targets`.

        base: where the model's weights came from, to be merged with again. Raises ValueError for unknown targets.
        """
        self.lora = {"rank": rank, "targets": list(targets), "base": str(Path(base).resolve())}
        self.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))

    def merge_lora(self) -> None:
        """Adds the adapter into the weights; the model is then a plain one again."""
        self.fuse_lora()
        self.unload_lora()
        self.lora = None
        self.requires_grad_(True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """As diffusers', but raises ValueError, listing names, unless the tensors are exactly the model's: diffusers
        would draw those that are missing and warn."""
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that all of them are told
        model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        expected = shapes(model.state_dict())
        unexpected = dict.fromkeys(info["unexpected_keys"], ())
        mismatched = {name: tuple(found) for name, found, _ in info["mismatched_keys"]}
        found = {n: size for n, size in expected.items() if n not in info["missing_keys"]} | unexpected | mismatched
        check_tensors(pretrained_model_name_or_path, cls.__name__, found, expected)
        return (model, info) if wants_info else model

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """A diffusers folder; with an adapter, the adapter's file and lora.json in place of the weights."""
        if self.lora is None:
            super().save_pretrained(folder, **kwargs)
            return
        self.save_config(folder)
        WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(self))
        Path(folder, SETTINGS).write_text(json.dumps(self.lora, indent=2) + "\n")

    def load_weights(self, folder: str | Path) -> None:
        """Restores, in place, what `save_pretrained` of the same model wrote; raises ValueError for another model's."""
        source = TensorSource(folder)
        if self.lora is None:
            check_tensors(folder, type(self).__name__, source.shapes, shapes(self.state_dict()))
            self.load_state_dict({name: source.read(name) for name in source.names()}, strict=True)
            return
        tensors = {name.removeprefix(PREFIX): source.read(name) for name in source.names()}
        expected = get_peft_model_state_dict(self)
        if {n: w.shape for n, w in tensors.items()} != {n: w.shape for n, w in expected.items()}:
            raise ValueError(f"{folder} holds the adapter of another model, other layers or another rank")
        set_peft_model_state_dict(self, tensors)


def read_lora(folder: Path) -> dict[str, Any] | None:
    """The settings beside an adapter; None where the folder holds none."""
    file = folder / SETTINGS
    return json.loads(file.read_text()) if file.is_file() else None
