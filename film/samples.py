"""This module samples a held-out scene while a model trains, always from the same noise, so that the pictures
compare."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.loading.dataset import DataConfig, ShotDataset
from data.loading.order import Draw
from film.shooting import pictures
from film.storyboard import Panel, draw_routing_map, draw_storyboard, pick_frames
from moc.batch import Sample
from moc.config import MoCConfig
from moc.diffusion import Flow, Progress, SamplingConfig, Story, sample_shots
from moc.statistics import RoutingMap
from moc.training import Parallel
from moc.training.trainer import DrawSamples
from models import load_codec

# Keys and values are not kept: a model that is spread over processes computes whole streams.
SAMPLING = SamplingConfig(steps=20, guidance_scale=3.0, lag=0.3, cache=False)

logger = logging.getLogger(__name__)


class _RunEnds(Exception):
    """This error stops a sample, because the run was told to end."""


def scene_drawer(dataset: Any, data: DataConfig, flow: Flow, run_folder: Path, parallel: Parallel) -> DrawSamples:
    """Returns what draws a model's sample at a step, as storyboard and routing map in `samples/` of the run's folder;
    every process takes part. A picture that fails costs no more than itself: a warning.

    dataset: prepared data. The scene is the first one held out, or of all where none is.
    """
    (scene, null), folder = _scene(dataset, data.validation), run_folder / "samples"
    codec, fps = load_codec(dataset.encoders_folder), dataset.frame_rates[0] if dataset.frame_rates else 24.0

    def draw(model: Any, moc: MoCConfig, step: int, is_over: Callable[[], bool]) -> None:
        text, negative = ([parallel.put(x.float()) for x in sample.text] for sample in (scene, null))
        shapes: list[Any] = [tuple(latent.shape) for latent in scene.latents]
        story = Story(shapes, text, negative, cuts=scene.cuts)
        routing, panels = RoutingMap(len(story.shapes)), []
        decode = codec.to(parallel.device).shot_decoder()

        def on_step(_: Progress) -> None:
            if is_over():
                raise _RunEnds

        try:
            shots = sample_shots(model, model.stream, moc, flow, story, SAMPLING, on_step, routing)
            for index, latent in shots:
                frames = np.concatenate([pictures(piece, f"shot {index + 1}") for piece in decode(latent)])
                beginning = "cut" if not scene.cuts or scene.cuts[index] else "goes on"
                panels.append(Panel(index + 1, "", len(frames) / fps, beginning, frames[pick_frames(len(frames))]))
        except _RunEnds:
            return
        except FloatingPointError as error:
            if parallel.is_main:
                logger.warning("no sample is drawn at step %d: %s", step, error)
            return
        finally:
            codec.to("cpu")
        if parallel.is_main:
            try:
                draw_storyboard(folder / f"step_{step:07d}.png", f"{scene.id}, step {step}", panels)
                draw_routing_map(folder / f"step_{step:07d}_routing.png", routing.shares())
            except Exception as error:
                logger.warning("no sample is drawn at step %d (%s: %s)", step, type(error).__name__, error)

    return draw


def _scene(dataset: ShotDataset, validation: int) -> tuple[Sample, Sample]:
    """Returns a scene with its captions, and without."""
    item = dataset.split(validation).held_out[0] if validation else 0
    dropped = (True,) * len(dataset[item].latents)
    null = Draw(0, item, drop_global_caption=True, drop_shot_captions=dropped)
    return dataset[item], dataset.sample(null)
