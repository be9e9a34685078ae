"""These tests are about prompt scripts: our form, HoloCine's two and StoryMem's; every mistake named with file and
field."""

import json
import re

import pytest
import yaml

from data.errors import DataError
from data.manifest import CUT_PREFIX
from film.script import Reference, load_script
from tests.pipeline import ROOT

SHOT = {"prompt": "Ann climbs the stairs.", "seconds": 2}


@pytest.fixture
def write(tmp_path):
    def write(content, name="story.yaml"):
        path = tmp_path / name
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def ours(**changes):
    return {
        "title": "The lighthouse",
        "global": "Ann, a keeper.",
        "size": [64, 96],
        "fps": 12,
        "shots": [SHOT],
    } | changes


# Our form


def test_every_field_is_read(write, tmp_path):
    (tmp_path / "ref.png").touch()
    second = {"prompt": "She lights the lamp.", "seconds": 1.5, "cut": False, "image": "ref.png"}
    script = load_script(write(ours(negative="blurry", shots=[SHOT, second])))
    assert (script.title, script.global_caption, script.negative) == ("The lighthouse", "Ann, a keeper.", "blurry")
    assert (script.size, script.fps) == ((64, 96), 12.0)
    first, last = script.shots
    assert (first.prompt, first.seconds, first.cut, first.image) == ("Ann climbs the stairs.", 2.0, True, None)
    assert (last.seconds, last.cut, last.image) == (1.5, False, tmp_path / "ref.png")


def test_references_are_pictures_with_what_they_show(write, tmp_path):
    (tmp_path / "ann.png").touch()
    script = load_script(write(ours(references=[{"prompt": "Ann, a keeper.", "image": "ann.png"}])))
    assert script.references == (Reference("Ann, a keeper.", tmp_path / "ann.png"),)


def test_a_true_cut_is_marked_in_the_caption_as_in_training(write):
    script = load_script(write(ours(shots=[SHOT, SHOT | {"cut": False}])))
    assert script.shots[0].caption == f"{CUT_PREFIX} Ann climbs the stairs."
    assert script.shots[1].caption == "Ann climbs the stairs."


def test_what_is_left_out_has_a_default(write):
    script = load_script(write({"shots": [{"prompt": "A cat."}]}, "cat.yaml"))
    assert (script.title, script.global_caption, script.negative) == ("cat", "", "")
    assert (script.size, script.fps, script.shots[0].seconds) == ((480, 832), 16.0, 5.0)
    assert script.shots[0].cut


def test_json_is_read_as_well(write):
    path = write(json.dumps(ours(title="Der Löwe", shots=[SHOT, SHOT])), "story.json")
    script = load_script(path)
    assert script.title == "Der Löwe"
    assert len(script.shots) == 2


def test_a_title_may_look_like_a_number(write):
    assert load_script(write("title: 1984\nshots: [{prompt: A cat.}]")).title == "1984"


# The peers' forms

HOLOCINE = {
    "global_caption": "[character1] is a painter. This scene contains 3 shots.",
    "shot_captions": ["[character1] paints.", "A brush.", "The canvas."],
    "num_frames": 241,
}
TAGGED = (
    "[global caption] [character1] is a painter. This scene contains 3 shots. "
    "[per shot caption] [character1] paints. [shot cut] A brush. [shot cut] The canvas."
)


@pytest.mark.parametrize(
    "content", [HOLOCINE, {"prompt": TAGGED, "num_frames": 241}, {"prompt": TAGGED.upper(), "num_frames": 241}]
)
def test_holocines_two_forms_are_one_story(write, content):
    script = load_script(write(content))
    assert script.global_caption.lower() == "[character1] is a painter."
    assert [shot.prompt.lower() for shot in script.shots] == ["[character1] paints.", "a brush.", "the canvas."]
    assert [shot.seconds * 16 for shot in script.shots] == pytest.approx([80, 81, 80])  # whole frames, 241 in all
    assert all(shot.cut for shot in script.shots)


@pytest.mark.parametrize("form", [HOLOCINE, {"prompt": TAGGED, "num_frames": 241}])
def test_holocines_cuts_are_frames(write, form):
    script = load_script(write(form | {"shot_cut_frames": [37, 113], "fps": 8, "negative_prompt": "static"}))
    assert [shot.seconds * 8 for shot in script.shots] == pytest.approx([37, 76, 128])
    assert script.negative == "static"


