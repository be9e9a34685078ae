"""A model's files load whole or not at all, with one message that says what is wrong."""

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
from models import Family, ModelConfig, build_model, load_model, save_model
from models.mmdit import MMDiT
from models.wan import WanTransformer3DModel
from tests.wan_files import MMDIT, REDUCED, same, save_original


def test_missing_extra_and_misshapen_tensors_are_listed(reduced_file: Path, tmp_path: Path) -> None:
    tensors = load_file(reduced_file)
    gone = tensors.pop("blocks.1.self_attn.q.weight")
    tensors["blocks.1.ffn.2.bias"] = torch.zeros(3)
    tensors["blocks.0.cross_attn.k_img.weight"] = gone
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"1 unknown tensors: blocks\.0\.cross_attn\.k_img\.weight"):
        load_model(tmp_path / "a.safetensors")
    del tensors["blocks.0.cross_attn.k_img.weight"]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="is not a whole WanTransformer3DModel") as caught:
        load_model(tmp_path / "b.safetensors")
    assert "1 missing: blocks.1.attn1.to_q.weight" in str(caught.value)
    assert "1 misshapen: blocks.1.ffn.net.2.bias (3,) instead of (128,)" in str(caught.value)
    tensors["text_embedding.0.weight"] = torch.zeros(3)  # the model's sizes are read from this tensor
    del tensors["head.head.bias"]
    save_file(tensors, tmp_path / "c.safetensors")
    told = r"\['proj_out\.bias', 'condition_embedder\.text_embedder\.linear_1\.weight'\]"
    with pytest.raises(UserError, match=rf"c\.safetensors is not a whole Wan model: missing or misshapen are {told};"):
        load_model(tmp_path / "c.safetensors")


@pytest.mark.parametrize("form", ["original", "diffusers"])
def test_image_to_video_models_are_named_as_such(reduced, form: str, tmp_path: Path) -> None:
    """Wan2.2's have no tensors of their own: they take the picture as 20 more channels."""
    model = diffusers.WanTransformer3DModel(**REDUCED | {"in_channels": 36})
    path = tmp_path / ("i2v.safetensors" if form == "original" else "i2v")
    save_original(model, path) if form == "original" else model.save_pretrained(path)
    with pytest.raises(UserError, match=f"{path}: this is an image-to-video Wan model"):
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
    for ignore in (False, True):  # diffusers lets wrong shapes pass with True
        with pytest.raises(UserError, match=f"is not a whole {family.__name__}: 1 missing: {lost}; ") as caught:
            family.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)
        assert f"1 unexpected: extra.weight; 1 misshapen: {short} (3,) instead of" in str(caught.value)


def test_a_path_of_another_family_is_refused(reduced_folder: Path, tmp_path: Path) -> None:
    save_model(MMDiT(**MMDIT), tmp_path / "mmdit", MoCConfig())
    assert isinstance(build_model(ModelConfig(Family.mmdit, str(tmp_path / "mmdit")), 4, 12), MMDiT)
    for family, path in ((Family.mmdit, reduced_folder), (Family.wan, tmp_path / "mmdit")):
        with pytest.raises(UserError, match=f"model.path={path} holds a .*, not one of model.family={family}; set"):
            build_model(ModelConfig(family, str(path)), 16, 24)


def test_a_tensor_under_two_names_is_refused(reduced_file: Path, tmp_path: Path) -> None:
    tensors = load_file(reduced_file)
    tensors["model.diffusion_model.head.head.weight"] = tensors["head.head.weight"] + 1
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"prefix: head\.head\.weight, model\.diffusion_model\.head\.head\.weight; name"
    ):
        load_model(tmp_path / "a.safetensors")


def test_a_diffusers_file_is_known_by_any_of_its_names(reduced_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(reduced_folder / "diffusion_pytorch_model.safetensors")
    del tensors["condition_embedder.time_proj.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"Model: 1 missing: condition_embedder\.time_proj\.weight;"):
        load_model(tmp_path / "a.safetensors")


def test_an_index_that_does_not_fit_its_shards_is_refused(reduced, tmp_path: Path) -> None:
    reduced.save_pretrained(tmp_path, max_shard_size="300KB")
    (file,) = tmp_path.glob("*.index.json")
    index = json.loads(file.read_text())
    lost = "proj_out.bias"  # this tensor shares its shard with others
    own = index["weight_map"][lost]
    other = next(shard for shard in index["weight_map"].values() if shard != own)
    for change, message in (
        ({"new.weight": own}, "1 not in the shard that the index names: new.weight;"),
        ({lost: other}, f"1 not in the shard that the index names: {lost};"),
        ({lost: None}, f"1 in a shard but not in the index: {lost};"),
    ):
        changed = {name: shard for name, shard in (index["weight_map"] | change).items() if shard}
        file.write_text(json.dumps(index | {"weight_map": changed}))
        with pytest.raises(UserError, match=f"is not what its index says: {re.escape(message)}"):
            load_model(tmp_path)


@pytest.mark.parametrize("outside", ["../{}", "{folder}/../{}", "a/../../{}"])
def test_an_index_reads_nothing_outside_its_folder(reduced, tmp_path: Path, outside: str) -> None:
    """The shard lies there, whole: only its folder is wrong."""
    folder = tmp_path / "model"
    reduced.save_pretrained(folder, max_shard_size="300KB")
    (file,) = folder.glob("*.index.json")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / shard.name)
    named = outside.format(shard.name, folder=folder)
    file.write_text(file.read_text().replace(f'"{shard.name}"', json.dumps(named)))
    for load in (load_model, WanTransformer3DModel.from_pretrained):
        with pytest.raises(UserError, match=f"{re.escape(str(file))} is no index of its own shards: .*does not lie"):
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
    for name in ("transformer", "transformer_2"):
        shutil.copytree(reduced_folder, experts / name)
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
        with pytest.raises(UserError, match=message):
            load_model(path)
