"""This module reads stories as other tools write them, in prompt scripts and in captions alike.

HoloCine gives the frames where shots begin; StoryMem gives scenes of prompts, and says which of them a cut begins.
"""

from itertools import pairwise
from typing import Any

from data.documents import flag
from data.errors import DataError, refuse_unknown

# The fields of a scene. Its prompts repeat what the last two, its first frames and actions, say.
_SCENE_FIELDS = {"scene_num", "video_prompts", "cut", "first_frame_prompt", "action_descriptions"}


def spans_between(cuts: Any, num_frames: Any, shots: int, where: str, kind: str) -> list[tuple[float, float]]:
    """Returns the (first, end) frames of each of `shots` shots, from HoloCine's `shot_cut_frames` and `num_frames`.

    Raises DataError of `kind` where the cuts are not numbers that rise within the video, one fewer than the shots.
    """
    if not isinstance(cuts, list) or not all(type(frame) in (int, float) for frame in [*cuts, num_frames]):
        raise DataError(kind, where, f"{cuts!r} of {num_frames!r} frames is not a list of frame numbers in a number")
    spans = list(pairwise([0, *cuts, num_frames]))
    if len(spans) != shots or any(first >= end for first, end in spans):
        raise DataError(kind, where, f"{cuts} are not {shots - 1} rising frames in {num_frames:g}")
    return spans


def prompts_and_cuts(scenes: Any, where: str, kind: str) -> list[tuple[Any, bool]]:
    """Returns each prompt of StoryMem's `scenes` and whether a cut begins it; without `cut`, one begins each.

    Raises DataError of `kind` with the scene and its field. Prompts are returned unread.
    """
    if not isinstance(scenes, list) or not all(isinstance(scene, dict) for scene in scenes):
        raise DataError(kind, where, "is not a list of mappings with video_prompts and cut")
    found: list[tuple[Any, bool]] = []
    for index, scene in enumerate(scenes):
        here, prompts = f"{where}[{index}]", scene.get("video_prompts")
        refuse_unknown(scene, _SCENE_FIELDS, here, kind)
        if not isinstance(prompts, list):
            raise DataError(kind, f"{here}.video_prompts", f"{prompts!r} is not a list of prompts")
        cuts = [True] * len(prompts) if scene.get("cut") is None else scene["cut"]
        if not isinstance(cuts, list) or len(cuts) != len(prompts):
            raise DataError(kind, f"{here}.cut", f"{cuts!r} is not a list of {len(prompts)}, one a prompt")
        flags = [flag(cut) for cut in cuts]
        if None in flags:
            raise DataError(kind, f"{here}.cut", f"{cuts[flags.index(None)]!r} is not true or false")
        found += [(prompt, bool(cut)) for prompt, cut in zip(prompts, flags, strict=True)]
    return found