def test_a_tagged_prompt_without_a_global_caption_loses_no_shot(write):
    script = load_script(write({"prompt": "[per shot caption] A. [shot cut] B."}))
    assert script.global_caption == ""
    assert [shot.prompt for shot in script.shots] == ["A.", "B."]
    assert [shot.seconds for shot in script.shots] == [5.0, 5.0]


@pytest.mark.parametrize(("true", "false"), [(True, False), ("True", "False"), ("true", "false"), (1, 0)])
def test_storymems_scenes_become_shots(write, true, false):
    scenes = [
        {"scene_num": 1, "video_prompts": ["A man wakes.", "He rises."], "cut": [true, false]},
        {"scene_num": 2, "video_prompts": ["A street."], "cut": [true]},
        {"scene_num": 3, "video_prompts": ["Night."]},
    ]
    script = load_script(write({"story_overview": "A day.", "scenes": scenes}))
    assert script.global_caption == "A day."
    assert [shot.prompt for shot in script.shots] == ["A man wakes.", "He rises.", "A street.", "Night."]
    assert [shot.cut for shot in script.shots] == [True, False, True, True]


@pytest.mark.parametrize("form", [HOLOCINE, {"scenes": [{"video_prompts": ["A man wakes.", "A street.", "Night."]}]}])
def test_the_peers_forms_take_title_size_rate_and_negative_prompt(write, form):
    more = {"title": "A day", "size": [64, 96], "fps": 12, "negative_prompt": "blurry"}
    script = load_script(write(form | more))
    assert (script.title, script.size, script.fps, script.negative) == ("A day", (64, 96), 12.0, "blurry")
    assert len(script.shots) == 3


# Benchmarks

EPISODE = {
    "story_name": "ep1",
    "story_overview": "A chase.",
    "scenes": [
        {
            "scene_num": 1,
            "video_prompts": ["Ida: Woman in red.\nIda runs.", "She stops."],
            "cut": [True, False],
            "action_descriptions": ["Ida runs.", "She stops."],
        },
        {"scene_num": 3, "video_prompts": ["Ole waits."], "cut": [True], "action_descriptions": ["Ole waits."]},
    ],
    "entity_schedule": {
        "1:1": {"characters": ["Ida"], "places": [], "objects": ["the lamp"]},
        "3:1": {"characters": ["Ole"], "places": ["The Yard"], "objects": []},
    },
    "entity_descriptions": {
        "Character 1": {"name": "Ida", "label": "Character 1", "description": "Woman in red."},
        "Location 1": {"name": "The Yard", "label": "Location 1", "description": "A yard."},
    },
    "_num_shots": 3,
    "_name_map": {"Character 1": "Ida"},
}


def test_an_episode_of_entitybench_keeps_its_schedule(write):
    script = load_script(write(json.dumps(EPISODE), "episode.json"))
    assert (script.title, script.global_caption) == ("ep1", "A chase.")
    assert [shot.prompt for shot in script.shots] == ["Ida: Woman in red.\nIda runs.", "She stops.", "Ole waits."]
    assert [shot.cut for shot in script.shots] == [True, False, True]
    assert [shot.scene for shot in script.shots] == [(1, 1), (1, 2), (3, 1)]
    assert script.shots[0].entities == EPISODE["entity_schedule"]["1:1"]
    assert script.shots[1].entities is None
    assert script.entities == {"Ida": "Woman in red.", "The Yard": "A yard."}
    again = load_script(write(json.dumps(script.record(0, {})), "again.json"))
    assert [(shot.entities, shot.scene) for shot in again.shots] == [(s.entities, s.scene) for s in script.shots]
    assert again.entities == script.entities


MSR = {
    "scenario_id": "nature_01",
    "domain": "Nature",
    "entities": {"A": "a red fox, bushy tail, full body, standing, white background", "B": "a hare, full body"},
    "backgrounds": {"D": "a full meadow, mist, cinematic, no people"},
    "negative_prompt": "blurry",
    "shots": [
        {
            "shot_id": f"S{number}",
            "target_entities": ["A"],
            "target_bg": "D",
            "expected_d": 0,
            "keyframe_prompt": "red fox stands",
            "motion_prompt": f"red fox walks {number}",
        }
        for number in range(1, 11)
    ],
}


