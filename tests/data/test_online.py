"""These tests are about caches without latents: what is encoded while training, and which films are read for it."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

import moc
from data.cache.reader import open_cache
from data.errors import DataError
from data.loading.dataset import DataConfig
from data.loading.loader import build_loader
from data.manifest import SceneRecord
from moc.errors import UserError
from tests.encoders import PoolCodec, numbers_in
from tests.preparing import film_folder, run, scene, scenes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films").mkdir()
    return film_folder(tmp_path / "films")


def read_first(path: Path) -> torch.Tensor:
    """Returns the first latent of an online cache."""
    cache = open_cache(path, load_codec=lambda encoders: PoolCodec())
    return cache.latents(cache.scenes[0])[0]


def test_online_latents_equal_stored_ones(folder):
    Image.fromarray(np.full((64, 160, 3), 90, np.uint8)).save(folder / "still.png")
    still = SceneRecord(id="still", image="still.png", caption="grey")
    scenes(folder, scene("a", (3, 20), (20, 29)), scene("b", (31, 56)), still)
    stored = open_cache(run(folder).cache)
    codec = PoolCodec()
    online = open_cache(run(folder, codec, online=True).cache, load_codec=lambda encoders: PoolCodec())
    assert codec.encoded == []
    assert sum(path.stat().st_size for path in Path(online.store.url).glob("*.safetensors")) < 10_000
    for now, then in zip(online.scenes, stored.scenes, strict=True):
        assert now.latent_shapes == then.latent_shapes
        assert all(torch.equal(a, b) for a, b in zip(online.latents(now), stored.latents(then), strict=True))
    data = DataConfig(path=str(online.store.url), batch_tokens=900, workers=1)
    loader = build_loader(data, moc.StreamSpec(), 64, load_codec=lambda encoders: PoolCodec())
    assert next(iter(loader))[0].latents[0].dtype == torch.float16
    with pytest.raises(DataError, match="stores no latents"):
        open_cache(online.store.url).latents(online.scenes[0])
    (folder / "film.mkv").unlink()
    with pytest.raises(DataError, match="no such file"):
        online.latents(online.scenes[0])


@pytest.mark.parametrize("side", ["beside", "within", "around"])
def test_an_online_cache_and_its_films_move_together(folder, side):
    world = folder / "world"
    films, output = {
        "beside": (world / "films", world / "made"),
        "within": (world / "made/films", world / "made"),
        "around": (world, world / "made"),
    }[side]
    films.mkdir(parents=True)
    for path in folder.glob("*.mkv"):
        path.rename(films / path.name)
    scenes(films, scene("a", (3, 20)))
    run(films, output=str(output), online=True)
    moved = world.rename(folder / "moved") / "made"
    assert numbers_in(read_first(moved))[0] == 3


def test_an_online_cache_whose_films_moved_alone_is_prepared_again(folder):
    scenes(folder, scene("a", (3, 20)))
    output = folder.parent / "far/away/made"
    run(folder, output=str(output), online=True)
    moved = folder.rename(folder.with_name("moved"))
    with pytest.raises(DataError, match=r"film\.mkv: no such file, .*prepare_data\.py again with the films where they"):
        read_first(output)
    codec = PoolCodec()
    assert run(moved, codec, output=str(output), online=True).report.problems == []
    assert numbers_in(read_first(output))[0] == 3


def test_an_online_cache_takes_no_film_of_another_size_nor_from_elsewhere(folder):
    scenes(folder, scene("a", (3, 20)))
    cache = run(folder, online=True).cache
    film, elsewhere = folder / "film.mkv", folder.parent / "elsewhere.mkv"
    film.rename(elsewhere)
    film.symlink_to(elsewhere)
    with pytest.raises(DataError, match="leads outside"):
        read_first(cache)
    film.unlink()
    film.write_bytes(elsewhere.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"film\.mkv: has not the \d+ bytes that were prepared"):
        read_first(cache)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda index: index["films"].update(beside="../.."), r"'\.\./\.\.' does not lie within"),
        (lambda index: index["films"].update(beside="/etc"), "'/etc' does not lie within"),
        (lambda index: index["scenes"][0]["frames"].update(file="../film.mkv"), "leads outside"),
        (
            lambda index: index.pop("films"),
            "of an older version, .*; delete it and run",
        ),
        (lambda index: index["scenes"][0]["frames"].pop("bytes"), "of an older version"),
    ],
)
def test_the_index_of_an_online_cache_leads_nowhere_else(folder, harm, message):
    scenes(folder, scene("a", (3, 20)))
    cache = run(folder, online=True).cache
    (folder.parent / "film.mkv").write_bytes((folder / "film.mkv").read_bytes())
    index = json.loads((cache / "index.json").read_text())
    harm(index)
    (cache / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        read_first(cache)


def test_a_remote_cache_names_no_file_of_this_machine(folder):
    """One without latents names its videos by path, which an index from elsewhere is not to choose here."""
    scenes(folder, scene("a", (3, 20)))
    made = run(folder, online=True).cache
    fs = fsspec.filesystem("memory")
    fs.put(str(made), "/online/cache", recursive=True)
    cache = open_cache("memory://online/cache", str(folder / "copies"), load_codec=lambda encoders: PoolCodec())
    cache.encoders_folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"memory://online/cache: stores no latents, .*copy it"):
        cache.latents(cache.scenes[0])
