"""Checkpoints: names and strict loading, on reduced copies with the real names."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from moc import MoCConfig
from models import Family, ModelConfig, build_model, load_model, save_model
from models.checkpoints.names import to_diffusers_name, to_original_name
from models.checkpoints.pickles import VAE22, convert_pickle
from models.encoders.codec import CodecConfig, CodecKind
from models.encoders.vae import WanCodec
from models.mmdit import MMDiT
from models.wan import WanTransformer3DModel
from tests.wan_files import MMDIT, REDUCED, same, save_original
from tests.weights import randomized


def test_names_are_those_of_the_release(reduced) -> None:
    pairs = {
        "patch_embedding.weight": "patch_embedding.weight",
        "time_embedding.0.weight": "condition_embedder.time_embedder.linear_1.weight",
        "time_embedding.2.bias": "condition_embedder.time_embedder.linear_2.bias",
        "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
        "text_embedding.2.bias": "condition_embedder.text_embedder.linear_2.bias",
        "time_projection.1.weight": "condition_embedder.time_proj.weight",
        "head.modulation": "scale_shift_table",
        "head.head.weight": "proj_out.weight",
        "blocks.11.modulation": "blocks.11.scale_shift_table",
        "blocks.3.norm3.bias": "blocks.3.norm2.bias",
        "blocks.3.ffn.0.weight": "blocks.3.ffn.net.0.proj.weight",
        "blocks.3.ffn.2.weight": "blocks.3.ffn.net.2.weight",
    }
    for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for a, b in (
            *(("q.weight", "to_q.weight"), ("k.weight", "to_k.weight"), ("v.bias", "to_v.bias")),
            *(("o.bias", "to_out.0.bias"), ("norm_q.weight", "norm_q.weight"), ("norm_k.weight", "norm_k.weight")),
        ):
            pairs[f"blocks.0.{old}.{a}"] = f"blocks.0.{new}.{b}"
    for old, new in pairs.items():
        assert to_diffusers_name(old) == new
        assert to_diffusers_name("model.diffusion_model." + old) == new
        assert to_original_name(new) == old
    stems = {re.sub(r"blocks\.\d+|\.weight$|\.bias$", "", name) for name in reduced.state_dict()}
    assert {re.sub(r"blocks\.\d+|\.weight$|\.bias$", "", name) for name in pairs.values()} == stems
    assert to_diffusers_name("img_emb.proj.0.weight") is None


def test_every_form_loads_the_same_weights(reduced, reduced_folder: Path, reduced_file: Path, tmp_path: Path) -> None:
    comfyui = {f"model.diffusion_model.{name}": w for name, w in load_file(reduced_file).items()}
    save_file(comfyui, tmp_path / "comfyui.safetensors")
    reduced.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    reduced.save_pretrained(tmp_path / "pipeline" / "transformer")
    config = tmp_path / "pipeline/transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"of_newer_diffusers": None}))
    written = [tmp_path / name for name in ("comfyui.safetensors", "sharded", "pipeline")]
    for path in (reduced_folder, reduced_file, *written):
        model = load_model(path)
        assert isinstance(model, WanTransformer3DModel)
        assert same(model, reduced.state_dict()), path
        assert {key: model.config[key] for key in REDUCED} == REDUCED


def test_diffusers_loads_what_we_save(reduced, reduced_folder: Path, tmp_path: Path) -> None:
    model = load_model(reduced_folder)
    model.save_pretrained(tmp_path / "ours")
    loaded, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert same(loaded, reduced.state_dict())
    assert not any(info.values())
    pipeline = diffusers.WanPipeline(
        transformer=loaded, vae=None, text_encoder=None, tokenizer=None, scheduler=diffusers.UniPCMultistepScheduler()
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    shutil.copytree(tmp_path / "ours", tmp_path / "pipeline" / "transformer", dirs_exist_ok=True)
    again = diffusers.WanPipeline.from_pretrained(
        tmp_path / "pipeline", vae=None, text_encoder=None, tokenizer=None, local_files_only=True
    )
    assert same(again.transformer, reduced.state_dict())


def test_save_load_save_is_byte_identical(reduced_folder: Path, tmp_path: Path) -> None:
    first = load_model(reduced_folder, dtype=None)
    first.save_pretrained(tmp_path / "a")
    load_model(tmp_path / "a", dtype=None).save_pretrained(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_low_precision_keeps_what_must_stay_wide(reduced_folder: Path, tmp_path: Path) -> None:
    save_model(MMDiT(**MMDIT, input_skip=True), tmp_path / "mmdit", MoCConfig())
    for path, wide in (
        (reduced_folder, ("scale_shift_table", "norm2", "norm_q", "norm_k", "time_embedder")),
        (tmp_path / "mmdit", ("condition", "modulation", "norm_q", "norm_k", "gain")),
    ):
        for name, weight in load_model(path, dtype=torch.bfloat16).named_parameters():
            kept = not set(wide).isdisjoint(name.split("."))
            assert weight.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_missing_extra_and_misshapen_tensors_are_listed(reduced_file: Path, tmp_path: Path) -> None:
    tensors = load_file(reduced_file)
    gone = tensors.pop("blocks.1.self_attn.q.weight")
    tensors["blocks.1.ffn.2.bias"] = torch.zeros(3)
    tensors["blocks.0.cross_attn.k_img.weight"] = gone
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"1 unknown tensors: blocks\.0\.cross_attn\.k_img\.weight"):
        load_model(tmp_path / "a.safetensors")
    del tensors["blocks.0.cross_attn.k_img.weight"]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="is not a whole WanTransformer3DModel") as caught:
        load_model(tmp_path / "b.safetensors")
    assert "1 missing: blocks.1.attn1.to_q.weight" in str(caught.value)
    assert "1 misshapen: blocks.1.ffn.net.2.bias (3,) instead of (128,)" in str(caught.value)
    tensors["text_embedding.0.weight"] = torch.zeros(3)  # one of those that tell the sizes
    del tensors["head.head.bias"]
    save_file(tensors, tmp_path / "c.safetensors")
    told = r"\['proj_out\.bias', 'condition_embedder\.text_embedder\.linear_1\.weight'\]"
    with pytest.raises(ValueError, match=rf"c\.safetensors is not a whole Wan model: missing or misshapen are {told};"):
        load_model(tmp_path / "c.safetensors")


@pytest.mark.parametrize("form", ["original", "diffusers"])
def test_image_to_video_models_are_named_as_such(reduced, form: str, tmp_path: Path) -> None:
    """Wan2.2's have no tensors of their own: they take the picture as 20 more channels."""
    model = diffusers.WanTransformer3DModel(**REDUCED | {"in_channels": 36})
    path = tmp_path / ("i2v.safetensors" if form == "original" else "i2v")
    save_original(model, path) if form == "original" else model.save_pretrained(path)
    with pytest.raises(ValueError, match=f"{path}: this is an image-to-video Wan model"):
        load_model(path)


