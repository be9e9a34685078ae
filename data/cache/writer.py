"""A cache holds latents shot by shot and deduplicated text features, in safetensors shards under a JSON index.

    cache/<digest of what made it>/
        shard-<writer>-00000.safetensors   latents "<scene key>/<shot>", text "text/<key>"
        shard-<writer>-00000.json          what the shard holds; written after it, so a shard without one is ignored
        scene-<writer>-00000.*             the same of one scene, until its shard is written
        index.json                         all shards, scenes and text keys, merged at the end
        complete                           written last

The digest covers decoder, codec, text encoder, size and fps, so another setting makes another cache, never a mixed
one. Every tensor has a CRC32 that each read checks. Writers share nothing but the folder: any number of processes
may fill it. Each scene is on disk as soon as it is added, so that a restarted run encodes no scene twice.
"""

import hashlib
import json
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data.cache.store import checksum
from data.errors import DataError
from data.records import read_record, write_record, write_whole

CACHE_FORMAT = 1
INDEX, COMPLETE = "index.json", "complete"
NULL_GLOBAL, NULL_SHOT = "null_global", "null_shot"


@dataclass(frozen=True)
class EncodedScene:
    """An encoded scene is what the cache stores of one scene. latents: [C, T, H, W] a shot. text: for each caption
    length 1 + S tensors [T_i, text_dim] (global first). kind: "image", "single" or "multi". key: a digest of all that
    the scene was made of.
    cuts: as in `moc.Sample`."""

    id: str
    key: str
    kind: str
    latents: list[Tensor]
    text: list[list[Tensor]]
    shapes: list[list[int]] = field(default_factory=list)
    frames: dict | None = None
    cuts: list[bool] = field(default_factory=list)


