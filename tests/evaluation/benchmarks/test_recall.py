"""These tests are about the record of the recall rows: rows replace their like, and tables compare rows scene by
scene."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from evaluation.benchmarks import recall
from evaluation.benchmarks.measurements import put_row
from evaluation.benchmarks.recall import KEY, ROWS, RecallRowsConfig, Turns, arguments
from evaluation.benchmarks.recall_plots import remembering
from evaluation.benchmarks.recall_report import tables, write_report
from evaluation.benchmarks.recall_rows import TITLES, attention_flops, by_seeds, loss_to_dense, rival
from evaluation.benchmarks.stories import WAYS
from moc.checkout import ROOT
from moc.errors import UserError
from moc.training import read_metrics
from tests import pipeline

SMALL = [
    "data.recall.size=[32,48]", "data.recall.frames=1", "data.recall.shots=3", "data.recall.paintings=1",
    "data.batch_tokens=300", "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.ffn_dim=32",
    "trainer.log_every=1",
]  # fmt: skip


def row(name: str, right: list[int], steps: int = 10, start: str = "") -> dict:
    """Returns a tested row whose looks were read so, two for each scene."""
    share = [0.5, 0.4, 0.6, len(right)]
    losses = {"0.8": [0.2, 0.01], "0.95": [0.3, 0.01]}
    found = {
        "readings": len(right), "recall": float(np.mean(right)), "interval": [0.4, 0.6], "sparsity": 0.8, "copied": 0.1,
        "by_attribute": {"fur": 0.5, "outfit": 0.5}, "by_distance": {"1": share, "2": share}, "loss": losses,
        "region_loss": losses, "right": np.packbits(right).tobytes().hex(),
    }  # fmt: skip
    mass = {name: [[0.5, 0.25]] for name in ("elsewhere", "kept", "best")}
    return {
        "row": name, "seed": 0, "start": start, "steps": steps, "steps_done": steps, "scenes_seen": 20,
        "train_minutes": 1.0, "reader": {"fur": 0.99, "outfit": 1.0}, "all": found,
        "look_alikes": copy.deepcopy(found), "mass": mass, "mass_routes": "5 chunks of 6 tokens",
        "moc": {"dense": name == "dense", "chunk_tokens": 6},
        "command": "python train.py", "machine": {"device": "a GPU", "torch": "2", "date": "today", "commit": "c"},
    }  # fmt: skip


def test_every_row_has_a_title_and_settings():
    assert ROWS.keys() == TITLES.keys()
    shared = arguments("dense", RecallRowsConfig(steps=100, settings=["optim.lr=0.1"]))
    assert shared == ["experiment=recall", "optim.lr=0.1", "trainer.num_steps=100", "seed=0", "moc=dense"]
    (stages,) = ROWS["moc_progressive"](100)
    assert stages.startswith("schedule=[{step: 0, chunk_tokens: 48, top_k: 7}, {step: 20,")
    for wrong, said in (({"rows": ["lame"]}, "lame"), ({"shots": [16, 1]}, "shots"), ({"at_once": 0}, "at_once")):
        with pytest.raises(UserError, match=said):
            RecallRowsConfig(**wrong)


def test_a_row_takes_the_place_of_its_like_and_of_no_other(tmp_path):
    output = tmp_path / "recall.json"
    for given in (row("dense", [1, 1]), row("moc", [1, 0]), row("dense", [1, 0]), row("dense", [1, 1], steps=20)):
        write_report(put_row(output, given, KEY), output)
    rows = json.loads(output.read_text())["rows"]
    found = [(r["row"], r["steps"], r["all"]["recall"]) for r in rows]
    assert found == [("moc", 10, 0.5), ("dense", 10, 0.5), ("dense", 20, 1.0)]
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "MoC, seed 0, 10 steps" in output.with_suffix(".md").read_text()


def test_a_row_that_waits_begins_only_if_as_much_time_is_left_as_the_longest_took(tmp_path, monkeypatch):
    took, given = iter([3.0, 1.0]), []
    monkeypatch.setattr(recall, "train_for", lambda minutes, words, log: given.append(minutes) or next(took))
    now = 0.0
    monkeypatch.setattr(recall.time, "monotonic", lambda: now)
    turns = Turns(RecallRowsConfig(minutes=8), tmp_path)
    assert turns.train("dense") == 3.0
    now = 60 * 4.0
    assert turns.train("moc") == 1.0
    now = 60 * 5.5
    assert turns.train("own_shot") is None
    assert given == [8.0, 4.0]


def test_rows_are_compared_with_dense_over_the_same_scenes():
    dense = row("dense", [1, 1, 1, 0, 1, 1, 0, 0, 1, 1])
    text = tables([dense, row("moc", [1, 1, 1, 0, 0, 1, 0, 1, 1, 1])])
    # The rows differ by 0, 0, -1/2, 1/2 and 0 in the five scenes.
    assert "+0.000 ± 0.439" in text
    assert tables([row("moc", [1, 0])]).count("±") == 4  # the losses alone have intervals
    # A dense row that began elsewhere is no rival.
    assert tables([row("dense", [1, 1]), row("moc", [1, 0], start="dense")]).count("±") == 8


def test_the_rival_took_as_many_steps_or_the_most_and_losses_are_compared_block_by_block():
    rows = [row("dense", [1, 1], steps) for steps in (10, 20, 15)] + [row("moc", [1, 1], steps) for steps in (10, 12)]
    assert [rival(of, rows)["steps"] for of in rows[3:]] == [10, 20]
    assert rival(rows[1], rows[1:]) is None
    assert loss_to_dense(rows[3], rows, "loss", "0.8") == (0, pytest.approx(math.nan, nan_ok=True))
    for of, blocks in ((rows[0], [0.2] * 5), (rows[3], [0.21, 0.23, 0.22, 0.21, 0.23])):
        of["all"] |= {"loss": {"0.8": [sum(blocks) / 5, 0]}, "loss_of_blocks": {"0.8": blocks}}
    excess, half = loss_to_dense(rows[3], rows, "loss", "0.8")
    assert (excess, half) == (pytest.approx(0.1), pytest.approx(2.776 * 0.01 / math.sqrt(5) / 0.2, rel=1e-3))


def test_rows_of_other_learning_rates_are_not_taken_together():
    rows = [row("moc", [1, 1]) | {"seed": seed} for seed in range(3)]
    rows[2]["command"] += " optim.lr=1e-3"
    assert [[of["seed"] for of in members] for members in by_seeds(rows)] == [[0, 1], [2]]
    assert "| MoC | 10 | 1e-3 | 2 |" in tables(rows)


def test_the_mass_of_rows_says_of_which_routes_it_is():
    other = row("dense", [1, 0]) | {"mass_routes": "1 chunk of 24 tokens"}
    text = tables([other, row("moc", [1, 0])])
    assert "| 0.50 0.25 | 1 chunk of 24 tokens | 0.50 0.25 |" in text
    assert "| 0.50 0.25 | 5 chunks of 6 tokens | 0.50 0.25 |" in text


def test_flops_of_attention_are_those_of_the_pairs_and_of_routing():
    dense, sparse = attention_flops(row("dense", [1])), attention_flops(row("moc", [1]))
    tokens, width, layers = 35 + 8 * (15 + 48), 192, 6
    assert dense == 4 * tokens**2 * width * layers
    assert sparse < 0.5 * dense


def test_rows_that_began_alike_and_a_course_have_plots(tmp_path):
    rows = {name: row(name, [1, 0]) for name in list(ROWS)[:6]}
    course = [{"step": step, "precision": [[0.1, 0.5]], "mass": rows["moc"]["mass"]} for step in (1, 2)]
    rows["moc"]["course"] = course
    write_report([rows["dense"], rows["moc"]], tmp_path / "few.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["few.md", "few.png", "few_routing.png"]
    write_report(list(rows.values()), tmp_path / "rows.json")
    assert (tmp_path / "rows_rows.png").stat().st_size > 1000


def test_a_course_follows_one_head_which_has_the_most_mass_on_other_shots_at_the_end():
    of = row("moc", [1, 0])
    assert remembering(of) == []  # a row that does not tell its routes
    early = {"step": 1, "precision": [[0.3, 0.1]], "mass": {"elsewhere": [[0.7, 0.2]], "kept": [[0.6, 0.4]]}}
    late = {"step": 2, "precision": [[0.2, 0.8]], "mass": {"elsewhere": [[0.1, 0.9]], "kept": [[0.5, 0.95]]}}
    of |= {"course": [early, late], "mass": late["mass"]}
    assert remembering(of) == [(1, 0.1, 0.2, 0.4), (2, 0.8, 0.9, 0.95)]


def test_a_row_of_which_only_what_was_printed_is_left_has_its_place():
    printed = row("own_shot", [1, 0])
    for name in ("by_attribute", "by_distance", "right", "copied"):
        del printed["all"][name]
    del printed["mass"]
    text = tables([row("dense", [1, 0]), printed])
    assert "| own shot only, seed 0, 10 steps |  | 0.500 (0.400 to 0.600) |  |  | 80.0% |  |  |  | 0.2000" in text


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "moc")) for name in ROWS])
def test_every_row_takes_steps(name, tmp_path):
    words = [*arguments(name, RecallRowsConfig(steps=5)), *SMALL]
    words += ["parallel.device=cpu", f"output={tmp_path}", "name=row"]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, capture_output=True)
    losses = [row["loss"] for row in read_metrics(tmp_path / "row") if "loss" in row]
    assert len(losses) == 5  # the steps at which the schedule's stages begin
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_a_row_is_trained_and_tested_also_over_whole_stories_and_other_numbers_of_shots(tmp_path):
    """Both commands are run: the second takes the run of the first, and its reader."""
    output, folder = tmp_path / "recall.json", tmp_path / "runs"
    shared = (f"folder={folder}", "device=cpu", "batch=2", "sampling_steps=2", f"settings={json.dumps(SMALL)}")
    words = ("rows=[moc]", "steps=2", "scenes=16", "look_alikes=2", "reader_steps=2", "shots=[4,6]", f"output={output}")
    pipeline.command("scripts/benchmark_recall.py", *words, *shared)
    (found,) = json.loads(output.read_text())["rows"]
    assert {shots: of["readings"] for shots, of in found["shots"].items()} == {"4": 4, "6": 4}
    assert found["shots"]["6"]["sparsity"] > found["shots"]["4"]["sparsity"] > found["all"]["sparsity"]
    assert "## With other numbers of shots" in output.with_suffix(".md").read_text()

    output = tmp_path / "stories.json"
    words = (
        f"checkpoints=[{folder / 'moc_seed0_2'}]",
        "ways=[joint,shot_by_shot,recall,mass]",
        "stories=2",
        "scenes=8",
    )
    words += ("shots=[3,5]", "moc.descriptor_subchunks=2", f"output={output}")
    pipeline.command("scripts/benchmark_stories.py", *words, *shared)
    rows = json.loads(output.read_text())["rows"]
    told = [(row["way"], row["shots"]) for row in rows]
    assert told == [(way, shots) for shots in (3, 5) for way in ("joint", "shot_by_shot", "recall", "mass")]
    assert all(row["changed"] == "moc.descriptor_subchunks=2" for row in rows)
    assert all(len(row["difference"]) == 3 for row in rows if row["way"] in WAYS)
    pipeline.command("scripts/benchmark_stories.py", "checkpoints=[]", f"output={output}")
    text = output.with_suffix(".md").read_text()
    assert "| moc_seed0_2 moc.descriptor_subchunks=2 | 5 | shot_by_shot | 2 |" in text
    assert "## The mass of dense attention that routes keep" in text


@pytest.mark.parametrize("words", [("recall", "start=nowhere"), ("stories", "checkpoints=[nowhere]")], ids=str)
def test_a_checkpoint_that_is_not_there_is_told_before_anything_is_made(tmp_path, capsys, words):
    """A reader would learn for minutes first."""
    name, setting = words
    said = pipeline.refusal(capsys, f"scripts/benchmark_{name}.py", setting, f"folder={tmp_path / 'made'}")
    pipeline.assert_one_message(said, "nowhere does not exist")
    assert not list(tmp_path.iterdir())
