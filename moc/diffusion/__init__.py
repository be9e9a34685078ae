"""This package trains and samples by rectified flow over shots, with one noise convention for both."""

from moc.diffusion.flow import Flow, NoiseLevels
from moc.diffusion.samplers import sample_shots
from moc.diffusion.steps import guidance_scales, num_still_remembered, plan_steps
from moc.diffusion.story import Progress, SamplingConfig, Story, noise_key

__all__ = [
    "Flow",
    "NoiseLevels",
    "Progress",
    "SamplingConfig",
    "Story",
    "guidance_scales",
    "noise_key",
    "num_still_remembered",
    "plan_steps",
    "sample_shots",
]
