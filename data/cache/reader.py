"""This module reads a cache: its index into memory, tensors from its shards by name, each checked against its
checksum."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.cache.online import LoadCodec, encode_frames
from data.cache.store import FileStore, checksum
from data.cache.writer import CACHE_FORMAT, COMPLETE, INDEX
from data.errors import DataError
from data.interfaces import Codec

_TEXT_FIELDS = ("shape", "crc32", "shard")
_MAX_OPEN = 64  # shards a process keeps open
REMEDY = "run scripts/prepare_data.py again: it makes only what is missing"


@dataclass(frozen=True)
class CachedScene:
    """A cached scene is an entry of the index. latent_shapes: (C, T, H, W) of each shot; text_keys: [caption length][1
    + S]."""

    id: str
    key: str
    kind: str
    shard: int
    latent_shapes: tuple[tuple[int, ...], ...]
    latent_checksums: tuple[int, ...]
    text_keys: tuple[tuple[str, ...], ...]
    frames: dict | None = None
    cuts: tuple[bool, ...] = ()

    @property
    def num_shots(self) -> int:
        return len(self.latent_shapes)


class Cache:
    """This object reads a finished cache. It is cheap to send to loader workers, because files open at the first read.

    Raises DataError: unfinished-cache, damaged-index, other-format, missing-shard, truncated-shard.
    """

    def __init__(self, store: FileStore, load_codec: LoadCodec | None = None) -> None:
        self.store, self.load_codec = store, load_codec
        self._codec: Codec | None = None
        if store.size(COMPLETE) is None:
            raise DataError("unfinished-cache", store.url, f"is not a finished cache; {REMEDY}")
        index = _read_index(store)
        self.recipe: dict = index["recipe"]
        self.text: dict[str, dict] = index["text"]
        self.scenes: list[CachedScene] = index["scenes"]
        self.films: dict[str, str] = index["films"]
        self._shards: list[str] = [shard["file"] for shard in index["shards"]]
        self._open: dict[int, Any] = {}
        for shard in index["shards"]:
            self._check_size(shard["file"], shard["bytes"])

    def latents(self, scene: CachedScene) -> list[Tensor]:
        """Returns [C, T, H, W] of each shot, as stored or to be stored. Raises DataError: damaged-shard, no-codec."""
        if scene.frames:
            dtype = getattr(torch, self.recipe["dtype"])
            return encode_frames(scene.frames, self.films, self.store, self._codec_now(), dtype)
        return [self._read(scene.shard, f"{scene.key}/{i}", crc32) for i, crc32 in enumerate(scene.latent_checksums)]

    def text_features(self, key: str) -> Tensor:
        """Returns [T_i, text_dim] as stored. Raises DataError (damaged-shard)."""
        entry = self.text[key]
        return self._read(entry["shard"], f"text/{key}", entry["crc32"])

    def text_rows(self, key: str) -> int:
        return self.text[key]["shape"][0]

    @property
    def encoders_folder(self) -> Path:
        """Returns the folder of encoders that decode these latents and encode prompts as this text."""
        return self.store.local_folder("encoders")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}, "_codec": None}

    def _codec_now(self) -> Codec:
        """Returns the codec of latents that are not stored, loaded at their first use."""
        if self._codec is None:
            if self.load_codec is None:
                raise DataError("no-codec", self.store.url, "stores no latents, and nothing to encode them was given")
            self._codec = self.load_codec(self.encoders_folder)
        return self._codec

    def _check_size(self, name: str, wanted: int) -> None:
        size = self.store.size(name)
        if size is None:
            raise DataError("missing-shard", f"{self.store.url}/{name}", f"the index names it; {REMEDY}")
        if size != wanted:
            raise DataError(
                "truncated-shard", f"{self.store.url}/{name}", f"{size} bytes, the index says {wanted}; {REMEDY}"
            )

    def _read(self, shard: int, name: str, crc32: int) -> Tensor:
        """Returns a tensor that its checksum fits. A bad local copy of a remote shard is fetched anew, once."""
        try:
            return self._read_once(shard, name, crc32)
        except DataError:
            self._open.pop(shard, None)
            if not self.store.forget(self._shards[shard]):
                raise
            return self._read_once(shard, name, crc32)

    def _read_once(self, shard: int, name: str, crc32: int) -> Tensor:
        try:
            if shard not in self._open:
                while len(self._open) >= _MAX_OPEN:
                    self._open.pop(next(iter(self._open)))
                self._open[shard] = safe_open(self.store.local(self._shards[shard]), framework="pt")
            tensor = self._open[shard].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(shard, f"{name!r} cannot be read ({error})") from error
        if checksum(tensor) != crc32:
            raise self._damaged(shard, f"{name!r} fails its checksum")
        return tensor

    def _damaged(self, shard: int, reason: str) -> DataError:
        where = f"{self.store.url}/{self._shards[shard]}"
        return DataError("damaged-shard", where, f"{reason}; delete the shard and {REMEDY}")


def _read_index(store: FileStore) -> dict:
    """Returns the index, its scenes typed, and all that they refer to there. Raises DataError: damaged-index,
    other-format."""
    where = f"{store.url}/{INDEX}"
    try:
        index = json.loads(store.read_bytes(INDEX))
        number = index["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError("damaged-index", where, f"cannot be read ({_reason(error)}); {REMEDY}") from error
    if number != CACHE_FORMAT:
        raise DataError("other-format", store.url, f"cache format {number}, this code reads {CACHE_FORMAT}")
    try:
        index["recipe"] = dict(index["recipe"])
        index["shards"] = [{"file": str(shard["file"]), "bytes": int(shard["bytes"])} for shard in index["shards"]]
        index["text"] = {key: {name: entry[name] for name in _TEXT_FIELDS} for key, entry in index["text"].items()}
        index["scenes"] = [_scene(entry) for entry in index["scenes"]]
        index["films"] = dict(index.get("films", {}))
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        reason = f"is not what prepare_data writes ({_reason(error)})"
        raise DataError("damaged-index", where, f"{reason}; {REMEDY}") from error
    frames = [scene.frames for scene in index["scenes"] if scene.frames]
    if frames and ("absolute" not in index["films"] or any("bytes" not in entry for entry in frames)):
        raise DataError(
            "other-format",
            where,
            f"is of an older version, which named videos otherwise; delete it and {REMEDY}",
        )
    if any(not scene.frames and len(scene.latent_checksums) < scene.num_shots for scene in index["scenes"]):
        raise DataError("damaged-index", where, f"lacks checksums of latents; delete the cache and {REMEDY}")
    lost = _unstored(index)
    if lost:
        raise DataError("damaged-index", where, f"does not say where {lost[0]!r} is stored; {REMEDY}")
    return index


def _unstored(index: dict) -> list[str]:
    """Returns what the index names and stores nowhere."""
    shards, text = range(len(index["shards"])), index["text"]
    keys = {key for scene in index["scenes"] for variant in scene.text_keys for key in variant}
    homeless = [key for key, entry in text.items() if entry["shard"] not in shards]
    return [*sorted(keys - text.keys()), *homeless, *(s.id for s in index["scenes"] if s.shard not in shards)]


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _scene(entry: dict) -> CachedScene:
    return CachedScene(
        id=entry["id"],
        key=entry["key"],
        kind=entry["kind"],
        shard=entry["shard"],
        latent_shapes=tuple(tuple(shot["shape"]) for shot in entry["shots"]),
        latent_checksums=tuple(shot["crc32"] for shot in entry["shots"] if "crc32" in shot),
        text_keys=tuple(tuple(keys) for keys in entry["text"]),
        frames=entry.get("frames"),
        cuts=tuple(entry.get("cuts", ())),  # older caches do not say
    )


def open_cache(
    path: str | Path, copies: str | None = None, max_bytes: int = 50 << 30, load_codec: LoadCodec | None = None
) -> Cache:
    """Returns the cache that `path` means, a folder or an fsspec URL: itself, or the only one of a prepared folder.

    load_codec: for a cache without latents, makes the codec of its encoders/ folder.

    Raises DataError: missing-data, unfinished-cache, several-caches, and what Cache raises.
    """
    store = FileStore(str(path), copies, max_bytes)
    if not store.is_remote and Path(store.url).is_file():
        raise DataError("missing-data", path, "is a file; name the folder that scripts/prepare_data.py made")
    if not store.is_remote and not Path(store.url).is_dir():
        raise DataError("missing-data", path, "no such folder; make it with scripts/prepare_data.py")
    if store.size(INDEX) is not None or store.size(COMPLETE) is not None:
        return Cache(store, load_codec)
    found = [marker.removesuffix(f"/{COMPLETE}") for marker in store.glob(f"cache/*/{COMPLETE}")]
    if not found:
        raise DataError(
            "unfinished-cache",
            path,
            f"holds no finished cache; name what scripts/prepare_data.py wrote as its output, or {REMEDY}",
        )
    if len(found) > 1:
        names = ", ".join(f"{store.url}/{name}" for name in found)
        raise DataError("several-caches", path, f"holds caches of several settings; name one of {names}")
    return Cache(FileStore(f"{store.url}/{found[0]}", copies, max_bytes), load_codec)
