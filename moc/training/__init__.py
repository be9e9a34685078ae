"""Training runs on any number of processes: here are trainer, checkpoints, optimizer, averaged weights and metrics."""

from moc.training.checkpoint import find_checkpoint, sound_checkpoint
from moc.training.ema import EMA
from moc.training.metrics import Metrics, TrackerConfig, read_metrics
from moc.training.optim import OptimConfig
from moc.training.parallel import MeshConfig, Parallel, ParallelConfig
from moc.training.peers import dead_processes
from moc.training.trainer import Trainer, TrainerConfig
from moc.training.validation import Validator, rivals

__all__ = [
    "EMA",
    "MeshConfig",
    "Metrics",
    "OptimConfig",
    "Parallel",
    "ParallelConfig",
    "TrackerConfig",
    "Trainer",
    "TrainerConfig",
    "Validator",
    "dead_processes",
    "find_checkpoint",
    "read_metrics",
    "rivals",
    "sound_checkpoint",
]
