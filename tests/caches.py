"""This module makes small caches of made-up latents for tests: each scene's values tell its number."""

import re
from pathlib import Path

import torch

from data.cache.reader import Cache
from data.cache.writer import NULL_GLOBAL, NULL_SHOT, CacheWriter, EncodedScene, finish

RECIPE = {"codec": "c", "text": "t"}
CHANNELS, TEXT_DIM = 3, 8


def scene(number: int, shots: int = 2, frames: int = 3, variants: int = 1, kind: str = "") -> EncodedScene:
    """Returns scene `number`: latents of value number + shot / 10, texts of 2 rows (3 for the second length, ...)."""
    latents = [torch.full((CHANNELS, frames + i, 4, 6), number + i / 10) for i in range(shots)]
    text = [[torch.full((2 + v, TEXT_DIM), float(10 * number + g)) for g in range(1 + shots)] for v in range(variants)]
    kind = kind or ("single" if shots == 1 else "multi")
    return EncodedScene(f"scene{number}", f"key{number}", kind, latents, text)


def write_cache(folder: Path, scenes: list[EncodedScene], recipe: dict | None = None, shard_bytes: int = 4000) -> Path:
    recipe = recipe or RECIPE
    writer = CacheWriter(folder, recipe, shard_bytes=shard_bytes)
    writer.add_text(torch.zeros(1, TEXT_DIM), "null", NULL_GLOBAL)
    writer.add_text(torch.zeros(1, TEXT_DIM), "null", NULL_SHOT)
    for item in scenes:
        writer.add(item)
    writer.flush()
    finish(folder, recipe, [item.key for item in scenes])
    return folder


def read_everything(cache: Cache) -> None:
    for stored in cache.scenes:
        cache.latents(stored)
    for key in cache.text:
        cache.text_features(key)


# These functions damage a record, a small JSON file.


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def alter(path: Path) -> None:
    """Alters JSON, which keeps its form: one value is another."""
    path.write_text(re.sub(r"[1-9]", lambda digit: str(int(digit[0]) % 9 + 1), path.read_text(), count=1))


def replace_all(path: Path) -> None:
    path.write_text('{"format": 1}')


RECORD_FAULTS = [empty, cut, alter, replace_all]


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 0x40
    path.write_bytes(data)
