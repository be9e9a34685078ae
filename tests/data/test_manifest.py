"""These tests are about manifest lines: what is accepted, and that every fault is named with file:line and field."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.manifest import SceneRecord, ShotRecord, captions, load_manifest, read_manifest, write_manifest
from data.prepare.report import Report
from data.prepare.sources import find_scenes, vocabulary

SHOT = {"start": 0, "end": 96, "caption": "a dog", "cut": True}
SCENE = {"id": "one", "video": "a.mp4", "caption": "at the sea", "fps": 24, "shots": [SHOT]}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def write_lines(folder, *lines):
    path = folder / "manifest.jsonl"
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw))
    return path


def test_round_trip(folder):
    scenes = [
        SceneRecord(id="one", video="a.mp4", caption=("short", "a longer one"), fps=23.976,
                    shots=(ShotRecord(0, 10, "x"), ShotRecord(10, 20, ("y", "yy"), cut=False))),
        SceneRecord(id="zwei", image="b.png", caption="Straße"),
        SceneRecord(id="three", video="a.mp4"),
    ]  # fmt: skip
    write_manifest(folder / "manifest.jsonl", scenes)
    assert load_manifest(folder / "manifest.jsonl") == scenes
    assert captions(scenes[0].caption) == ("short", "a longer one")


FAULTS = {
    "not-json": b"{oops",
    "not-utf-8": b'{"id": "\xff", "video": "a.mp4"}',
    "not-an-object": [1, 2],
    "unknown-field": SCENE | {"captoin": "x"},
    "bad-id": SCENE | {"id": ""},
    "no-media": {"id": "one"},
    "bad-path": SCENE | {"video": 3},
    "image-with-shots": {"id": "one", "image": "b.png", "shots": [SHOT]},
    "bad-fps": SCENE | {"fps": 0},
    "no-shots": SCENE | {"shots": []},
    "bad-shot": SCENE | {"shots": [5]},
    "bad-frame": SCENE | {"shots": [SHOT | {"start": -1}]},
    "reversed-shot": SCENE | {"shots": [SHOT | {"start": 96}]},
    "overlapping-shots": SCENE | {"shots": [SHOT, SHOT | {"start": 95, "end": 99}]},
    "bad-cut": SCENE | {"shots": [SHOT | {"cut": "yes"}]},
    "bad-caption": SCENE | {"caption": {"text": "x"}},
    "huge-caption": SCENE | {"caption": "word " * 10_000},
    "missing-file": SCENE | {"video": "gone.mp4"},
    "outside-root": SCENE | {"video": "../a.mp4"},
}


MORE_FAULTS = {
    "key twice": ("repeated-key", b'{"id": "one", "video": "a.mp4", "fps": 12, "fps": 24}'),
    "key of a shot twice": (
        "repeated-key",
        b'{"id": "a", "video": "a.mp4", "shots": [{"end": 9, "end": 8}]}',
    ),
    "deep": ("not-json", b'{"shots": ' + b"[" * 100_000),
    "many digits": ("not-json", b'{"fps": ' + b"9" * 5000 + b"}"),
    "null byte": ("bad-path", SCENE | {"video": "a\0.mp4"}),
    "long name": ("bad-path", SCENE | {"video": "a" * 300}),
    "no name": ("bad-path", SCENE | {"video": "\ud800.mp4"}),
    "circle": ("bad-path", SCENE | {"video": "circle.mp4"}),
    "folder": ("missing-file", SCENE | {"video": "."}),
    "id no text": ("not-utf-8", SCENE | {"id": "\udcff"}),
}
ALL_FAULTS = {kind: (kind, line) for kind, line in FAULTS.items()} | MORE_FAULTS


@pytest.mark.parametrize("name", ALL_FAULTS)
def test_faults_cite_line_and_do_not_hide_the_rest(folder, name):
    kind, line = ALL_FAULTS[name]
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    path = write_lines(folder, SCENE | {"id": "first"}, line, SCENE | {"id": "last"})
    with pytest.raises(DataError) as caught:
        load_manifest(path)
    assert caught.value.kind == kind
    assert f"{path}:2" in str(caught.value)
    entries = list(read_manifest(path))
    assert [entry.id for entry in entries if isinstance(entry, SceneRecord)] == ["first", "last"]


def test_a_byte_order_mark_is_no_fault(folder):
    path = write_lines(folder, b"\xef\xbb\xbf" + json.dumps(SCENE).encode())
    assert [scene.id for scene in load_manifest(path)] == ["one"]


def test_a_file_name_that_is_no_text(folder):
    (folder / "caf\udce9.mp4").write_bytes(b"x")
    found = find_scenes(folder)
    assert [scene.id for scene in found.scenes] == ["a.mp4", "b.png"]
    assert [problem.kind for problem in found.problems] == ["bad-path"]
    report = Report()
    report.add_problem(found.problems[0])
    report.write(folder / "out")
    assert "bad-path" in (folder / "out" / "report.html").read_text()


def test_faults_cite_the_field(folder):
    path = write_lines(folder, SCENE | {"shots": [SHOT, SHOT | {"start": 50}]})
    with pytest.raises(DataError, match=r"manifest\.jsonl:1 shots\[1\]\.start: 50 is before the end 96"):
        load_manifest(path)
    path = write_lines(folder, SCENE, SCENE)
    with pytest.raises(DataError, match=r":2 id: 'one' is already line 1"):
        load_manifest(path)


def test_absolute_paths_and_symlinks_out_are_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "film.mp4"
    outside.write_bytes(b"x")
    (folder / "link.mp4").symlink_to(outside)
    for video in (str(outside), "link.mp4"):
        with pytest.raises(DataError, match="leads outside"):
            load_manifest(write_lines(folder, SCENE | {"video": video}))


@pytest.mark.parametrize("name", ["{folder}/videos/a.mp4", "x/../videos/a.mp4"])
def test_a_path_within_that_is_not_written_from_the_folder_on_is_told_as_it_should_be(folder, name):
    video = name.format(folder=folder)
    with pytest.raises(DataError) as error:
        load_manifest(write_lines(folder, SCENE | {"video": video}))
    assert str(error.value).endswith(f"{video!r} is not a path from {folder} on; write 'videos/a.mp4'")


def test_empty_and_missing_manifests(folder):
    with pytest.raises(DataError, match="holds no scene"):
        load_manifest(write_lines(folder, b"", b"  "))
    with pytest.raises(DataError, match="no such file"):
        load_manifest(folder / "other.jsonl")


def test_folder_without_manifest_gives_its_files(folder):
    (folder / "a.txt").write_text("two dogs run, two cats sleep\n")
    (folder / "c.mkv").write_bytes(b"x")
    (folder / "c.txt").write_bytes(b"\xff\xfe")
    found = find_scenes(folder)
    assert found.scenes == [
        SceneRecord(id="a.mp4", video="a.mp4", caption="two dogs run, two cats sleep"),
        SceneRecord(id="b.png", image="b.png"),
    ]
    assert [problem.kind for problem in found.problems] == ["not-utf-8"]
    assert set(vocabulary(found, limit=3)) == {"two", "shot", "cut"}
    (folder / "vocabulary.txt").write_text("cat\ndog\n")
    assert vocabulary(found) == ["cat", "dog"]


def test_missing_and_empty_input(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        find_scenes(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no video"):
        find_scenes(tmp_path)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=2, max_size=12, unique=True), st.text(max_size=40))
def test_any_ascending_spans_and_text_survive(tmp_path_factory, edges, caption):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.mp4").write_bytes(b"x")
    shots = tuple(ShotRecord(a, b, caption) for a, b in pairwise(sorted(edges)))
    scene = SceneRecord(id="s", video="a.mp4", caption=caption, shots=shots)
    write_manifest(folder / "m.jsonl", [scene])
    assert load_manifest(folder / "m.jsonl") == [scene]
