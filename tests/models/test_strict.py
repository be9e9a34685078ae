"""Folders of a text encoder and of a VAE load whole or not at all, with one message that says what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer, UMT5Config, UMT5EncoderModel

from moc.errors import UserError
from models.encoders.codec import CodecConfig, CodecKind
from models.encoders.text import T5TextEncoder, TextConfig, TextKind
from models.encoders.vae import WanCodec

T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
WORDS = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁a", -1.0), ("▁red", -1.0), ("▁fox", -1.0)]
SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns small folders as the libraries write them."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    T5EncoderModel(T5Config(**T5)).save_pretrained(root / "t5")
    UMT5EncoderModel(UMT5Config(**T5)).save_pretrained(root / "umt5")
    T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(root / "whole_t5")
    for name in ("t5", "umt5", "whole_t5"):
        T5Tokenizer(vocab=WORDS, extra_ids=0).save_pretrained(root / name)
    AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).save_pretrained(root / "vae")
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Returns a copy to spoil."""
    return lambda name: Path(shutil.copytree(saved / name, tmp_path / name))


def load(path: Path) -> nn.Module:
    if "vae" in path.name:
        return WanCodec(CodecConfig(CodecKind.wan, str(path)))
    return T5TextEncoder(TextConfig(TextKind.t5, str(path)))


def weights(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def change(path: Path, edit: Callable[[dict], object]) -> None:
    """Rewrites the folder's tensors."""
    tensors = load_file(weights(path))
    edit(tensors)
    save_file(tensors, weights(path), metadata={"format": "pt"})


def misfit(tensors: dict) -> None:
    """Spoils a folder: one tensor is missing, one too many, one of another shape."""
    names = sorted(tensors)
    del tensors[names[0]]
    tensors["stray.weight"] = torch.zeros(2)
    tensors[names[-1]] = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("name", "kind", "missing", "misshapen"),
    [
        ("t5", "T5EncoderModel", "encoder.block.0.layer.0.SelfAttention.k.weight", SHARED),
        ("umt5", "UMT5EncoderModel", "encoder.block.0.layer.0.SelfAttention.k.weight", SHARED),
        ("vae", "AutoencoderKLWan", "decoder.conv_in.bias", "quant_conv.weight"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_one_message(folder, name, kind, missing, misshapen) -> None:
    path = folder(name)
    change(path, misfit)
    with pytest.raises(UserError, match=f"is not a whole {kind}") as caught:
        load(path)
    for words in (str(path), f"1 missing: {missing};", "1 unexpected: stray.weight;", f"{misshapen} (2, 3) instead of"):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", ["t5", "vae"])
def test_one_tensor_too_few_or_too_many_is_refused(folder, name) -> None:
    path = folder(name)
    change(path, lambda tensors: tensors.update(stray=torch.zeros(2)))
    with pytest.raises(UserError, match="1 unexpected: stray; fetch it again"):
        load(path)
    change(path, lambda tensors: (tensors.pop("stray"), tensors.pop(max(set(tensors) - {SHARED}))))
    with pytest.raises(UserError, match=r"is not a whole \w+: 1 missing: \S+; fetch it again"):
        load(path)


@pytest.mark.parametrize("name", ["t5", "vae"])
def test_damaged_files_are_named(folder, saved: Path, name) -> None:
    path = folder(name)
    weights(path).write_bytes(weights(saved / name).read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{weights(path)} is damaged or no safetensors file"):
        load(path)
    config, whole = path / "config.json", (path / "config.json").read_text()
    config.write_text(whole[:-20])
    with pytest.raises(UserError, match=f"{config} is damaged or no JSON file"):
        load(path)
    size = {"t5": ('"d_model": 16', '"d_model": "wide"'), "vae": ('"base_dim": 8', '"base_dim": "wide"')}[name]
    config.write_text(whole.replace(*size))
    with pytest.raises(UserError, match=f"{config} does not describe a model"):
        load(path)


@pytest.mark.parametrize("name", ["t5", "vae"])
def test_pickles_are_refused(folder, name) -> None:
    path = folder(name)
    torch.save(load_file(weights(path)), path / "pytorch_model.bin")
    weights(path).unlink()
    with pytest.raises(UserError, match=rf"{path} holds only pickles \['pytorch_model\.bin'\].* safetensors release"):
        load(path)


@pytest.mark.parametrize("name", ["t5", "umt5"])
@pytest.mark.parametrize("stored", [[SHARED], [EMBED], [SHARED, EMBED]])
def test_tied_embeddings_are_stored_under_either_name(folder, name, stored) -> None:
    path = folder(name)
    embedding = load_file(weights(path))[SHARED]
    change(path, lambda tensors: (tensors.pop(SHARED), tensors.update({key: embedding.clone() for key in stored})))
    model = load(path).model
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert torch.equal(model.shared.weight, embedding.bfloat16())
    change(path, lambda tensors: [tensors.pop(key) for key in stored])
    with pytest.raises(UserError, match=f"2 missing: {EMBED}, {SHARED}"):
        load(path)


@pytest.mark.parametrize(("name", "kind"), [("t5", T5EncoderModel), ("umt5", UMT5EncoderModel)])
def test_a_folder_is_the_librarys_encoder_of_its_kind(saved: Path, name, kind) -> None:
    encoder = load(saved / name)
    theirs = kind.from_pretrained(saved / name, dtype=torch.bfloat16).eval()
    assert type(encoder.model) is kind
    ids = torch.tensor([encoder.tokenizer("a red fox").input_ids])
    with torch.no_grad():  # like the encoder, since attention rounds otherwise with gradients
        assert torch.equal(encoder.encode("", ["a red fox"])[1], theirs(ids).last_hidden_state[0])
    assert {key: w.dtype for key, w in encoder.model.state_dict().items()} == {
        key: w.dtype for key, w in theirs.state_dict().items()
    }


def test_a_whole_t5_gives_its_encoder(saved: Path) -> None:
    tensors, model = load_file(weights(saved / "whole_t5")), load(saved / "whole_t5").model
    assert any(key.startswith("decoder.") for key in tensors)
    assert all(
        torch.equal(w, tensors[SHARED if key == EMBED else key].bfloat16()) for key, w in model.state_dict().items()
    )


def test_a_tokenizer_is_there_and_whole(folder) -> None:
    path = folder("umt5")
    file = path / "tokenizer.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(UserError, match=f"{file} is damaged or no JSON file"):
        load(path)
    file.write_text("{}")
    with pytest.raises(UserError, match=f"{path} holds a tokenizer that does not load"):
        load(path)
    file.unlink()
    with pytest.raises(UserError, match=f"{path} holds no tokenizer"):
        load(path)
