"""These tests are about preparing bad input: every fault is a named record, never a crash, and the rest is used."""

import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import filelock
import numpy as np
import pytest
from av.video.reformatter import ColorTrc
from PIL import Image

from data.cache.reader import open_cache
from data.errors import DataError
from data.loading.dataset import DataConfig, open_dataset
from data.manifest import SceneRecord
from data.media.index import estimated_frames
from data.prepare.planning import doubts
from data.prepare.scan import scan_video
from moc.errors import UserError
from tests.encoders import PoolCodec
from tests.films import write_numbered, write_paired
from tests.preparing import film_folder, run, scene, scenes


@pytest.fixture
def folder(tmp_path):
    return film_folder(tmp_path)


def truncated_mp4(path: Path) -> None:
    write_numbered(path, 20)
    path.write_bytes(path.read_bytes()[:600])


def half_mkv(path: Path) -> None:
    """Writes an mkv that is cut in the middle, its header still claiming all."""
    write_numbered(path, 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])


def no_frames(path: Path) -> None:
    """Writes a file with a video stream that holds nothing."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 160, "yuv420p"
        container.start_encoding()


def size_change(path: Path) -> None:
    videos = []
    for size in ((64, 160), (96, 160)):
        write_numbered(path.with_name("part.ts"), 10, size=size)
        videos.append(path.with_name("part.ts").read_bytes())
    path.with_name("part.ts").unlink()
    path.write_bytes(b"".join(videos))


def eight_k(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "x264-params": "log=-1"})
        stream.height, stream.width, stream.pix_fmt = 4320, 7680, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(7680, 4320, "yuv420p")))
        container.mux(stream.encode(None))


def broken_png(path: Path) -> None:
    """Writes a PNG in which a chunk's name is damaged: Pillow calls it a SyntaxError."""
    Image.fromarray(np.zeros((70, 90, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"\x1e\x13\xc3r"))


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
    "pairs.mkv": write_paired,
    "zero.png": lambda path: path.write_bytes(b""),
    "broken.png": broken_png,
    "text.png": lambda path: path.write_text("not a picture"),
    "still.png": lambda path: Image.fromarray(np.zeros((70, 90, 3), np.uint8)).save(path),
}
SPAN = [{"start": 0, "end": 9}]
GOOD = {"video": "film.mkv", "caption": "fine", "shots": SPAN}

# The id of a bad line maps to (its fields, the kind of its record, the place that the record names).
BAD = {
    "zero-byte video": ({"video": "zero.mkv"}, "zero-byte", "zero.mkv"),
    "not a video": ({"video": "text.mkv"}, "not-a-video", "text.mkv"),
    "truncated, no index": ({"video": "cut.mp4"}, "not-a-video", "cut.mp4"),
    "truncated, readable": ({"video": "half.mkv"}, "truncated", ":LINE"),
    "audio only": ({"video": "sound.mp4"}, "audio-only", "sound.mp4"),
    "no frame": ({"video": "none.mp4"}, "no-frames", "none.mp4"),
    "one frame": ({"video": "one.mkv"}, "short-shot", ":LINE shots[0]"),
    "changing size": ({"video": "resize.ts"}, "size-change", "resize.ts"),
    "zero-byte image": ({"image": "zero.png"}, "zero-byte", "zero.png"),
    "broken image": ({"image": "broken.png"}, "not-an-image", "broken.png"),
    "not an image": ({"image": "text.png"}, "not-an-image", "text.png"),
    "missing file": ({"video": "gone.mkv"}, "missing-file", ":LINE video"),
    "missing image": ({"image": "gone.png"}, "missing-file", ":LINE image"),
    "parent path": ({"video": "../film.mkv"}, "outside-root", ":LINE video"),
    "absolute path": ({"video": "/etc/passwd"}, "outside-root", ":LINE video"),
    "symlink out": ({"video": "link.mkv"}, "outside-root", ":LINE video"),
    "duplicate": (GOOD | {"id": "good"}, "duplicate-id", ":LINE id"),
    "overlapping": (GOOD | {"shots": [*SPAN, {"start": 8, "end": 20}]}, "overlapping-shots", ":LINE shots[1].start"),
    "reversed": (GOOD | {"shots": [{"start": 9, "end": 3}]}, "reversed-shot", ":LINE shots[0].end"),
    "out of range": (GOOD | {"shots": [{"start": 0, "end": 61}]}, "out-of-range-shot", ":LINE shots[0].end"),
    "negative start": (GOOD | {"shots": [{"start": -1, "end": 9}]}, "bad-frame", ":LINE shots[0].start"),
    "fractional frame": (GOOD | {"shots": [{"start": 0, "end": 9.5}]}, "bad-frame", ":LINE shots[0].end"),
    "short shots": (GOOD | {"shots": [{"start": 0, "end": 3}]}, "short-shot", ":LINE shots[0]"),
    "no shots": (GOOD | {"shots": []}, "no-shots", ":LINE shots"),
    "shot of wrong type": (GOOD | {"shots": ["0-9"]}, "bad-shot", ":LINE shots[0]"),
    "cut of wrong type": (GOOD | {"shots": [SPAN[0] | {"cut": 1}]}, "bad-cut", ":LINE shots[0].cut"),
    "unknown field": (GOOD | {"captoin": "x"}, "unknown-field", ":LINE captoin"),
    "empty caption": (GOOD | {"caption": " "}, "empty-caption", ":LINE"),
    "huge caption": (GOOD | {"caption": "w " * 20_000}, "huge-caption", ":LINE caption"),
    "caption of wrong type": (GOOD | {"caption": 5}, "bad-caption", ":LINE caption"),
    "caption no text": (GOOD | {"caption": "\ud800"}, "not-utf-8", ":LINE caption"),
    "empty id": (GOOD | {"id": ""}, "bad-id", ":LINE id"),
    "no media": ({"caption": "x"}, "no-media", ":LINE"),
    "two media": (GOOD | {"image": "still.png"}, "no-media", ":LINE"),
    "image with shots": ({"image": "still.png", "shots": SPAN}, "image-with-shots", ":LINE shots"),
    "zero fps": (GOOD | {"fps": 0}, "bad-fps", ":LINE fps"),
    "repeated stamps": (GOOD | {"video": "pairs.mkv"}, "bad-stamps", ":LINE"),
    "other fps": (GOOD | {"fps": 60}, "other-fps", ":LINE"),
    "nan latents": (GOOD | {"shots": [{"start": 40, "end": 49}]}, "nan-latents", "nan latents shot 0"),
    "non-UTF-8 line": (b'{"id": "caf\xe9"}', "not-utf-8", ":LINE"),
    "broken JSON": (b'{"id": "x", ', "not-json", ":LINE"),
    "no object": (b'"x"', "not-an-object", ":LINE"),
}
FILE_FAULTS = {
    *("zero-byte", "not-a-video", "audio-only", "no-frames", "broken", "not-an-image", "missing-file", "bad-path"),
    *("too-large", "size-change"),
}
TAKEN = {
    *("good", "odd", "eight k", "still", "truncated, readable#0000"),
    *("empty caption", "repeated stamps", "other fps"),
}


