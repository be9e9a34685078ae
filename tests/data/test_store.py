"""These tests are about remote caches: read through a bounded folder of copies, which holds nothing but what the cache
wrote there."""

import json
import os

import fsspec
import pytest

from data.cache.reader import open_cache
from data.cache.store import FileStore
from data.cache.writer import read_stored
from data.errors import DataError
from tests.caches import flip_byte, read_everything, scene, write_cache


@pytest.fixture
def remote(tmp_path):
    """Returns a cache in fsspec's memory file system."""
    folder = write_cache(tmp_path / "made", [scene(n) for n in range(6)], shard_bytes=1)
    fs = fsspec.filesystem("memory")
    fs.rm("/bucket", recursive=True) if fs.exists("/bucket") else None
    fs.put(str(folder), "/bucket/cache/aa", recursive=True)
    return "memory://bucket"


def test_a_remote_cache_reads_through_a_bounded_folder(remote, tmp_path):
    sizes = [stored["bytes"] for stored in read_stored(tmp_path / "made")]
    bound = 2 * max(sizes) + 10
    cache = open_cache(remote, str(tmp_path / "copies"), bound)
    order = [0, 1, 2, 3, 4, 5, 0, 5, 2]
    for number in order:
        assert cache.latents(cache.scenes[number])[0].unique() == number
        cache._open.clear()  # as if this process had never opened a shard
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
    """A user's model lies in the folder for copies, and one beside the copies themselves."""
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
