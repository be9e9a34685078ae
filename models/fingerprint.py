"""Short names of what decides the meaning of latents and text features; caches are keyed by them."""

import hashlib

import torch
from torch import nn

VALUES_PER_TENSOR = 4096


def fingerprint(kind: str, *parts: object) -> str:
    """`kind` and a hash of the parts, which must have a faithful repr."""
    return f"{kind}-{hashlib.sha256(repr((kind, *parts)).encode()).hexdigest()[:16]}"


def weights_digest(module: nn.Module) -> str:
    """A hash of a module's weights: names, shapes, dtypes and values, of large tensors 4096 values at even steps."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // VALUES_PER_TENSOR)].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
