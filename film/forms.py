"""This module rewrites scripts of other tools and of benchmarks in our form. It knows these:

HoloCine: `global_caption`, `shot_captions`, `num_frames`, optionally `shot_cut_frames`; or `prompt`, one string with
[global caption], [per shot caption] and [shot cut] tags. StoryMem (ST-Bench): `story_overview` and `scenes` of
`video_prompts` and `cut`. EntityBench: StoryMem's form with `entity_schedule`, who and what each shot shows, and
`entity_descriptions`. MSR-50: `shots` of `motion_prompt` and `target_entities`, with `entities` and `backgrounds`.
HoloCine's and StoryMem's may add `title`, `size`, `fps` and `negative_prompt`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.errors import DataError, refuse_unknown
from data.other_tools import prompts_and_cuts, spans_between
from film.fields import DEFAULT_FPS, DEFAULT_SECONDS, positive, text_of

_SHARED_FIELDS = {"title", "size", "fps", "negative_prompt"}  # every form may have these too
# Prompts of MSR-50's single shots end like this.
_ANCHOR = re.compile(r"(, (full body|standing|white background|cinematic|no people))+$")


def as_ours(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns a script of any known form in our own, whose values are not read yet; raises DataError citing file and
    field."""
    return _reader(raw, path)(raw, path)


def _reader(raw: dict[str, Any], path: Path) -> Callable[[dict[str, Any], Path], dict[str, Any]]:
    if "shot_captions" in raw or isinstance(raw.get("prompt"), str):
        return _from_holocine
    if "entity_schedule" in raw:
        return _from_entitybench
    if "scenarios" in raw:
        raise DataError(
            "bad-script",
            f"{path} scenarios",
            "is an index of many scripts; name one of the files beside it, or a folder of them without the index",
        )
    if "scenario_id" in raw:
        return _from_msr
    return _from_storymem if "scenes" in raw else lambda ours, _: ours


