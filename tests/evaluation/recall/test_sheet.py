"""The sheet of last shots: whose pictures stand where, and which shot is framed."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evaluation.recall.sheet import GAP, LARGE, LINE, ORANGE, SMALL, DrawRecallConfig, draw
from moc.errors import UserError


def test_a_row_has_its_history_with_the_shot_that_shows_the_name_framed_and_then_a_column_for_each_model():
    scenes = SimpleNamespace(name=np.zeros((2, 4), int), distance=np.array([2, 1]), shown=np.array([0, 1]))
    history = [[Image.new("RGB", (96, 64), color) for color in ("red", "green")] for _ in range(2)]
    columns = {name: [Image.new("RGB", (96, 64), name)] * 2 for name in ("blue", "yellow")}
    sheet = draw(scenes, history, columns)
    for row, framed in enumerate((0, 1)):
        top = LINE + row * (LARGE[1] + GAP)
        for shot, color in enumerate(((255, 0, 0), (0, 128, 0))):
            x, y = GAP + shot * (SMALL[0] + GAP), top + LINE + GAP
            assert sheet.getpixel((x + SMALL[0] // 2, y + SMALL[1] // 2)) == color
            assert (sheet.getpixel((x + 5, y - 2)) == ORANGE) == (shot == framed)
        left = 2 * (SMALL[0] + GAP) + GAP
        middles = [left + n * (LARGE[0] + GAP) + LARGE[0] // 2 for n in range(2)]
        assert [sheet.getpixel((x, top + LARGE[1] // 2)) for x in middles] == [(0, 0, 255), (255, 255, 0)]


def test_models_are_asked_for():
    with pytest.raises(UserError, match="models"):
        DrawRecallConfig(models=[])
