"""This module opens what a run trains on, prepared scenes or a world of recall scenes with the encoders it names; and
the world that a checkpoint is tested on."""

import subprocess
import sys
from collections.abc import Sequence
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf

from configs.command import parse
from configs.schema import TrainConfig
from data.loading.dataset import ShotDataset, open_dataset
from data.loading.endless import RecallWorld
from data.storyworld import vocabulary
from data.storyworld.recall_scenes import RecallConfig
from moc.checkout import ROOT
from moc.errors import UserError
from moc.training import Parallel
from models import Contents, Encoders, build_encoders, load_codec, load_encoders

Data = ShotDataset | RecallWorld


def open_data(config: TrainConfig, parallel: Parallel) -> Data:
    """Returns what a run trains on: prepared scenes, or a world on the process's device where `config.data.recall` asks
    for it. What one process cannot open, all of them refuse."""
    with parallel.together():
        if config.data.recall:
            return recall_world(config, parallel.device)
        return open_dataset(config.data, load_codec)


def recall_world(config: TrainConfig, device: torch.device) -> RecallWorld:
    """Returns the world of `config.data.recall` on a device. Raises UserError where the config has none."""
    if config.data.recall is None:
        raise UserError("data.recall is not set; take experiment=recall")
    return _world(config.data.recall, build_encoders(config.encoders, vocabulary()), device)


def world_of_experiment(settings: Sequence[str], device: torch.device) -> RecallWorld:
    """Returns the world of experiment=recall on a device, with some settings of train.py changed."""
    words = ["train.py", "experiment=recall", *settings, "--cfg", "job"]
    shown = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return recall_world(parse(cast(DictConfig, OmegaConf.create(shown.stdout)), TrainConfig), device)


def world_of(checkpoint: Contents, recall: RecallConfig, device: torch.device) -> RecallWorld:
    """Returns a world on a device, with a checkpoint's own encoders."""
    return _world(recall, load_encoders(checkpoint), device)


def _world(recall: RecallConfig, encoders: Encoders, device: torch.device) -> RecallWorld:
    codec, text = encoders.codec.to(device), encoders.text.to(device)
    return RecallWorld(recall, codec, text, encoders.save, device)
