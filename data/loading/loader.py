"""This module loads endless optimizer steps of packed batches for one rank; one position is enough to resume from.

`for step in build_loader(...)`: each step is a list of `accumulation` moc.Batch, on the CPU and in the dtype of the
cache. Workers read ahead; neither their number nor the number of ranks changes which samples a step holds.
"""

import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import moc
from data.cache.online import LoadCodec
from data.errors import DataError
from data.loading.ahead import ahead
from data.loading.dataset import DataConfig, ShotDataset, open_dataset
from data.loading.order import Draw, SampleOrder
from data.loading.packing import check_budget, deal, plan_steps
from data.loading.parcel import Parcel, unwrap, wrap
from moc.errors import UserError


class MicroBatches(Dataset):
    """This dataset makes a moc.Batch of each list of draws, in a worker. It returns a DataError, since torch would
    raise another error in its place."""

    def __init__(self, dataset: ShotDataset, spec: moc.StreamSpec, chunk_tokens: int) -> None:
        self.dataset, self.spec, self.chunk_tokens = dataset, spec, chunk_tokens

    def __getitem__(self, draws: Sequence[Draw]) -> moc.Batch | DataError:
        try:
            samples = [self.dataset.sample(draw) for draw in draws]
            return moc.make_batch(samples, self.spec, self.chunk_tokens)
        except DataError as error:
            return error
        except UserError as error:  # the model cannot take the sizes of these samples
            return DataError("unfit-size", "data.path", str(error))


class Loader:
    """A loader gives the steps of a run to one data-parallel rank (ranks that share a sample pass the same rank).
    `position`: the next sample not yet given out.

    Iterating gives steps from `start_position` on, each a list of `accumulation` moc.Batch whose samples together
    with the other ranks' are a run of consecutive positions of at most `config.batch_tokens` tokens.
    Raises DataError: a budget too small for the ranks, too few scenes to hold some out.
    """

    def __init__(
        self,
        dataset: ShotDataset,
        config: DataConfig,
        spec: moc.StreamSpec,
        chunk_tokens: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start_position: int = 0,
    ) -> None:
        self.dataset, self.config, self.spec = dataset, config, spec
        self.chunk_tokens, self.rank, self.world_size = chunk_tokens, rank, world_size
        self.accumulation, self.position = accumulation, start_position
        split = dataset.split(config.validation)
        if not all(source.items for source in split.sources):
            name = "held_out" if config.held_out else "validation"
            raise DataError(
                "no-usable-samples",
                f"data.{name}={getattr(config, name)}",
                f"what is held out of {len(dataset)} scenes leaves none to train; hold out fewer, or make more scenes",
            )
        self.order = SampleOrder(split.sources, config.seed)
        self.num_training = len(split.training_items)
        sizes = {i: dataset.max_tokens(i, spec) for i in split.training_items}
        largest = max(sizes, key=sizes.__getitem__)
        scene_id = dataset.items[largest][1].id
        check_budget(sizes[largest], scene_id, config.batch_tokens, world_size * accumulation)

    def state(self) -> dict[str, int]:
        """Returns where to go on: `start_position` of another loader, on any number of ranks."""
        return {"position": self.position, "epoch": self.position // self.num_training}

    def __iter__(self) -> Iterator[list[moc.Batch]]:
        ends: deque[int] = deque()
        # The iterator is made in the thread that asks it, which then finds out if a worker has died: in the main thread
        # torch would raise that anywhere, in the middle of a checkpoint too.
        micro_batches, workers = MicroBatches(self.dataset, self.spec, self.chunk_tokens), self.config.workers
        arriving = ahead(lambda: iter(_data_loader(micro_batches, self._planned(ends), workers, self.config.prefetch)))
        step: deque[moc.Batch] = deque()
        while True:
            step.append(_arrived(next(arriving)))
            if len(step) == self.accumulation:
                self.position = ends.popleft()
                # The packs leave `step` as they are yielded, so that only the user keeps them alive.
                yield [step.popleft() for _ in range(self.accumulation)]

    def held_out(self) -> Iterator[moc.Batch]:
        """Yields this rank's share of the scenes that are held out; see `held_out`."""
        spec, chunk_tokens = self.spec, self.chunk_tokens
        return held_out(self.dataset, self.config.validation, spec, chunk_tokens, self.rank, self.world_size)

    def _planned(self, ends: deque[int]) -> Iterator[list[Draw]]:
        """Yields this rank's micro-batches, planned ahead of their reading, and notes where each step ends."""
        steps = plan_steps(
            lambda position: self.dataset.draw(position, self.order[position][0], self.config),
            lambda draw: self.dataset.num_tokens(draw, self.spec),
            self.config.batch_tokens,
            self.position,
        )
        for step in steps:
            ends.append(step.end)
            dealt = deal(step, self.world_size * self.accumulation)
            yield from dealt[self.rank :: self.world_size]


def build_loader(
    config: DataConfig, spec: moc.StreamSpec, chunk_tokens: int, load_codec: LoadCodec | None = None, **share: int
) -> Loader:
    """Returns the loader of one rank's `share`, as `Loader` takes it, of the caches that a config names.

    load_codec: makes the codec of caches that store no latents, in each worker.
    Raises DataError: no data, an unfinished cache, damage, and what Loader raises.
    """
    return Loader(open_dataset(config, load_codec), config, spec, chunk_tokens, **share)


def held_out(
    dataset: ShotDataset, validation: int, spec: moc.StreamSpec, chunk_tokens: int, rank: int = 0, world_size: int = 1
) -> Iterator[moc.Batch]:
    """Yields the held-out scenes in one fixed order, one a batch, nothing dropped, fp32; every `world_size`-th for a
    rank.
    They may be of any size: a training step's budget is not theirs. Raises DataError as `ShotDataset.split` does."""
    items = dataset.split(validation).held_out
    draws = [[Draw(position=position, item=item)] for position, item in enumerate(items)][rank::world_size]
    for made in _data_loader(MicroBatches(dataset, spec, chunk_tokens), draws):
        yield _arrived(made).to("cpu")


def _data_loader(
    micro_batches: MicroBatches, draws: Iterable[list[Draw]], workers: int = 0, prefetch: int | None = None
) -> DataLoader:
    has_gpu = torch.cuda.is_available()
    return DataLoader(
        micro_batches,
        sampler=draws,
        batch_size=None,
        collate_fn=_packed if workers or has_gpu else None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=has_gpu,
        worker_init_fn=_leave_signals,
    )


def _leave_signals(worker: int) -> None:
    """Ignores signals that a terminal or a scheduler sends to every process of a run; the main one answers them."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _packed(made: Any) -> Parcel:
    """Returns a batch as one tensor, to send and to pin; or a DataError, to send."""
    return wrap(made.in_stacks() if isinstance(made, moc.Batch) else made)


def _arrived(made: Parcel | moc.Batch | DataError) -> moc.Batch:
    found = unwrap(made) if isinstance(made, Parcel) else made
    if isinstance(found, DataError):
        raise found
    return found
