"""This module has a reduced Wan transformer of diffusers' own, and what tests ask of the files made of it; files larger
than disks."""

import json
import os
import struct
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints.names import to_original_name
from tests.weights import randomized

REDUCED = {
    **{"num_attention_heads": 1, "ffn_dim": 192, "num_layers": 2, "in_channels": 16, "out_channels": 16},
    "text_dim": 24,
}
MMDIT = {"latent_channels": 4, "text_dim": 12, "dim": 48, "num_layers": 2, "num_heads": 2, "ffn_dim": 64}


def reduced_wan() -> diffusers.WanTransformer3DModel:
    torch.manual_seed(0)
    return randomized(diffusers.WanTransformer3DModel(**REDUCED)).eval()


def save_original(model: torch.nn.Module, file: Path) -> Path:
    """Saves a model under the names of the release."""
    save_file({to_original_name(name): weight for name, weight in model.state_dict().items()}, file)
    return file


def same(model: torch.nn.Module, state: dict[str, Tensor]) -> bool:
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)


def save_hole(file: Path, header: dict[str, dict], size: int) -> Path:
    """Returns a safetensors file whose `size` bytes of values take no room on disk."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + size)
    return file
