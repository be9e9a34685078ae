"""The cache: exact round trip, resumption, deduplicated text, and damage found and named."""

import errno
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from data.cache import COMPLETE, CacheWriter, digest, finish, read_parts
from data.errors import DataError
from data.records import write_whole
from data.shards import Cache, open_cache
from data.store import FileStore
from tests.caches import RECIPE, RECORD_FAULTS, scene, write_cache


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
    assert len(read_parts(tmp_path)[0]["text"]) == 2 + 3


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
        writer = CacheWriter(tmp_path, RECIPE, writer=str(rank), shard_bytes=1)
        writer.add(scene(rank))
    finish(tmp_path, RECIPE, ["key2", "key0", "key1"])
    cache = open_cache(tmp_path)
    assert [s.id for s in cache.scenes] == ["scene2", "scene0", "scene1"]
    assert cache.latents(cache.scenes[0])[0].unique() == 2


def test_a_deleted_shard_is_made_again(tmp_path):
    scenes = [scene(n) for n in range(3)]
    write_cache(tmp_path, scenes, shard_bytes=1)
    lost = open_cache(tmp_path).scenes[1]
    (tmp_path / read_parts(tmp_path)[lost.shard]["file"]).unlink()
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


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 0x40
    path.write_bytes(data)


def read_all(folder: Path) -> None:
    read_everything(open_cache(folder))


def read_everything(cache: Cache) -> None:
    for stored in cache.scenes:
        cache.latents(stored)
    for key in cache.text:
        cache.text_features(key)