@pytest.fixture(scope="module")
def bad_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "input"
    folder.mkdir()
    shutil.copy(film_folder(folder) / "film.mkv", folder.parent / "outside.mkv")
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
    line_of = {}
    for name, (fields, _, _) in BAD.items():
        line_of[name] = len(lines) + 1
        lines.append(
            fields if isinstance(fields, bytes) else json.dumps({"id": name, "caption": "x"} | fields).encode()
        )
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines))
    codec = PoolCodec()
    codec.nan_at = 40
    return run(folder, codec), line_of


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_named_record(bad_run, name):
    prepared, line_of = bad_run
    _, kind, where = BAD[name]
    where = where.replace("LINE", str(line_of[name]))
    matching = [p for p in prepared.report.problems if p["kind"] == kind and p["where"].endswith(where)]
    assert len(matching) == 1, prepared.report.problems
    assert len(matching[0]["message"]) > 10
    assert "\n" not in matching[0]["message"]
    if kind in FILE_FAULTS:
        assert re.search("; .*(fetch|leave|put|remove|scale|split)", matching[0]["message"])


def test_the_rest_of_a_bad_folder_is_used(bad_run):
    prepared, _ = bad_run
    assert {s.id for s in open_cache(prepared.cache).scenes} >= TAKEN
    assert len(BAD) >= 30


def test_nothing_usable_is_an_error_that_says_why(folder):
    (folder / "film.mkv").write_bytes(b"")
    (folder / "film2.mkv").write_text("no film")
    with pytest.raises(DataError, match=r"nothing usable \(.*1 zero-byte: .*film.mkv: the file is empty.*\)"):
        run(folder)
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["summary"]["problems"]["not-a-video"] == 1
    with pytest.raises(DataError, match="no finished cache"):
        open_dataset(DataConfig(path=str(folder / "out")))


def test_captions_of_more_shots_than_there_are_cite_their_line(folder):
    (folder / "captions.jsonl").write_text('\n{"path": "film.mkv", "shot_captions": ["one", "two", "three", "four"]}')
    with pytest.raises(DataError, match=r"1 caption-count: .*captions\.jsonl:2: has 4 shot captions, but 2 shots"):
        run(folder)


def test_the_output_may_lie_in_the_input_but_not_be_it(folder):
    Image.fromarray(np.zeros((70, 90, 3), np.uint8)).save(folder / "still.png")
    for _ in range(2):  # the second time the folder holds thumbnails too
        assert {sample["file"] for sample in run(folder).report.samples} == {"film.mkv", "still.png"}
    with pytest.raises(UserError, match="is the input"):
        run(folder, output=str(folder / "out" / ".."))


