"""These are Hypothesis strategies over streams and settings: small enough for a brute force, odd in every way
allowed."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import moc


@dataclass(frozen=True)
class Stream:
    """These are plain numbers of a packed stream: (global text tokens, shots) of each sample, and the chunk size."""

    samples: tuple[tuple[int, tuple[moc.Shot, ...]], ...]
    chunk_tokens: int

    def layouts(self) -> list[moc.ShotLayout]:
        """Returns one layout for each sample."""
        return [moc.ShotLayout.build(list(shots), text, self.chunk_tokens) for text, shots in self.samples]

    def layout(self) -> moc.ShotLayout:
        return moc.ShotLayout.pack(self.layouts())


def shots(max_size: tuple[int, int, int] = (3, 2, 2), max_text: int = 2) -> st.SearchStrategy[moc.Shot]:
    """Returns shots of 1 to `max_size` tokens on each axis, one-frame shots and captions without tokens among them."""
    grid = st.tuples(*(st.integers(1, size) for size in max_size))
    return st.builds(moc.Shot, st.integers(0, max_text), grid)


def streams(
    max_samples: int = 2,
    max_shots: int = 3,
    max_size: tuple[int, int, int] = (3, 2, 2),
    max_text: int = 2,
    max_chunk_tokens: int = 14,
) -> st.SearchStrategy[Stream]:
    """Returns packed streams; chunks from one token (frames split into rows) to more than a whole shot."""
    sample = st.tuples(
        st.integers(0, max_text), st.lists(shots(max_size, max_text), min_size=1, max_size=max_shots).map(tuple)
    )
    samples = st.lists(sample, min_size=1, max_size=max_samples).map(tuple)
    return st.builds(Stream, samples, st.integers(1, max_chunk_tokens))


def configs(max_top_k: int = 6, **fixed) -> st.SearchStrategy[moc.MoCConfig]:
    """Returns every combination of the settings that shape attention; `fixed` pins some of them."""
    free = {
        "top_k": st.integers(0, max_top_k),
        "causal": st.booleans(),
        "own_anchor": st.sampled_from(["shot", "chunk", "none"]),
        "text_anchor": st.sampled_from(["all", "global_and_own", "none"]),
    }
    return st.builds(moc.MoCConfig, **{**free, **{name: st.just(value) for name, value in fixed.items()}})


seeds = st.integers(0, 2**31 - 1)


def tensors(num_tokens: int, seed: int, num_heads: int = 2, head_dim: int = 4, count: int = 3, **kind) -> list[Tensor]:
    """Returns `count` random tensors [num_tokens, num_heads, head_dim], fp64 unless `dtype` is given."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, num_tokens, num_heads, head_dim)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64).to(kind.pop("dtype", torch.float64)))


def attention_tensors(layout: moc.ShotLayout, seed: int = 0, requires_grad: bool = False, **kind) -> list[Tensor]:
    """Returns random q, k, v of a layout's stream."""
    made = tensors(layout.num_tokens, seed, **kind)
    return [x.requires_grad_(requires_grad) for x in made]
