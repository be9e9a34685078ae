"""This module tells what the ways of sampling set, the options of configs/sampler."""

from typing import Any

import yaml

from configs.command import CONFIGS
from moc.diffusion import SamplingConfig


def lag_of(way: str) -> float:
    """Returns the lag that `sampler=WAY` sets (configs/sampler/WAY.yaml)."""
    changed: dict[str, Any] = yaml.safe_load((CONFIGS / "sampler" / f"{way}.yaml").read_text())
    return changed.get("lag", SamplingConfig.lag)