@pytest.mark.parametrize("family", [WanTransformer3DModel, MMDiT])
def test_from_pretrained_is_as_strict(family, tmp_path: Path) -> None:
    model = family(**REDUCED if family is WanTransformer3DModel else MMDIT)
    model.save_pretrained(tmp_path)
    loaded, info = family.from_pretrained(tmp_path, output_loading_info=True)
    assert same(loaded, model.state_dict())
    assert same(family.from_pretrained(tmp_path), model.state_dict())
    assert not any(info.values())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    lost, short = sorted(name for name in tensors if name.startswith("blocks.1.") and name.endswith(".bias"))[:2]
    tensors["extra.weight"] = tensors.pop(lost)
    tensors[short] = torch.zeros(3)
    save_file(tensors, file, {"format": "pt"})
    for ignore in (False, True):  # which is diffusers' setting to let the shapes pass
        with pytest.raises(ValueError, match=f"is not a whole {family.__name__}: 1 missing: {lost}; ") as caught:
            family.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)
        assert f"1 unexpected: extra.weight; 1 misshapen: {short} (3,) instead of" in str(caught.value)


def test_a_folder_of_the_release_is_read_by_its_shapes(tmp_path: Path) -> None:
    sizes = REDUCED | {"num_attention_heads": 2, "text_dim": 40, "freq_dim": 64, "num_layers": 3, "ffn_dim": 96}
    theirs = diffusers.WanTransformer3DModel(**sizes)
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 256, "num_layers": 3}')
    file = save_original(theirs, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_model(tmp_path)
    assert same(loaded, theirs.state_dict())
    assert {key: loaded.config[key] for key in sizes} == sizes
    save_original(diffusers.WanTransformer3DModel(**sizes, attention_head_dim=96), file)
    with pytest.raises(ValueError, match="has width 192, not a multiple of 128: no Wan model"):
        load_model(tmp_path)


def test_a_path_of_another_family_is_refused(reduced_folder: Path, tmp_path: Path) -> None:
    save_model(MMDiT(**MMDIT), tmp_path / "mmdit", MoCConfig())
    assert isinstance(build_model(ModelConfig(Family.mmdit, str(tmp_path / "mmdit")), 4, 12), MMDiT)
    for family, path in ((Family.mmdit, reduced_folder), (Family.wan, tmp_path / "mmdit")):
        with pytest.raises(ValueError, match=f"model.path={path} holds a .*, not one of model.family={family}; set"):
            build_model(ModelConfig(family, str(path)), 16, 24)


def test_a_tensor_under_two_names_is_refused(reduced_file: Path, tmp_path: Path) -> None:
    tensors = load_file(reduced_file)
    tensors["model.diffusion_model.head.head.weight"] = tensors["head.head.weight"] + 1
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"prefix: head\.head\.weight, model\.diffusion_model\.head\.head\.weight$"):
        load_model(tmp_path / "a.safetensors")