def test_strict_stops_at_the_first(folder):
    scenes(folder, scene("a", (0, 9)), scene("b", (0, 99)))
    with pytest.raises(DataError, match="99 is past the 60 frames"):
        run(folder, strict=True)


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
        ({"output": "s3://bucket/out"}, "is a URL: prepare into a local folder"),
        ({"size": [64]}, "a size is"),
        ({"size": [64, 10**5]}, "at most 16384 each"),
        ({"detector": "transnetv2", "threshold": 5}, "threshold=5 is of probabilities"),
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
    with pytest.raises(UserError, match=message):
        run(folder, **change)


def test_a_film_of_a_varying_rate_that_is_whole_is_not_truncated(tmp_path):
    """Its header has a duration and a rate of its own, which together claim other frames than there are."""
    ticks = [tick for second in range(0, 800, 100) for tick in (second, second + 10, second + 90)]
    path = write_numbered(tmp_path / "film.mkv", len(ticks), ticks=ticks)
    assert abs(estimated_frames(path) - len(ticks)) > 2
    assert_whole(path)


def test_a_whole_film_that_starts_late_is_not_truncated(tmp_path):
    ticks = list(range(500, 700, 4))
    path = write_numbered(tmp_path / "film.mkv", len(ticks), ticks=ticks)
    assert abs(estimated_frames(path) - len(ticks)) <= 2
    assert_whole(path)


@pytest.mark.parametrize(("claimed", "told"), [(90, False), (103, False), (110, True)])
def test_a_film_is_truncated_where_its_header_claims_many_more_frames(tmp_path, claimed, told):
    """A header may be off by a little: its frames are often counted from a rounded duration."""
    write_numbered(tmp_path / "film.mp4", 100)
    scan = replace(scan_video(tmp_path, "film.mp4", tmp_path / "scans", None), claimed_frames=claimed)
    found = doubts(SceneRecord(id="film", video="film.mp4", caption="A film."), scan, [(32, 80)])
    assert [doubt.kind for doubt in found] == ["truncated"] * told


def assert_whole(path):
    scanned = scan_video(path.parent, path.name, path.parent / "scans", None)
    assert not doubts(SceneRecord(id="film", video=path.name, caption="A film."), scanned, [(1, 1)])


@pytest.mark.parametrize(("transfer", "name"), [(ColorTrc.SMPTE2084, "PQ"), (ColorTrc.ARIB_STD_B67, "HLG")])
def test_a_film_in_hdr_is_told(tmp_path, transfer, name):
    write_numbered(tmp_path / "film.mp4", 5, pixel_format="yuv420p10le", transfer=transfer)
    scanned = scan_video(tmp_path, "film.mp4", tmp_path / "scans", None)
    again = scan_video(tmp_path, "film.mp4", tmp_path / "scans", None)  # from its record
    for scan in (scanned, again):
        (doubt,) = doubts(SceneRecord(id="film", video="film.mp4", caption="A film."), scan, [(32, 80)])
        assert doubt.kind == "hdr"
        assert f"film.mp4 is HDR ({name})" in doubt.message


@pytest.mark.parametrize(("ratio", "told"), [("64/45", True), ("1/1", False), ("200/199", False)])
def test_a_film_of_pixels_that_are_not_square_is_told(tmp_path, ratio, told):
    write_numbered(tmp_path / "film.mkv", 5, pixel_aspect=Fraction(ratio))
    scene = SceneRecord(id="film", video="film.mkv", caption="A film.")
    for _ in range(2):  # the second time from its record
        found = doubts(scene, scan_video(tmp_path, "film.mkv", tmp_path / "scans", None), [(32, 80)])
        assert [doubt.kind for doubt in found] == ["anamorphic"] * told
        assert all("film.mkv has pixels of 64:45" in doubt.message for doubt in found)


@pytest.mark.parametrize("flags", ["", "+ildct+ilme"])
def test_an_interlaced_film_is_told(tmp_path, flags):
    write_numbered(tmp_path / "film.mkv", 5, options={"flags": flags} if flags else {})
    scene = SceneRecord(id="film", video="film.mkv", caption="A film.")
    for _ in range(2):  # the second time from its record
        found = doubts(scene, scan_video(tmp_path, "film.mkv", tmp_path / "scans", None), [(32, 80)])
        assert [doubt.kind for doubt in found] == ["interlaced"] * bool(flags)
        assert all("film.mkv is interlaced" in doubt.message for doubt in found)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([(64, 160)], []),
        ([(70, 170)], []),
        ([(96, 160)], ["64x160 is enlarged 1.5 times to 96x160"]),
        ([(480, 832), (32, 80)], []),
    ],
)
def test_a_film_with_fewer_pixels_than_the_size_is_told(tmp_path, sizes, said):
    write_numbered(tmp_path / "film.mp4", 5)
    scan = scan_video(tmp_path, "film.mp4", tmp_path / "scans", None)
    found = doubts(SceneRecord(id="film", video="film.mp4", caption="A film."), scan, sizes)
    assert [doubt.message.partition(";")[0] for doubt in found] == said
    assert all(doubt.kind == "enlarged" for doubt in found)