@dataclass
class _Content:
    """A content is the tensors and scenes that will be one file."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, dict] = field(default_factory=dict)
    scenes: list[dict] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def take(self, other: "_Content") -> None:
        self.tensors |= other.tensors
        self.text |= other.text
        self.scenes += other.scenes


class CacheWriter:
    """A writer adds scenes to a cache folder: each is written at once as a file of its own, and these merge into full
    shards.

    writer: the number of this writer among the `writers` that fill the folder now; file names contain it.
    """

    def __init__(
        self,
        folder: Path,
        recipe: dict,
        writer: int = 0,
        writers: int = 1,
        dtype: torch.dtype = torch.float16,
        shard_bytes: int = 256 << 20,
    ) -> None:
        self.folder, self.recipe, self.writer, self.writers = Path(folder), recipe, writer, writers
        self.dtype, self.shard_bytes = dtype, shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stored = {stored["file"]: stored for stored in read_stored(self.folder)}
        self._text_keys = {key for stored in self._stored.values() for key in stored["text"]}
        self._fresh, self._shard = _Content(), _Content()  # scenes not on disk yet; all scenes of the next shard
        self._alone: list[str] = []  # the files of single scenes, until their shard is written

    @property
    def done(self) -> set[str]:
        """Returns the keys of the scenes that are stored."""
        return whole_scenes(list(self._stored.values()))

    def adopt(self) -> None:
        """Takes over this writer's share of the one-scene files that killed writers left, of whatever number, so that
        its shards take them. Call it when all writers are there, since each must know what is stored first."""
        shards = [stored for stored in self._stored.values() if stored["file"].startswith("shard-")]
        gathered = {key for stored in shards for key in _keys(stored)}
        for stored in [stored for stored in self._stored.values() if self._falls_here(stored["file"])]:
            self._alone.append(stored["file"])
            if not _keys(stored) <= gathered:  # else a shard holds them, and its writer was killed
                tensors = load_file(self.folder / stored["file"])
                self._shard.take(_Content(tensors, stored["text"], stored["scenes"]))
            if self._shard.nbytes >= self.shard_bytes:
                self.flush()

    def add(self, scene: EncodedScene) -> None:
        """Stores a scene. Raises DataError (nan-latents, cannot-write)."""
        shots: list[dict] = [{"shape": shape} for shape in scene.shapes]
        latents = [self._finite(latent, f"{scene.id} shot {i}") for i, latent in enumerate(scene.latents)]
        text = [[self.add_text(tensor, scene.id) for tensor in variant] for variant in scene.text]
        for i, latent in enumerate(latents):
            shots.append({"shape": list(latent.shape), "crc32": checksum(latent)})
            self._fresh.tensors[f"{scene.key}/{i}"] = latent
        entry = {"id": scene.id, "key": scene.key, "kind": scene.kind, "shots": shots, "cuts": scene.cuts, "text": text}
        self._fresh.scenes.append(entry | ({"frames": scene.frames} if scene.frames else {}))
        if self._shard.nbytes + self._fresh.nbytes >= self.shard_bytes:
            self.flush()
        else:
            self._alone.append(self._write("scene", self._fresh))
            self._shard.take(self._fresh)
            self._fresh = _Content()

    def add_text(self, tensor: Tensor, where: str, name: str | None = None) -> str:
        """Queues text features unless equal ones are stored; returns their key. name: a fixed key."""
        tensor = self._finite(tensor, f"{where} text")
        shape = str(tuple(tensor.shape)).encode()
        key = name or hashlib.sha256(shape + tensor.view(torch.uint8).numpy().tobytes()).hexdigest()[:24]
        if key not in self._text_keys:
            self._text_keys.add(key)
            self._fresh.text[key] = {"shape": list(tensor.shape), "crc32": checksum(tensor)}
            self._fresh.tensors[f"text/{key}"] = tensor
        return key

    def flush(self) -> None:
        """Gathers what is stored scene by scene, and what is queued, in one shard."""
        self._shard.take(self._fresh)
        if self._shard.tensors:
            self._write("shard", self._shard)
        for file in self._alone:
            remove_stored(self.folder / file)
            del self._stored[file]
        self._fresh, self._shard, self._alone = _Content(), _Content(), []

    def _falls_here(self, file: str) -> bool:
        kind, writer, _ = file.split("-")
        return kind == "scene" and int(writer) % self.writers == self.writer

    def _write(self, kind: str, content: _Content) -> str:
        """Writes a shard, its record last. A shard whose record was never written is overwritten."""
        names = (f"{kind}-{self.writer}-{number:05d}.safetensors" for number in count())
        file = next(name for name in names if name not in self._stored)
        payload = save(content.tensors)
        record = {"bytes": len(payload), "scenes": content.scenes, "text": content.text}
        write_whole(self.folder / file, payload)
        write_record((self.folder / file).with_suffix(".json"), record)
        self._stored[file] = record | {"file": file}
        return file

    def _finite(self, tensor: Tensor, where: str) -> Tensor:
        in_half = tensor.detach().to("cpu", self.dtype).contiguous()
        if not torch.isfinite(in_half).all():
            raise DataError("nan-latents", where, f"values are not finite in {self.dtype}; the encoder failed")
        return in_half


def read_stored(folder: Path) -> list[dict]:
    """Returns what each whole shard of the folder holds, in the order of their names. A shard is passed over where it
    or its record is missing or cut short, so that its scenes are made again."""
    all_stored = []
    for path in _records(folder):
        record, file = read_record(path), path.with_suffix(".safetensors")
        if record is not None and _size(file) == record["bytes"]:
            all_stored.append(record | {"file": file.name})
    return all_stored


def _records(folder: Path) -> list[Path]:
    return sorted([*folder.glob("scene-*.json"), *folder.glob("shard-*.json")])


def _keys(stored: dict) -> set[str]:
    return {scene["key"] for scene in stored["scenes"]} | stored["text"].keys()


def whole_scenes(all_stored: list[dict]) -> set[str]:
    """Returns keys of the scenes that the shards hold with all their text, which may lie in other shards."""
    text = {key for stored in all_stored for key in stored["text"]}
    return {
        scene["key"]
        for stored in all_stored
        for scene in stored["scenes"]
        if all(key in text for variant in scene["text"] for key in variant)
    }


def remove_stored(path: Path) -> None:
    """Removes a shard, its record first."""
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_damaged(folder: Path) -> list[DataError]:
    """Deletes shards that fail a checksum or cannot be read, with their records; says which, and which records cannot
    be read; what they held is made again by the next run."""
    damaged = [
        DataError("damaged-record", path, "is not as it was written; the scenes of its shard are made again")
        for path in _records(folder)
        if read_record(path) is None
    ]
    for stored in read_stored(folder):
        path = folder / stored["file"]
        if not _intact(path, stored):
            remove_stored(path)
            damaged.append(DataError("damaged-shard", path, "fails its checksums; deleted, its scenes are made again"))
    return damaged


def _intact(path: Path, stored: dict) -> bool:
    wanted = {f"text/{key}": entry["crc32"] for key, entry in stored["text"].items()}
    for scene in stored["scenes"]:
        wanted |= {f"{scene['key']}/{i}": shot["crc32"] for i, shot in enumerate(scene["shots"]) if "crc32" in shot}
    try:
        with safe_open(path, framework="pt") as file:
            is_whole = all(checksum(file.get_tensor(name)) == crc32 for name, crc32 in wanted.items())
    except (SafetensorError, OSError):
        return False
    videos = {scene["frames"].get("video_index") for scene in stored["scenes"] if "frames" in scene} - {None}
    return is_whole and all(read_record(path.parent / name) is not None for name in videos)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def finish(folder: Path, recipe: dict, keys: list[str], films: dict[str, str] | None = None) -> int:
    """Merges the shards' records into the index, the scenes of `keys` in that order, and returns their number.

    films: where the videos lie of scenes without latents (data/cache/online.py).

    Scenes of the shards that are not asked for stay out of the index. Raises DataError (no-usable-samples).
    """
    all_stored = read_stored(folder)
    whole = whole_scenes(all_stored)
    scenes: dict[str, dict] = {}
    text: dict[str, dict] = {}
    for number, stored in enumerate(all_stored):
        for scene in stored["scenes"]:
            scenes.setdefault(scene["key"], scene | {"shard": number})
        for key, entry in stored["text"].items():
            text.setdefault(key, entry | {"shard": number})
    chosen = [scenes[key] for key in keys if key in whole]
    if not chosen:
        raise DataError("no-usable-samples", folder, "no scene could be encoded; the report says why for each")
    index = {
        "format": CACHE_FORMAT,
        "recipe": recipe,
        "shards": [{"file": stored["file"], "bytes": stored["bytes"]} for stored in all_stored],
        "text": text,
        "scenes": chosen,
    } | ({"films": films} if films else {})
    write_whole(folder / INDEX, json.dumps(index).encode())
    write_whole(folder / COMPLETE, f"{len(chosen)} scenes\n".encode())
    return len(chosen)
