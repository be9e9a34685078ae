"""This module composes shots of storyworld's things as a moving camera sees them.

A camera moves in few ways, so that what each of its frames sees of a place is painted beforehand, and where it looks is
known: a grid of a clip's pixels, to be sampled between as the CPU renderer does it. The camera stands still within an
open shutter, which in the renderer it does not: shots of a static camera are the same within rounding (but for what
drifts across the frame's edge), others nearly.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.storyworld.canvas import Canvas
from data.storyworld.motion import View
from data.storyworld.places import PLACES, Layer
from data.storyworld.recall_scenes import PLACE_NAMES, RecallConfig, stock_shot
from data.storyworld.render import Renderer
from data.storyworld.scenes import PAN, view_at
from data.storyworld.stock import Stock
from moc.move import move

PIXELS_AT_ONCE = 1 << 25  # fine pixels that are drawn together; each takes some 100 bytes


def build_stock(config: RecallConfig, device: torch.device | str = "cpu") -> Stock:
    """Returns the painted things of a world: as its moving cameras see them, or as a camera that stands still does."""
    return (FilmedStock if config.camera_moves else Stock)(config, device)


class FilmedStock(Stock):
    """This stock is that of a world whose cameras move: what each camera sees of a place is painted beforehand.

    seen: fp32 [cameras, F, H, W, 2], where in a clip the pixels lie, as `grid_sample` takes them.
    """

    def _paint_places(self, renderers: list[Renderer]) -> None:
        config, renderer = self.config, renderers[0]
        self.views = len(config.cameras)
        self.at_once = max(1, PIXELS_AT_ONCE // (config.frames * renderer.height * renderer.width))
        margin = math.ceil(PAN * renderer.height) + 1
        air = _layer(renderer, (renderer.height, renderer.width + 2 * margin), margin)
        layers = [*renderer.layers[PLACE_NAMES[0]], air]
        views = [self._views(renderer, layer) for layer in layers]
        seen = [self._seen(r, place, margin, views) for place in PLACE_NAMES for r in renderers]
        self.under, self.over = (torch.cat(of_all) for of_all in zip(*seen, strict=True))
        self.clip_size = renderer.height + 2 * self.margin[0], renderer.width + 2 * self.margin[1]
        self.seen = self._views(renderer, _layer(renderer, self.clip_size, self.margin[1]))
        self.seen += self._shift(torch.tensor([[self.margin[0]], [0]]))

    def _seen(self, renderer: Renderer, place: str, margin: int, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns what each camera sees of a painted place, behind a character and before it; see `Stock`."""
        painted = [layer.pixels.transpose(2, 0, 1)[None] for layer in renderer.layers[place]]
        painted.append(_paint_air(self.config, renderer, place, margin))
        far, ground, front, air = (
            _sampled(self._put(layer, torch.float32).expand(len(view), self.config.frames, *layer.shape[1:]), view)
            for layer, view in zip(painted, views, strict=True)
        )
        return _laid_over(far[:, :, :3], ground).half(), self._before(_laid_over(air, front))

    def _views(self, renderer: Renderer, layer: Layer) -> Tensor:
        """Returns where the pixels of each frame of each camera lie in a layer."""
        config, (height, width) = self.config, layer.pixels.shape[:2]
        shots = [stock_shot(config, PLACE_NAMES[0], None, camera=camera) for camera in config.cameras]
        times = [(frame + 0.5) / config.fps for frame in range(config.frames)]
        sampled = np.array([renderer.sampling(layer, view_at(shot, time)) for shot in shots for time in times])
        step, left, top = sampled.T[..., None]
        x = self._put((2 * (left + step * np.arange(renderer.width)) + 1) / width - 1, torch.float32)
        y = self._put((2 * (top + step * np.arange(renderer.height)) + 1) / height - 1, torch.float32)
        grids = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), dim=-1)
        return grids.unflatten(0, (len(shots), -1))

    def _shift(self, pixels: Tensor) -> Tensor:
        """Returns what moves a view of clips by whole rows and columns, [2, N]: [N, 1, 1, 1, 2]."""
        across = pixels.flip(0) * 2 / torch.tensor(self.clip_size[::-1])[:, None]
        return move(across.T.float().contiguous(), self.device)[:, None, None, None]

    def _characters(self, numbers: Tensor, where: Tensor) -> Tensor:
        clips = self._coloured(self.clips[move(where[0].contiguous(), self.device)], numbers)
        return _sampled(clips.float(), self.seen[numbers[4]] - self._shift(where[1:]))


def _sampled(layer: Tensor, view: Tensor) -> Tensor:
    """Returns a layer fp32 [N, F, C, h, w] seen as [N, F, H, W, 2] says: [N, F, C, H, W]."""
    seen = F.grid_sample(layer.flatten(0, 1), view.flatten(0, 1), padding_mode="border", align_corners=False)
    return seen.unflatten(0, view.shape[:2])


def _laid_over(below: Tensor, layer: Tensor) -> Tensor:
    """Lays premultiplied RGBA [..., 4, H, W] over RGB or premultiplied RGBA."""
    return below * (1 - layer[..., 3:, :, :]) + layer[..., : below.shape[-3], :, :]


def _paint_air(config: RecallConfig, renderer: Renderer, place: str, margin: int) -> np.ndarray:
    """Returns what drifts in a place, in each frame, with a margin for pans: [F, 4, H, w]."""
    frames = []
    for frame in range(config.frames):
        planes = np.zeros((4, renderer.height, renderer.width + 2 * margin), np.float32)
        canvas = Canvas(planes.transpose(1, 2, 0), renderer.world(View()) + np.array([[0, 0, margin], [0, 0, 0]]))
        renderer.draw_drift(canvas, PLACES[place].drift, (frame + 0.5) / config.fps)
        frames.append(planes)
    return np.stack(frames)


def _layer(renderer: Renderer, size: tuple[int, ...], margin: int) -> Layer:
    """Returns the stage at fine pixels, with a margin to the left and the right."""
    left = -renderer.aspect / 2 - margin / renderer.height
    return Layer(np.zeros(size, np.float32), renderer.height, left, 1.0)
