"""A `Batch` is what travels from the data to the loss: shots, captions and their layout, packed.

A model says through its `StreamSpec` how latents become tokens; `make_batch` lays samples out accordingly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moc.errors import UserError
from moc.layout import ShotLayout
from moc.move import move
from moc.shot import Shot


@dataclass(frozen=True)
class StreamSpec:
    """A spec says how a model lays a sample out. patch: the size (T, H, W), in a latent, of one token.
    text_in_stream: whether text stands in the stream."""

    patch: tuple[int, int, int] = (1, 2, 2)
    text_in_stream: bool = True

    def grid(self, shape: torch.Size) -> tuple[int, int, int]:
        """Returns the token grid of a latent [C, T, H, W]. Raises UserError where the patch does not divide it."""
        sizes = shape[-3:]
        if any(size % patch for size, patch in zip(sizes, self.patch, strict=True)):
            raise UserError(
                f"latent size {tuple(sizes)} (frames, height, width) is not divisible by the model's patch "
                f"{self.patch}; choose a frame size whose latent is"
            )
        t, h, w = (size // patch for size, patch in zip(sizes, self.patch, strict=True))
        return t, h, w


@dataclass(frozen=True)
class Sample:
    """A sample is one scene: latents [C, T, H, W], one for each shot; text features [T_i, text_dim], the global
    caption's, then one for each shot. `position` is where it comes in the run's order of samples and keys its draws:
    noise, levels, drops. cuts: whether a true cut begins each shot, or it continues the one before; empty means cuts
    everywhere. source: which source of a mix it comes from."""

    latents: list[Tensor]
    text: list[Tensor]
    position: int = 0
    id: str = ""
    cuts: Sequence[bool] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.text) != len(self.latents) + 1:
            raise ValueError(
                f"sample {self.id!r} has {len(self.text)} texts for {len(self.latents)} shots; "
                "it needs one for the global caption and one for each shot"
            )


@dataclass(frozen=True)
class Batch:
    """A batch is packed samples: latents of all shots, text of all groups (global, shot 1, ... for each sample), their
    layout."""

    latents: Sequence[Tensor]
    text: Sequence[Tensor]
    layout: ShotLayout
    ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @property
    def num_shots(self) -> int:
        return len(self.latents)

    def rechunk(self, chunk_tokens: int) -> "Batch":
        """Returns the same batch with chunks of another size."""
        return replace(self, layout=self.layout.rechunk(chunk_tokens))

    def in_stacks(self) -> "Batch":
        """Returns the same batch, whose latents and texts of one shape are one tensor, so that few are sent."""
        return replace(self, latents=Alike.of(self.latents), text=Alike.of(self.text))

    def to(self, device: torch.device | str) -> "Batch":
        """Returns this batch on `device`, latents and text in fp32: loaders send halves, the device widens them."""
        device = torch.device(device)
        return replace(
            self, latents=_moved(self.latents, device), text=_moved(self.text, device), layout=self.layout.to(device)
        )


def _moved(tensors: Sequence[Tensor], device: torch.device) -> "Alike":
    """Returns `tensors` on `device` in fp32, by a copy for each shape: hundreds of shots would be hundreds of
    launches."""
    return Alike([(indices, move(stack, device).float()) for indices, stack in Alike.of(tensors).stacks])


class Alike(Sequence[Tensor]):
    """A list of alike tensors holds those of each shape stacked: what is done to all of them takes as many launches
    as there are shapes, where a pack may have hundreds of shots.

    stacks: for each shape the indices of its tensors, and the tensors, [n, ...].
    """

    def __init__(self, stacks: Sequence[tuple[Sequence[int], Tensor]]) -> None:
        self.stacks = stacks

    def __reduce__(self) -> tuple[Any, ...]:
        return Alike, (self.stacks,)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Alike":
        """Stacks tensors, unless they are stacked already."""
        if isinstance(tensors, cls):
            return tensors
        by_shape: dict[torch.Size, list[int]] = {}
        for index, tensor in enumerate(tensors):
            by_shape.setdefault(tensor.shape, []).append(index)
        return cls([(indices, torch.stack([tensors[i] for i in indices])) for indices in by_shape.values()])

    @cached_property
    def _tensors(self) -> list[Tensor]:
        rows = {i: row for indices, stack in self.stacks for i, row in zip(indices, stack.unbind(), strict=True)}
        return [rows[i] for i in range(len(rows))]

    def __len__(self) -> int:
        return sum(len(indices) for indices, _ in self.stacks)

    def __getitem__(self, index: Any) -> Any:
        return self._tensors[index]

    def at(self, indices: Sequence[int]) -> Tensor:
        """Returns the tensors of these indices, stacked."""
        kept = next((stack for own, stack in self.stacks if list(own) == list(indices)), None)
        return torch.stack([self[index] for index in indices]) if kept is None else kept

    def stacked(self) -> Tensor:
        """Returns all tensors, stacked, which are of one shape."""
        return self.at(range(len(self)))


def shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    """Returns the shape of each tensor, without a view of each where they are stacked."""
    if not isinstance(tensors, Alike):
        return [x.shape for x in tensors]
    found = {index: stack.shape[1:] for indices, stack in tensors.stacks for index in indices}
    return [found[index] for index in range(len(found))]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Returns tensors one after another along the first axis."""
    if isinstance(tensors, Alike) and len(tensors.stacks) == 1:
        return tensors.stacks[0][1].flatten(0, 1)
    return torch.cat(list(tensors))


