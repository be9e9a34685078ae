"""Latents encoded while training instead of stored: the cache then holds captions, and which frames to read of what.

Slower to train on, and nothing to store; a codec in loader workers runs on the CPU. The latents equal stored ones.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from data.bucketing import read_shots
from data.cache import digest, write_whole
from data.errors import DataError
from data.interfaces import Codec
from data.planning import SamplePlan
from data.store import FileStore
from data.video import VideoIndex

LoadCodec = Callable[[Path], Codec]  # from the cache's encoders/ folder


def latent_shapes(plan: SamplePlan, codec: Codec) -> list[list[int]]:
    """[C, T, H, W] of each shot, before anything is encoded."""
    height, width = (side // codec.spatial_factor for side in plan.size)
    lengths = [codec.latent_frames(len(indices), shot) for shot, indices in enumerate(plan.indices)]
    return [[codec.latent_channels, length, height, width] for length in lengths]


def describe_frames(plan: SamplePlan, root: Path, cache: Path, decoder: str) -> dict:
    """What `encode_frames` needs, for the index; leaves the video's own index in the cache folder."""
    frames = {"file": str((root / plan.scene.path).resolve()), "decoder": decoder, "size": plan.size}
    if plan.index is None:
        return frames
    index = asdict(plan.index)
    name = f"videos/{digest({'file': frames['file'], 'index': index})}.json"
    if not (cache / name).is_file():
        write_whole(cache / name, json.dumps(index).encode())
    return frames | {"video_index": name, "indices": plan.indices}


def encode_frames(frames: dict, store: FileStore, codec: Codec, dtype: torch.dtype) -> list[Tensor]:
    """[C, T, H, W] of each shot, in the dtype that a cache would hold. Raises DataError: missing-file, broken, ..."""
    path, index = Path(frames["file"]), None
    if not path.is_file():
        raise DataError("missing-file", path, "no such file, but the cache names it; prepare again where it lies now")
    if "video_index" in frames:
        fields = json.loads(store.read_bytes(frames["video_index"]))
        index = VideoIndex(**fields | {key: fields[key] and tuple(fields[key]) for key in ("times", "pts")})
    shots = read_shots(path, frames["decoder"], index, frames.get("indices", ()), frames["size"])
    return [latent.to(dtype) for latent in map(codec.shot_encoder(), shots)]
