"""Rectified flow over shots: one noise convention for the loss and for sampling."""

from moc.diffusion.flow import Flow, ShotLosses
from moc.diffusion.samplers import SamplingConfig, Story, sample_shots

__all__ = ["Flow", "SamplingConfig", "ShotLosses", "Story", "sample_shots"]
