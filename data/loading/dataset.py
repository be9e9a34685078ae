"""This module gives the scenes of prepared caches as moc.Sample to train on, and defines the settings of loading."""

import hashlib
import math
import shutil
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

import moc
from data.cache.online import LoadCodec
from data.cache.reader import Cache, CachedScene, open_cache
from data.cache.writer import NULL_GLOBAL, NULL_SHOT
from data.errors import DataError
from data.loading.order import DRAW, Draw, Source, Split, uniforms
from data.storyworld.recall_scenes import RecallConfig
from moc.counts import count_of
from moc.errors import UserError, check_least, check_seed


class Kind(StrEnum):
    """A kind says which scenes a source gives: stills, scenes of one shot, scenes of several, or all."""

    any = "any"
    image = "image"
    single = "single"
    multi = "multi"


@dataclass
class SourceConfig:
    """These settings describe one source of a mix.

    path: a folder made by scripts/prepare_data.py.
    weight: its share of the samples, relative to the other sources'.
    kind: the kind of scenes taken from it.
    """

    path: str
    weight: float = 1.0
    kind: Kind = Kind.any

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise UserError(f"data.sources: the weight {self.weight} of {self.path} must be positive and finite")

    @property
    def name(self) -> str:
        """Returns what the source is called in the run's metrics."""
        return self.path if self.kind is Kind.any else f"{self.path} ({self.kind})"