def test_a_diffusers_file_is_known_by_any_of_its_names(reduced_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(reduced_folder / "diffusion_pytorch_model.safetensors")
    del tensors["condition_embedder.time_proj.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"Model: 1 missing: condition_embedder\.time_proj\.weight;"):
        load_model(tmp_path / "a.safetensors")


def test_an_index_that_does_not_fit_its_shards_is_refused(reduced, tmp_path: Path) -> None:
    reduced.save_pretrained(tmp_path, max_shard_size="300KB")
    (file,) = tmp_path.glob("*.index.json")
    index = json.loads(file.read_text())
    lost = "proj_out.bias"  # which shares its shard with others
    own = index["weight_map"][lost]
    other = next(shard for shard in index["weight_map"].values() if shard != own)
    for change, message in (
        ({"new.weight": own}, "1 not in the shard that the index names: new.weight;"),
        ({lost: other}, f"1 not in the shard that the index names: {lost};"),
        ({lost: None}, f"1 in a shard but not in the index: {lost};"),
    ):
        changed = {name: shard for name, shard in (index["weight_map"] | change).items() if shard}
        file.write_text(json.dumps(index | {"weight_map": changed}))
        with pytest.raises(ValueError, match=f"is not what its index says: {re.escape(message)}"):
            load_model(tmp_path)


@pytest.mark.parametrize("outside", ["../{}", "{folder}/../{}", "a/../../{}"])
def test_an_index_reads_nothing_outside_its_folder(reduced, tmp_path: Path, outside: str) -> None:
    """The shard lies there, whole: only its place is wrong."""
    folder = tmp_path / "model"
    reduced.save_pretrained(folder, max_shard_size="300KB")
    (file,) = folder.glob("*.index.json")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / shard.name)
    named = outside.format(shard.name, folder=folder)
    file.write_text(file.read_text().replace(f'"{shard.name}"', json.dumps(named)))
    for load in (load_model, WanTransformer3DModel.from_pretrained):
        with pytest.raises(ValueError, match=f"{re.escape(str(file))} is no index of its own shards: .*does not lie"):
            load(folder)


def test_bad_files_are_one_clear_message(reduced_file: Path, reduced_folder: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(reduced_file.read_bytes()[:-1000])
    other = tmp_path / "other.safetensors"
    save_file({"unet.weight": torch.zeros(2)}, other)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for expert in ("full_high_noise", "full_low_noise"):
        shutil.copy(reduced_file, mixed / f"{expert}.safetensors")
    experts = tmp_path / "experts"
    for part in ("transformer", "transformer_2"):
        shutil.copytree(reduced_folder, experts / part)
    sharded = tmp_path / "sharded"
    load_model(reduced_folder).save_pretrained(sharded, max_shard_size="300KB")
    next(sharded.glob("*-00002-*")).unlink()
    doubled = tmp_path / "doubled"
    load_model(reduced_folder).save_pretrained(doubled, max_shard_size="300KB")
    shutil.copy(next(doubled.glob("*-00001-*")), next(doubled.glob("*-00002-*")))
    index = tmp_path / "index"
    load_model(reduced_folder).save_pretrained(index, max_shard_size="300KB")
    next(index.glob("*.index.json")).write_text('{"metadata": {}}')
    settings = {
        "class": ("WanTransformer3DModel", "CogVideoXTransformer3DModel"),
        "setting": ("{", '{"new_thing": 3,'),
        "cut": ('",\n', ""),
        "typed": ('layers": 2', 'layers": "two"'),
    }
    for name, (old, new) in settings.items():
        shutil.copytree(reduced_folder, tmp_path / name)
        text = (reduced_folder / "config.json").read_text()
        (tmp_path / name / "config.json").write_text(text.replace(old, new, 1))
    (tmp_path / "empty").mkdir()
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    torch.save({}, pickles / "pytorch_model.bin")
    pickled = tmp_path / "model.pth"
    torch.save({}, pickled)
    for path, message in {
        truncated: "is damaged or no safetensors file",
        other: "no model of the Wan family, nor one of ours",
        mixed: r"holds two noise experts, \['full_high_noise\.safetensors', 'full_low_noise\.safetensors'\]",
        experts: r"holds two noise experts, \['transformer', 'transformer_2'\]",
        sharded: r"lacks the shards \['diffusion_pytorch_model-00002",
        doubled: r"is in .*-00001-of-.* and in .*-00002-of-.*; fetch the folder again",
        index: "has no weight_map from tensors to shards",
        tmp_path / "class": r"class/config\.json is of a CogVideoXTransformer3DModel; only models of MMDiT, Wan",
        tmp_path / "setting": r"settings \['new_thing'\] that this WanTransformer3DModel does not know",
        tmp_path / "cut": r"cut/config\.json is damaged or no JSON file",
        tmp_path / "typed": r"typed/config\.json does not describe a WanTransformer3DModel",
        tmp_path / "empty": r"holds no \.safetensors file",
        pickles: r"holds only pickles \['pytorch_model\.bin'\]",
        pickled: "is a pickle file",
        tmp_path / "nowhere": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_model(path)


def original_t5_name(name: str) -> str:
    """The name in models_t5_umt5-xxl-enc-bf16.pth, as Wan's t5.py has it."""
    for new, old in {
        **{"shared": "token_embedding", "encoder.final_layer_norm": "norm", "encoder.block": "blocks"},
        **{"layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2"},
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention": "attn",  # then q, k, v, o
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",  # the one that GELU follows
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
    """The name in Wan2.2_VAE.pth; a block has two layers in the encoder, three in the decoder, then its resampling."""
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
    assert state.keys() > {  # as Wan2.2's vae2_2.py names them
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
        with pytest.raises(ValueError, match=rf"part\.pth is not whole: it lacks the weights \[{re.escape(lacking)}"):
            convert_pickle(tmp_path / "part.pth", tmp_path / "out")


def test_latent_statistics_of_wan22_are_the_release_s() -> None:
    """By their sums, plain and weighted by place: those of vae/config.json of Wan-AI/Wan2.2-TI2V-5B-Diffusers."""
    for name, expected in (("latents_mean", (-0.5589, -7.0659)), ("latents_std", (32.5360, 758.3531))):
        values = VAE22[name]
        assert len(values) == 48
        assert (sum(values), sum(i * x for i, x in enumerate(values))) == pytest.approx(expected, abs=1e-6)


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"token_embedding.weight": subprocess.run}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"cannot be read safely: it names \w+\.run, which is code; fetch"):
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
        with pytest.raises(ValueError, match=rf"{name}\.pth {message}"):
            convert_pickle(tmp_path / f"{name}.pth", tmp_path / "out")
