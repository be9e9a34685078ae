"""Checkpoints are what was written: a changed byte is found, the newest good one is taken, and a crash leaves none half
on the disk."""

import json
import os
import shutil
import zlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from moc.errors import UserError
from moc.training import find_checkpoint, sound_checkpoint
from moc.training.checkpoint import new_checkpoint
from moc.training.integrity import checksums, files_to_seal, seal
from models import load_model
from tests.runs import losses, train

STEPS = ("step_0000002", "step_0000004")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(cache, folder, num_steps=4, checkpoint_every=2)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path, index: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[index] ^= 4
    file.write_bytes(data)
    mark = next(f for f in file.parents if f.name.startswith("step_")) / "complete"
    os.utime(mark, ns=(mark.stat().st_atime_ns, mark.stat().st_mtime_ns + 1))  # has it checked again


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def test_a_flipped_byte_anywhere_is_found(run, caplog):
    newest = run / "checkpoints" / STEPS[1]
    assert sound_checkpoint(run) == newest
    names = files_of(newest)
    assert {"optimizer.safetensors", "model/moc.json", "state.json", "complete", "rng_00000.safetensors"} <= set(names)
    for name in names:
        caplog.clear()
        flip(newest / name)
        assert sound_checkpoint(run) == run / "checkpoints" / STEPS[0]
        (message,) = [record.message for record in caplog.records]
        assert str(newest) in message
        assert f"{STEPS[0]} is taken instead" in message
        if name != "complete":  # its damage may look like another file's
            assert f"damaged: {name} is not what was written" in message
        flip(newest / name)
        assert sound_checkpoint(run) == newest


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 100)])
def test_a_lost_or_shortened_file_is_found(run, damage):
    damage(run / "checkpoints" / STEPS[1] / "optimizer.safetensors")
    assert sound_checkpoint(run).name == STEPS[0]


def test_a_run_goes_on_from_the_newest_good_one(cache, run, whole, caplog):
    """The damaged one is kept, and the steps after the good one are done again, to the same losses."""
    flip(run / "checkpoints" / STEPS[1] / "optimizer.safetensors")
    train(cache, run, num_steps=4, checkpoint_every=2, resume=True)
    assert "damaged_0000004" in caplog.text
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged_0000004", *STEPS]
    assert losses(run) == losses(whole)
    flip(run / "checkpoints" / STEPS[1] / "ema/diffusion_pytorch_model.safetensors")
    train(cache, run, num_steps=4, checkpoint_every=2, resume=True)
    assert "damaged_0000004_2" in [path.name for path in (run / "checkpoints").iterdir()]


def test_sampling_reads_the_newest_good_weights_and_needs_no_optimizer(run):
    newest, older = (run / "checkpoints" / name for name in reversed(STEPS))
    flip(newest / "optimizer.safetensors")
    flip(newest / "model/diffusion_pytorch_model.safetensors")
    assert_same(load_model(run), load_model(newest))
    flip(newest / "ema/diffusion_pytorch_model.safetensors")
    assert_same(load_model(run), load_model(older))


def test_sampling_takes_no_checkpoint_with_damaged_encoders(cache, tmp_path):
    def save_encoders(folder):
        (folder / "encoders").mkdir()
        (folder / "encoders/codec.json").write_text("{}")

    train(cache, tmp_path, num_steps=4, checkpoint_every=2, save_extras=save_encoders)
    assert sound_checkpoint(tmp_path, "ema").name == STEPS[1]
    flip(tmp_path / "checkpoints" / STEPS[1] / "encoders/codec.json", 0)
    assert sound_checkpoint(tmp_path, "ema").name == STEPS[0]


def assert_same(one: torch.nn.Module, two: torch.nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


def test_a_damaged_one_that_was_named_is_refused_by_file(run):
    newest = run / "checkpoints" / STEPS[1]
    flip(newest / "ema/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"step_0000004/ema/diffusion_.*s is not what was written; remove"):
        load_model(newest)


def test_what_says_where_others_lie_may_be_edited(cache, tmp_path):
    train(cache, tmp_path, num_steps=1, save_extras=lambda folder: (folder / "lora.json").write_text("{}"))
    flip(tmp_path / "checkpoints/step_0000001/lora.json", 0)
    assert sound_checkpoint(tmp_path).name == "step_0000001"


@pytest.mark.parametrize("outside", ["../../other", "{run}/other"])
def test_the_mark_of_a_checkpoint_names_no_file_outside(run, outside):
    """The file lies there, with that checksum."""
    (run / "other").write_text("other")
    mark = run / "checkpoints" / STEPS[1] / "complete"
    mark.write_text(json.dumps(sealed(mark.parent) | {outside.format(run=run): zlib.crc32(b"other")}))
    assert sound_checkpoint(run).name == STEPS[0]


def test_without_any_whole_checkpoint_nothing_is_taken(run):
    for name in STEPS:
        flip(run / "checkpoints" / name / "state.json")
    with pytest.raises(UserError, match=r"step_0000004/state.json .*no earlier checkpoint of .* is whole; remove"):
        sound_checkpoint(run, set_aside=True)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(STEPS)


def test_a_checkpoint_of_an_earlier_version_is_taken_as_it_is(run):
    (run / "checkpoints" / STEPS[1] / "complete").write_text("")
    flip(run / "checkpoints" / STEPS[1] / "state.json", 0)
    assert sound_checkpoint(run).name == STEPS[1]


def test_everything_is_on_the_disk_before_the_mark_and_the_mark_before_the_name(cache, tmp_path, monkeypatch):
    events = []
    sync, rename = os.fsync, Path.rename

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        files = sorted(str(f.relative_to(path.parent)) for f in path.parent.glob("complete"))
        events.append((path.name, bool(files)))
        sync(descriptor)

    def renamed(path, target):
        if path.name.startswith("partial_"):
            events.append(("rename", True))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    train(cache, tmp_path, num_steps=1)
    checkpoint = find_checkpoint(tmp_path)
    names = [name for name, _ in events]
    mark, moved = names.index("complete"), names.index("rename")
    for path in checkpoint.rglob("*"):
        if path.name != "complete":
            assert (path.name, False) in events[:mark] or (path.parent != checkpoint and path.name in names[:mark])
    assert names[mark:moved] == ["complete", "partial_0000001"]
    assert names[moved + 1] == "checkpoints"


class Writers:
    """This is the main one of two processes. The other one, on another host, sees no file yet that this one did not
    name."""

    is_main, rank, world_size = True, 0, 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def together(self) -> nullcontext:
        return nullcontext()

    def gather(self, value):
        if isinstance(value, list):
            self.files = value
            return [value, []]
        return [value, checksums(self.folder, self.files[1::2])]


def test_the_processes_share_the_files_that_the_main_one_lists(tmp_path):
    folder, names = tmp_path / "checkpoints/partial_0000001", {f"{letter}.txt" for letter in "abcde"}
    with new_checkpoint(tmp_path, 1, Writers(folder)):
        for name in names:
            (folder / name).write_text(name)
    assert sealed(tmp_path / "checkpoints/step_0000001").keys() == names


def test_a_folder_is_not_sealed_without_the_checksum_of_every_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    with pytest.raises(RuntimeError, match="cannot be sealed: two came or went"):
        seal(tmp_path, checksums(tmp_path, ["one"]))
    assert not (tmp_path / "complete").exists()
    seal(tmp_path, checksums(tmp_path, files_to_seal(tmp_path)))
    assert sealed(tmp_path).keys() == {"one", "two"}


def sealed(folder: Path) -> dict[str, int]:
    return json.loads((folder / "complete").read_text())