def test_a_scenario_of_msr_has_ten_shots_and_looks_in_its_global_caption(write):
    script = load_script(write(json.dumps(MSR), "nature_01.json"))
    assert (script.title, script.negative, len(script.shots)) == ("nature_01", "blurry", 10)
    assert script.global_caption == "[character] a red fox, bushy tail. a hare. [environment] a full meadow, mist."
    assert [shot.prompt for shot in script.shots] == [f"red fox walks {number}" for number in range(1, 11)]
    assert all(shot.cut for shot in script.shots)
    assert script.shots[9].entities == {"characters": ["A"], "places": ["D"]}
    assert script.entities == {"A": "a red fox, bushy tail", "B": "a hare", "D": "a full meadow, mist"}


def test_stbench_stories_may_name_themselves_and_their_first_frames(write):
    scene = {"video_prompts": ["A man wakes."], "first_frame_prompt": ["A bed."], "cut": ["True"]}
    script = load_script(write({"story_name": "Morning", "story_overview": "A day.", "scenes": [scene]}))
    assert (script.title, [shot.prompt for shot in script.shots]) == ("Morning", ["A man wakes."])


# How texts are read


def test_json_is_read_as_json(write):
    """YAML takes no tabs for indentation, and each half of an escaped emoji for a character."""
    text = '{\n\t"title": "\\ud83d\\udc07 $5",\n\t"shots": [\n\t\t{"prompt": "A \\ud83d\\udc07."}\n\t]\n}'
    script = load_script(write(text, "story.JSON"))
    assert (script.title, script.shots[0].prompt) == ("\N{RABBIT} $5", "A \N{RABBIT}.")
    assert load_script(write("\ufeff" + text, "story.json")) == script  # Windows programs may write this mark first


def test_a_character_that_yaml_has_in_halves_is_joined(write):
    script = load_script(write('shots: [{prompt: "A \\ud83d\\udc07."}]'))
    assert script.shots[0].prompt == "A \N{RABBIT}."


