"""These tests are about caption files of other tools, as they write them."""

import json

import pytest

from data.errors import DataError
from data.manifest import SceneRecord, ShotRecord
from data.prepare.sources import find_scenes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4", "videos/c.mp4", "still.png"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def video(name, caption, **fields):
    return SceneRecord(id=name, video=name, caption=caption, **fields)


SIMPLE = [video("a.mp4", "first"), video("videos/c.mp4", "third")]
FORMS = {
    "fastvideo": (
        "videos2caption.json",
        json.dumps([{"path": "a.mp4", "cap": ["first"], "fps": 24.0}, {"path": "c.mp4", "cap": ["third"]}]),
    ),
    "diffusion-pipe": ("captions.json", json.dumps({"a.mp4": ["first"], "videos/c.mp4": "third"})),
    "hf jsonl": (
        "metadata.jsonl",
        '{"file_name": "a.mp4", "text": "first"}\n\n{"file_name": "c.mp4", "text": "third"}\n',
    ),
    "hf csv": ("metadata.csv", "file_name,text\na.mp4,first\nc.mp4,third\n"),
    "open-sora csv": ("data.csv", 'path,text,num_frames\na.mp4,"first",17\nvideos/c.mp4,third,9\n'),
    "byte order mark": ("captions.csv", "\ufeffvideo,caption\na.mp4,first\nc.mp4,third\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_caption_a_file(folder, form):
    name, text = FORMS[form]
    (folder / name).write_text(text, encoding="utf-8")
    assert find_scenes(folder).scenes == SIMPLE


def test_line_by_line(folder):
    (folder / "videos.txt").write_text("a.mp4\nc.mp4\n")
    (folder / "prompts.txt").write_text("first\nthird\n")
    assert find_scenes(folder).scenes == SIMPLE
    (folder / "prompts.txt").write_text("first\n")
    with pytest.raises(DataError, match="1 lines for the 2"):
        find_scenes(folder)


def test_sidecars(folder):
    (folder / "a.txt").write_text("first\n")
    (folder / "still.txt").write_text("a picture")
    assert find_scenes(folder).scenes == [
        video("a.mp4", "first"),
        video("b.mp4", ""),
        SceneRecord(id="still.png", image="still.png", caption="a picture"),
        video("videos/c.mp4", ""),
    ]


def test_a_sidecar_that_leads_out_is_not_read(folder, tmp_path_factory):
    """An archive of someone else's may hold a link to a file of this machine."""
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("not a caption")
    (folder / "a.txt").symlink_to(secret)
    found = find_scenes(folder)
    assert [(problem.kind, problem.where) for problem in found.problems] == [("outside-root", "a.txt")]
    assert "not a caption" not in [scene.caption for scene in found.scenes]


def test_multi_shot_forms(folder):
    storymem = {
        "story_overview": "a story",
        "scenes": [
            {"scene_num": 1, "video_prompts": ["one", "goes on"], "cut": ["True", "False"]},
            {"scene_num": 2, "video_prompts": ["two"], "cut": ["True"]},
        ],
    }
    entries = [
        {"video": "a.mp4", "global_caption": "all", "shot_captions": ["x", "y"]}
        | {"num_frames": 81, "shot_cut_frames": [41]},
        {"path": "b.mp4"} | storymem,
        {"video": "c.mp4", "whole_caption": "sum", "captions": ["p", "q", "r"]},
        {"image": "still.png", "caption": ["short", "longer"]},
    ]
    (folder / "captions.json").write_text(json.dumps(entries))
    assert find_scenes(folder).scenes == [
        video("a.mp4", "all", shots=(ShotRecord(0, 41, "x"), ShotRecord(41, 81, "y"))),
        video("b.mp4", "a story", shot_captions=("one goes on", "two")),
        video("videos/c.mp4", "sum", shot_captions=("p", "q", "r")),
        SceneRecord(id="still.png", image="still.png", caption=("short", "longer")),
    ]


BAD_ENTRIES = {
    "no-media": {"caption": "x"},
    "missing-file": {"path": "gone.mp4"},
    "outside-root": {"path": "../a.mp4"},
    "not-an-object": 3,
    "bad-caption": {"path": "a.mp4", "cap": 5},
    "duplicate-id": {"path": "b.mp4"},
    "bad-shot": {"path": "a.mp4", "shot_captions": ["x", "y"], "shot_cut_frames": [90], "num_frames": 81},
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_bad_entries_do_not_hide_the_rest(folder, kind):
    good = {"path": "b.mp4", "cap": "fine"}
    (folder / "videos2caption.json").write_text(json.dumps([good, BAD_ENTRIES[kind]]))
    if kind == "not-an-object":  # the file has another form, so nothing in it is trusted
        with pytest.raises(DataError, match="an entry is an object"):
            find_scenes(folder)
        return
    found = find_scenes(folder)
    assert [scene.id for scene in found.scenes] == ["b.mp4"]
    assert [problem.kind for problem in found.problems] == [kind]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bad-path", {"path": "a\0.mp4"}),
        ("bad-captions", {"path": "a.mp4", "scenes": [{"video_prompts": None, "cut": None}]}),
        ("bad-shot", {"path": "a.mp4", "shot_captions": ["x", "y"], "shot_cut_frames": [True], "num_frames": 9}),
    ],
)
def test_odd_values_are_records(folder, name, fields):
    (folder / "data.json").write_text(json.dumps([{"path": "b.mp4"}, fields]))
    assert [problem.kind for problem in find_scenes(folder).problems] == [name]


def test_csv_as_spreadsheets_write_it(folder):
    """Quotes hold line breaks; a caption whose comma is not quoted would lose its end, and is refused."""
    (folder / "data.csv").write_text('video,caption\na.mp4,"one\ntwo"\nb.mp4,runs, jumps\n')
    found = find_scenes(folder)
    assert found.scenes == [video("a.mp4", "one\ntwo")]
    assert [(problem.kind, problem.where) for problem in found.problems] == [
        ("bad-captions", f"{folder / 'data.csv'}:4")
    ]
    (folder / "data.csv").write_text("video,caption\na.mp4," + "x" * 200_000)
    with pytest.raises(DataError, match="not CSV after line 1"):
        find_scenes(folder)


@pytest.mark.parametrize(
    ("text", "kind"),
    [(b"{", "not-json"), (b"[" * 100_000, "not-json"), (b"3", "bad-captions"), (b"\xff\xfe", "not-utf-8")],
)
def test_unreadable_files(folder, text, kind):
    (folder / "captions.json").write_bytes(text)
    with pytest.raises(DataError) as caught:
        find_scenes(folder)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("captions.json", '{"a.mp4": "one",\n"b.mp4": "two",\n"a.mp4": "three"}', ":3: 'a.mp4'"),
        ("data.json", '[{"path": "b.mp4"},\n{"path": "a.mp4", "cap": "x", "cap": "y"}]', ":2: 'cap'"),
        ("data.csv", "path,text,text\na.mp4,x,y\n", ":1: the column 'text'"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(folder, name, text, where):
    (folder / name).write_text(text)
    with pytest.raises(DataError) as error:
        find_scenes(folder)
    assert error.value.kind == "repeated-key"
    assert where in str(error.value)


@pytest.mark.parametrize("true", [True, "True", "true", 1])
def test_storymems_cuts_in_any_writing(folder, true):
    scenes = [{"video_prompts": ["one", "two"], "cut": [true, true]}]
    (folder / "data.json").write_text(json.dumps([{"path": "a.mp4", "scenes": scenes}]))
    assert find_scenes(folder).scenes == [video("a.mp4", "", shot_captions=("one", "two"))]
    scenes[0]["cut"][1] = "maybe"
    (folder / "data.json").write_text(json.dumps([{"path": "a.mp4", "scenes": scenes}]))
    (problem,) = find_scenes(folder).problems
    assert "cut: 'maybe' is not true or false" in str(problem)


BAD_LINES = {
    "not-json": b'{"video": "a.mp4", "caption"',
    "not-utf-8": b'{"video": "caf\xe9.mp4"}',
    "not-an-object": b'["a.mp4", "x"]',
    "repeated-key": b'{"video": "a.mp4", "video": "a.mp4"}',
    "huge-line": b'{"video": "' + b"x" * 16_000_000 + b'"}',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_a_record_with_its_number_and_hides_no_other(folder, kind):
    lines = [b'\xef\xbb\xbf{"video": "a.mp4", "caption": "first"}', b"", BAD_LINES[kind], b'{"video": "b.mp4"}\r', b""]
    (folder / "captions.jsonl").write_bytes(b"\n".join(lines))
    found = find_scenes(folder)
    assert found.scenes == [video("a.mp4", "first"), video("b.mp4", "")]
    assert [(problem.kind, problem.where) for problem in found.problems] == [(kind, f"{folder / 'captions.jsonl'}:3")]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(folder, mark):
    """Marks that other programs take for line ends, and str.splitlines too, belong to the caption."""
    caption = f"one{mark}two"
    expected = [video("a.mp4", caption), video("videos/c.mp4", "third")]
    if mark > " ":  # JSON allows no bare control character in a text
        lines = [{"video": "a.mp4", "caption": caption}, {"video": "c.mp4", "caption": "third"}]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (folder / "captions.jsonl").write_text(text, encoding="utf-8")
        assert find_scenes(folder).scenes == expected
        (folder / "captions.jsonl").unlink()
    (folder / "videos.txt").write_text("a.mp4\nc.mp4\n")
    (folder / "prompts.txt").write_text(f"{caption}\nthird", encoding="utf-8")
    assert find_scenes(folder).scenes == expected
    (folder / "videos.txt").unlink()
    (folder / "data.csv").write_text(f"video,caption\na.mp4,{caption}\nc.mp4,third\n", encoding="utf-8")
    assert find_scenes(folder).scenes == expected


def test_captions_under_an_unknown_name_are_told_with_their_line(folder):
    """The films are used: a captioner may tell what they show. Other fields say other things, and are no fault."""
    (folder / "metadata.csv").write_text("file_name,txt,fps\na.mp4,first,24\nb.mp4,second,24\ngone.mp4,third,24\n")
    found = find_scenes(folder)
    assert found.scenes == [video("a.mp4", ""), video("b.mp4", "")]
    (unknown,) = found.warnings
    assert (unknown.kind, unknown.where) == ("no-caption-field", f"{folder / 'metadata.csv'}:2")
    assert "none of file_name, txt, fps is a caption" in str(unknown)
    assert [(problem.kind, problem.where) for problem in found.problems] == [
        ("missing-file", f"{folder / 'metadata.csv'}:4")
    ]
    (folder / "metadata.csv").write_text("file_name,text,fps\na.mp4,first,24\nb.mp4,,24\n")
    assert find_scenes(folder).warnings == []


def test_captions_under_several_names_are_told_with_their_line(folder):
    """One is taken; where they say the same, it does not matter which."""
    lines = [
        {"video": "a.mp4", "text": "first", "prompt": "first"},
        {"video": "c.mp4", "global_caption": "all", "prompt": "third", "shot_captions": ["x", "y"]},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = find_scenes(folder)
    assert [scene.caption for scene in found.scenes] == ["first", "third"]
    (several,) = found.warnings
    assert (several.kind, several.where) == ("several-captions", f"{folder / 'captions.jsonl'}:2")
    assert "prompt is taken as the caption, not global_caption" in str(several)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_columns_without_commas_are_told(folder, separator):
    (folder / "metadata.csv").write_text(f"file_name{separator}text\na.mp4{separator}One, two.\n")
    with pytest.raises(DataError, match=r"metadata\.csv:1: columns are separated by .*; separate them by commas"):
        find_scenes(folder)


def test_files_that_are_passed_over_are_counted_by_kind(folder):
    (folder / ".cache").mkdir()
    hidden = (".hidden", ".cache/a.mp4.lock")
    for name in ("a.txt", "gone.txt", "clip.GIF", "videos/d.gif", "take.h264", "LICENSE", "vocabulary.txt", *hidden):
        (folder / name).write_text("x")
    (warning,) = find_scenes(folder).warnings
    assert (warning.kind, warning.where) == ("passed-over", str(folder))
    assert warning.message == "files of kinds that are not read: 2 .gif, 1 .h264, 1 .txt, 1 LICENSE"


def test_a_folder_that_is_called_as_a_film_is_a_folder(folder):
    (folder / "takes.mp4").mkdir()
    (folder / "takes.mp4" / "e.mp4").write_bytes(b"x")
    found = find_scenes(folder)
    assert "takes.mp4/e.mp4" in [scene.id for scene in found.scenes]
    assert not found.problems


def test_files_and_captions_of_any_characters(tmp_path):
    odd = ["\N{RABBIT} clip", "$x$", "100%s", "{0}", "a'b\"c", "-dash", "\N{HEBREW LETTER ALEF}", "back\\slash"]
    for name in odd:
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
        (tmp_path / f"{name}.txt").write_text(f"{name}\u2028<b>", encoding="utf-8")
    found = find_scenes(tmp_path)
    assert {scene.video: scene.caption for scene in found.scenes} == {f"{n}.mp4": f"{n}\u2028<b>" for n in odd}
    assert not found.problems + found.warnings
