"""Preparing: exact latents, resumption, many processes, and every bad input a named record, never a crash."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import filelock
import numpy as np
import pytest
import torch
from PIL import Image

import moc
from data.cache import read_parts
from data.dataset import DataConfig, open_dataset
from data.errors import DataError
from data.loader import build_loader
from data.manifest import SceneRecord, ShotRecord, load_manifest, write_manifest
from data.prepare import PrepareConfig, Process, prepare
from data.shards import open_cache
from data.video import write_video
from tests.encoders import PoolCodec, WordText, numbers_in
from tests.films import write_numbered

SIZE = [64, 160]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("film") / "film.mkv", 60)


@pytest.fixture
def folder(tmp_path, film):
    shutil.copy(film, tmp_path / "film.mkv")
    return tmp_path


def settings(folder, **changes):
    defaults = {"input": str(folder), "output": str(folder / "out"), "size": SIZE, "detector": "adaptive"}
    return PrepareConfig(**defaults | {"min_frames": 5, "max_frames": 25, "shots_per_sample": 2} | changes)


def run(folder, codec=None, process=None, **changes):
    return prepare(settings(folder, **changes), codec or PoolCodec(), WordText(), process)


def scenes(folder, *records):
    write_manifest(folder / "manifest.jsonl", records)


def scene(name, *spans, caption="a film", video="film.mkv"):
    shots = tuple(ShotRecord(start, end, f"shot at {start}") for start, end in spans)
    return SceneRecord(id=name, video=video, caption=caption, shots=shots)


def test_latents_are_the_frames_that_were_asked_for(folder):
    scenes(folder, scene("a", (3, 20), (20, 29), (31, 33), (33, 60)))
    prepared = run(folder)
    cache = open_cache(prepared.cache)
    assert [s.id for s in cache.scenes] == ["a#0000", "a#0001"]
    numbers = [[numbers_in(latent) for latent in cache.latents(s)] for s in cache.scenes]
    assert numbers == [[[3, 7, 11, 15, 19], [20, 24, 28]], [[33, 37, 41, 45, 49, 53, 57]]]
    lines = load_manifest(prepared.manifest, root=folder)
    assert [(shot.start, shot.end, shot.cut) for shot in lines[0].shots] == [(3, 20, True), (20, 29, True)]
    assert [p["kind"] for p in prepared.report.problems] == ["short-shot"]


def test_long_shots_become_continuations_and_fps_is_kept(folder):
    scenes(folder, scene("a", (0, 60)))
    prepared = run(folder, max_frames=12, shots_per_sample=9)
    (line,) = load_manifest(prepared.manifest, root=folder)
    assert [(s.start, s.end, s.cut) for s in line.shots[:2]] == [(0, 9, True), (9, 18, False)]
    slow = run(folder, fps=12.5)
    (stored,) = open_cache(slow.cache).scenes
    assert numbers_in(open_cache(slow.cache).latents(stored)[0])[:4] == [0, 8, 16, 24]


def test_captions_of_several_lengths_and_images(folder):
    Image.fromarray(np.full((100, 90, 3), 200, np.uint8)).save(folder / "still.png")
    shots = (ShotRecord(0, 9, ("one", "one two")), ShotRecord(9, 18, "three", cut=False))
    scenes(
        folder,
        SceneRecord(id="a", video="film.mkv", caption=("x", "x y", "x y z"), shots=shots),
        SceneRecord(id="b", image="still.png", caption="grey"),
    )
    cache = open_cache(run(folder, buckets=[[96, 96]]).cache)
    film, still = cache.scenes
    rows = [[cache.text_rows(key) for key in keys] for keys in film.text_keys]
    assert rows == [[2, 4, 2], [3, 5, 2], [4, 5, 2]]  # a cut's caption begins with [SHOT CUT]
    assert still.kind == "image"
    assert still.latent_shapes == ((3, 1, 12, 12),)


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
    failures = []

    def work(rank):
        try:
            run(folder, codecs[rank], Process(rank, 3, barrier.wait))
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


def moving_texture(seed, num_frames):
    """A picture sliding by a pixel a frame."""
    texture = np.random.default_rng(seed).integers(0, 255, (8, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.roll(texture, i, axis=1)[:, :160] for i in range(num_frames)]


def test_detected_shots_of_a_folder(tmp_path):
    write_video(tmp_path / "a.mp4", moving_texture(0, 30) + moving_texture(1, 22), fps=25)
    (tmp_path / "a.txt").write_text("two textures slide")
    prepared = run(tmp_path, shots_per_sample=3)
    (line,) = load_manifest(prepared.manifest, root=tmp_path)
    assert line.caption == "two textures slide"
    spans = [(shot.start, shot.end, shot.cut) for shot in line.shots]
    assert spans == [(0, 25, True), (25, 30, False), (30, 51, True)]
    assert set(prepared.report.speed()) == {"decode", "shot detection", "encode"}


def test_online_latents_equal_stored_ones(folder):
    Image.fromarray(np.full((64, 160, 3), 90, np.uint8)).save(folder / "still.png")
    still = SceneRecord(id="still", image="still.png", caption="grey")
    scenes(folder, scene("a", (3, 20), (20, 29)), scene("b", (31, 56)), still)
    stored = open_cache(run(folder).cache)
    codec = PoolCodec()
    online = open_cache(run(folder, codec, online=True).cache, load_codec=lambda encoders: PoolCodec())
    assert codec.encoded == []
    assert sum(path.stat().st_size for path in online.store.local("").glob("*.safetensors")) < 10_000
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


def test_report_shows_every_shot(folder):
    scenes(folder, scene("a", (0, 9), (9, 18), caption="<b>bold</b> & more"))
    run(folder)
    out = folder / "out"
    page, report = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    assert report["summary"]["samples"] == 1
    assert report["summary"]["shots"] == 2
    for name in report["samples"][0]["thumbnails"]:
        assert name in page
        assert Image.open(out / "thumbnails" / name).size[1] == 64
    assert "&lt;b&gt;bold" in page


def test_prepared_data_loads(folder):
    scenes(folder, *(scene(f"s{n}", (n, n + 9), (n + 9, n + 14)) for n in range(0, 40, 10)))
    run(folder)
    loader = build_loader(DataConfig(path=str(folder / "out"), batch_tokens=600, workers=0), moc.StreamSpec(), 64)
    step = next(iter(loader))
    assert step[0].layout.num_samples >= 1
    assert step[0].latents[0].shape == (3, 3, 8, 20)


# Bad input


def truncated_mp4(path: Path) -> None:
    write_numbered(path, 20)
    path.write_bytes(path.read_bytes()[:600])


def half_mkv(path: Path) -> None:
    """Cut in the middle, its header still claiming all."""
    write_numbered(path, 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])


def no_frames(path: Path) -> None:
    """A video stream with nothing in it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 160, "yuv420p"
        container.start_encoding()