def _from_holocine(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reads HoloCine's form: captions apart with a frame count, or one tagged prompt."""
    own = {"global_caption", "shot_captions", "num_frames", "shot_cut_frames", "prompt"}
    refuse_unknown(raw, own | _SHARED_FIELDS, str(path), "bad-script")
    apart = sorted({"global_caption", "shot_captions"} & raw.keys())
    if "prompt" in raw and apart:
        raise DataError(
            "bad-script", f"{path} prompt", f"stands beside {apart[0]}; give one tagged prompt, or captions apart"
        )
    if "prompt" in raw:
        field, (global_caption, captions) = "prompt", _tagged(raw["prompt"])
    else:
        field, global_caption, captions = "shot_captions", text_of(raw, "global_caption", path), raw["shot_captions"]
    if not isinstance(captions, list) or not captions:
        raise DataError("bad-script", f"{path} {field}", "there is no shot; give at least one")
    fps = positive(raw.get("fps", DEFAULT_FPS), f"{path} fps")
    num_frames = positive(raw.get("num_frames", DEFAULT_SECONDS * fps * len(captions)), f"{path} num_frames")
    cuts = raw.get("shot_cut_frames")
    if cuts is None:
        cuts = [round(num_frames * i / len(captions)) for i in range(1, len(captions))]  # no frame is lost to rounding
    spans = spans_between(cuts, num_frames, len(captions), f"{path} shot_cut_frames", "bad-script")
    shots = [
        {"prompt": caption, "seconds": (end - start) / fps}
        for caption, (start, end) in zip(captions, spans, strict=True)
    ]
    global_caption = re.sub(r"This scene contains \d+ shots?\.", "", global_caption, flags=re.IGNORECASE)
    return _shared(raw) | {"global": global_caption, "shots": shots}


def _shared(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that mean the same in every form, under our names."""
    return {"negative" if key == "negative_prompt" else key: raw[key] for key in _SHARED_FIELDS & raw.keys()}


def _tagged(prompt: str) -> tuple[str, list[str]]:
    """Returns global caption and shot captions of a prompt with [global caption], [per shot caption] and [shot cut]."""
    whole, *rest = re.split(r"\[per shot caption\]", prompt, maxsplit=1, flags=re.IGNORECASE)
    global_caption = re.sub(r"\[global caption\]", "", whole, flags=re.IGNORECASE)
    return global_caption, re.split(r"\[shot cut\]", rest[0], flags=re.IGNORECASE) if rest else []


def _from_storymem(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reads StoryMem's form: scenes, each with a list of prompts and a list that says which of them a cut begins."""
    refuse_unknown(raw, {"story_name", "story_overview", "scenes"} | _SHARED_FIELDS, str(path), "bad-script")
    prompts = prompts_and_cuts(raw["scenes"], f"{path} scenes", "bad-script")
    shots = [{"prompt": prompt, "cut": cut} for prompt, cut in prompts]
    return {"title": raw.get("story_name")} | _shared(raw) | {"global": raw.get("story_overview"), "shots": shots}


def _from_entitybench(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reads EntityBench's form: StoryMem's with a schedule of entities, whose keys are "scene:shot"."""
    extra = {"entity_schedule", "entity_descriptions"}
    notes = {name for name in raw if name.startswith("_")}  # such as where the episode comes from
    ours = _from_storymem({name: value for name, value in raw.items() if name not in extra | notes}, path)
    schedule, where = raw["entity_schedule"], f"{path} entity_schedule"
    if not isinstance(schedule, dict):
        raise DataError("bad-script", where, f"{schedule!r} is not a mapping of scene:shot to entities")
    numbered = [
        (scene.get("scene_num", index), number)
        for index, scene in enumerate(raw["scenes"], start=1)
        for number in range(1, len(scene["video_prompts"]) + 1)
    ]
    refuse_unknown(schedule, {f"{scene}:{number}" for scene, number in numbered}, where, "bad-script")
    for shot, (scene, number) in zip(ours["shots"], numbered, strict=True):
        shot |= {"entities": schedule.get(f"{scene}:{number}"), "scene": [scene, number]}
    return ours | {"entities": _described(raw.get("entity_descriptions"), f"{path} entity_descriptions")}


def _described(raw: Any, where: str) -> dict[str, Any]:
    """Returns EntityBench's descriptions by name, from {"Character 1": {"name": ..., "description": ...}, ...}."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise DataError("bad-script", where, f"{raw!r} is not a mapping of entities")
    for label, one in raw.items():
        if not isinstance(one, dict) or not {"name", "description"} <= one.keys():
            raise DataError("bad-script", f"{where}.{label}", f"{one!r} has no name and description")
    return {str(one["name"]): one["description"] for one in raw.values()}


def _from_msr(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reads MSR-50's form: ten shots of three entities A, B, C before three backgrounds D, E, F. The global caption
    says what these look like, since shots name them shortly; each shot is a cut."""
    own = {"scenario_id", "domain", "entities", "backgrounds", "shots"}
    refuse_unknown(raw, own | _SHARED_FIELDS, str(path), "bad-script")
    characters, places = (_looks(raw.get(kind), f"{path} {kind}") for kind in ("entities", "backgrounds"))
    shots = raw.get("shots")
    shots = shots if isinstance(shots, list) else []
    return _shared(raw) | {
        "title": raw.get("title", raw["scenario_id"]),
        "global": f"[character] {'. '.join(characters.values())}. [environment] {'. '.join(places.values())}.",
        "entities": characters | places,
        "shots": [_msr_shot(shot, f"{path} shots[{index}]") for index, shot in enumerate(shots)],
    }


def _looks(raw: Any, where: str) -> dict[str, str]:
    """Returns MSR-50's descriptions by name, without what they say for lone pictures of an entity or a place."""
    if not isinstance(raw, dict) or not all(isinstance(text, str) for text in raw.values()):
        raise DataError("bad-script", where, f"{raw!r} is not a mapping of names to descriptions")
    return {name: _ANCHOR.sub("", text) for name, text in raw.items()}


def _msr_shot(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise DataError("bad-script", where, f"{raw!r} is not a mapping with motion_prompt")
    known = {"shot_id", "target_entities", "target_bg", "expected_d", "keyframe_prompt", "motion_prompt"}
    refuse_unknown(raw, known, where, "bad-script")
    if not isinstance(raw.get("motion_prompt"), str):
        raise DataError("bad-script", f"{where}.motion_prompt", f"{raw.get('motion_prompt')!r} is not a text")
    seen = {"characters": raw.get("target_entities", []), "places": [raw["target_bg"]] if "target_bg" in raw else []}
    return {"prompt": raw["motion_prompt"], "entities": seen}
