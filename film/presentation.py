"""This module draws a finished film's storyboard, routing map and page, once each and from the film's files alone."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from film.folder import FilmFolder
from film.page import write_page
from film.plan import FilmPlan
from film.storyboard import ROWS_A_PAGE, Panel, draw_routing_map, draw_storyboard, page_size, pick_frames
from film.video import VideoConfig, write_preview, write_subtitles


class Stills:
    """These are pictures of a film's shots; each video is decoded once. Each shot's middle picture stays in memory."""

    def __init__(self, folder: FilmFolder) -> None:
        self.folder = folder
        self._middles: dict[int, np.ndarray] = {}

    def row(self, number: int) -> np.ndarray:
        """Returns frames spread over a shot, uint8 [n, H, W, 3], as a storyboard shows them."""
        frames = self.folder.frames(number, pick_frames, page_size)
        self._middles[number] = frames[len(frames) // 2].copy()
        return frames

    def middle(self, number: int) -> np.ndarray:
        """Returns a frame of the middle of a shot, uint8 [H, W, 3]."""
        if number not in self._middles:
            self.row(number)
        return self._middles[number]


def present(folder: FilmFolder, plan: FilmPlan, video: VideoConfig) -> None:
    """Draws those pictures of a whole film that are not there, and its page. video: what else is asked for."""
    stills, numbers = Stills(folder), range(1, len(plan.filmed) + 1)
    for number, shot in zip(numbers, plan.script.shots, strict=True):
        if shot.scene:
            folder.draw("{:03d}_{:03d}.mp4".format(*shot.scene), partial(folder.file_shot, number))

    def panel(number: int) -> Panel:
        shot, seconds = plan.script.shots[number - 1], plan.num_frames[number - 1] / plan.script.fps
        return Panel(number, shot.prompt, seconds, shot.beginning, stills.row(number))

    def page(first: int, path: Path) -> None:
        draw_storyboard(path, plan.script.title, [panel(number) for number in numbers[first : first + ROWS_A_PAGE]])

    def draw_page(first: int) -> None:
        number = 1 + first // ROWS_A_PAGE
        folder.draw("storyboard.png" if number == 1 else f"storyboard_{number}.png", partial(page, first))

    # Decoding and encoding pictures leave Python to other threads.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(draw_page, range(0, len(numbers), ROWS_A_PAGE)))

    def routing(path: Path) -> None:
        shares = torch.tensor(folder.read_metadata()["routing"])[plan.filmed][:, plan.filmed]
        draw_routing_map(path, shares, [stills.middle(number) for number in numbers])

    folder.draw("routing.png", routing)
    folder.draw("index.html", lambda path: write_page(path, folder, plan, stills.middle))
    for name in ("video.srt", "video.vtt") if video.subtitles else ():
        folder.draw(name, lambda path: write_subtitles(path, plan))
    if video.preview:
        folder.draw("preview.webp", lambda path: write_preview(path, folder, plan))
