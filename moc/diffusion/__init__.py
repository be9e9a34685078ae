"""Rectified flow over shots: one noise convention for the loss and for sampling."""

from moc.diffusion.flow import Flow, NoiseLevels
from moc.diffusion.samplers import SamplingConfig, Story, sample_shots

__all__ = ["Flow", "NoiseLevels", "SamplingConfig", "Story", "sample_shots"]
