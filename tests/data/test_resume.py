"""These tests are about preparing again: nothing is made twice, nothing is lost, by one process or many."""

import errno
import threading
import time
from pathlib import Path

import pytest

from data.cache.reader import open_cache
from data.cache.writer import CacheWriter, read_stored
from data.errors import DataError
from data.loading.dataset import DataConfig, open_dataset
from data.prepare import pipeline
from data.prepare.ranks import Process
from tests.caches import RECORD_FAULTS, replace_all
from tests.encoders import PoolCodec, numbers_in
from tests.preparing import film_folder, run, scene, scenes


@pytest.fixture
def folder(tmp_path):
    return film_folder(tmp_path)


def test_a_second_run_makes_nothing_again(folder):
    scenes(folder, scene("a", (0, 9)), scene("b", (20, 29)))
    first = run(folder)
    codec = PoolCodec()
    assert run(folder, codec).cache == first.cache
    assert codec.encoded == []
    scenes(folder, scene("a", (0, 9)), scene("b", (20, 29), caption="other words"), scene("c", (40, 49)))
    prepared = run(folder, codec)
    assert codec.encoded == [20, 40]
    assert [s.id for s in open_cache(prepared.cache).scenes] == ["a", "b", "c"]


def test_an_interrupted_run_goes_on(folder):
    scenes(folder, *(scene(f"s{n}", (n, n + 9)) for n in range(0, 50, 10)))
    codec = PoolCodec()
    codec.fail_at, codec.error = 30, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(folder, codec)
    with pytest.raises(DataError, match="no finished cache"):
        open_dataset(DataConfig(path=str(folder / "out")))
    again = PoolCodec()
    assert len(open_cache(run(folder, again).cache).scenes) == 5
    assert codec.encoded + again.encoded == [0, 10, 20, 30, 40]


def test_what_a_kill_left_is_gathered_by_the_next_run(folder, monkeypatch):
    """The process is killed without a chance to write its shard, while it encodes the fourth scene."""
    scenes(folder, *(scene(f"s{n}", (n, n + 9)) for n in range(0, 50, 10)))
    codec = PoolCodec()
    codec.fail_at, codec.error = 30, KeyboardInterrupt()
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "flush", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            run(folder, codec)
    assert len(list(folder.glob("out/cache/*/scene-0-*.safetensors"))) == 3
    again = PoolCodec()
    cache = run(folder, again).cache
    assert again.encoded == [30, 40]
    assert [path.name for path in cache.glob("*.safetensors")] == ["shard-0-00000.safetensors"]
    assert len(open_cache(cache).scenes) == 5


def test_other_settings_make_another_cache(folder):
    scenes(folder, scene("a", (0, 9)))
    first, second = run(folder).cache, run(folder, size=[32, 80]).cache
    assert first != second
    assert open_cache(first).scenes[0].latent_shapes != open_cache(second).scenes[0].latent_shapes
    other = PoolCodec()
    other.fingerprint = "another"
    assert run(folder, other).cache not in (first, second)


def test_processes_share_the_work(folder):
    scenes(folder, *(scene(f"s{n}", (n, n + 9)) for n in range(0, 50, 5)))
    barrier, codecs = threading.Barrier(3), [PoolCodec() for _ in range(3)]
    told, failures = [[]], []

    def process(rank):
        def first(names):
            if rank == 0:
                told[0] = names
            barrier.wait()
            answer = told[0]
            barrier.wait()
            return answer

        return Process(rank, 3, barrier.wait, first)

    def work(rank):
        try:
            run(folder, codecs[rank], process(rank))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(len(codec.encoded) for codec in codecs) == [3, 3, 4]
    assert sorted(n for codec in codecs for n in codec.encoded) == list(range(0, 50, 5))
    assert [s.id for s in open_dataset(DataConfig(path=str(folder / "out"))).caches[0].scenes] == [
        f"s{n}" for n in range(0, 50, 5)
    ]


def test_turns_are_taken_by_the_first_process_list():
    """A host that sees some of what is done late takes its turn all the same, and neither loses nor doubles any."""
    items = {name: name for name in "abcdef"}
    first = Process(0, 2)
    late = Process(1, 2, first=lambda names: list("acdf"))
    assert list(first.share(items, "x", done={"b", "e"})) == ["a", "d"]
    assert list(late.share(items, "x", done={"b"})) == ["c", "f"]
    with pytest.raises(DataError, match="do all see the same input"):
        list(late.share({"a": "a", "b": "b"}, "x"))


