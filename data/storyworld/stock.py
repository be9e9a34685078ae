"""This module paints storyworld's things once and composes shots of them by the thousand, on any torch device.

A pixel of a shot is affine in the colours of fur, outfit and light, so that a clip of a character is a few masks:

    shown = under * keep + shadow colour * shade + own + fur * furred + outfit * dressed + trim * trimmed
    frame = shown * clear + over

`under` is the place behind the character. `over` is what drifts and stands before it, and `clear` is 1 - its alpha.
Both are darkened by the vignette. The other masks belong to the clip and hold the average over an open shutter. What
drifts in the air moves while the shutter is open in the CPU renderer, but not here: frames in which nobody moves equal
the renderer's within rounding, and other frames nearly do.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.storyworld.animals import CREAM
from data.storyworld.canvas import Canvas, lay_over, rgb
from data.storyworld.characters import COLOURS, SIZES, Look, draw_in_colours
from data.storyworld.motion import Actor, View, pose_at
from data.storyworld.places import PLACES
from data.storyworld.recall_scenes import (
    ACTION_NAMES,
    DEPTH,
    FACINGS,
    NAMES,
    PLACE_NAMES,
    STAGE,
    RecallConfig,
    RecallScenes,
    actor_of,
    clip_number,
    fine_height,
    stock_shot,
)
from data.storyworld.render import SHUTTER, Renderer, draw_shadow, shadow_colour
from data.storyworld.scenes import Scene, Shot
from moc.move import move

_BLACK = np.array([0, 0, 0, 1], np.float32)
_NOBODY = np.eye(8, 1, dtype=np.float32)[..., None]  # masks of an empty window, which keep the whole background
_RED, _GREEN, _BLUE = (np.stack([_BLACK, _BLACK + np.eye(4, dtype=np.float32)[i]]) for i in range(3))


@dataclass(frozen=True)
class Composed:
    """These are shots as pixels: frames [N, 3, F, H, W] in [-1, 1], and cover [N, F, H, W], the character's share of a
    pixel."""

    frames: Tensor
    cover: Tensor


class Stock:
    """A stock holds what recall scenes are composed of, on a device.

    clips: fp16 [names x actions x facings, F, 8, H', W'], keep, shade, own (3), furred, dressed and trimmed, on fine
    pixels with a margin for where a character may stand. under, over: fp16 [places x paintings x views, F or 1, 3, H,
    W] and [..., F, 4, H, W], premultiplied colour and clear. views: how many cameras see a painting differently.
    at_once: how many shots are composed at a time, which bounds its memory. dtype: clips are coloured in it.
    """

    at_once, views = 512, 1

    def __init__(self, config: RecallConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        scale = fine_height(config)
        self.margin = (int(DEPTH * scale), int(STAGE * scale))  # rows, columns
        renderers = [_place_renderer(config, painting) for painting in range(config.paintings)]
        self.vignette = self._put(renderers[0].vignette[..., 0], torch.float32)
        self._paint_places(renderers)
        actors = [
            actor_of(config, Look(name, "red", "red"), action, facing)
            for name in NAMES
            for action in range(len(ACTION_NAMES))
            for facing in range(len(FACINGS))
        ]
        rows, columns = (n + 2 * edge for n, edge in zip(self.vignette.shape, self.margin, strict=True))
        nobody = self._put(_NOBODY)
        self.clips = nobody.expand(len(actors), config.frames, -1, rows, columns).contiguous()
        for number, actor in enumerate(actors):  # threads would be slower, since painting is mostly Python
            window, clip = _paint_clip(renderers[0], actor, self.margin)
            self.clips[number, :, :, *window] = self._put(clip)
        lights = np.stack([rgb(place.light)[:3] for place in PLACES.values()])
        colours = np.stack([colour[:3] for colour in COLOURS.values()])
        self.lit = self._put(lights[:, None] * colours, torch.float32)  # [places, colours, 3]
        self.trim = self._put(lights * CREAM[:3], torch.float32)
        self.shadow = self._put(np.stack([shadow_colour(place)[:3] for place in PLACES.values()]), torch.float32)

    def _paint_places(self, renderers: list[Renderer]) -> None:
        places = [_paint_place(self.config, renderer, place) for place in PLACE_NAMES for renderer in renderers]
        under, over = (self._put(np.stack(layers), torch.float32) for layers in zip(*places, strict=True))
        self.under, self.over = under[:, None].half(), self._before(over)

    def _before(self, over: Tensor) -> Tensor:
        """Returns RGBA [..., 4, H, W] before a character as fp16 premultiplied colour and clear, darkened."""
        colour, alpha = over.split((3, 1), dim=-3)
        return (torch.cat([colour, 1 - alpha], dim=-3) * self.vignette).half()

    def _put(self, values: np.ndarray, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, dtype)

    @torch.no_grad()
    def compose(self, scenes: RecallScenes) -> Composed:
        """Returns all shots of the scenes, in order: N = B x S."""
        place = scenes.place.ravel()
        painted = place * self.config.paintings + scenes.painting.repeat(scenes.place.shape[1])
        painted = painted * self.views + scenes.camera.ravel() % self.views
        clip = clip_number(scenes.of_shots(scenes.name), scenes.action, scenes.facing).ravel()
        colours = [scenes.of_shots(scenes.fur).ravel(), scenes.of_shots(scenes.outfit).ravel()]
        numbers = np.stack([place, painted, *colours, scenes.camera.ravel()])
        where = np.stack([clip, scenes.row.ravel(), scenes.column.ravel()])
        some = zip(
            move(torch.from_numpy(numbers), self.device).split(self.at_once, dim=1),
            torch.from_numpy(where).split(self.at_once, dim=1),
            strict=True,
        )
        composed = [self._compose(*shots) for shots in some]
        return Composed(torch.cat([one.frames for one in composed]), torch.cat([one.cover for one in composed]))

    def _compose(self, numbers: Tensor, where: Tensor) -> Composed:
        """Returns the shots that these numbers describe. numbers: place, painted view of it, fur, outfit and camera of
        each shot, [5, N]. where: clip, row and column of its character, [3, N], on the CPU."""
        keep, shade, shown = self._characters(numbers, where).float().split((1, 1, 3), dim=2)
        frames = torch.addcmul(shown, keep, self.under[numbers[1]])
        over, clear = self.over[numbers[1]].split((3, 1), dim=2)
        frames = torch.addcmul(over, frames, clear)
        pixels = F.avg_pool2d(frames.flatten(0, 1), 2).mul_(255).add_(0.5).clamp_(0, 255).floor_() / 127.5 - 1
        cover = 1 - F.avg_pool2d((keep + shade).flatten(0, 1), 2)
        return Composed(
            pixels.unflatten(0, frames.shape[:2]).transpose(1, 2), cover.squeeze(1).unflatten(0, frames.shape[:2])
        )

    def _characters(self, numbers: Tensor, where: Tensor) -> Tensor:
        """Returns keep, shade and the colours of the characters and their shadows: [N, F, 5, H, W]."""
        return self._coloured(torch.stack([self._placed(*one) for one in where.T.tolist()]), numbers)

    def _coloured(self, clips: Tensor, numbers: Tensor) -> Tensor:
        """Colours clips [N, F, 8, H, W]: `dtype` [N, F, 5, H, W] of keep, shade and colours."""
        place, _, fur, outfit, _ = numbers.unbind()
        mix = torch.eye(5, 8, device=self.device).repeat(len(place), 1, 1)
        mix[:, 2:, 1] = self.shadow[place]
        mix[:, 2:, 5:] = torch.stack([self.lit[place, fur], self.lit[place, outfit], self.trim[place]], dim=2)
        return (mix[:, None].to(self.dtype) @ clips.to(self.dtype).flatten(3)).unflatten(3, clips.shape[3:])

    def _placed(self, clip: int, row: int, column: int) -> Tensor:
        """Returns a clip [F, 8, H, W] with its character moved by whole fine pixels."""
        (rows, columns), (height, width) = self.margin, self.vignette.shape
        top, left = rows - row, columns - column
        return self.clips[clip, ..., top : top + height, left : left + width]


def _place_renderer(config: RecallConfig, painting: int) -> Renderer:
    """Returns all places in one of their paintings."""
    shots = tuple(stock_shot(config, place, None) for place in PLACE_NAMES)
    seed = (config.seed, painting)
    return Renderer(Scene((), shots, "", (), False, seed, seed), (config.size[0], config.size[1]), config.fps)


def _paint_place(config: RecallConfig, renderer: Renderer, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns what is behind a character [3, H, W], and before it in each frame [F, 4, H, W], premultiplied."""
    under, ground, front = (renderer.warp(layer, View()) for layer in renderer.layers[place])
    lay_over(under, ground)
    over = []
    for frame in range(config.frames):
        canvas = Canvas(np.zeros_like(under), renderer.world(View()))
        renderer.draw_drift(canvas, PLACES[place].drift, (frame + 0.5) / config.fps)
        lay_over(canvas.pixels, front)
        over.append(canvas.pixels.transpose(2, 0, 1))
    return under[..., :3].transpose(2, 0, 1), np.stack(over)


