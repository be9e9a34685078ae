"""This module leaves out curves and routing maps, but for tests that look at them: to draw them takes longer than the
tiny runs and films that they are of."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from PIL import Image

from film.storyboard import draw_routing_map
from moc.training.curves import draw_curves

# The keys name the functions that draw.
DRAWN = {
    "moc.training.curves.draw_curves": draw_curves,
    "film.presentation.draw_routing_map": draw_routing_map,
    "film.samples.draw_routing_map": draw_routing_map,
}


@contextmanager
def left_out() -> Iterator[None]:
    """A map is one pixel meanwhile, and curves are nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in DRAWN.items():
            patch.setattr(name, _no_curves if function is draw_curves else _pixel)
        yield


@contextmanager
def drawn() -> Iterator[None]:
    """They are drawn meanwhile, though they were left out."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in DRAWN.items():
            patch.setattr(name, function)
        yield


def _no_curves(*_: object) -> None:
    pass


def _pixel(path, *_: object) -> None:
    Image.new("L", (1, 1)).save(path, "PNG")
