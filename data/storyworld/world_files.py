"""This module writes a storyworld: H.264 videos, vocabulary.txt, truth.jsonl and, last, manifest.jsonl.

truth.jsonl has one scene a line:
{"id", "seed", "mode", "fps", "size": [height, width], "places": [...],
 "characters": {name: {"animal", "emblem", "fur", "outfit", "pattern", "accessory", "size", "pace", "bounce"}},
 "shots": [{"start", "end", "cut", "place", "camera", "views": [[x, y, zoom] at its start, at its end],
            "actors": [{"name", "action", "boxes": [[x0, y0, x1, y1] or null a frame], "visible": [share, ...]}]}],
 "recalls": [{"shot", "name", "shown_in": [shot, ...], "distance", "looks": {"fur", "outfit"}}]}
Boxes are in pixels and hold the whole character, hidden parts too. A recall is every return of a name after a cut:
what it must show (looks), where (the boxes of its shot), and how many shots ago it was last shown (distance).
"""

import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data.manifest import SceneRecord, ShotRecord, write_manifest
from data.media.write import write_video
from data.records import write_whole
from data.storyworld.characters import BADGES
from data.storyworld.config import StoryworldConfig
from data.storyworld.render import Renderer, Sighting
from data.storyworld.scenes import Scene, Shot, plan_scene, vocabulary

X264 = {"preset": "veryfast"}
MANIFEST, TRUTH, VOCABULARY, VIDEOS = "manifest.jsonl", "truth.jsonl", "vocabulary.txt", "videos"


def generate(config: StoryworldConfig) -> Path:
    """Writes the whole dataset under `config.output` and returns its manifest's path.

    The same config and seed give the same files whatever the number of workers. The manifest is written last: a
    folder without one is unfinished. Raises FileExistsError if there is one already and `overwrite` is off.
    """
    root = Path(config.output)
    _clear(root, config.overwrite)
    truths = dict(_write_scenes(config))
    write_whole(root / VOCABULARY, "".join(f"{word}\n" for word in vocabulary()).encode())
    write_whole(root / TRUTH, "".join(json.dumps(truths[i]) + "\n" for i in range(config.scenes)).encode())
    write_manifest(root / MANIFEST, (_record(config, i) for i in range(config.scenes)))
    return root / MANIFEST


def _clear(root: Path, overwrite: bool) -> None:
    manifest = root / MANIFEST
    if not manifest.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{manifest} exists: give another output, or overwrite=true to replace it")
    if not (root / TRUTH).exists():
        raise FileExistsError(f"{manifest} is no storyworld ({TRUTH} is missing): give another output")
    manifest.unlink()
    for video in (root / VIDEOS).glob("*.mp4"):
        if re.fullmatch(r"scene_\d{6,}|\.scene_\d{6,}\.partial", video.stem):  # names that only this code gives
            video.unlink()


def _write_scenes(config: StoryworldConfig) -> Iterator[tuple[int, dict]]:
    """Writes every video; yields (number, truth) as they come."""
    workers = min(config.workers or os.cpu_count() or 1, config.scenes)
    bar = tqdm(total=config.scenes, desc="storyworld", unit="scene", dynamic_ncols=True)
    with bar:
        if workers == 1:
            for index in range(config.scenes):
                yield index, write_scene(config, index)
                bar.update()
            return
        # Workers are forked from a server process, since this one may hold threads; it imports once for all of them.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(workers, context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            jobs = {pool.submit(write_scene, config, index): index for index in range(config.scenes)}
            try:
                for job in as_completed(jobs):
                    yield jobs[job], job.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def write_scene(config: StoryworldConfig, index: int) -> dict:
    """Writes the video of scene `index` and returns its truth."""
    scene = plan_scene(config, index)
    renderer = Renderer(scene, (config.size[0], config.size[1]), config.fps)
    sightings: list[list[list[Sighting]]] = []  # by shot, frame, actor

    def frames() -> Iterator[np.ndarray]:
        for shot in scene.shots:
            sightings.append([])
            for frame, seen in renderer.render(shot):
                sightings[-1].append(seen)
                yield frame

    write_video(Path(config.output) / _video_path(index), frames(), config.fps, crf=config.crf, options=X264)
    return _truth(config, index, scene, sightings)


def _truth(config: StoryworldConfig, index: int, scene: Scene, sightings: list[list[list[Sighting]]]) -> dict:
    looks = {look.name: asdict(look) for look in scene.looks}
    characters = {}
    for name, look in looks.items():
        look.pop("name")
        characters[name] = asdict(BADGES[name]) | look
    recalls = [
        asdict(recall) | {"looks": {key: characters[recall.name][key] for key in ("fur", "outfit")}}
        for recall in scene.recalls
    ]
    return {
        "id": _scene_id(index),
        "seed": config.seed,
        "mode": config.mode.value,
        "fps": config.fps,
        "size": list(config.size),
        "places": sorted({shot.place for shot in scene.shots}),
        "characters": characters,
        "shots": [
            {"start": start, "end": end, **_shot_truth(shot, seen)}
            for (start, end), shot, seen in zip(_spans(scene), scene.shots, sightings, strict=True)
        ],
        "recalls": recalls,
    }


def _shot_truth(shot: Shot, sightings: list[list[Sighting]]) -> dict:
    actors = [
        {
            "name": actor.look.name,
            "action": actor.action,
            "boxes": [seen[i].box for seen in sightings],
            "visible": [round(seen[i].visible, 3) for seen in sightings],
        }
        for i, actor in enumerate(shot.actors)
    ]
    views = [[round(value, 4) for value in astuple(view)] for view in (shot.start_view, shot.end_view)]
    return {"cut": shot.cut, "place": shot.place, "camera": shot.camera, "views": views, "actors": actors}


def _record(config: StoryworldConfig, index: int) -> SceneRecord:
    scene = plan_scene(config, index)
    shots = tuple(
        ShotRecord(start, end, shot.caption, shot.cut)
        for (start, end), shot in zip(_spans(scene), scene.shots, strict=True)
    )
    video = _video_path(index)
    return SceneRecord(_scene_id(index), video=video, caption=scene.caption, fps=config.fps, shots=shots)


def _spans(scene: Scene) -> list[tuple[int, int]]:
    """Returns each shot's half-open span of frames."""
    ends = np.cumsum([shot.frames for shot in scene.shots]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _scene_id(index: int) -> str:
    return f"scene_{index:06d}"


def _video_path(index: int) -> str:
    return f"{VIDEOS}/{_scene_id(index)}.mp4"
