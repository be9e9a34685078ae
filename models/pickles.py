"""The Wan release's own T5 encoder and VAE, which come as pickles: read with weights_only, written as folders.

Only these two are read from pickles at all, and only by `convert_pickle`; everything else reads the folders it writes.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from models.tensors import new_folder, write_sharded

# Stems of the release's T5 encoder -> transformers'; {} is the layer.
T5_TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
T5_LAYER = {
    "norm1": "encoder.block.{}.layer.0.layer_norm",
    "norm2": "encoder.block.{}.layer.1.layer_norm",
    **{f"attn.{x}": f"encoder.block.{{}}.layer.0.SelfAttention.{x}" for x in "qkvo"},
    "pos_embedding.embedding": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "encoder.block.{}.layer.1.DenseReluDense.wo",
}


def convert_pickle(file: Path, output: Path) -> str:
    """Writes the T5 encoder or Wan2.1 VAE in `file` as a folder that its library loads; returns what it was.

    The tokenizer is no part of a T5 file: put its files into the folder. Raises ValueError for any other pickle.
    """
    if output.exists():
        raise ValueError(f"{output} exists; name a new path")
    tensors = read_pickle(file)
    if "token_embedding.weight" in tensors:
        what, model, state, stem = "UMT5 encoder", *_t5(tensors, file), "model"
    elif "encoder.conv1.weight" in tensors:
        what, model, state, stem = "Wan2.1 VAE", *_vae(tensors, file), "diffusion_pytorch_model"
    else:
        raise ValueError(f"{file} is neither Wan's T5 encoder nor its VAE; other pickles are not read")
    _check(model, state, file)
    with new_folder(output) as partial:
        entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
        write_sharded(partial, entries, state.__getitem__, stem=stem)
        if isinstance(model, AutoencoderKLWan):
            model.save_config(partial)
        else:
            (partial / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    return what


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, mapped from disk; nothing but tensors and plain containers is accepted."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is truncated, or no file that torch.save wrote; fetch it again")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read safely: {str(error).splitlines()[0]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{file} holds other things than tensors by name")
    return tensors


def _t5(tensors: dict[str, Tensor], file: Path) -> tuple[UMT5EncoderModel, dict[str, Tensor]]:
    state = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)\.weight", name)
        stem = (T5_TOP if match[1] is None else T5_LAYER).get(match[2]) if match else None
        if match is None or stem is None:
            raise ValueError(f"{file} holds {name}, which Wan's T5 encoder does not have")
        state[stem.format(match[1]) + ".weight"] = tensor
    bias = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    attention, d_model = state["encoder.block.0.layer.0.SelfAttention.q.weight"].shape
    layers = {int(name.split(".")[2]) for name in state if name.startswith("encoder.block.")}
    config = UMT5Config(
        vocab_size=len(state["shared.weight"]),
        d_model=d_model,
        d_kv=attention // bias.shape[1],
        d_ff=len(state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]),
        num_layers=max(layers) + 1,
        num_heads=bias.shape[1],
        relative_attention_num_buckets=bias.shape[0],
        architectures=["UMT5EncoderModel"],
    )
    with init_empty_weights():
        return UMT5EncoderModel(config), state


def _vae(tensors: dict[str, Tensor], file: Path) -> tuple[AutoencoderKLWan, dict[str, Tensor]]:
    if any(name.startswith("encoder.downsamples.0.downsamples") for name in tensors):
        raise ValueError(f"{file} is the Wan2.2 VAE; use the vae folder of its diffusers release")
    base_dim = tensors["encoder.conv1.weight"].shape[0]
    with init_empty_weights():
        model = AutoencoderKLWan(base_dim=base_dim)
    return model, convert_wan_vae_to_diffusers(dict(tensors))


def _check(model: torch.nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Raises ValueError unless `state` holds exactly the model's tensors (T5's embedding is stored once)."""
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items() if "embed_tokens" not in name}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{file} is not a whole {type(model).__name__}: it differs in {wrong[:10]}")
