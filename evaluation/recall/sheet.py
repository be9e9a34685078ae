"""This module draws what models make of a shot whose looks an earlier shot showed, beside the truth."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data.loading.endless import EncodedScenes, RecallWorld
from data.storyworld.recall_scenes import HELD_OUT, NAMES, RecallScenes, draw_scenes
from evaluation.recall.bench import LastShots
from film.lettering import draw_text
from moc.errors import UserError, check_least, check_seed
from moc.files import check_writable, write_whole
from moc.training import Parallel, ParallelConfig
from models import Contents, load_codec, load_model
from models.encoders.codec import Codec

SMALL, LARGE, GAP, LINE = (90, 60), (168, 112), 6, 22  # pixels: history, last shots, gaps, lines of text
ORANGE = (230, 85, 13)
NO_ROUTES = {"top_k": 0, "drop_in_rate": 0.0, "dense": False}


@dataclass(frozen=True)
class DrawRecallConfig:
    """These settings say what to draw.

    models: models of experiment=recall, whose encoders are all the same.
    output: the JPEG to write.
    scenes: how many.
    steps: Euler steps of a shot.
    seed: the seed of the noise.
    device: as in `moc.training.ParallelConfig`.
    """

    models: list[str] = field(default_factory=lambda: ["docs/checkpoints/recall_moc"])
    output: str = "outputs/recall_last_shots.jpg"
    scenes: int = 6
    steps: int = 24
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_least(self, "", 1, "scenes", "steps")
        check_seed(self, "")
        if not self.models:
            raise UserError("models is empty; say models=[PATH,...]")


def write_sheet(config: DrawRecallConfig, make_world: Callable[[torch.device], RecallWorld]) -> None:
    """Samples the last shots and writes the sheet: a column of the truth, of each model, and of the last model without
    routes. make_world: returns the world on a device. Raises UserError where the sheet cannot be written or a path
    holds no model."""
    check_writable(Path(config.output))
    parallel = Parallel(ParallelConfig(config.device))
    world = make_world(parallel.device)
    sampler = LastShots(world, parallel, config.steps, config.seed)
    positions = list(range(config.scenes))
    encoded = world.encode(draw_scenes(world.config, [HELD_OUT + position for position in positions]))
    columns = {"the truth": encoded.latents[:, -1]}
    for name, path in zip(_names(config.models), config.models, strict=True):
        columns[name] = _last_shots(path, sampler, encoded, positions)
    columns["no routes"] = _last_shots(config.models[-1], sampler, encoded, positions, NO_ROUTES)
    codec = load_codec(config.models[-1]).to(parallel.device)
    pictures = {name: [picture(codec, latent) for latent in shots] for name, shots in columns.items()}
    history = [[picture(codec, latent) for latent in shots[:-1]] for shots in encoded.latents]
    file = io.BytesIO()
    draw(encoded.scenes, history, pictures).save(file, "JPEG", quality=88)
    write_whole(Path(config.output), file.getvalue())


def _names(paths: Sequence[str]) -> list[str]:
    """Returns what each model's column is called: its folder, or its path where several folders are called so."""
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]


def _last_shots(
    path: str, sampler: LastShots, encoded: EncodedScenes, positions: list[int], changes: dict[str, Any] | None = None
) -> Tensor:
    """Returns the last shots as the model at `path` makes them, fp32 [B, C, T, H, W]. changes: of its attention."""
    contents = Contents(Path(path))
    model = load_model(path).to(sampler.parallel.device).eval()
    return sampler.sample(model, contents.moc.override(changes or {}), contents.own_flow, encoded, positions)


def picture(codec: Codec, latent: Tensor) -> Image.Image:
    """Returns the middle frame of a shot."""
    frames = codec.decode(latent)
    middle = ((frames[:, frames.shape[1] // 2] + 1) * 127.5).round().clamp(0, 255)
    return Image.fromarray(middle.permute(1, 2, 0).cpu().numpy().astype(np.uint8))


def draw(scenes: RecallScenes, history: list[list[Image.Image]], columns: dict[str, list[Image.Image]]) -> Image.Image:
    """Returns the sheet: a row for each scene, its history and then the last shot in each column."""
    left = len(history[0]) * (SMALL[0] + GAP) + GAP
    step = (LARGE[0] + GAP, LARGE[1] + GAP)
    sheet = Image.new("RGB", (left + len(columns) * step[0], LINE + len(history) * step[1]), "white")
    for column, name in enumerate(columns):
        sheet.paste(draw_text(name, (LARGE[0], LINE), size=14, bold=True), (left + column * step[0], 0))
    pen = ImageDraw.Draw(sheet)
    for row, shots in enumerate(history):
        top = LINE + row * step[1]
        named = f"{NAMES[scenes.name[row, 0]]} was shown at a distance of {scenes.distance[row]}:"
        sheet.paste(draw_text(named, (left - GAP, LINE), size=14), (GAP, top))
        for number, shot in enumerate(shots):
            x, y = GAP + number * (SMALL[0] + GAP), top + LINE + GAP
            if number == scenes.shown[row]:
                pen.rectangle((x - 4, y - 4, x + SMALL[0] + 3, y + SMALL[1] + 3), fill=ORANGE)
            sheet.paste(shot.resize(SMALL, Image.Resampling.LANCZOS), (x, y))
        for column, pictures in enumerate(columns.values()):
            sheet.paste(pictures[row].resize(LARGE, Image.Resampling.LANCZOS), (left + column * step[0], top))
    return sheet
