"""What a run says when the GPU's memory is full."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from moc.batch import Batch
from moc.errors import UserError

STEP = (
    "lower data.batch_tokens, raise parallel.accumulation, which deals a step's tokens to more micro-batches, or set "
    "parallel.activation_checkpointing=true"
)
VALIDATION = "hold out shorter scenes, or none: data.validation=0"


@contextmanager
def enough_for(what: str, batches: Sequence[Batch], remedy: str) -> Iterator[None]:
    """Raises UserError, with the batches' tokens, where they do not fit into the GPU's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        tokens = [batch.layout.num_tokens for batch in batches]
        reason = str(error).partition(". GPU")[0].rstrip(".")
        raise UserError(
            f"{what} of {sum(tokens)} tokens, the most in one batch {max(tokens)}, does not fit into the GPU's memory "
            f"({reason}): {remedy}"
        ) from error
