"""This module builds the world of recall scenes that a run trains on, with the encoders it names, or a checkpoint is
tested on."""

import subprocess
import sys
from collections.abc import Sequence
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf

from configs.command import parse
from configs.schema import TrainConfig
from data.loading.endless import RecallWorld
from data.storyworld import vocabulary
from data.storyworld.recall_scenes import RecallConfig
from moc.checkout import ROOT
from moc.errors import UserError
from models import Contents, Encoders, build_encoders, load_encoders


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
