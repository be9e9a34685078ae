"""The releases' T5 and VAE, which are pickles, become folders without running any code."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from moc.errors import UserError
from models.checkpoints.pickles import VAE22, convert_pickle
from models.encoders.codec import CodecConfig, CodecKind
from models.encoders.vae import WanCodec
from tests.wan_files import same
from tests.weights import randomized


def original_t5_name(name: str) -> str:
    """Returns the name in models_t5_umt5-xxl-enc-bf16.pth, as Wan's t5.py has it."""
    for new, old in {
        **{"shared": "token_embedding", "encoder.final_layer_norm": "norm", "encoder.block": "blocks"},
        **{"layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2"},
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention": "attn",  # then q, k, v, o
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",  # GELU follows this one
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
    }.items():
        name = name.replace(new, old)
    return name


def test_the_releases_t5_and_vae_become_folders(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5 = randomized(UMT5EncoderModel(UMT5Config(**sizes, relative_attention_num_buckets=16)))
    state = {original_t5_name(name): w for name, w in t5.state_dict().items() if "embed_tokens" not in name}
    assert len(state) == 2 + 2 * 10
    torch.save(state, tmp_path / "t5.pth")
    assert convert_pickle(tmp_path / "t5.pth", tmp_path / "t5") == "UMT5 encoder"
    ids = torch.tensor([[1, 5, 9]])
    loaded = UMT5EncoderModel.from_pretrained(tmp_path / "t5").eval()
    torch.testing.assert_close(loaded(ids).last_hidden_state, t5.eval()(ids).last_hidden_state)

    vae = randomized(AutoencoderKLWan(base_dim=8))
    renamed = {"encoder.conv_in": "encoder.conv1", "decoder.conv_in": "decoder.conv1", "quant_conv": "conv1"}
    state = {}
    for name, weight in vae.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        state[f"{renamed.get(stem, stem)}.{suffix}"] = weight
    torch.save(state, tmp_path / "vae.pth")
    assert convert_pickle(tmp_path / "vae.pth", tmp_path / "vae") == "Wan2.1 VAE"
    assert same(AutoencoderKLWan.from_pretrained(tmp_path / "vae"), vae.state_dict())
    del state["post_quant_conv.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(
        ValueError, match=r"part\.pth is not a whole AutoencoderKLWan: 1 missing: post_quant_conv\.bias;"
    ):
        convert_pickle(tmp_path / "part.pth", tmp_path / "part")
    assert not (tmp_path / "part").exists()


WEIGHTS = "diffusion_pytorch_model.safetensors"


def original_vae22_name(name: str) -> str:
    """Returns the name in Wan2.2_VAE.pth; a block has two layers in the encoder, three in the decoder, then its
    resampling."""
    layers = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    tops = {
        **{"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2", "mid_block.attentions.0": "middle.1"},
        **{"mid_block.resnets.0": "middle.0", "mid_block.resnets.1": "middle.2", "conv_shortcut": "shortcut"},
        **{"post_quant_conv": "conv2", "quant_conv": "conv1"},
    }
    middle = "mid_block" in name or "resnets" in name
    for new, old in (tops | layers if middle else tops).items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(new)}(?=\.)", old, name)
    name = re.sub(r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1samples.\2.\1samples.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsampler\.", r"downsamples.\1.downsamples.2.", name)
    return re.sub(r"up_blocks\.(\d+)\.upsampler\.", r"upsamples.\1.upsamples.3.", name)


def test_the_wan22_vae_becomes_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = randomized(AutoencoderKLWan(**VAE22, base_dim=8, decoder_base_dim=4))
    state = {original_vae22_name(name): weight for name, weight in vae.state_dict().items()}
    assert len(state) == len(vae.state_dict())
    assert state.keys() > {  # Wan2.2's vae2_2.py has these names
        *("conv1.weight", "conv2.bias", "encoder.conv1.weight", "encoder.downsamples.0.downsamples.0.residual.0.gamma"),
        *("encoder.downsamples.1.downsamples.0.shortcut.bias", "encoder.downsamples.1.downsamples.2.time_conv.weight"),
        *("encoder.middle.0.residual.6.bias", "encoder.middle.1.to_qkv.weight", "decoder.head.2.weight"),
        *("decoder.upsamples.0.upsamples.3.resample.1.weight", "decoder.upsamples.3.upsamples.1.residual.2.weight"),
    }
    torch.save(state, tmp_path / "vae.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("vae", "old"):
        assert convert_pickle(tmp_path / f"{name}.pth", tmp_path / name) == "Wan2.2 VAE"
    assert (tmp_path / "old" / WEIGHTS).read_bytes() == (tmp_path / "vae" / WEIGHTS).read_bytes()
    codec = WanCodec(CodecConfig(CodecKind.wan, str(tmp_path / "vae")))
    assert same(codec.vae, vae.state_dict())
    assert codec.mean.numel() == codec.std.numel() == codec.latent_channels == 48
    assert codec.encode(torch.zeros(3, 5, 32, 48)).shape == (48, 2, 2, 3)


def test_part_of_a_pickle_is_said_to_be_one(tmp_path: Path) -> None:
    for stem, lacking in {
        "token_embedding": "'blocks.0.attn.q.weight', 'blocks.0.pos_embedding.embedding.weight', 'blocks.0.ffn.gate.0",
        "encoder.conv1": "'decoder.conv1.weight'",
    }.items():
        torch.save({f"{stem}.weight": torch.zeros(8, 3)}, tmp_path / "part.pth")
        with pytest.raises(UserError, match=rf"part\.pth is not whole: it lacks the weights \[{re.escape(lacking)}"):
            convert_pickle(tmp_path / "part.pth", tmp_path / "out")


def test_latent_statistics_of_wan22_are_the_release_s() -> None:
    """Their sums, plain and weighted by index, are those of vae/config.json of Wan-AI/Wan2.2-TI2V-5B-Diffusers."""
    for name, expected in (("latents_mean", (-0.5589, -7.0659)), ("latents_std", (32.5360, 758.3531))):
        values = VAE22[name]
        assert len(values) == 48
        assert (sum(values), sum(i * x for i, x in enumerate(values))) == pytest.approx(expected, abs=1e-6)


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"token_embedding.weight": subprocess.run}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"cannot be read safely: it names \w+\.run, which is code; fetch"):
        convert_pickle(tmp_path / "evil.pth", tmp_path / "out")
    (tmp_path / "short.pth").write_bytes((tmp_path / "evil.pth").read_bytes()[:50])
    torch.save({"token_embedding.weight": torch.zeros(99)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name, cut in (("old", -50), ("old_short", 200)):
        (tmp_path / f"{name}.pth").write_bytes((tmp_path / "old.pth").read_bytes()[:cut])
    (tmp_path / "page.pth").write_text("<!doctype html>")
    for name, message in {
        "short": "is truncated; fetch it again",
        "old": "cannot be read safely: .*corrupted.*; fetch the release's own file again",
        "old_short": "cannot be read safely",
        "page": "is no file that torch.save wrote",
    }.items():
        with pytest.raises(UserError, match=rf"{name}\.pth {message}"):
            convert_pickle(tmp_path / f"{name}.pth", tmp_path / "out")
