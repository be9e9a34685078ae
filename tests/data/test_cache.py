"""These tests are about the cache: exact round trip, resumption, deduplicated text, and damage found and named."""

import errno
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.cache.reader import open_cache
from data.cache.writer import COMPLETE, CacheWriter, finish, read_stored, remove_stored
from data.errors import DataError
from data.records import digest, write_whole
from tests.caches import RECIPE, RECORD_FAULTS, flip_byte, read_everything, scene, write_cache


def test_round_trip_over_several_shards(tmp_path):
    scenes = [scene(n, shots=1 + n % 3, variants=1 + n % 2) for n in range(6)]
    cache = open_cache(write_cache(tmp_path, scenes))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert [s.id for s in cache.scenes] == [s.id for s in scenes]
    for stored, wrote in zip(cache.scenes, scenes, strict=True):
        assert stored.kind == wrote.kind
        for a, b in zip(cache.latents(stored), wrote.latents, strict=True):
            torch.testing.assert_close(a, b.half(), rtol=0, atol=0)
        for keys, texts in zip(stored.text_keys, wrote.text, strict=True):
            for key, text in zip(keys, texts, strict=True):
                assert torch.equal(cache.text_features(key), text.half())
                assert cache.text_rows(key) == len(text)


def test_equal_text_is_stored_once(tmp_path):
    write_cache(tmp_path, [scene(1), scene(1, shots=1)], shard_bytes=1 << 20)
    assert len(read_stored(tmp_path)[0]["text"]) == 2 + 3


def test_digest_names_the_recipe():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_killed_writer_has_stored_every_scene(tmp_path):
    writer = CacheWriter(tmp_path, RECIPE, shard_bytes=1 << 20)
    writer.add(scene(0))
    writer.add(scene(1))  # killed here: no shard is full
    again = CacheWriter(tmp_path, RECIPE, shard_bytes=1 << 20)
    assert again.done == {"key0", "key1"}
    again.add(scene(2))
    again.flush()
    assert finish(tmp_path, RECIPE, ["key0", "key1", "key2"]) == 3
    cache = open_cache(tmp_path)
    assert [cache.latents(stored)[0].unique() for stored in cache.scenes] == [0, 1, 2]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_what_killed_writers_left_is_gathered_in_shards(tmp_path):
    """Four writers were killed; two go on, one of them with scenes of its own."""
    for rank in range(4):
        killed = CacheWriter(tmp_path, RECIPE, rank, 4, shard_bytes=1 << 20)
        for number in range(3):
            killed.add(scene(10 * rank + number))
    assert len(files_in(tmp_path)) == 12
    writers = [CacheWriter(tmp_path, RECIPE, rank, 2, shard_bytes=1 << 20) for rank in range(2)]
    for writer in writers:
        writer.adopt()
    assert len(writers[0].done) == 12
    writers[0].add(scene(99))
    for writer in writers:
        writer.flush()
    assert files_in(tmp_path) == ["shard-0-00000.safetensors", "shard-1-00000.safetensors"]
    keys = [f"key{10 * rank + number}" for rank in range(4) for number in range(3)] + ["key99"]
    assert finish(tmp_path, RECIPE, keys) == 13
    cache = open_cache(tmp_path)
    assert [cache.latents(stored)[0].unique().item() for stored in cache.scenes] == [float(key[3:]) for key in keys]
    read_everything(cache)


def test_no_number_of_kills_makes_more_files_than_shards(tmp_path):
    for number in range(6):
        writer = CacheWriter(tmp_path, RECIPE, shard_bytes=4000)
        writer.adopt()
        writer.add(scene(number))
        writer.add(scene(100 + number))  # killed here
        assert len([file for file in files_in(tmp_path) if file.startswith("scene")]) <= 4
    sizes = [(tmp_path / file).stat().st_size for file in files_in(tmp_path) if file.startswith("shard")]
    assert len(sizes) >= 3
    assert min(sizes) >= 4000


