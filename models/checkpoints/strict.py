"""Loading is strict: a folder's tensors are exactly those of its model, or one UserError lists what is wrong."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from moc.errors import UserError
from moc.training.checkpoint import remedy
from models.checkpoints.tensors import TensorSource, check_tensors, shapes


def load_folder(
    folder: Path,
    build: Callable[[], nn.Module],
    dtype: torch.dtype,
    tied: Sequence[str] = (),
    ignored: tuple[str, ...] = (),
) -> Any:
    """Returns the model of a folder, on the CPU, in `dtype`, from its safetensors files alone; its class is what
    `build` says.

    build: makes the model from the folder's config.json. tied: names of one tensor, of which the files may hold any.
    ignored: prefixes of tensors that may be there and are left out. Raises UserError where the config does not make a
    model, or unless the tensors are exactly the model's.
    """
    try:
        with init_empty_weights():
            model = build()
    except Exception as error:  # each library raises its own type for a wrong setting
        raise UserError(f"{folder}/config.json does not describe a model: {error}; {remedy(folder)}") from None
    source = TensorSource(folder)
    stored = {name: name for name in source.names() if not name.startswith(ignored)}
    held = [name for name in tied if name in stored]
    if held:
        stored = dict.fromkeys(tied, held[0]) | stored
    found = {name: source.shapes[key] for name, key in stored.items()}
    check_tensors(folder, type(model).__name__, found, shapes(model.state_dict()))
    tensors = {key: source.read(key).to(dtype) for key in set(stored.values())}
    model.load_state_dict({name: tensors[key] for name, key in stored.items()}, strict=True, assign=True)
    return model.eval()
