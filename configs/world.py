"""This module builds the world of recall scenes that a run trains on, with the encoders it names."""

import torch

from configs.schema import TrainConfig
from data.loading.endless import RecallWorld
from data.storyworld import vocabulary
from moc.errors import UserError
from models import build_encoders


def recall_world(config: TrainConfig, device: torch.device) -> RecallWorld:
    """Returns the world of `config.data.recall` on a device. Raises UserError where the config has none."""
    if config.data.recall is None:
        raise UserError("data.recall is not set; take experiment=recall")
    encoders = build_encoders(config.encoders, vocabulary())
    codec, text = encoders.codec.to(device), encoders.text.to(device)
    return RecallWorld(config.data.recall, codec, text, encoders.save, device)