def test_a_writer_killed_as_it_gathers_stores_nothing_twice(tmp_path, monkeypatch):
    """The shard is written, and of its scenes' files none, or some, are removed yet."""
    writer = CacheWriter(tmp_path, RECIPE, shard_bytes=1 << 20)
    for number in range(3):
        writer.add(scene(number))
    with monkeypatch.context() as patch:
        patch.setattr(
            "data.cache.writer.remove_stored", lambda path: None if "00001" in path.name else remove_stored(path)
        )
        writer.flush()
    assert files_in(tmp_path) == ["scene-0-00001.safetensors", "shard-0-00000.safetensors"]
    again = CacheWriter(tmp_path, RECIPE, shard_bytes=1 << 20)
    again.adopt()
    again.flush()
    assert files_in(tmp_path) == ["shard-0-00000.safetensors"]
    assert again.done == {"key0", "key1", "key2"}


def test_a_shard_takes_the_place_of_its_scenes_files(tmp_path):
    writer = CacheWriter(tmp_path, RECIPE, shard_bytes=1 << 20)
    for number in range(3):
        writer.add(scene(number))
    assert len(list(tmp_path.glob("scene-0-*.safetensors"))) == 3
    writer.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-0-00000.json", "shard-0-00000.safetensors"]
    assert writer.done == {"key0", "key1", "key2"}


def test_a_scene_whose_text_is_lost_is_not_done(tmp_path):
    """Equal text is stored once, with the scene that had it first; that one may be gone from the plans."""
    writer = CacheWriter(tmp_path, RECIPE, shard_bytes=1)
    first, second = scene(1), scene(1, shots=1)
    writer.add(first)
    writer.add(replace(second, key="another"))
    assert writer.done == {"key1", "another"}
    (tmp_path / "shard-0-00000.safetensors").unlink()
    again = CacheWriter(tmp_path, RECIPE, shard_bytes=1)
    assert again.done == set()
    again.add(replace(second, key="another"))
    assert finish(tmp_path, RECIPE, ["another"]) == 1
    read_all(tmp_path)


def test_one_file_written_by_many_at_once_is_whole(tmp_path):
    contents = [bytes([number]) * 500_000 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda content: [write_whole(tmp_path / "a", content) for _ in range(5)], contents))
    assert (tmp_path / "a").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_writers_of_many_processes_meet_in_one_index(tmp_path):
    for rank in range(3):
        writer = CacheWriter(tmp_path, RECIPE, writer=rank, writers=3, shard_bytes=1)
        writer.add(scene(rank))
    finish(tmp_path, RECIPE, ["key2", "key0", "key1"])
    cache = open_cache(tmp_path)
    assert [s.id for s in cache.scenes] == ["scene2", "scene0", "scene1"]
    assert cache.latents(cache.scenes[0])[0].unique() == 2


def test_a_deleted_shard_is_made_again(tmp_path):
    scenes = [scene(n) for n in range(3)]
    write_cache(tmp_path, scenes, shard_bytes=1)
    lost = open_cache(tmp_path).scenes[1]
    (tmp_path / read_stored(tmp_path)[lost.shard]["file"]).unlink()
    writer = CacheWriter(tmp_path, RECIPE, shard_bytes=1)
    assert "key1" not in writer.done
    writer.add(scenes[1])
    finish(tmp_path, RECIPE, [s.key for s in scenes])
    cache = open_cache(tmp_path)
    assert cache.latents(cache.scenes[1])[0].unique() == 1


@pytest.mark.parametrize("harm", RECORD_FAULTS)
def test_a_shard_whose_record_is_not_as_written_is_made_again(tmp_path, harm):
    scenes = [scene(n) for n in range(3)]
    write_cache(tmp_path, scenes, shard_bytes=1)
    harm(tmp_path / "shard-0-00001.json")
    writer = CacheWriter(tmp_path, RECIPE, shard_bytes=1)
    lost = {item.key for item in scenes} - writer.done
    assert len(lost) == 1
    for item in scenes:
        if item.key in lost:
            writer.add(item)
    assert finish(tmp_path, RECIPE, [s.key for s in scenes]) == 3
    read_all(tmp_path)