def _paint_clip(renderer: Renderer, actor: Actor, margin: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """Returns the rows and columns that hold a character and its shadow, and the masks of its clip there, fp16 [F, 8,
    h, w], each frame averaged over the shutter as the renderer does it."""
    shot = Shot(**{**vars(renderer.scene.shots[0]), "actors": (actor,)})
    half = SHUTTER / 2 / renderer.fps
    frames = []
    for frame in range(shot.frames):
        time = (frame + 0.5) / renderer.fps
        count = renderer.count_samples(shot, time - half, time + half)
        moments = [time + half * ((2 * sample + 1) / count - 1) for sample in range(count)]
        frames.append([_masks(renderer, shot, moment, margin) for moment in moments])
    windows = np.array([window for drawn in frames for window, _ in drawn])
    (top, left), (bottom, right) = windows[:, 0].min(0), windows[:, 1].max(0)
    clip = np.empty((shot.frames, 8, bottom - top, right - left), np.float16)
    masks = np.empty(clip.shape[1:], np.float32)
    for frame, drawn in enumerate(frames):
        masks[:] = _NOBODY
        for ((y0, x0), (y1, x1)), layers in drawn:
            masks[:, y0 - top : y1 - top, x0 - left : x1 - left] += (layers - _NOBODY) / len(drawn)
        clip[frame] = masks
    return (slice(top, bottom), slice(left, right)), clip


def _masks(renderer: Renderer, shot: Shot, time: float, margin: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the window that holds the character and its shadow at one moment, its first row and column and those
    after its last, and the masks there [8, h, w]."""
    actor = shot.actors[0]
    pose, size = pose_at(actor, shot.timing, time), SIZES[actor.look.size]
    world = renderer.world(View()) + np.array([[0, 0, margin[1]], [0, 0, margin[0]]])
    corners = [(pose.x - 0.65 * size, pose.y - pose.lift - 1.25 * size), (pose.x + 0.65 * size, pose.y + 0.25 * size)]
    shape = (renderer.width + 2 * margin[1], renderer.height + 2 * margin[0])
    window = (np.array(corners) * np.diag(world[:, :2]) + world[:, 2]).clip(0, shape).astype(int)[:, ::-1]
    (y0, x0), (y1, x1) = window
    world = world - np.array([[0, 0, x0], [0, 0, y0]])
    shadow = np.zeros((4, y1 - y0, x1 - x0), np.float32)
    drawn = np.zeros((2, *shadow.shape), np.float32)  # one drawing in black, one in colours
    draw_shadow(Canvas(shadow.transpose(1, 2, 0), world), pose, size, _BLACK)
    draw_in_colours(Canvas(drawn.transpose(2, 3, 0, 1), world), actor.look, pose, _RED, _GREEN, _BLUE)
    shade, own, alpha = shadow[3:], drawn[0, :3], drawn[0, 3:]
    masks = (drawn[1, :3] - own) / np.array([1, 1, CREAM[2]], np.float32)[:, None, None]
    return window, np.concatenate([(1 - shade) * (1 - alpha), shade * (1 - alpha), own, masks])
