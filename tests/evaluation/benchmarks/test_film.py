"""These tests are about the rows on the film: trained for real on made-up latents of its scenes, tested, recorded;
tables over folds."""

import copy
import json
from itertools import chain

import pytest
import torch

from data.cache.writer import NULL_GLOBAL, NULL_SHOT, CacheWriter, EncodedScene, finish
from data.media.example_shots import block, film_shots, scenes
from evaluation.benchmarks.film import ROWS, FilmRowsConfig, arguments, held_out_blocks
from evaluation.benchmarks.film_report import TITLES, write_report
from moc.errors import UserError
from models import EncodersConfig, build_encoders
from tests import pipeline


def test_every_row_has_a_title_and_its_held_out_blocks():
    assert ROWS.keys() == TITLES.keys()
    blocks = [held_out_blocks(fold) for fold in range(4)]
    assert sorted(chain(*blocks)) == list(range(block(len(film_shots()) - 1) + 1))
    words = arguments("own_shot", 3, FilmRowsConfig("BUNNY", steps=100, settings=["optim.lr=0.1"]))
    assert words[:3] == ["experiment=bunny", "data.path=BUNNY", 'data.held_out=["*b03*","*b07*","*b11*"]']
    assert words[3:6] == ["optim.lr=0.1", "trainer.num_steps=100", "seed=0"]
    for wrong, said in (
        ({"rows": ["lame"]}, "lame"),
        ({"folds": [4]}, "folds"),
        ({"folds": []}, "folds"),
        ({"film": None}, "film is not set"),
    ):
        with pytest.raises(UserError, match=said):
            FilmRowsConfig(**{"film": "BUNNY"} | wrong)


def row(name: str, fold: int, history: list[list[float]], farthest: list[int | None]) -> dict:
    """Returns a tested row, whose shots alone have a loss of 1; history: [targets][draws]."""
    losses = {"alone": [[[1.0]] * len(draws) for draws in history]}
    losses["history"] = [[[x] for x in draws] for draws in history]
    losses["other"] = losses["alone"]
    return {
        "row": name, "fold": fold, "seed": 0, "steps": 10, "steps_done": 10, "train_minutes": 1.5, "sparsity": 0.8,
        "validation": [[0, 1.0], [10, 0.5 + fold]], "sigmas": [0.8], "losses": losses, "command": "python train.py",
        "targets": [{"number": n, "nearest": age, "farthest": age} for n, age in enumerate(farthest)],
        "machine": {"device": "a GPU", "torch": "2", "date": "today", "commit": "c"},
    }  # fmt: skip


def test_folds_are_taken_together_and_shots_told_apart_by_age(tmp_path):
    folds = [
        row("moc", 1, [[0.5, 0.7], [1.0, 1.0]], [1, 20]),
        row("moc", 0, [[0.8, 0.8], [0.9, 0.9], [1.1, 1.1]], [1, 5, None]),
        row("dense", 0, [[1.0, 1.0]], [-1]),
        row("own_shot", 1, [[1.2, 1.0]], [-1]) | {"steps": 20},
        row("dense", 1, [[1.0, 1.0]], [-1]) | {"steps": 20},
    ]
    write_report(copy.deepcopy(folds), tmp_path / "film.json")
    assert (tmp_path / "film.png").stat().st_size > 1000
    text = (tmp_path / "film.md").read_text()
    worth = text.partition("## What the history is worth")[2].partition("## ")[0]
    dense, _, moc, _ = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in worth.splitlines() if "seed 0" in line
    )
    assert moc[0] == "MoC from scratch, seed 0, 10 steps"
    assert moc[1].startswith("+12.0 ± ")
    assert moc[1].endswith("% (5)")
    assert moc[2] == "+0.0 ± 0.0 % (5)"
    assert moc[3] == moc[1]  # the history of another scene is worth nothing
    assert moc[4] == "+30.0 % (2)"  # two are too few for an interval
    assert moc[6] == ""  # no character was last seen two shots ago
    assert moc[8] == moc[9] == "+10.0 % (1)"
    assert moc[10] == "+0.0 % (1)"
    assert moc[12] == "-10.0 % (1)"
    assert dense[10] == "+0.0 % (1)"
    assert "+10.00 %" in text  # own shot only, minus dense on the same shot
    assert "| MoC from scratch, seed 0, 10 steps | 1.0000 | 1.0000 |" in text  # the course of both folds


@pytest.mark.slow
def test_rows_are_trained_tested_and_recorded(tmp_path):
    """The command itself runs on made-up latents of the film's scenes."""
    folder, output = tmp_path / "data", tmp_path / "film.json"
    encoders = build_encoders(EncodersConfig(), ["rabbit"])
    recipe = {"codec": encoders.codec.fingerprint, "text": encoders.text.fingerprint, "sizes": [[32, 48]], "fps": 8}
    writer, made = CacheWriter(folder, recipe), []
    for key in (NULL_GLOBAL, NULL_SHOT):
        writer.add_text(torch.zeros(1, 128), "null", key)
    for scene in scenes("film.mp4", "A film.", [1, 8]):
        latents = [torch.randn(54, 1, 4, 6) for _ in scene.shots]
        text = [[torch.randn(2, 128) for _ in range(1 + len(latents))]]
        made.append(EncodedScene(scene.id, scene.id, "single" if len(latents) == 1 else "multi", latents, text))
        writer.add(made[-1])
    writer.flush()
    encoders.save(folder / "encoders")
    finish(folder, recipe, [scene.key for scene in made])
    settings = ("model.dim=24,model.num_layers=1,model.num_heads=1,model.ffn_dim=24,data.validation=2,"
                "data.batch_tokens=2000,moc.chunk_tokens=6")  # fmt: skip
    words = (f"film={folder}", f"output={output}", f"folder={tmp_path / 'runs'}", "rows=[moc,own_shot]", "folds=[2]",
             "steps=2", "draws=2", f"settings={json.dumps(settings.split(chr(44)))}", "device=cpu")  # fmt: skip
    pipeline.command("scripts/benchmark_film.py", *words)
    rows = json.loads(output.read_text())["rows"]
    assert sorted(row["row"] for row in rows) == ["moc", "own_shot"]
    for found in rows:
        assert found["steps_done"] == 2
        assert len(found["targets"]) == len(found["losses"]["history"]) == 30
        assert torch.tensor(found["losses"]["other"]).shape == (30, 2, 3)
        assert [step for step, _ in found["validation"]] == [0, 2]
    assert "own shot only, seed 0, 2 steps" in output.with_suffix(".md").read_text()