TWICE = {
    "yaml": ("title: One\nshots:\n- {prompt: A cat.}\ntitle: Two\n", "story.yaml:4: 'title'"),
    "yaml shot": ("shots:\n- prompt: A cat.\n  cut: true\n  prompt: A dog.\n", "story.yaml:4: 'prompt'"),
    "yaml quoted": ("fps: 12\n'fps': 24\nshots: [{prompt: A cat.}]\n", "story.yaml:2: 'fps'"),
    "json": ('{"fps": 12,\n "shots": [{"prompt": "A {cat}: \\"fps\\": 3"}],\n "fps": 24}', "story.json:3: 'fps'"),
    "json shot": (
        '{"shots": [{"prompt": "a"},\n{"prompt": "b",\n"prompt": "c"}]}',
        "story.json:3: 'prompt'",
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_given_twice_is_refused_with_its_line(write, name):
    text, said = TWICE[name]
    with pytest.raises(DataError) as error:
        load_script(write(text, "story.json" if name.startswith("json") else "story.yaml"))
    assert error.value.kind == "repeated-key"
    assert said in str(error.value)


def test_yaml_may_override_what_it_merges(write):
    text = "shots:\n- &cat {prompt: A cat., seconds: 2}\n- {<<: *cat, seconds: 3}\n"
    assert [shot.seconds for shot in load_script(write(text)).shots] == [2.0, 3.0]


NOT_READ = {
    "json": ("story.json", '{"shots":\n [,]}', "story.json:2: not JSON"),
    "yaml": ("story.yaml", "shots:\n- {prompt: A cat.\n", "story.yaml:3: not YAML"),
    "yaml colon": ("story.yaml", "shots:\n- prompt: It: is", "put quotes around a text that has a colon"),
    "yaml tab": ("story.yaml", "shots:\n\t- prompt: A cat", "indent by spaces"),
    "yaml backslash": ("story.yaml", 'title: "a\\d"', "write a backslash twice"),
    "yaml bell": ("story.yaml", "title: \a", "story.yaml: not YAML"),
    "yaml date": ("story.yaml", "title: 2024-13-45", "story.yaml: not YAML"),
    "yaml deep": ("story.yaml", "[" * 5000, "story.yaml: not YAML"),
    "json deep": ("story.json", "[" * 100_000, "story.json:1: not JSON"),
    "lone half": ("story.json", '{"shots": [{"prompt": "A \\ud83d cat."}]}', "shots[0].prompt: holds half a character"),
    "lone half of a title": ("story.json", '{"title": "\\udc07", "shots": [{"prompt": "A."}]}', "title: holds half"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_cannot_be_read_is_one_line(write, name):
    file, text, said = NOT_READ[name]
    with pytest.raises(DataError) as error:
        load_script(write(text, file))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# Bad scripts

BAD = {
    "no shots field": ({"title": "x"}, "shots", "no shot"),
    "no shot": (ours(shots=[]), "shots", "no shot"),
    "shots not a list": (ours(shots={"prompt": "x"}), "shots", "no shot"),
    "shot not a mapping": (ours(shots=["a cat"]), r"shots\[0\]", "not a mapping"),
    "no prompt": (ours(shots=[SHOT, {"seconds": 2}]), r"shots\[1\]\.prompt", "say what the shot shows"),
    "blank prompt": (ours(shots=[{"prompt": "  "}]), r"shots\[0\]\.prompt", "say what"),
    "zero seconds": (ours(shots=[SHOT | {"seconds": 0}]), r"shots\[0\]\.seconds", "0 is not a positive number"),
    "negative seconds": (ours(shots=[SHOT | {"seconds": -1}]), r"shots\[0\]\.seconds", "not a positive"),
    "seconds as text": (ours(shots=[SHOT | {"seconds": "two"}]), r"shots\[0\]\.seconds", "'two' is not"),
    "endless seconds": (ours(shots=[SHOT | {"seconds": float("inf")}]), r"shots\[0\]\.seconds", "inf is not"),
    "cut as text": (ours(shots=[SHOT | {"cut": "no"}]), r"shots\[0\]\.cut", "not true or false"),
    "unknown field": (ours(sise=[64, 96]), "story.yaml", "unknown field 'sise'; known are"),
    "unknown shot field": (ours(shots=[SHOT | {"second": 2}]), r"shots\[0\]", "unknown field 'second'"),
    "size of one": (ours(size=[64]), "size", r"\[64\] is not \[height, width\]"),
    "size as text": (ours(size="64x96"), "size", "not"),
    "size negative": (ours(size=[64, -96]), "size", "not"),
    "seconds of days": (ours(shots=[SHOT | {"seconds": 10**7}]), r"shots\[0\]\.seconds", "number below a million"),
    "fps zero": (ours(fps=0), "fps", "0 is not a positive number"),
    "global a list": ({"global": ["Ann"], "shots": [SHOT]}, "global", "not a text"),
    "image missing": (ours(shots=[SHOT | {"image": "ref.png"}]), r"shots\[0\]\.image", "'ref.png' is not in"),
    "image elsewhere": (ours(shots=[SHOT | {"image": "/etc/passwd"}]), r"shots\[0\]\.image", "outside"),
    "image outside": (ours(shots=[SHOT | {"image": "../x.png"}]), r"shots\[0\]\.image", "outside"),
    "references no list": (ours(references={"image": "a.png"}), "references", "not a list"),
    "reference without prompt": (ours(references=[{"image": "a.png"}]), r"references\[0\]", "not a mapping of prompt"),
    "reference missing": (
        ours(references=[{"prompt": "Ann", "image": "ann.png"}]),
        r"references\[0\]\.image",
        "'ann.png' is not in",
    ),
    "seed negative": (ours(shots=[SHOT | {"seed": -1}]), r"shots\[0\]\.seed", "-1 is not a whole number"),
    "seed of 33 bits": (
        ours(shots=[SHOT | {"seed": 2**32}]),
        r"shots\[0\]\.seed",
        "4294967296 is not a whole number from 0 to 4294967295",
    ),
    "seed as text": (ours(shots=[SHOT | {"seed": "1"}]), r"shots\[0\]\.seed", "'1' is not a whole number"),
    "entities a list": (ours(entities=["Ann"]), "entities", "not a mapping of names"),
    "shot's entities a list": (ours(shots=[SHOT | {"entities": ["Ann"]}]), r"shots\[0\]\.entities", "not a mapping"),
    "entity no list": (
        ours(shots=[SHOT | {"entities": {"characters": "Ann"}}]),
        r"entities\.characters",
        "not a list of names",
    ),
    "scene of one": (ours(shots=[SHOT | {"scene": [1]}]), r"shots\[0\]\.scene", "two whole numbers"),
    "scene twice": (ours(shots=[SHOT, *[SHOT | {"scene": [1, 2]}] * 2]), r"shots\[2\]\.scene", r"shots\[1\] too"),
    "scene a path": (ours(shots=[SHOT | {"scene": ["../x", 1]}]), r"shots\[0\]\.scene", "two whole numbers"),
    "schedule of no shot": (EPISODE | {"entity_schedule": {"2:1": {}}}, "entity_schedule", "unknown field '2:1'"),
    "schedule a list": (EPISODE | {"entity_schedule": []}, "entity_schedule", "not a mapping of scene:shot"),
    "entity without a name": (EPISODE | {"entity_descriptions": {"C": {}}}, r"descriptions\.C", "no name"),
    "index of scenarios": ({"name": "MSR-50", "scenarios": [MSR]}, "scenarios", "name one of the files beside it"),
    "msr without motion": (MSR | {"shots": [{"shot_id": "S1"}]}, r"shots\[0\]\.motion_prompt", "None is not a text"),
    "msr without looks": (MSR | {"backgrounds": []}, "backgrounds", "not a mapping"),
    "msr without shots": (MSR | {"shots": []}, "shots", "no shot"),
    "not a mapping": ("- a\n- b", "story.yaml", "must be a mapping"),
    "not yaml": ("shots: [", "story.yaml:1", "not YAML"),
    "empty": ("", "story.yaml", "must be a mapping"),
    "holocine without shots": (HOLOCINE | {"shot_captions": []}, "shot_captions", "no shot"),
    "holocine untagged": ({"prompt": "A painter paints."}, "prompt", "no shot"),
    "holocine cuts too many": (HOLOCINE | {"shot_cut_frames": [37, 73, 113]}, "shot_cut_frames", "2 rising frames"),
    "holocine cuts falling": (HOLOCINE | {"shot_cut_frames": [113, 37]}, "shot_cut_frames", "rising"),
    "holocine cuts too late": (HOLOCINE | {"shot_cut_frames": [37, 241]}, "shot_cut_frames", "in 241"),
    "holocine cuts as text": (HOLOCINE | {"shot_cut_frames": "37"}, "shot_cut_frames", "not a list"),
    "holocine unknown field": (HOLOCINE | {"frames": 3}, "story.yaml", "unknown field 'frames'"),
    "storymem scenes": ({"scenes": ["x"]}, "scenes", "not a list of mappings"),
    "storymem prompts": ({"scenes": [{"cut": [True]}]}, r"scenes\[0\]\.video_prompts", "not a list"),
    "storymem cuts": ({"scenes": [{"video_prompts": ["a", "b"], "cut": [True]}]}, r"scenes\[0\]\.cut", "list of 2"),
    "storymem cut word": ({"scenes": [{"video_prompts": ["a"], "cut": ["maybe"]}]}, "cut", "'maybe' is not true"),
    "storymem cut of a number": ({"scenes": [{"video_prompts": ["a"], "cut": [2]}]}, "cut", "2 is not true"),
    "storymem cut no list": ({"scenes": [{"video_prompts": ["a"], "cut": False}]}, "cut", "False is not a list of 1"),
    "storymem unknown field": ({"scenes": [], "story_overveiw": "x"}, "story.yaml", "unknown field 'story_overveiw'"),
    "storymem unknown scene field": ({"scenes": [{"video_prompt": ["a"]}]}, r"scenes\[0\]", "unknown field 'video_p"),
    "storymem with shots": ({"scenes": [], "shots": [SHOT]}, "story.yaml", "unknown field 'shots'"),
    "size of truths": (ours(size=[True, 96]), "size", "not"),
    "two sources of captions": (HOLOCINE | {"prompt": TAGGED}, "prompt", "stands beside global_caption"),
    "two sources of shots": ({"shot_captions": ["a"], "prompt": TAGGED}, "prompt", "stands beside shot_captions"),
    "storymem empty": ({"scenes": []}, "shots", "no shot"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(write, name):
    content, field, reason = BAD[name]
    path = write(content)
    with pytest.raises(DataError, match=f"{field}.*{reason}") as error:
        load_script(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.yaml: no such file"):
        load_script(tmp_path / "nowhere.yaml")
    (tmp_path / "film.mp4").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=r"film\.mp4: byte 128 is not UTF-8"):
        load_script(tmp_path / "film.mp4")


# What a language model is told


def test_the_example_for_a_language_model_is_a_script_as_it_says(write):
    text = (ROOT / "docs/write_a_script.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    script = load_script(write(example))
    assert 4 <= len(script.shots) <= 12
    assert all(2 <= shot.seconds <= 8 for shot in script.shots)
    assert script.shots[0].cut
    assert not all(shot.cut for shot in script.shots)
    tags = ["[character]", "[environment]", "[story]"]
    assert re.findall(r"\[\w+\]", script.global_caption) == tags
    told = text.split("```yaml")[0]
    fields = set(yaml.safe_load(example)) | set(yaml.safe_load(example)["shots"][0])
    assert all(f"`{field}`" in told for field in fields)