@pytest.mark.parametrize(
    ("kind", "harm"),
    [
        ("damaged-shard", flip_byte),
        ("truncated-shard", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("missing-shard", lambda path: path.unlink()),
        ("unfinished-cache", lambda path: path.with_name(COMPLETE).unlink()),
        ("damaged-index", lambda path: path.with_name("index.json").write_text("{")),
        ("other-format", lambda path: path.with_name("index.json").write_text('{"format": 99}')),
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
    huge.latents[0][0, 0, 0, 0] = 1e6  # over float16
    with pytest.raises(DataError, match=r"not finite in torch\.float16"):
        writer.add(huge)
    writer.add(scene(2))
    writer.flush()
    assert [s["id"] for s in read_parts(tmp_path)[0]["scenes"]] == ["scene2"]


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
    write_cache(tmp_path / "cache" / "bb", [scene(0)])
    with pytest.raises(DataError, match="several settings"):
        open_cache(tmp_path)


def test_an_open_cache_travels_to_workers(tmp_path):
    cache = open_cache(write_cache(tmp_path, [scene(4)]))
    cache.latents(cache.scenes[0])
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.latents(copy.scenes[0])[0].unique() == 4


# Remote caches


@pytest.fixture
def remote(tmp_path):
    """A cache in fsspec's memory file system."""
    folder = write_cache(tmp_path / "made", [scene(n) for n in range(6)], shard_bytes=1)
    fs = fsspec.filesystem("memory")
    fs.rm("/bucket", recursive=True) if fs.exists("/bucket") else None
    fs.put(str(folder), "/bucket/cache/aa", recursive=True)
    return "memory://bucket"


def test_a_remote_cache_reads_through_a_bounded_folder(remote, tmp_path):
    sizes = [part["bytes"] for part in read_parts(tmp_path / "made")]
    bound = 2 * max(sizes) + 10
    cache = open_cache(remote, str(tmp_path / "copies"), bound)
    order = [0, 1, 2, 3, 4, 5, 0, 5, 2]
    for number in order:
        assert cache.latents(cache.scenes[number])[0].unique() == number
        cache._open.clear()  # as in a process that never had it open
        held = list((tmp_path / "copies").rglob("*"))
        assert sum(path.stat().st_size for path in held if path.is_file()) <= bound
    assert not [path for path in held if "partial" in path.name]


def test_the_least_recently_used_copy_goes_first(remote, tmp_path):
    store = FileStore(f"{remote}/cache/aa", str(tmp_path / "copies"))
    names = store.glob("*.safetensors")[:3]
    for age, name in enumerate(names):
        os.utime(store.local(name), (1000 + age, 1000 + age))
    store.local(names[0])
    store.max_bytes = sum(store.size(name) for name in names)
    fourth = store.glob("*.safetensors")[3]
    store.local(fourth)
    held = {path.stem for path in (tmp_path / "copies").rglob("*.safetensors.moc-copy")}
    assert names[0] in held
    assert fourth in held
    assert names[1] not in held


def test_a_bad_local_copy_is_fetched_anew(remote, tmp_path):
    cache = open_cache(remote, str(tmp_path / "copies"))
    cache.latents(cache.scenes[0])
    for copy in (tmp_path / "copies").rglob("*.safetensors.moc-copy"):
        flip_byte(copy)
    again = open_cache(remote, str(tmp_path / "copies"))
    assert again.latents(again.scenes[0])[0].unique() == 0
    read_everything(again)
    fs, shard = fsspec.filesystem("memory"), "/bucket/cache/aa/shard-0-00003.safetensors"
    data = bytearray(fs.cat_file(shard))
    data[-10] ^= 0x40
    fs.pipe_file(shard, bytes(data))
    with pytest.raises(DataError, match=r"memory://bucket/.*fails its checksum"):
        read_everything(open_cache(remote, str(tmp_path / "elsewhere")))


def test_what_a_killed_process_left_counts_and_goes(remote, tmp_path):
    store = FileStore(f"{remote}/cache/aa", str(tmp_path / "copies"))
    name = store.glob("*.safetensors")[0]
    left = store.local(name).with_name(".shard-9.safetensors.moc-copy.0.moc-partial")
    left.write_bytes(bytes(5000))
    os.utime(left, (1000, 1000))
    store.max_bytes = 2 * store.size(name) + 100
    store.local(store.glob("*.safetensors")[1])
    assert not left.exists()


def test_making_room_takes_only_what_the_cache_wrote(remote, tmp_path):
    """A user's model in the folder for copies, and one beside the copies themselves."""
    store = FileStore(f"{remote}/cache/aa", str(tmp_path / "copies"))
    first, second = store.glob("*.safetensors")[:2]
    copy = store.local(first)
    own = [tmp_path / "copies" / "model.safetensors", copy.with_name("model.safetensors"), copy.with_name(".x.partial")]
    for path in own:
        path.write_bytes(bytes(5000))
        os.utime(path, (1000, 1000))
    store.max_bytes = store.size(second)
    store.local(second)
    assert not copy.exists()
    assert all(path.stat().st_size == 5000 for path in own)


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../../escaped", ".."])
@pytest.mark.parametrize("is_remote", [True, False])
def test_no_name_of_an_index_leaves_the_cache(remote, tmp_path, name, is_remote):
    """The name stands where the index names a shard; a file of that name and size lies there to be read."""
    fs, cache = fsspec.filesystem("memory"), "/bucket/cache/aa"
    local = tmp_path / "made"
    index = json.loads((local / "index.json").read_text())
    index["shards"][0]["file"] = name
    (local / "index.json").write_text(json.dumps(index))
    shard = (local / "shard-0-00000.safetensors").read_bytes()
    (tmp_path / "escaped").write_bytes(shard)
    fs.pipe_file(f"{cache}/index.json", json.dumps(index).encode())
    fs.pipe_file("/bucket/escaped", shard)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError) as caught:
        read_everything(open_cache(remote if is_remote else local, str(tmp_path / "a/b/copies")))
    assert caught.value.kind == "outside-root"
    assert sorted(tmp_path.rglob("*")) == before


def test_no_name_of_a_remote_folder_leaves_the_copies(remote, tmp_path, monkeypatch):
    """A bucket may hold a file whose name has .. in it."""
    store = FileStore(f"{remote}/cache/aa", str(tmp_path / "copies"))
    monkeypatch.setattr(FileStore, "glob", lambda self, pattern: ["encoders/../../../escaped"])
    with pytest.raises(DataError, match="leads outside the cache"):
        store.local_folder("encoders")
    assert list(tmp_path.glob("escaped")) == []


def test_remote_faults_are_named(remote, tmp_path):
    with pytest.raises(DataError, match=r"set data\.local_cache"):
        open_cache(remote)
    with pytest.raises(DataError, match="no finished cache"):
        open_cache("memory://elsewhere", str(tmp_path / "copies"))
    cache = open_cache(remote, str(tmp_path / "copies"), max_bytes=10)
    with pytest.raises(DataError, match="the local cache takes 10"):
        cache.latents(cache.scenes[0])
    fsspec.filesystem("memory").rm("/bucket/cache/aa/shard-0-00002.safetensors")
    with pytest.raises(DataError, match="the index names it"):
        open_cache(remote, str(tmp_path / "copies"))