def size_change(path: Path) -> None:
    parts = []
    for size in ((64, 160), (96, 160)):
        write_numbered(path.with_name("part.ts"), 10, size=size)
        parts.append(path.with_name("part.ts").read_bytes())
    path.with_name("part.ts").unlink()
    path.write_bytes(b"".join(parts))


def eight_k(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "x264-params": "log=-1"})
        stream.height, stream.width, stream.pix_fmt = 4320, 7680, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(7680, 4320, "yuv420p")))
        container.mux(stream.encode(None))


FILES = {
    "zero.mkv": lambda path: path.write_bytes(b""),
    "text.mkv": lambda path: path.write_text("not a film\n" * 200),
    "cut.mp4": truncated_mp4,
    "half.mkv": half_mkv,
    "sound.mp4": audio_only,
    "none.mp4": no_frames,
    "one.mkv": lambda path: write_numbered(path, 1),
    "resize.ts": size_change,
    "odd.mkv": lambda path: write_numbered(path, 9, codec="ffv1", pixel_format="yuv444p", size=(65, 161)),
    "8k.mkv": eight_k,
    "zero.png": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_text("not a picture"),
    "still.png": lambda path: Image.fromarray(np.zeros((70, 90, 3), np.uint8)).save(path),
}
SPAN = [{"start": 0, "end": 9}]
GOOD = {"video": "film.mkv", "caption": "fine", "shots": SPAN}

