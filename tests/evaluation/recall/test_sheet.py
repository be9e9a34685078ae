"""The sheet of last shots: whose pictures stand where, and which shot is framed."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.loading.endless import RecallWorld
from data.storyworld import vocabulary
from data.storyworld.recall_scenes import HELD_OUT, RecallConfig, draw_scenes
from evaluation.recall.bench import LastShots
from evaluation.recall.sheet import GAP, LARGE, LINE, ORANGE, SMALL, DrawRecallConfig, draw, picture, write_sheet
from moc import MoCConfig
from moc.diffusion import Flow
from moc.errors import UserError
from moc.training import Parallel, ParallelConfig
from models import EncodersConfig, ModelConfig, build_encoders, build_model, load_model
from models.encoders.pair import Encoders

WORLD = RecallConfig(size=[32, 48], frames=1, shots=3, paintings=1, characters=3)


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


def saved(folder: Path, seed: int, config: MoCConfig, encoders: Encoders) -> str:
    torch.manual_seed(seed)
    sizes = encoders.codec.latent_channels, encoders.text.text_dim
    model = build_model(ModelConfig(num_layers=2, dim=32, num_heads=2, ffn_dim=32), *sizes)
    for weight in model.parameters():  # a new model's last layer is zero
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    config.save(folder)
    encoders.save(folder / "encoders")
    return str(folder)


def test_a_column_is_of_its_own_model_and_the_last_one_of_the_last_model_without_routes(tmp_path, monkeypatch):
    """Folders of one name are told apart by their paths."""
    encoders = build_encoders(EncodersConfig(), vocabulary())
    world = RecallWorld(WORLD, encoders.codec, encoders.text, encoders.save)
    dense, routed = MoCConfig(dense=True), MoCConfig(top_k=1, chunk_tokens=6)
    models = [
        saved(tmp_path / "one" / "ema", 0, dense, encoders),
        saved(tmp_path / "other" / "ema", 1, dense, encoders),
        saved(tmp_path / "routed", 2, routed, encoders),
    ]
    drawn = {}
    monkeypatch.setattr(
        "evaluation.recall.sheet.draw",
        lambda scenes, history, columns: drawn.update(columns) or draw(scenes, history, columns),
    )
    output = tmp_path / "sheet.jpg"
    write_sheet(DrawRecallConfig(models, str(output), scenes=2, steps=2, device="cpu"), lambda device: world)
    assert Image.open(output).size == draw_size(len(drawn), scenes=2)
    sampler = LastShots(world, Parallel(ParallelConfig("cpu")), steps=2)
    encoded = world.encode(draw_scenes(WORLD, [HELD_OUT, HELD_OUT + 1]))
    expected = {"the truth": encoded.latents[:, -1]} | {
        name: sampler.sample(load_model(path).eval(), config, Flow(), encoded, [0, 1])
        for name, path, config in (
            (models[0], models[0], dense),
            (models[1], models[1], dense),
            ("routed", models[2], routed),
            ("no routes", models[2], replace(routed, top_k=0, drop_in_rate=0.0)),
        )
    }
    assert list(drawn) == list(expected)
    for name, pictures in drawn.items():
        for found, latent in zip(pictures, expected[name], strict=True):
            assert np.array_equal(found, picture(encoders.codec, latent))
    assert len({pictures[0].tobytes() for pictures in drawn.values()}) == 5


def draw_size(columns: int, scenes: int) -> tuple[int, int]:
    left = (WORLD.shots - 1) * (SMALL[0] + GAP) + GAP
    return left + columns * (LARGE[0] + GAP), LINE + scenes * (LARGE[1] + GAP)


def test_models_are_asked_for():
    with pytest.raises(UserError, match="models"):
        DrawRecallConfig(models=[])
