"""These tests are about damaged files and full disks: one message that names the file and what to do about it; what was
whole stays."""

import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.errors import DataError
from data.prepare.sources import Found, find_scenes, vocabulary
from moc.errors import UserError
from moc.training import Metrics, TrackerConfig, find_checkpoint
from models.checkpoints.contents import Contents
from models.checkpoints.tensors import TensorSource
from models.encoders.text import EmbeddedTextEncoder, TextConfig, build_text_encoder
from tests.pipeline import command, refusal, train_arguments
from tests.runs import make_cache, make_trainer, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    train(make_cache(folder / "cache"), folder / "run", num_steps=2)
    return folder / "run"


@pytest.fixture
def checkpoint(finished, tmp_path):
    """Returns its checkpoint, to damage."""
    shutil.copytree(finished, tmp_path / "run")
    return find_checkpoint(tmp_path / "run")


@contextmanager
def largest_file(limit: int):
    """No file may grow past this: the system refuses as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Checkpoints


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def without(key: str):
    def damage(file: Path) -> None:
        state = json.loads(file.read_text())
        del state[key]
        file.write_text(json.dumps(state))

    return damage


def no_position(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": {}}))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("optimizer.safetensors", cut, "optimizer.safetensors is damaged"),
        ("rng_00000.safetensors", cut, "rng_00000.safetensors is damaged"),
        ("model/diffusion_pytorch_model.safetensors", cut, "diffusion_pytorch_model.safetensors is damaged"),
        ("model/config.json", cut, "config.json is damaged"),
        ("state.json", cut, "state.json is damaged"),
        ("state.json", without("data"), r"state.json has data\.position=None"),
        ("state.json", without("step"), "state.json has step=None"),
        ("state.json", no_position, r"state.json has data\.position=None"),
    ],
)
def test_a_damaged_checkpoint_of_a_run_is_not_to_be_fetched_again(checkpoint, name, damage, said):
    damage(checkpoint / name)
    with pytest.raises(UserError, match=said) as caught:
        make_trainer(checkpoint.parents[1]).resume(checkpoint)
    assert f"remove {checkpoint}, which is damaged, and go on from an earlier checkpoint" in str(caught.value)
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize("flow", ['{"shifts": 1.0}', "3", "null"])
def test_a_state_without_its_noise_convention(checkpoint, flow):
    file = checkpoint / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flow": json.loads(flow)}))
    with pytest.raises(UserError, match=r"state\.json tells no noise convention"):
        _ = Contents(checkpoint).flow


def test_a_converted_checkpoint_is_to_be_converted_again(tmp_path):
    file = tmp_path / "checkpoints/step_0000000/model/model.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"w": torch.zeros(100)}, file)
    cut(file)
    with pytest.raises(UserError, match="convert the weights again"):
        TensorSource(file)


@pytest.mark.parametrize("limit", [200, 20_000])
def test_a_disk_that_is_full_leaves_the_earlier_checkpoint(checkpoint, limit):
    trainer = make_trainer(checkpoint.parents[1])
    data = trainer.resume(checkpoint)
    trainer.step += 1
    with (
        largest_file(limit),
        pytest.raises(UserError, match=r"step_0000003 cannot be written: File too large; nothing"),
    ):
        trainer.save(data, last=True)
    assert [folder.name for folder in checkpoint.parent.iterdir()] == [checkpoint.name]
    trainer.save(data)
    assert find_checkpoint(checkpoint.parents[1]).name == "step_0000003"


def test_training_on_a_full_disk_ends_in_one_line(capsys, tmp_path, prepared):
    arguments = train_arguments(prepared, tmp_path / "run")
    with largest_file(20_000):
        said = refusal(capsys, "train.py", *arguments)
    assert said.startswith(f"error: {tmp_path}/run/checkpoints/step_0000003 cannot be written: File too large;")
    assert not list(tmp_path.glob("run/checkpoints/*"))
    command("train.py", *arguments)


# Input


def test_a_vocabulary_that_is_no_utf_8(tmp_path):
    (tmp_path / "vocabulary.txt").write_bytes("un café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"vocabulary\.txt: byte 6 is not UTF-8"):
        vocabulary(Found(tmp_path))
    EmbeddedTextEncoder(["red"]).save(tmp_path)
    (tmp_path / "vocabulary.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"vocabulary\.txt is no UTF-8 text"):
        build_text_encoder(TextConfig(path=str(tmp_path)))
    (tmp_path / "words").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(UserError, match="words is no UTF-8 text"):
        build_text_encoder(TextConfig(path=str(tmp_path / "words")))
    with pytest.raises(UserError, match="absent' does not exist"):
        build_text_encoder(TextConfig(path=str(tmp_path / "absent")))


def test_an_input_that_is_a_file(capsys, tmp_path):
    file = tmp_path / "film.mp4"
    file.write_bytes(b"x")
    with pytest.raises(DataError, match=rf"film\.mp4: is a file; name the folder that holds it, {tmp_path}"):
        find_scenes(file)
    said = refusal(capsys, "train.py", f"data.path={file}", f"output={tmp_path}", "parallel=cpu")
    assert said.startswith(f"error: {file}: is a file; name the folder that scripts/prepare_data.py made")


# Weights & Biases


def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(UserError, match=r"tracking\.tracker=wandb: .*No API key.* tracking\.tracker=wandb-offline"):
        Metrics(tmp_path, TrackerConfig(tracker="wandb"), {})
