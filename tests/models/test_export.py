"""These tests are about conversion between the forms of a checkpoint: the same bytes, in little memory."""

import errno
import json
import os
import struct
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moc import MoCConfig
from moc.errors import UserError
from models import load_model, save_model
from models.checkpoints.export import Form, convert
from models.checkpoints.opening import open_checkpoint
from models.checkpoints.tensors import TensorSource, write_sharded, write_tensors
from models.mmdit import MMDiT
from tests.wan_files import MMDIT, same, save_hole


def test_conversion_there_and_back(reduced, reduced_file: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(reduced_file), tmp_path / "folder", shard_bytes=300_000)
    assert (tmp_path / "folder" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "folder")
    assert same(loaded, reduced.state_dict())
    convert(open_checkpoint(tmp_path / "folder"), tmp_path / "new/back.safetensors")
    back, before = load_file(tmp_path / "new/back.safetensors"), load_file(reduced_file)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in before)
    with pytest.raises(UserError, match="exists; name a new path"):
        convert(open_checkpoint(reduced_file), tmp_path / "folder")


def test_a_sample_of_a_tensor_is_from_its_middle(tmp_path: Path) -> None:
    """Fingerprints that checkpoints keep are made of such samples."""
    write_tensors(tmp_path / "a.safetensors", [("x", torch.float32, (3, 4))], lambda _: torch.arange(12.0))
    source = TensorSource(tmp_path / "a.safetensors")
    assert source.sample("x", 4).tolist() == [4, 5, 6, 7]
    assert source.sample("x", 99).tolist() == list(range(12))


def test_conversion_leaves_what_lies_beside_its_output(reduced_file: Path, tmp_path: Path) -> None:
    """The files are the user's, named as other programs name their unfinished ones."""
    (tmp_path / "folder.partial").mkdir()
    own = [tmp_path / "folder.partial/notes.txt", tmp_path / "file.safetensors.partial"]
    for path in own:
        path.write_text("mine")
    convert(open_checkpoint(reduced_file), tmp_path / "folder")
    convert(open_checkpoint(reduced_file), tmp_path / "file.safetensors")
    assert [path.read_text() for path in own] == ["mine", "mine"]
    names = {"folder", "folder.partial", "file.safetensors", "file.safetensors.partial"}
    assert {path.name for path in tmp_path.iterdir()} - {reduced_file.name} == names


@pytest.mark.parametrize("form", [Form.original, Form.diffusers, Form.checkpoint])
def test_low_precision_keeps_what_must_stay_wide(reduced_file: Path, form: Form, tmp_path: Path) -> None:
    """It is so in a converted file as in a loaded model, so that the two are the same."""
    output = tmp_path / ("half.safetensors" if form is Form.original else "half")
    convert(open_checkpoint(reduced_file), output, torch.bfloat16, form=form)
    loaded = load_model(reduced_file, torch.bfloat16).state_dict()
    written = load_model(output, dtype=None).state_dict()
    assert {name: w.dtype for name, w in written.items()} == {name: w.dtype for name, w in loaded.items()}
    assert all(torch.equal(written[name], loaded[name]) for name in loaded)
    assert written["blocks.0.scale_shift_table"].dtype == torch.float32
    assert written["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16


def test_training_checkpoints_load_and_convert(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_0000010"
    for weights in ("model", "ema"):
        model = MMDiT(**MMDIT)
        save_model(model, step / weights, MoCConfig(top_k=3))
    (step / "complete").write_text("")
    states = {
        weights: load_file(step / weights / "diffusion_pytorch_model.safetensors") for weights in ("model", "ema")
    }
    assert same(load_model(tmp_path / "run"), states["ema"])
    assert same(load_model(step, weights="model"), states["model"])
    convert(open_checkpoint(tmp_path / "run"), tmp_path / "out")
    assert same(load_model(tmp_path / "out"), states["ema"])
    assert open_checkpoint(tmp_path / "out").moc == MoCConfig(top_k=3)
    with pytest.raises(UserError, match="only Wan models have a form with original names"):
        convert(open_checkpoint(tmp_path / "run"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []

    def read(name: str) -> Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = torch.full((100,), float(name[1:]))
        alive.append(weakref.ref(tensor))
        return tensor

    entries = [(f"w{i}", torch.bfloat16, (20, 5)) for i in range(12)]
    write_sharded(tmp_path, entries, read, shard_bytes=500)
    source = TensorSource(tmp_path)
    assert len(source) == len(alive) == 12
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    (index,) = tmp_path.glob("*.index.json")
    assert json.loads(index.read_text())["metadata"] == {"total_size": 12 * 200}
    assert torch.equal(source.read("w7"), torch.full((20, 5), 7.0, dtype=torch.bfloat16))


def test_conversion_holds_one_tensor_of_a_sharded_folder(reduced, tmp_path: Path, monkeypatch) -> None:
    """Memory is bounded by the largest tensor, whatever the size of the model."""
    reduced.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    read, alive, peak = TensorSource.read, [], 0

    def counted(source: TensorSource, name: str) -> Tensor:
        nonlocal peak
        tensor = read(source, name)
        alive.append(weakref.ref(tensor))
        held = [ref() for ref in alive]
        peak = max(peak, sum(x.nbytes for x in held if x is not None))
        return tensor

    monkeypatch.setattr(TensorSource, "read", counted)
    for form in (Form.checkpoint, Form.diffusers, Form.original):
        output = tmp_path / ("out.safetensors" if form is Form.original else form)
        convert(open_checkpoint(tmp_path / "sharded"), output, torch.bfloat16, 200_000, form)
    weights = reduced.state_dict().values()
    assert len(alive) == 3 * len(weights)
    assert peak == max(weight.nbytes for weight in weights)


def test_a_file_larger_than_memory_is_read(tmp_path: Path) -> None:
    """One of 2 TiB, nearly all of it a hole: mapped for writing, as torch maps files, it would claim that memory."""
    file, hole = tmp_path / "large.safetensors", 2**41
    header = {
        "hole": {"dtype": "F8_E4M3", "shape": [hole], "data_offsets": [0, hole]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [hole, hole + 8]},
    }
    with save_hole(file, header, hole).open("ab") as out:
        out.write(struct.pack("<ff", 5, 7))
    source = TensorSource(file)
    assert source.shapes["hole"] == (hole,)
    assert source.read("small").tolist() == [5, 7]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match="has become shorter than when it was opened"):
        source.read("small")


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "c": torch.randn(2),
        "long": torch.randn(1).half(),
    }
    write_tensors(tmp_path / "ours", [(n, w.dtype, tuple(w.shape)) for n, w in tensors.items()], tensors.__getitem__)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_dtype_without_values_of_ours_is_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    with pytest.raises(UserError, match="w is F8_E8M0; weights of F64, F32, "):
        TensorSource(save_hole(tmp_path / "a.safetensors", header, 4))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def read(name: str) -> Tensor:
        raise ValueError("gone")

    with pytest.raises(ValueError, match="gone"):
        write_tensors(tmp_path / "x.safetensors", [("w", torch.float32, (2,))], read)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    def read(name: str) -> Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a failed write raises it, without a file's name

    with pytest.raises(OSError, match=r"No space left on device: '.*x\.safetensors'"):
        write_tensors(tmp_path / "x.safetensors", [("w", torch.float32, (2,))], read)
    assert list(tmp_path.iterdir()) == []
