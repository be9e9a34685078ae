"""This module orders samples: says which scene stands at each position of a run, and what is dropped from it.

Position p counts samples 0, 1, 2 ... over the whole run. Everything here is a function of (seed, p) alone, from a
counter-based generator, so the order is the same for any number of workers and ranks; p alone tells where to resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK = 1000  # positions over which up to _SOURCES sources are given their shares; more sources need more positions
_SOURCES = 100
_SHUFFLE, _MIX, DRAW = 0, 1, 2  # independent streams of random bits


def random_bits(seed: int, stream: int, index: int, count: int) -> np.ndarray:
    """Returns uint64 [count], a function of its arguments alone."""
    generator = np.random.Philox(key=[seed, stream], counter=[0, index, 0, 0])
    return generator.random_raw(count)


def uniforms(seed: int, stream: int, index: int, count: int) -> np.ndarray:
    """Returns float64 [count] in [0, 1)."""
    return (random_bits(seed, stream, index, count) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class Source:
    """A source is items that are drawn together: their indices in the dataset, and their share of the positions."""

    items: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Split:
    """A split says which items of a dataset are trained on, and which are held out of that, in one fixed order."""

    sources: tuple[Source, ...]
    held_out: tuple[int, ...]

    @property
    def training_items(self) -> list[int]:
        return [item for source in self.sources for item in source.items]


class SampleOrder:
    """An order maps a position to (item, epoch of its source). A source is shuffled anew for each epoch, and an epoch
    gives each of its items once. Sources are interleaved in blocks of positions: each block gives every source its
    share to the nearest whole number, and at least one position, in an order of its own."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        if not sources or any(not source.items for source in sources):
            raise ValueError("every source needs at least one item")
        self.sources, self.seed = sources, seed
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        if not (weights > 0).all():
            raise ValueError(f"source weights must be positive, got {weights.tolist()}")
        self._block_size = _BLOCK * -(-len(sources) // _SOURCES)  # gives a source ten positions on average, or more
        self._counts = _apportion(weights / weights.sum(), self._block_size)
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._shuffles: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        source, drawn = (0, position) if len(self.sources) == 1 else self._mixed(position)
        items = self.sources[source].items
        epoch, index = divmod(drawn, len(items))
        return items[self._shuffle(source, epoch, len(items))[index]], epoch

    def _mixed(self, position: int) -> tuple[int, int]:
        """Returns the source of a position, and how many positions it had before."""
        block, offset = divmod(position, self._block_size)
        if self._block[0] != block:
            schedule = np.repeat(np.arange(len(self.sources)), self._counts)
            keys = random_bits(self.seed, _MIX, block, self._block_size)
            self._block = (block, schedule[np.argsort(keys, kind="stable")])
        schedule = self._block[1]
        source = int(schedule[offset])
        return source, block * self._counts[source] + int((schedule[:offset] == source).sum())

    def _shuffle(self, source: int, epoch: int, size: int) -> np.ndarray:
        held = self._shuffles.get(source)
        if held is None or held[0] != epoch:
            keys = random_bits(self.seed, _SHUFFLE, (source << 40) + epoch, size)
            held = self._shuffles[source] = (epoch, np.argsort(keys, kind="stable"))
        return held[1]


def _apportion(shares: np.ndarray, total: int) -> list[int]:
    """Returns whole counts nearest the shares (largest remainders), at least 1 each, summing to `total`, which is no
    smaller than the number of shares."""
    counts = np.maximum(1, np.floor(shares * total)).astype(int)
    remainders = shares * total - counts
    while counts.sum() != total:
        change = 1 if counts.sum() < total else -1
        i = int(np.argmax(np.where(counts + change > 0, remainders * change, -np.inf)))
        counts[i] += change
        remainders[i] -= change
    return counts.tolist()


@dataclass(frozen=True)
class Draw:
    """A draw describes one sample of the run: its item in the dataset, its position, which caption length, and what
    training drops of it."""

    position: int
    item: int
    variant: float = 0.0  # in [0, 1); chooses one of the caption's versions of different length
    drop_global_caption: bool = False
    drop_shot_captions: tuple[bool, ...] = ()
    to_still: tuple[bool, ...] = ()