# id of the bad line: (its fields, the kind of its record, what the record's place names)
BAD = {
    "zero-byte video": ({"video": "zero.mkv"}, "zero-byte", "zero.mkv"),
    "not a video": ({"video": "text.mkv"}, "not-a-video", "text.mkv"),
    "truncated, no index": ({"video": "cut.mp4"}, "not-a-video", "cut.mp4"),
    "truncated, readable": ({"video": "half.mkv"}, "truncated", "truncated, readable"),
    "audio only": ({"video": "sound.mp4"}, "audio-only", "sound.mp4"),
    "no frame": ({"video": "none.mp4"}, "no-frames", "none.mp4"),
    "one frame": ({"video": "one.mkv"}, "short-shot", "one frame shots[0]"),
    "changing size": ({"video": "resize.ts"}, "size-change", "resize.ts"),
    "zero-byte image": ({"image": "zero.png"}, "zero-byte", "zero.png"),
    "not an image": ({"image": "text.png"}, "not-an-image", "text.png"),
    "missing file": ({"video": "gone.mkv"}, "missing-file", ":LINE video"),
    "missing image": ({"image": "gone.png"}, "missing-file", ":LINE image"),
    "parent path": ({"video": "../film.mkv"}, "outside-root", ":LINE video"),
    "absolute path": ({"video": "/etc/passwd"}, "outside-root", ":LINE video"),
    "symlink out": ({"video": "link.mkv"}, "outside-root", ":LINE video"),
    "duplicate": (GOOD | {"id": "good"}, "duplicate-id", ":LINE id"),
    "overlapping": (GOOD | {"shots": [*SPAN, {"start": 8, "end": 20}]}, "overlapping-shots", ":LINE shots[1].start"),
    "reversed": (GOOD | {"shots": [{"start": 9, "end": 3}]}, "reversed-shot", ":LINE shots[0].end"),
    "out of range": (GOOD | {"shots": [{"start": 0, "end": 61}]}, "out-of-range-shot", "out of range shots[0].end"),
    "negative start": (GOOD | {"shots": [{"start": -1, "end": 9}]}, "bad-frame", ":LINE shots[0].start"),
    "fractional frame": (GOOD | {"shots": [{"start": 0, "end": 9.5}]}, "bad-frame", ":LINE shots[0].end"),
    "short shots": (GOOD | {"shots": [{"start": 0, "end": 3}]}, "short-shot", "short shots shots[0]"),
    "no shots": (GOOD | {"shots": []}, "no-shots", ":LINE shots"),
    "shot of wrong type": (GOOD | {"shots": ["0-9"]}, "bad-shot", ":LINE shots[0]"),
    "cut of wrong type": (GOOD | {"shots": [SPAN[0] | {"cut": 1}]}, "bad-cut", ":LINE shots[0].cut"),
    "unknown field": (GOOD | {"captoin": "x"}, "unknown-field", ":LINE captoin"),
    "empty caption": (GOOD | {"caption": " "}, "empty-caption", "empty caption"),
    "huge caption": (GOOD | {"caption": "w " * 20_000}, "huge-caption", ":LINE caption"),
    "caption of wrong type": (GOOD | {"caption": 5}, "bad-caption", ":LINE caption"),
    "caption no text": (GOOD | {"caption": "\ud800"}, "not-utf-8", ":LINE caption"),
    "empty id": (GOOD | {"id": ""}, "bad-id", ":LINE id"),
    "no media": ({"caption": "x"}, "no-media", ":LINE"),
    "two media": (GOOD | {"image": "still.png"}, "no-media", ":LINE"),
    "image with shots": ({"image": "still.png", "shots": SPAN}, "image-with-shots", ":LINE shots"),
    "zero fps": (GOOD | {"fps": 0}, "bad-fps", ":LINE fps"),
    "other fps": (GOOD | {"fps": 60}, "other-fps", "other fps"),
    "nan latents": (GOOD | {"shots": [{"start": 40, "end": 49}]}, "nan-latents", "nan latents shot 0"),
    "non-UTF-8 line": (b'{"id": "caf\xe9"}', "not-utf-8", ":LINE"),
    "broken JSON": (b'{"id": "x", ', "not-json", ":LINE"),
    "no object": (b'"x"', "not-an-object", ":LINE"),
}
TAKEN = {"good", "odd", "eight k", "still", "truncated, readable#0000", "empty caption", "other fps"}


@pytest.fixture(scope="module")
def bad_run(tmp_path_factory, film):
    folder = tmp_path_factory.mktemp("bad") / "input"
    folder.mkdir()
    shutil.copy(film, folder / "film.mkv")
    shutil.copy(film, folder.parent / "outside.mkv")
    (folder / "link.mkv").symlink_to(folder.parent / "outside.mkv")
    for name, make in FILES.items():
        make(folder / name)
    usable = {
        "odd": {"video": "odd.mkv"},
        "eight k": {"video": "8k.mkv", "shots": [{"start": 0, "end": 5}]},
        "still": {"image": "still.png"},
    }
    lines = [json.dumps({"id": "good"} | GOOD).encode()]
    lines += [json.dumps({"id": name, "caption": "x"} | fields).encode() for name, fields in usable.items()]
    places = {}
    for name, (fields, _, _) in BAD.items():
        places[name] = len(lines) + 1
        lines.append(
            fields if isinstance(fields, bytes) else json.dumps({"id": name, "caption": "x"} | fields).encode()
        )
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines))
    codec = PoolCodec()
    codec.nan_at = 40
    return run(folder, codec), places


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_named_record(bad_run, name):
    prepared, places = bad_run
    _, kind, place = BAD[name]
    place = place.replace("LINE", str(places[name]))
    matching = [p for p in prepared.report.problems if p["kind"] == kind and p["where"].endswith(place)]
    assert len(matching) == 1, prepared.report.problems
    assert len(matching[0]["message"]) > 10
    assert "\n" not in matching[0]["message"]


