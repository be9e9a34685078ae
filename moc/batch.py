"""What travels from the data to the loss: shots, captions and their layout, packed.

A model says through its `StreamSpec` how latents become tokens; `make_batch` lays samples out accordingly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moc.errors import UserError
from moc.layout import Shot, ShotLayout


@dataclass(frozen=True)
class StreamSpec:
    """How a model lays a sample out: latent patch (T, H, W) of a token; whether text stands in the stream."""

    patch: tuple[int, int, int] = (1, 2, 2)
    text_in_stream: bool = True

    def grid(self, latent: Tensor) -> tuple[int, int, int]:
        """Token grid of a latent [C, T, H, W]; raises ValueError where the patch does not divide it."""
        sizes = latent.shape[-3:]
        if any(size % patch for size, patch in zip(sizes, self.patch, strict=True)):
            raise UserError(
                f"latent size {tuple(sizes)} (frames, height, width) is not divisible by the model's patch "
                f"{self.patch}; choose a frame size whose latent is"
            )
        t, h, w = (size // patch for size, patch in zip(sizes, self.patch, strict=True))
        return t, h, w


@dataclass(frozen=True)
class Sample:
    """One scene: latents [C, T, H, W], one for each shot; text features [T_i, text_dim], the global caption's, then
    one for each shot. `position` is its place in the run's order of samples and keys its draws: noise, levels, drops.
    cuts: whether a true cut begins each shot, or it continues the one before; empty is cuts everywhere."""

    latents: list[Tensor]
    text: list[Tensor]
    position: int = 0
    id: str = ""
    cuts: Sequence[bool] = ()

    def __post_init__(self) -> None:
        if len(self.text) != len(self.latents) + 1:
            raise ValueError(
                f"sample {self.id!r} has {len(self.text)} texts for {len(self.latents)} shots; "
                "it needs one for the global caption and one for each shot"
            )


@dataclass(frozen=True)
class Batch:
    """Packed samples: latents of all shots, text of all groups (global, shot 1, ... for each sample), their layout."""

    latents: list[Tensor]
    text: list[Tensor]
    layout: ShotLayout
    ids: list[str] = field(default_factory=list)

    @property
    def num_shots(self) -> int:
        return len(self.latents)

    @property
    def positions(self) -> tuple[int, ...]:
        """Each sample's place in the run."""
        return self.layout.positions

    def rechunk(self, chunk_tokens: int) -> "Batch":
        """The same batch with chunks of another size."""
        return replace(self, layout=self.layout.rechunk(chunk_tokens))

    def to(self, device: torch.device | str) -> "Batch":
        """This batch on `device`, latents and text in fp32: loaders send halves, and the device widens them."""
        non_blocking = torch.device(device).type != "cpu"  # there they are read at once
        return replace(
            self,
            latents=[x.to(device, non_blocking=non_blocking).float() for x in self.latents],
            text=[x.to(device, non_blocking=non_blocking).float() for x in self.text],
            layout=self.layout.to(device),
        )


def make_layout(sample: Sample, spec: StreamSpec, chunk_tokens: int) -> ShotLayout:
    """The stream of one sample as a model with this spec sees it."""
    texts = [len(text) if spec.text_in_stream else 0 for text in sample.text]
    cuts = sample.cuts or [True] * len(sample.latents)
    shots = [Shot(n, spec.grid(x), cut) for n, x, cut in zip(texts[1:], sample.latents, cuts, strict=True)]
    return ShotLayout.build(shots, texts[0], chunk_tokens, sample.position)


def make_batch(samples: Sequence[Sample], spec: StreamSpec, chunk_tokens: int) -> Batch:
    """Packs samples one after another; they never see each other."""
    return Batch(
        latents=[latent for sample in samples for latent in sample.latents],
        text=[text for sample in samples for text in sample.text],
        layout=ShotLayout.pack([make_layout(sample, spec, chunk_tokens) for sample in samples]),
        ids=[sample.id for sample in samples],
    )
