"""Rectified flow over shots: one noise convention for the loss and for sampling."""

from moc.diffusion.flow import Flow, NoiseLevels
from moc.diffusion.samplers import Progress, SamplingConfig, Story, noise_key, plan_steps, sample_shots

__all__ = ["Flow", "NoiseLevels", "Progress", "SamplingConfig", "Story", "noise_key", "plan_steps", "sample_shots"]
