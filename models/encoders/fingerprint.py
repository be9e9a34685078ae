"""A fingerprint is a short name of what decides the meaning of latents or text features; caches are keyed by it."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

VALUES_PER_TENSOR = 4096


def fingerprint(kind: str, *facts: object) -> str:
    """Returns `kind` and a hash of the facts, which must have a faithful repr."""
    return f"{kind}-{hashlib.sha256(repr((kind, *facts)).encode()).hexdigest()[:16]}"


def weights_digest(module: nn.Module) -> str:
    """Returns a hash of a module's weights: names, shapes, dtypes and values, of large tensors 4096 values at even
    steps."""
    return tensors_digest(
        (name, tuple(weight.shape), weight.detach().flatten()[:: max(1, weight.numel() // VALUES_PER_TENSOR)].cpu())
        for name, weight in sorted(module.state_dict().items())
    )


def tensors_digest(tensors: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """Returns a hash of tensors, in their order: name, shape, and some of the values, flat, with their dtype."""
    digest = hashlib.sha256()
    for name, shape, some in tensors:
        digest.update(f"{name} {shape} {some.dtype}".encode())
        digest.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