def read_all(folder: Path) -> None:
    read_everything(open_cache(folder))


@pytest.mark.parametrize(
    ("kind", "harm"),
    [
        ("damaged-shard", flip_byte),
        ("truncated-shard", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("missing-shard", lambda path: path.unlink()),
        ("unfinished-cache", lambda path: path.with_name(COMPLETE).unlink()),
        ("damaged-index", lambda path: path.with_name("index.json").write_text("{")),
        ("other-format", lambda path: path.with_name("index.json").write_text('{"format": 99}')),
        ("damaged-index", lambda path: _without_checksums(path.with_name("index.json"))),
    ],
)
def test_damage_is_named(tmp_path, kind, harm):
    write_cache(tmp_path, [scene(0)], shard_bytes=1 << 20)
    harm(next(tmp_path.glob("*.safetensors")))
    with pytest.raises(DataError) as caught:
        read_all(tmp_path)
    assert caught.value.kind == kind


def test_an_index_that_prepare_did_not_write_is_one_clear_line(tmp_path):
    """Each field in turn is missing, of another type, or names what is not there."""
    path = write_cache(tmp_path, [scene(0)]) / "index.json"
    index = json.loads(path.read_text())
    changes = [{"format": 1}, [], 7, "x", None, index | {"scenes": [{"id": "a"}]}, index | {"text": {}}]
    changes += [{name: value for name, value in index.items() if name != lost} for lost in index]
    changes += [index | {name: wrong} for name in index for wrong in (None, 3, ["x"])]
    changes += [index | {"shards": []}, index | {"scenes": [index["scenes"][0] | {"shard": 99}]}]
    for changed in changes:
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError) as caught:
            open_cache(tmp_path)
        assert caught.value.kind in ("damaged-index", "other-format"), changed
        assert str(path.parent) in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps({"format": 1}))
    with pytest.raises(DataError, match=r"index\.json: .*it lacks 'recipe'.*prepare_data"):
        open_cache(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    writer = CacheWriter(tmp_path, RECIPE)
    bad = scene(0)
    bad.latents[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="scene0 shot 1"):
        writer.add(bad)
    huge = scene(1)
    huge.latents[0][0, 0, 0, 0] = 1e6  # beyond the range of float16
    with pytest.raises(DataError, match=r"not finite in torch\.float16"):
        writer.add(huge)
    writer.add(scene(2))
    writer.flush()
    assert [s["id"] for s in read_stored(tmp_path)[0]["scenes"]] == ["scene2"]


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def full(self, data):
        self.open("wb").write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = CacheWriter(tmp_path, RECIPE, shard_bytes=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match="No space left on device; free"):
            writer.add(scene(0))
    assert list(tmp_path.iterdir()) == []


def test_open_cache(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_cache(tmp_path / "no")
    with pytest.raises(DataError, match="no finished cache"):
        open_cache(tmp_path)
    first = write_cache(tmp_path / "cache" / "aa", [scene(0)])
    assert open_cache(tmp_path).store.url == open_cache(first).store.url == str(first)
    assert open_cache(f"file://{tmp_path}").store.local("index.json") == first / "index.json"
    write_cache(tmp_path / "cache" / "bb", [scene(0)])
    with pytest.raises(DataError, match="several settings"):
        open_cache(tmp_path)


def test_an_open_cache_travels_to_workers(tmp_path):
    cache = open_cache(write_cache(tmp_path, [scene(4)]))
    cache.latents(cache.scenes[0])
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.latents(copy.scenes[0])[0].unique() == 4


def _without_checksums(path):
    index = json.loads(path.read_text())
    for shot in index["scenes"][0]["shots"]:
        del shot["crc32"]
    path.write_text(json.dumps(index))
