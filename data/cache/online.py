"""This module encodes latents while training: the cache then holds captions, and says which frames of which file to
read.

Training is slower, but no latents are stored; a codec in loader workers runs on the CPU. Latents equal stored ones.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from data.cache.store import FileStore
from data.errors import DataError
from data.interfaces import Codec
from data.manifest import resolve
from data.media.index import VideoIndex
from data.media.resize import read_shots
from data.records import digest, parse_record, read_record, write_record
from moc.files import inside

LoadCodec = Callable[[Path], Codec]  # loads the codec from the cache's encoders/ folder


def name_films(root: Path, cache: Path) -> dict[str, str]:
    """Returns where the videos lie, for the index: the absolute path of their folder, and its path from the folder
    around the prepared one where it lies in that. By the second it is found after both have moved together."""
    root, around = root.resolve(), _around(cache)
    beside = {"beside": root.relative_to(around).as_posix()} if root.is_relative_to(around) else {}
    return {"absolute": str(root)} | beside


def describe_frames(
    root: Path,
    file: str,
    decoder: str,
    index: VideoIndex | None,
    indices: tuple[tuple[int, ...], ...],
    size: tuple[int, int],
    cache: Path,
) -> dict:
    """Returns what `encode_frames` needs, for the index; leaves the video's own index in the cache folder.

    file: the name under `root` of a video, or of an image, which has no index. indices: those of each shot's frames.
    size: (H, W) after resizing.
    """
    frames = {"file": file, "bytes": (root / file).stat().st_size, "decoder": decoder, "size": size}
    if index is None:
        return frames
    fields = asdict(index)
    name = f"videos/{digest({'file': file, 'index': fields})}.json"
    if read_record(cache / name) is None:
        write_record(cache / name, fields)
    return frames | {"video_index": name, "indices": indices}


def encode_frames(
    frames: dict, films: dict[str, str], store: FileStore, codec: Codec, dtype: torch.dtype
) -> list[Tensor]:
    """Returns [C, T, H, W] of each shot, in the dtype of a cache. Raises DataError: no-latents (a cache at a
    URL, which may not name files of this machine), missing-file, outside-root, changed-file, damaged-record, and those
    of reading."""
    if store.is_remote:
        raise DataError(
            "no-latents",
            store.url,
            "stores no latents, and where it says its videos lie is not for a URL to say; copy it to where they are",
        )
    path, index = _find_video(frames, films, store), None
    if "video_index" in frames:
        fields = parse_record(store.read_bytes(frames["video_index"]))
        if fields is None:
            where = f"{store.url}/{frames['video_index']}"
            raise DataError("damaged-record", where, "is not as it was written; run scripts/prepare_data.py again")
        index = VideoIndex(**fields | {key: fields[key] and tuple(fields[key]) for key in ("times", "pts")})
    shots = read_shots(path, frames["decoder"], index, frames.get("indices", ()), frames["size"])
    return [latent.to(dtype) for latent in map(codec.shot_encoder(), shots)]


def _find_video(frames: dict, films: dict[str, str], store: FileStore) -> Path:
    remedy = "run scripts/prepare_data.py again with the films where they lie now"
    folder = Path(films["absolute"])
    if "beside" in films and (beside := inside(_around(store.local(".")), films["beside"])).is_dir():
        folder = beside
    path = folder / frames["file"]
    if not path.is_file():
        raise DataError("missing-file", path, f"no such file, but the cache names it; {remedy}")
    path = resolve(folder, frames["file"], store.url)
    if path.stat().st_size != frames["bytes"]:
        raise DataError("changed-file", path, f"has not the {frames['bytes']} bytes that were prepared; {remedy}")
    return path


def _around(cache: Path) -> Path:
    """Returns the folder that PREPARED lies in, of PREPARED/cache/DIGEST."""
    return (cache / "../../..").resolve()