@dataclass
class DataConfig:
    """These settings say what training reads and how.

    path: a folder made by scripts/prepare_data.py.
    sources: a mix of several such folders, in place of path.
    recall: scenes composed on the trainer's device without a disk, in place of path.
    batch_tokens: tokens of one optimizer step, over all ranks and accumulation.
    seed: the seed of the order of samples and of the rates' draws.
    workers: processes that read samples.
    prefetch: micro-batches that each worker holds ready.
    local_cache: a local folder for copies of shards, which a path that is a URL (s3://, gs://, https://, ...) needs.
    local_cache_gigabytes: the size at which its oldest copies go.
    validation: how many scenes are held out of training and evaluated, chosen by a hash of their id.
    held_out: patterns of ids, as in a shell, of scenes that are never trained on; `validation` then chooses among them.
    drop_captions: the rate at which a sample loses all its captions, for guidance.
    drop_global_caption: the rate at which it loses its global caption.
    drop_shot_caption: the rate at which a shot loses its caption.
    drop_to_still: the rate at which a shot becomes its first latent frame, as in LCT, which does not say how often.

    Rates are probabilities, drawn for each sample by (seed, position).
    """

    path: str | None = None
    sources: list[SourceConfig] = field(default_factory=list)
    recall: RecallConfig | None = None
    batch_tokens: int = 8192
    seed: int = 0
    workers: int = 2
    prefetch: int = 4
    local_cache: str | None = None
    local_cache_gigabytes: float = 50.0
    validation: int = 0
    held_out: list[str] = field(default_factory=list)
    drop_captions: float = 0.1
    drop_global_caption: float = 0.0
    drop_shot_caption: float = 0.0
    drop_to_still: float = 0.1

    def __post_init__(self) -> None:
        given = [f"data.{name}" for name in ("path", "sources", "recall") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are set together; set one of them")
        for name in ("drop_captions", "drop_global_caption", "drop_shot_caption", "drop_to_still"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name} is a probability in [0, 1], got {getattr(self, name)}")
            if self.recall and getattr(self, name) and name != "drop_captions":
                raise UserError(f"data.{name}={getattr(self, name)}: recall scenes lie alike; set it to 0")
        if self.recall and self.held_out:
            raise UserError(
                f"data.held_out={self.held_out} names prepared scenes, and recall scenes have no names; hold some of "
                "them out by data.validation"
            )
        check_least(self, "data", 1, "batch_tokens", "prefetch")
        check_least(self, "data", 0, "workers", "validation", "local_cache_gigabytes")
        check_seed(self, "")  # data.seed is the command's seed unless it is set by itself


class ShotDataset:
    """This dataset gives the scenes of one or more caches. `dataset[i]` is scene i whole; `sample(draw)` applies a
    draw's drops.

    Raises DataError: missing or unfinished caches, no-usable-samples, mixed-encoders.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        copies: str | None = None,
        max_bytes: int = 50 << 30,
        load_codec: LoadCodec | None = None,
        held_out: Sequence[str] = (),
    ) -> None:
        self.held_out = held_out
        self.caches: list[Cache] = []
        self.items: list[tuple[int, CachedScene]] = []
        self.source_items: list[tuple[float, list[int]]] = []
        self.source_names: list[str] = []  # the source of each item, where there are several
        opened: dict[str, int] = {}
        for source in sources:
            if source.path not in opened:
                opened[source.path] = len(self.caches)
                self.caches.append(open_cache(source.path, copies, max_bytes, load_codec))
            cache = opened[source.path]
            scenes = [s for s in self.caches[cache].scenes if source.kind.value in ("any", s.kind)]
            if not scenes:
                raise DataError(
                    "no-usable-samples",
                    source.path,
                    f"holds no scene of kind {source.kind.value}; take another kind, or leave it out",
                )
            first = len(self.items)
            self.items += [(cache, scene) for scene in scenes]
            self.source_items.append((source.weight, list(range(first, len(self.items)))))
            self.source_names += [source.name if len(sources) > 1 else ""] * len(scenes)
        self._check_same_encoders()

    def __len__(self) -> int:
        return len(self.items)

    def reopened(self) -> "ShotDataset":
        """Returns this dataset with open files and a codec of its own, so that another thread may read it."""
        other = copy(self)
        other.caches = [copy(cache) for cache in self.caches]
        return other

    def __getitem__(self, i: int) -> moc.Sample:
        return self.sample(Draw(position=i, item=i))

    @property
    def latent_channels(self) -> int:
        return self.items[0][1].latent_shapes[0][0]

    @property
    def encoders_folder(self) -> Path:
        """Returns the encoders that decode these latents and encode prompts as this text; a checkpoint has a copy."""
        return self.caches[0].encoders_folder

    def save_encoders(self, folder: Path) -> None:
        shutil.copytree(self.encoders_folder, folder)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Returns the heights and widths that films were prepared in, those of the first cache first."""
        return list(dict.fromkeys((size[0], size[1]) for c in self.caches for size in c.recipe.get("sizes", [])))

    @property
    def frame_rates(self) -> list[float]:
        """Returns the frame rates that films were prepared at, those of the first cache first."""
        rates = [cache.recipe.get("fps") for cache in self.caches]
        return list(dict.fromkeys(float(rate) for rate in rates if rate))  # at a rate of 0 each film keeps its own

    @property
    def max_shots(self) -> int:
        """Returns the number of shots of the scene that has most."""
        return max(scene.num_shots for _, scene in self.items)

    @property
    def text_dim(self) -> int:
        return self.caches[0].text[NULL_SHOT]["shape"][1]

    def split(self, validation: int) -> Split:
        """Keeps scenes out of training: those that `held_out` names, and `validation` scenes, among these where any is
        named, whose ids hash lowest, the same whatever else the folder holds in whatever order.

        Raises DataError where a pattern names no scene, or fewer than `validation` are named.
        """
        ids = sorted({scene.id for _, scene in self.items}, key=_id_hash)
        named = self._named(ids, validation)
        evaluated = (named if self.held_out else ids)[:validation]
        kept_out = {*named, *evaluated}
        training = tuple(
            Source(tuple(i for i in items if self.items[i][1].id not in kept_out), weight)
            for weight, items in self.source_items
        )
        first = {scene.id: i for i, (_, scene) in reversed(list(enumerate(self.items)))}
        return Split(training, tuple(first[scene_id] for scene_id in evaluated))

    def _named(self, ids: list[str], validation: int) -> list[str]:
        """Returns those of the ids that `held_out` names, in their order. Raises DataError, see `split`."""
        by_pattern = {pattern: {x for x in ids if fnmatchcase(x, pattern)} for pattern in self.held_out}
        for pattern, found in by_pattern.items():
            if not found:
                raise DataError("no-such-scene", "data.held_out", f"{pattern!r} names no scene, such as {ids[0]!r}")
        named = set().union(*by_pattern.values())
        if self.held_out and validation > len(named):
            said = f"{validation} is more than the {count_of(len(named), 'scene')} that data.held_out names"
            raise DataError("no-usable-samples", "data.validation", said)
        return [x for x in ids if x in named]

    def draw(self, position: int, item: int, config: DataConfig) -> Draw:
        """Returns what position `position` drops, by (seed, position) alone."""
        num_shots = self.items[item][1].num_shots
        u = uniforms(config.seed, DRAW, position, 3 + 2 * num_shots)
        no_captions = bool(u[1] < config.drop_captions)
        return Draw(
            position=position,
            item=item,
            variant=float(u[0]),
            drop_global_caption=no_captions or bool(u[2] < config.drop_global_caption),
            drop_shot_captions=tuple(no_captions or bool(x < config.drop_shot_caption) for x in u[3 : 3 + num_shots]),
            to_still=tuple(bool(x < config.drop_to_still) for x in u[3 + num_shots :]),
        )

    def text_keys(self, draw: Draw) -> list[str]:
        """Returns keys of the text features a draw shows: 1 + S."""
        variants = self.items[draw.item][1].text_keys
        keys = list(variants[int(draw.variant * len(variants))])
        if draw.drop_global_caption:
            keys[0] = NULL_GLOBAL
        for i, dropped in enumerate(draw.drop_shot_captions):
            if dropped:
                keys[1 + i] = NULL_SHOT
        return keys

    def num_tokens(self, draw: Draw, spec: moc.StreamSpec) -> int:
        """Returns tokens of the sample in a model's stream, from the index alone."""
        cache, scene = self.items[draw.item]
        pt, ph, pw = spec.patch
        total = 0
        for i, (_, frames, height, width) in enumerate(scene.latent_shapes):
            shown = 1 if draw.to_still and draw.to_still[i] else frames
            total += (shown // pt) * (height // ph) * (width // pw)
        if spec.text_in_stream:
            total += sum(self.caches[cache].text_rows(key) for key in self.text_keys(draw))
        return total

    def max_tokens(self, item: int, spec: moc.StreamSpec) -> int:
        """Returns tokens of an item at most, whatever is drawn."""
        cache, scene = self.items[item]
        total = self.num_tokens(Draw(0, item), spec)
        if spec.text_in_stream:
            rows = self.caches[cache].text_rows
            total -= sum(rows(key) for key in self.text_keys(Draw(0, item)))
            nulls = (NULL_GLOBAL, *[NULL_SHOT] * scene.num_shots)
            total += sum(max(map(rows, keys)) for keys in zip(nulls, *scene.text_keys, strict=True))
        return total

    def sample(self, draw: Draw) -> moc.Sample:
        """Reads a draw: latents [C, T, H, W] and text [T_i, text_dim] as stored, in half precision as a rule
        (`Batch.to` widens them). Raises DataError (damaged-shard)."""
        cache, scene = self.caches[self.items[draw.item][0]], self.items[draw.item][1]
        latents = cache.latents(scene)
        stills = draw.to_still or (False,) * len(latents)
        latents = [x[:, :1].contiguous() if still else x for x, still in zip(latents, stills, strict=True)]
        text = [cache.text_features(key) for key in self.text_keys(draw)]
        source = self.source_names[draw.item]
        return moc.Sample(latents, text, draw.position, scene.id, scene.cuts, source)

    def _check_same_encoders(self) -> None:
        first = self.caches[0].recipe
        for cache in self.caches[1:]:
            for name in ("codec", "text"):
                if cache.recipe[name] != first[name]:
                    raise DataError(
                        "mixed-encoders",
                        cache.store.url,
                        f"was made with {name} {cache.recipe[name]}, {self.caches[0].store.url} with {first[name]}; "
                        "prepare both with one",
                    )


def _id_hash(scene_id: str) -> str:
    return hashlib.sha256(scene_id.encode()).hexdigest()


def open_dataset(config: DataConfig, load_codec: LoadCodec | None = None) -> ShotDataset:
    """Returns the dataset a config names. load_codec: for caches without latents. Raises DataError where it names
    none."""
    sources = config.sources if config.path is None else [SourceConfig(path=config.path)]
    if not sources:
        raise DataError("missing-data", "data", "set data.path to a prepared folder, or data.sources to a mix of them")
    max_bytes = int(config.local_cache_gigabytes * 1e9)
    return ShotDataset(sources, config.local_cache, max_bytes, load_codec, config.held_out)