def laid_out(flat: Tensor, sizes: Sequence[torch.Size]) -> Alike:
    """Returns the tensors of these shapes that lie one after another in `flat` [n], which they fill."""
    if len(set(sizes)) == 1:
        return Alike([(range(len(sizes)), flat.view(len(sizes), *sizes[0]))])
    pieces = flat.split([shape.numel() for shape in sizes])
    return Alike.of([piece.view(shape) for piece, shape in zip(pieces, sizes, strict=True)])


def each_shape(function: Callable[..., Tensor], *lists: Sequence[Tensor]) -> Alike:
    """Applies `function` to the tensors of one shape at once.

    lists: of as many tensors each; those whose first list's tensors share a shape are stacked to [n, ...] and handed
    over together, one argument a list. Returns the results in order.
    """
    first, *others = (Alike.of(tensors) for tensors in lists)
    return Alike([(indices, function(stack, *(x.at(indices) for x in others))) for indices, stack in first.stacks])


def stream_of(sample: Sample, spec: StreamSpec) -> tuple[int, tuple[Shot, ...]]:
    """Returns how a model with this spec sees a sample: the number of its global text's tokens, and its shots."""
    texts = [len(text) if spec.text_in_stream else 0 for text in sample.text]
    cuts = sample.cuts or [True] * len(sample.latents)
    shots = [Shot(n, spec.grid(x.shape), cut) for n, x, cut in zip(texts[1:], sample.latents, cuts, strict=True)]
    return texts[0], tuple(shots)


def make_layout(sample: Sample, spec: StreamSpec, chunk_tokens: int) -> ShotLayout:
    """Returns the stream of one sample as a model with this spec sees it."""
    return ShotLayout([stream_of(sample, spec)], chunk_tokens, [sample.position])


def make_batch(samples: Sequence[Sample], spec: StreamSpec, chunk_tokens: int, like: ShotLayout | None = None) -> Batch:
    """Packs samples one after another; they never see each other. like: a layout whose tables are shared where these
    samples lie as its own do."""
    streams = tuple(stream_of(sample, spec) for sample in samples)
    positions = [sample.position for sample in samples]
    alike = like if like and like.is_stream_of(streams, chunk_tokens) else None
    layout = alike.at(positions) if alike else ShotLayout(streams, chunk_tokens, positions)
    return Batch(
        latents=[latent for sample in samples for latent in sample.latents],
        text=[text for sample in samples for text in sample.text],
        layout=layout,
        ids=[sample.id for sample in samples],
        sources=[sample.source for sample in samples],
    )
