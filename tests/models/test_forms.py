"""Every form of a checkpoint loads the same weights, and what we save other tools load."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from moc import MoCConfig
from moc.errors import UserError
from models import load_model, save_model
from models.checkpoints.names import to_diffusers_name, to_original_name
from models.mmdit import MMDiT
from models.wan import WanTransformer3DModel
from tests.wan_files import MMDIT, REDUCED, same, save_original


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


def test_a_folder_of_the_release_is_read_by_its_shapes(tmp_path: Path) -> None:
    sizes = REDUCED | {"num_attention_heads": 2, "text_dim": 40, "freq_dim": 64, "num_layers": 3, "ffn_dim": 96}
    theirs = diffusers.WanTransformer3DModel(**sizes)
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 256, "num_layers": 3}')
    file = save_original(theirs, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_model(tmp_path)
    assert same(loaded, theirs.state_dict())
    assert {key: loaded.config[key] for key in sizes} == sizes
    save_original(diffusers.WanTransformer3DModel(**sizes, attention_head_dim=96), file)
    with pytest.raises(UserError, match="has width 192, not a multiple of 128: it is no Wan model"):
        load_model(tmp_path)
