"""The Wan release's T5 encoder and both VAEs come as pickles, which are read with weights_only and written as folders.

Only these are read from pickles at all, and only by `convert_pickle`; everything else reads the folders it writes.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from moc.errors import UserError
from models.checkpoints.tensors import WEIGHT_DTYPES, check_tensors, new_folder, shapes, write_sharded

# Stems of the release's T5 encoder map to transformers'; {} is the layer.
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
# The shapes of these tensors tell the config.
T5_SIZES = ["token_embedding", "blocks.0.attn.q", "blocks.0.pos_embedding.embedding", "blocks.0.ffn.gate.0"]
VAE_SIZES = ["encoder.conv1", "decoder.conv1"]

# Layers of a block of Wan2.2's VAE map to diffusers'. Its blocks nest; the rest of its names are Wan2.1's.
VAE22_LAYER = {
    **{"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"},
    "shortcut": "conv_shortcut",
}
VAE22 = {
    **{"z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
    "scale_factor_spatial": 16,
    "latents_mean": [
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
        *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
        *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ],
    "latents_std": [
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
        *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
        *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ],
}
LEGACY = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # stands near the start of a file that is no zip


def convert_pickle(file: Path, output: Path) -> str:
    """Writes the T5 encoder or VAE in `file` as a folder that its library loads; returns what it was.

    The tokenizer is no part of a T5 file: put its files into the folder. Raises UserError for any other pickle.
    """
    if output.exists():
        raise UserError(f"{output} exists; name a new path")
    tensors = read_pickle(file)
    model: Any
    if "token_embedding.weight" in tensors:
        what, model, state, stem = "UMT5 encoder", *_t5(tensors, file), "model"
    elif "encoder.conv1.weight" in tensors:
        what, model, state, stem = *_vae(tensors, file), "diffusion_pytorch_model"
    else:
        raise UserError(f"{file} is neither Wan's T5 encoder nor one of its VAEs; other pickles are not read")
    # T5's embedding is stored once.
    expected = {name: shape for name, shape in shapes(model.state_dict()).items() if "embed_tokens" not in name}
    check_tensors(file, type(model).__name__, shapes(state), expected)
    with new_folder(output) as partial:
        entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
        write_sharded(partial, entries, state.__getitem__, stem=stem)
        if isinstance(model, UMT5EncoderModel):
            (partial / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
        else:
            model.save_config(partial)
    return what


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a .pth file, mapped from disk; nothing but tensors and plain containers is accepted.

    The form of torch before 1.6, which is no zip, is held in memory.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist; name the .pth of Wan's T5 encoder or of its VAE")
    zipped = zipfile.is_zipfile(file)
    with file.open("rb") as raw:
        start = raw.read(32)
    if not zipped and LEGACY not in start:
        what = "truncated" if start.startswith(b"PK") else "no file that torch.save wrote"
        raise UserError(f"{file} is {what}; fetch it again")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the file holds code or is damaged; the old form raises many types of errors then
        raise UserError(f"{file} cannot be read safely: {_reason(error)}; fetch the release's own file again") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file} holds other things than tensors by name; fetch the release's own file")
    quantized = [name for name, value in tensors.items() if value.dtype not in WEIGHT_DTYPES.values()]
    if quantized:
        raise UserError(
            f"{file}: {quantized[0]} is {tensors[quantized[0]].dtype}; name a release that is not quantized"
        )
    return tensors


def _reason(error: Exception) -> str:
    """Returns why torch refuses a file; its own words would go on to say how to run the code in it."""
    said = str(error)
    if "weights_only" not in said:
        return said.partition("\n")[0]
    code = re.search(r"GLOBAL ([\w.]+)", said)
    return f"it names {code[1]}, which is code" if code else "it holds more than tensors, or is damaged"


def _require(stems: list[str], tensors: dict[str, Tensor], file: Path) -> None:
    names = [f"{stem}.weight" for stem in stems]
    lacking = [name for name in names if name not in tensors or tensors[name].dim() < 2]
    if lacking:
        raise UserError(f"{file} is not whole: it lacks the weights {lacking}; fetch it again")


def _t5(tensors: dict[str, Tensor], file: Path) -> tuple[UMT5EncoderModel, dict[str, Tensor]]:
    _require(T5_SIZES, tensors, file)
    state = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)\.weight", name)
        stem = (T5_TOP if match[1] is None else T5_LAYER).get(match[2]) if match else None
        if match is None or stem is None:
            raise UserError(f"{file} holds {name}, which Wan's T5 encoder does not have; fetch the release's own")
        state[stem.format(match[1]) + ".weight"] = tensor
    bias = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    attention, d_model = state["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[:2]
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


def _vae(tensors: dict[str, Tensor], file: Path) -> tuple[str, AutoencoderKLWan, dict[str, Tensor]]:
    _require(VAE_SIZES, tensors, file)
    what = "Wan2.1 VAE"
    settings: dict[str, Any] = {"base_dim": tensors["encoder.conv1.weight"].shape[0]}
    if any(name.startswith("encoder.downsamples.0.downsamples") for name in tensors):
        what = "Wan2.2 VAE"
        # The width of decoder.conv1 is four times the decoder's base width.
        settings |= VAE22 | {"decoder_base_dim": tensors["decoder.conv1.weight"].shape[0] // 4}
        tensors = {_vae22_name(name): tensor for name, tensor in tensors.items()}
    with init_empty_weights():
        model = AutoencoderKLWan(**settings)
    return what, model, convert_wan_vae_to_diffusers(tensors)


def _vae22_name(name: str) -> str:
    """Returns diffusers' name of a tensor in Wan2.2's nested blocks; any other is left as it is."""
    match = re.fullmatch(r"(encoder|decoder)\.(down|up)samples\.(\d+)\.\2samples\.(\d+)\.(.+)\.(\w+)", name)
    if match is None:
        return name
    side, way, block, index, layer, kind = match.groups()
    rest = f"resnets.{index}.{VAE22_LAYER[layer]}" if layer in VAE22_LAYER else f"{way}sampler.{layer}"
    return f"{side}.{way}_blocks.{block}.{rest}.{kind}"