def test_what_another_host_wrote_may_show_late(folder, monkeypatch):
    """The first process sees the other's work only when it looks again."""
    scenes(folder, *(scene(f"s{n}", (n, n + 9)) for n in range(0, 40, 10)))
    codec, other, told = PoolCodec(), PoolCodec(), []

    def tell(names):
        told.append(names)
        return names

    def late(seconds):
        if not other.encoded:
            run(folder, other, Process(1, 2, first=lambda names: told.pop(0)))

    monkeypatch.setattr(time, "sleep", late)
    cache = open_cache(run(folder, codec, Process(0, 2, first=tell)).cache)
    assert (codec.encoded, other.encoded) == ([0, 20], [10, 30])
    assert len(cache.scenes) == 4


def test_work_that_nobody_stored_is_an_error(folder, monkeypatch):
    scenes(folder, scene("a", (0, 9)), scene("b", (20, 29)))
    monkeypatch.setattr(pipeline, "_LATE_SECONDS", 0)
    with pytest.raises(DataError, match=r"no process stored 1 samples \(b \.\.\.\)"):
        run(folder, process=Process(0, 2))
    assert not list(folder.glob("out/cache/*/complete"))
    run(folder)
    assert not list(folder.rglob("*partial"))


def test_damaged_and_missing_shards_are_made_again(folder):
    scenes(folder, scene("a", (0, 9)))
    cache = run(folder).cache
    shard = cache / read_stored(cache)[0]["file"]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    report = run(folder).report
    assert [(p["kind"], p["action"]) for p in report.problems] == [("damaged-shard", "made again")]
    shard.unlink()
    codec = PoolCodec()
    run(folder, codec)
    assert codec.encoded == [0]
    stored = open_cache(cache)
    assert numbers_in(stored.latents(stored.scenes[0])[0]) == [0, 4, 8]


@pytest.mark.parametrize("harm", RECORD_FAULTS)
@pytest.mark.parametrize("records", ["scans/*.json", "cache/*/shard-*.json"])
def test_records_that_are_not_as_written_are_made_again(folder, records, harm, caplog):
    scenes(folder, scene("a", (0, 9)), scene("b", (20, 29)))
    cache = run(folder).cache
    (record,) = (folder / "out").glob(records)
    harm(record)
    codec = PoolCodec()
    caplog.clear()
    report = run(folder, codec).report
    of_shard = record.parent == cache
    what = "were made by an older version, without checksums" if harm is replace_all else "are not as they were written"
    assert caplog.messages.count(f"{record.parent}: records {what}; what they tell of is made again") == 1
    assert codec.encoded == ([0, 20] if of_shard else [])
    assert [(p["kind"], p["where"]) for p in report.problems] == ([("damaged-record", str(record))] if of_shard else [])
    assert [numbers_in(open_cache(cache).latents(s)[0]) for s in open_cache(cache).scenes] == [[0, 4, 8], [20, 24, 28]]
    again = PoolCodec()
    assert run(folder, again).report.problems == []
    assert again.encoded == []


@pytest.mark.parametrize("harm", RECORD_FAULTS)
def test_the_frames_of_an_online_cache_are_described_again(folder, harm):
    scenes(folder, scene("a", (0, 9)))
    cache = run(folder, online=True).cache
    (record,) = cache.glob("videos/*.json")
    harm(record)
    stored = open_cache(cache, load_codec=lambda encoders: PoolCodec())
    with pytest.raises(DataError, match=rf"{record.name}: is not as it was written; .*prepare_data"):
        stored.latents(stored.scenes[0])
    again = open_cache(run(folder, online=True).cache, load_codec=lambda encoders: PoolCodec())
    assert numbers_in(again.latents(again.scenes[0])[0]) == [0, 4, 8]


def test_a_full_disk_ends_the_run_and_the_next_goes_on(folder, monkeypatch):
    scenes(folder, scene("a", (0, 9)), scene("b", (20, 29)))
    whole = Path.write_bytes

    def full(self, data):
        if "safetensors" in self.name:
            whole(self, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match="No space left on device"):
            run(folder)
    assert not list(folder.glob("out/cache/*/complete"))
    assert not list(folder.glob("out/cache/*/*safetensors*"))
    assert len(open_cache(run(folder).cache).scenes) == 2
