"""Mixture of Contexts is sparse attention over the shots of a long video; training and sampling stand around it."""

from moc import reference
from moc.attention import moc_attention, route
from moc.batch import Batch, Sample, StreamSpec, make_batch, make_layout
from moc.config import Descriptor, DropKey, MoCConfig, OwnAnchor, TextAnchor
from moc.execution import Backend, Execution
from moc.layout import ShotLayout
from moc.routes import Routes
from moc.routing import select_shots
from moc.shot import Shot

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Batch",
    "Descriptor",
    "DropKey",
    "Execution",
    "MoCConfig",
    "OwnAnchor",
    "Routes",
    "Sample",
    "Shot",
    "ShotLayout",
    "StreamSpec",
    "TextAnchor",
    "make_batch",
    "make_layout",
    "moc_attention",
    "reference",
    "route",
    "select_shots",
]
