"""A run whose GPU memory is full says what did not fit and what would, in one line."""

import pytest
import torch

from moc.diffusion import Flow
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
