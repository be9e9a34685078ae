"""This module draws a film beside the earlier shots that one of the model's heads looks back to."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from film.filmmaker import Filmmaker
from film.folder import FilmFolder
from film.lettering import draw_text
from film.plan import FilmPlan
from film.script import Script
from film.video import moving
from moc.errors import UserError
from moc.files import write_whole
from moc.layout import ShotLayout
from moc.statistics import RoutingMap, shot_counts

GAP, LARGE, SMALL, LINE, EDGE = 12, 420, 132, 26, 5  # pixels: gaps, two widths of pictures, a line of text, a frame
COLUMNS = 3
SECONDS_A_SHOT, FRAMES_A_SECOND = 1.6, 5
ORANGE = (230, 85, 13)


class HeadMaps(RoutingMap):
    """These maps count routes by head too. by_head: counts by layer, float64 [N, S, S], over all noise levels."""

    def __init__(self, num_shots: int, sum_over_heads: Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_shots, sum_over_heads)
        self.by_head: dict[int, Tensor] = {}

    def observer(
        self, layout: ShotLayout, shots: list[int], making: list[int], sigmas: Sequence[float] | None = None
    ) -> Callable[[int, Tensor], None]:
        observe = super().observer(layout, shots, making, sigmas)
        made, columns = torch.tensor([shots.index(shot) for shot in making]), torch.tensor(shots)
        num_shots = self.counts.shape[-1]

        def by_head(layer: int, routes: Tensor) -> None:
            observe(layer, routes)
            found = torch.stack([shot_counts(of_head[None], layout).cpu() for of_head in routes])[:, made]
            counts = self.by_head.setdefault(layer, found.new_zeros(len(routes), num_shots, num_shots))
            counts[:, torch.tensor(making)[:, None], columns] += found

        return by_head


class Watched(Filmmaker):
    """This filmmaker makes films and keeps the last film's map of heads."""

    maps: HeadMaps

    def routing_map(self, plan: FilmPlan) -> RoutingMap:
        self.maps = HeadMaps(len(plan.shapes), self.parallel.sum_over_heads)
        return self.maps


def most_pointed(by_head: dict[int, Tensor]) -> tuple[int, int, Tensor]:
    """Returns layer, head and shares [S, S] of the head whose routes lead most to one earlier shot: the largest share
    that a single shot has of the routes of a later one, less chance, averaged over the shots with several before
    them."""
    found = []
    for layer, counts in by_head.items():
        shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        # By chance the largest share is at least 1 / (earlier shots).
        above = [(shares[:, shot].amax(-1) - 1 / shot) / (1 - 1 / shot) for shot in range(2, shares.shape[-1])]
        scores = torch.stack(above).mean(0)
        found += [(float(score), layer, head, shares[head]) for head, score in enumerate(scores)]
    _, layer, head, shares = max(found, key=lambda row: row[0])
    return layer, head, shares


def draw(folder: FilmFolder, plan: FilmPlan, shares: Tensor) -> Iterator[Image.Image]:
    """Yields the moving picture's frames: the shot on the left; on the right all shots until then, of which those that
    it does not look to are pale, and those that it looks to more than evenly are framed."""
    numbers = range(1, len(plan.filmed) + 1)
    films = [list(folder.frames(number, lambda count: list(range(count)), lambda *size: size)) for number in numbers]
    height, width = films[0][0].shape[:2]
    large, small = (LARGE, LARGE * height // width), (SMALL, SMALL * height // width)
    stills = [Image.fromarray(film[len(film) // 2]).resize(small, Image.Resampling.LANCZOS) for film in films]
    step = (SMALL + GAP, small[1] + LINE)
    rows = -(-len(films) // COLUMNS)
    size = (LARGE + 3 * GAP + COLUMNS * step[0], max(large[1] + 2 * LINE, LINE + rows * step[1]) + 2 * GAP)
    for shot, film in enumerate(films):
        sheet, left = Image.new("RGB", size, "white"), LARGE + 3 * GAP
        prompt = plan.script.shots[shot].prompt.removesuffix(" Static camera.")
        sheet.paste(draw_text(f"{shot + 1}. {prompt}", (LARGE, 2 * LINE), size=19, bold=True), (GAP, large[1] + GAP))
        sheet.paste(draw_text("It looks back to", (size[0] - left, LINE), size=15), (left, GAP // 2))
        pen, row = ImageDraw.Draw(sheet), shares[shot].tolist()
        for other, still in enumerate(stills[: shot + 1]):
            x, y = left + other % COLUMNS * step[0], GAP + LINE + other // COLUMNS * step[1]
            strength = row[other] / max(*row, 1e-9) if other < shot else 1.0
            sheet.paste(Image.blend(Image.new("RGB", small, "white"), still, 0.3 + 0.7 * strength), (x, y))
            if other < shot and row[other] * shot > 1.2:
                for out in range(EDGE):
                    pen.rectangle((x - out, y - out, x + small[0] + out, y + small[1] + out), outline=ORANGE)
            label = f"{other + 1}: {row[other]:.0%}" if other < shot else f"{other + 1}: itself"
            sheet.paste(draw_text(label, (small[0], LINE - 10), size=13), (x, y + small[1] + EDGE + 1))
        for moment in range(round(SECONDS_A_SHOT * FRAMES_A_SECOND)):
            frame, now = sheet.copy(), Image.fromarray(film[_there_and_back(moment, len(film))])
            frame.paste(now.resize(large, Image.Resampling.LANCZOS), (GAP, GAP))
            yield frame


def _there_and_back(moment: int, count: int) -> int:
    """Returns the frame of a moment, which goes 0, 1 .. count - 1 .. 1, 0, 1 .."""
    frame = moment % max(1, 2 * count - 2)
    return frame if frame < count else 2 * count - 2 - frame


def write_picture(filmmaker: Watched, script: Script, folder: FilmFolder, output: Path) -> None:
    """Films a script of at least three shots into a new folder and writes the moving picture, a WebP, of the head whose
    routes lead most to single shots. Raises UserError where the model routes nowhere."""
    filmmaker.make([(script, folder)])
    if not filmmaker.maps.by_head:
        checkpoint = filmmaker.config.checkpoint
        raise UserError(f"{checkpoint} routes nowhere: dense attention and own shots only have no map to draw")
    plan = filmmaker.plan(script)
    among = torch.tensor(plan.filmed)  # leaves out reference pictures, which are in the stream too
    by_head = {layer: counts[:, among[:, None], among] for layer, counts in filmmaker.maps.by_head.items()}
    layer, head, shares = most_pointed(by_head)
    write_whole(output, moving(draw(folder, plan, shares), FRAMES_A_SECOND, quality=72))
    table = np.array2string(shares.numpy(), precision=2, suppress_small=True)
    print(f"{output}: layer {layer + 1}, head {head + 1} looks back to\n{table}")
    print(*folder.files(), sep="\n")