def test_the_rest_of_a_bad_folder_is_used(bad_run):
    prepared, _ = bad_run
    assert {s.id for s in open_cache(prepared.cache).scenes} >= TAKEN
    assert len(BAD) >= 30


def test_nothing_usable_is_an_error_that_says_why(folder):
    (folder / "film.mkv").write_bytes(b"")
    (folder / "film2.mkv").write_text("no film")
    with pytest.raises(DataError, match=r"nothing usable \(.*zero-byte 1.*\)"):
        run(folder)
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["summary"]["problems"]["not-a-video"] == 1
    with pytest.raises(DataError, match="no finished cache"):
        open_dataset(DataConfig(path=str(folder / "out")))


def test_strict_stops_at_the_first(folder):
    scenes(folder, scene("a", (0, 9)), scene("b", (0, 99)))
    with pytest.raises(DataError, match="99 is past the 60 frames"):
        run(folder, strict=True)


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


def test_damaged_and_missing_shards_are_made_again(folder):
    scenes(folder, scene("a", (0, 9)))
    cache = run(folder).cache
    shard = cache / read_parts(cache)[0]["file"]
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


def test_two_preparers_on_one_output(folder):
    scenes(folder, scene("a", (0, 9)))
    (folder / "out").mkdir()
    with (
        filelock.FileLock(folder / "out" / ".lock"),
        pytest.raises(DataError, match="another run is preparing"),
    ):
        run(folder)
    run(folder)


def test_output_that_cannot_be_written(folder):
    scenes(folder, scene("a", (0, 9)))
    (folder / "file").write_text("in the way")
    with pytest.raises(DataError, match="file/out"):
        run(folder, output=str(folder / "file" / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": ""}, "say input=DIR"),
        ({"size": [64]}, "a size is"),
        ({"min_frames": 0}, "need 1 <= min_frames"),
        ({"min_frames": 30}, "need 1 <= min_frames"),
        ({"decoder": "vlc"}, "decoder must be one of pyav"),
        ({"detector": "eyes"}, "detector must be one of transnetv2"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"size": [60, 160]}, "multiples of the codec's 8"),
        ({"input": "/nowhere"}, "no such folder"),
    ],
)
def test_bad_settings(folder, change, message):
    scenes(folder, scene("a", (0, 9)))
    with pytest.raises(ValueError, match=message):
        run(folder, **change)


# The command itself


def command(folder, *launcher, **changes):
    script = Path(__file__).parents[1] / "scripts" / "prepare_data.py"
    overrides = {"input": folder, "output": folder / "out", "detector": "adaptive", "size": "[64,160]"} | changes
    return [*launcher, str(script), *(f"{key}={value}" for key, value in overrides.items())]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_command_in_two_processes(folder):
    scenes(folder, *(scene(f"s{n}", (n, n + 9)) for n in range(0, 50, 5)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(command(folder, *launch, device="cpu"), check=True, env=environment(), timeout=300)
    dataset = open_dataset(DataConfig(path=str(folder / "out")))
    assert [item[1].id for item in dataset.items] == [f"s{n}" for n in range(0, 50, 5)]
    (cache,) = (folder / "out" / "cache").iterdir()
    assert len(list(cache.glob("shard-0-*.safetensors"))) == len(list(cache.glob("shard-1-*.safetensors"))) == 1


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(folder):
    """Killed without warning while it scans its fourth film; the next run scans only what is left."""
    for n in range(8):
        write_numbered(folder / f"{n}.mkv", 400)
    process = subprocess.Popen(command(folder, sys.executable), env=environment())
    scans = folder / "out" / "scans"
    while len(list(scans.glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in scans.glob("*.json")}
    assert 3 <= len(finished) < 9
    assert not list(folder.glob("out/cache/*/complete"))
    subprocess.run(command(folder, sys.executable), check=True, env=environment(), timeout=300)
    assert all(path.stat().st_mtime_ns == made for path, made in finished.items())
    assert len(open_dataset(DataConfig(path=str(folder / "out"))).items) >= 9


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line(folder):
    empty = folder / "empty"
    empty.mkdir()
    for changes, message in [
        ({"input": empty}, "holds no manifest.jsonl and no video"),
        ({"size": "[60,160]"}, "multiples of the codec's"),
        ({"fps": "fast"}, "fps"),
        ({"decoder": "vlc"}, "decoder must be one of"),
    ]:
        done = subprocess.run(
            command(folder, sys.executable, **changes), env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr
