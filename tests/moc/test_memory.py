"""A run whose GPU memory is full says what did not fit and what would, in one line."""

import pytest
import torch

from moc import memory
from moc.diffusion import Flow
from moc.errors import UserError
from moc.training import find_checkpoint
from tests.pipeline import assert_one_message, refusal, train_arguments

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 MiB is free."


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (7, ("step 2 of ", "data.batch_tokens", "parallel.accumulation", "parallel.activation_checkpointing")),
        (2, ("validation of ", "data.validation=0")),
    ],
)
def test_a_full_memory_is_one_message(prepared, tmp_path, monkeypatch, capsys, call, words):
    """Validation comes first: four noise levels of one scene, and its routing."""
    healthy, calls, tokens = Flow.loss, [], []

    def loss(self, model, batch, *others, **more):
        calls.append(None)
        if len(calls) == call:
            tokens.append(batch.layout.num_tokens)
            raise torch.OutOfMemoryError(FULL)
        return healthy(self, model, batch, *others, **more)

    monkeypatch.setattr(Flow, "loss", loss)
    run = tmp_path / "run"
    said = refusal(capsys, "train.py", *train_arguments(prepared, run), "trainer.checkpoint_every=1")
    assert_one_message(said, *words, f"{tokens[0]} tokens", "(CUDA out of memory. Tried to allocate 2.00 GiB)")
    assert "total capacity" not in said
    if call == 7:
        assert find_checkpoint(run).name == "step_0000001"


def test_a_full_host_is_one_message_as_well():
    said = r"a film does not fit into memory \(can't allocate memory.*: name fewer shots$"
    with pytest.raises(UserError, match=said), memory.enough_for("a film", "name fewer shots"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="negative dimension"), memory.enough_for("a film", ""):
        torch.empty(-1)


def test_the_memory_of_a_container_is_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    whole = memory.usable_bytes(torch.device("cpu"))
    for limit, usable in (("max", whole), ("1000", 1000), (f"{whole + 1}", whole)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert memory.usable_bytes(torch.device("cpu")) == usable


def test_the_hosts_free_memory_is_what_its_container_has_left_for_each_process(tmp_path, monkeypatch):
    """Contents of files, which the kernel counts as the container's too, come back."""
    free = memory.host_free_bytes()
    assert 0 < free <= memory.usable_bytes(torch.device("cpu"))
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\nanon_thp 7\n")
    for limit, left in (("max", free), ("9000", 8000)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert memory.host_free_bytes() == pytest.approx(left, rel=0.5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.host_free_bytes() == 2000
