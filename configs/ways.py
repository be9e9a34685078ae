"""This module tells how the ways of sampling differ, which are options of configs/sampler."""

import yaml

from configs.command import CONFIGS
from moc.diffusion import SamplingConfig


def lags() -> dict[str, float]:
    """Returns the lag that each option of `sampler` sets, by its name."""
    files = (CONFIGS / "sampler").glob("*.yaml")
    return {file.stem: yaml.safe_load(file.read_text()).get("lag", SamplingConfig.lag) for file in files}
