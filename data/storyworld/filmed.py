"""Shots composed of storyworld's things through a camera that moves.

A camera moves in few ways, so that where each of its frames looks is known beforehand: for every layer a grid of its
pixels, to be sampled between as the CPU renderer does it. The camera stands still within an open shutter, which in the
renderer it does not: shots of a static camera are the same within rounding (but for what drifts across the frame's
edge), others nearly.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.storyworld.canvas import Canvas
from data.storyworld.motion import View
from data.storyworld.places import PLACES, Layer
from data.storyworld.recall import PLACE_NAMES, RecallConfig, stock_shot
from data.storyworld.render import Renderer
from data.storyworld.stock import Composed, Stock, laid_over
from data.storyworld.story import PAN, view_at
from moc.move import move

PIXELS_AT_ONCE = 1 << 25  # fine pixels of all frames, which take some 200 bytes each


def build_stock(config: RecallConfig, device: torch.device | str) -> Stock:
    """Returns the things of a world, for cameras as it has them."""
    return (FilmedStock if config.camera_moves else Stock)(config, device)


class FilmedStock(Stock):
    """The things of a world whose cameras move.

    far, ground, front: fp16 [places x paintings, 4, h, w]; air: [..., F, 4, H, w], what drifts; premultiplied RGBA.
    views: fp32 [cameras, F, H, W, 2] of far, ground, front, air and clips, as `grid_sample` takes them.
    """

    def _paint_places(self, renderers: list[Renderer]) -> None:
        config, renderer = self.config, renderers[0]
        self.at_once = max(1, PIXELS_AT_ONCE // (config.frames * renderer.height * renderer.width))
        painted = [r.layers[place] for place in PLACE_NAMES for r in renderers]
        self.far, self.ground, self.front = (
            self._put(np.stack([layer.pixels.transpose(2, 0, 1) for layer in of_depth]))
            for of_depth in zip(*painted, strict=True)
        )
        margin = math.ceil(PAN * renderer.height) + 1
        air = [_paint_air(config, r, place, margin) for place in PLACE_NAMES for r in renderers]
        self.air = self._put(np.stack(air))
        clip = (renderer.height + 2 * self.margin[0], renderer.width + 2 * self.margin[1])
        layers = [*painted[0], _layer(renderer, air[0].shape[-2:], margin), _layer(renderer, clip, self.margin[1])]
        self.views = [self._views(renderer, layer) for layer in layers]
        self.views[-1] += self._shift(torch.tensor([[self.margin[0]], [0]]), clip)
        self.clip_size = clip

    def _views(self, renderer: Renderer, layer: Layer) -> Tensor:
        """Returns where the pixels of each frame of each camera lie in a layer."""
        config, (height, width) = self.config, layer.pixels.shape[:2]
        views = []
        for camera in config.cameras:
            shot = stock_shot(config, PLACE_NAMES[0], None, camera=camera)
            for frame in range(config.frames):
                step, left, top = renderer.sampling(layer, view_at(shot, (frame + 0.5) / config.fps))
                x, y = left + step * np.arange(renderer.width), top + step * np.arange(renderer.height)
                views.append(np.stack(np.meshgrid((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), axis=-1))
        return self._put(np.stack(views), torch.float32).unflatten(0, (len(config.cameras), -1))

    def _shift(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns what moves a view by whole rows and columns, [2, N], of a layer of this size: [N, 1, 1, 1, 2]."""
        across = pixels.flip(0) * 2 / torch.tensor(size[::-1])[:, None]
        return move(across.T.float().contiguous(), self.device)[:, None, None, None]

    def _compose(self, numbers: Tensor, where: Tensor) -> Composed:
        painted, camera = numbers[1], numbers[4]
        clip = move(where[0].contiguous(), self.device)
        far, ground, front, air, clips = (views[camera] for views in self.views)
        clips = clips - self._shift(where[1:], self.clip_size)
        under = laid_over(_sampled(self.far[painted, :3], far), _sampled(self.ground[painted], ground))
        actors = _sampled(self.clips[clip].unflatten(1, (self.config.frames, -1)), clips)
        before = [_sampled(self.air[painted], air), _sampled(self.front[painted], front)]
        return self._finished(under, actors, before, numbers)


def _sampled(layer: Tensor, view: Tensor) -> Tensor:
    """Returns a layer [N, C, h, w], or one of each frame [N, F, C, h, w], seen as [N, F, H, W, 2] says: [N, F, C, H,
    W]."""
    if layer.ndim == 5:
        return F.grid_sample(
            layer.flatten(0, 1).float(), view.flatten(0, 1), padding_mode="border", align_corners=False
        ).unflatten(0, view.shape[:2])
    seen = F.grid_sample(layer.float(), view.flatten(1, 2), padding_mode="border", align_corners=False)
    return seen.unflatten(2, view.shape[1:3]).transpose(1, 2)


def _paint_air(config: RecallConfig, renderer: Renderer, place: str, margin: int) -> np.ndarray:
    """Returns what drifts in a place, in each frame, with a margin for pans: [F, 4, H, w]."""
    frames = []
    for frame in range(config.frames):
        pixels = np.zeros((renderer.height, renderer.width + 2 * margin, 4), np.float32)
        canvas = Canvas(pixels, renderer.world(View()) + np.array([[0, 0, margin], [0, 0, 0]]))
        renderer.draw_drift(canvas, PLACES[place].drift, (frame + 0.5) / config.fps)
        frames.append(pixels.transpose(2, 0, 1))
    return np.stack(frames)


def _layer(renderer: Renderer, size: tuple[int, ...], margin: int) -> Layer:
    """Returns the stage at fine pixels, with a margin to the left and the right."""
    left = -renderer.aspect / 2 - margin / renderer.height
    return Layer(np.zeros(size, np.float32), renderer.height, left, 1.0)
