"""These tests are about the demo: its stages fit each other, and it ends with the one that failed."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from data.loading.dataset import DataConfig
from data.media.decode import open_video
from data.storyworld import place_of_caption
from evaluation import demo
from evaluation.films.cuts import cut_accuracy
from evaluation.films.judge import Verdict
from film.folder import FilmFolder
from film.script import load_script
from moc.errors import UserError
from models import build_model
from tests.composing import parsed
from tests.pipeline import ROOT, TINY_MODEL, command


def test_the_demo_is_larger_where_there_is_a_gpu(monkeypatch):
    config = parsed("demo", "output=o")
    for gpus, scale in (([], config.small), (["cuda:0"], config.large)):
        monkeypatch.setattr(demo, "visible_gpus", lambda gpus=gpus: gpus)
        assert config.chosen() == scale
        assert parsed("demo", "output=o", "scale=small").chosen() == config.small
    with pytest.raises(UserError, match="scale=huge"):
        parsed("demo", "scale=huge")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("scenes=16", "scenes=16 leaves none to train: 16 are held out to judge it; say 17 or more"),
        ("small.scenes=3", "small.scenes=3 leaves none to train"),
        ("small.size=[64]", r"small.size=\[64\] must be \[height, width\]"),
        ("small.size=[60,96]", "multiples of 16"),
        ("small.experiment=none", "small.experiment=none must be one of"),
        ("small.script=none.yaml", "small.script=none.yaml must be a file"),
        ("small.threads=0", "small.threads=0 must be at least 1"),
        ("small.seconds=[1]", r"small.seconds=\[1\] must be five numbers"),
    ],
)
def test_what_a_stage_would_refuse_minutes_later_is_refused_at_the_start(setting, said):
    with pytest.raises(UserError, match=said):
        parsed("demo", "scale=small", setting)
    assert parsed("demo", "scale=small", "scenes=17").scenes == 17


def test_training_holds_out_what_the_demo_counts_with():
    config = parsed("demo", "scale=small", "small.held_out=5", "scenes=6")
    train = next(stage.arguments for stage in demo.plan(config) if stage.arguments[0] == "train.py")
    assert parsed("train", *train[1:]).data.validation == 5


@pytest.mark.parametrize("scale", [pytest.param("small", marks=pytest.mark.slow), "large"])
def test_the_demo_s_stages_fit_each_other(scale, tmp_path):
    """All but the first run with their own sizes of frames, shots and codec, a tiny model and one step. A film as
    long as the script's comes out, of the size of the world's. The first films by itself what its model was trained
    to film."""
    config = parsed(
        "demo", f"output={tmp_path}", f"scale={scale}", "scenes=2", f"{scale}.held_out=1", "steps=1", "workers=1"
    )
    extra = [
        ["device=cpu", "sampler.steps=1"],
        [],
        ["device=cpu"],
        [*TINY_MODEL, "parallel=cpu", "data.batch_tokens=3000", "data.workers=0"],
        ["device=cpu", "sampler.steps=1"],
    ]
    for stage, arguments in zip(demo.plan(config), extra, strict=True):
        command(stage.arguments[0], *stage.arguments[1:], *arguments)
    script = load_script(ROOT / config.chosen().script)
    film = open_video(tmp_path / "film/video.mp4")
    frames = json.loads((tmp_path / "world/truth.jsonl").read_text().splitlines()[0])["shots"][0]["end"]
    assert script.size == tuple(config.chosen().size) == (film.height, film.width)
    assert film.num_frames == frames * len(script.shots)
    shown = FilmFolder(tmp_path / "friends")
    assert shown.is_finished
    assert shown.read_metadata()["routing"][1][0] == 1  # the map shows a route
    settings = " ".join(config.chosen().world)
    assert all(place_of_caption(shot.prompt) in settings for shot in script.shots)


def test_the_large_demo_s_training_is_of_its_world():
    """A chunk is one latent frame of its films, and a step holds ten scenes at least."""
    config = parsed("demo", "output=o")
    train = parsed("train", "experiment=storyworld_large")
    frame = config.large.size[0] * config.large.size[1] // 16**2
    assert train.moc.chunk_tokens == frame
    assert train.data.batch_tokens >= 10 * 6 * 4 * frame
    assert train.parallel.device == "auto"
    model = build_model(train.model, latent_channels=32, text_dim=128)
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 50e6


def test_the_demo_ends_with_the_stage_that_failed(capfd):
    stages = [demo.Stage("one", 60, ["-c", "print('did one')"]), demo.Stage("two", 60, ["-c", "raise SystemExit(3)"])]
    with pytest.raises(UserError, match=r"failed: python -c 'raise SystemExit\(3\)'$"):  # as a shell takes it
        demo.run([*stages, demo.Stage("three", 60, ["-c", "print('did three')"])], threads=1)
    said = capfd.readouterr().out
    assert "[1/3] one (about 3.0 minutes left)" in said
    assert "did one" in said
    assert "did three" not in said


@pytest.mark.parametrize(
    ("end", "seen", "said"),
    [
        (0.5, "reef", []),
        (1.5, "reef", ["does not beat the best linear predictor"]),
        (0.5, "meadow", ["fewer than three in four shots"]),
        (1.5, "meadow", ["fewer than three in four shots", "does not beat the best linear predictor"]),
    ],
)
def test_the_verdict_is_of_the_places_shown_and_of_the_losses(tmp_path, monkeypatch, capsys, end, seen, said):
    config = parsed("demo", f"output={tmp_path}", "scale=small")
    places = [("reef", "reef"), ("reef", seen), ("reef", seen), ("reef", "reef")]
    verdict = Verdict(places, [5, 10], [5], cut_accuracy([5], [5, 10], 15))
    monkeypatch.setattr(demo, "judge_film", lambda *given: verdict)
    monkeypatch.setattr(demo, "held_out_floors", lambda data, sigmas: (2.0, [1.0 for _ in sigmas]))
    rows = [
        {"step": step, "validation/loss_0.2": loss, "validation/loss_0.8": loss, "validation/loss_0.95": 9.0,
         "routing/sparsity": 0.8, "routing/flops_of_dense": 0.25}
        for step, loss in ((0, 3.0), (7, end))
    ]  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert demo.report(config, DataConfig("prepared"), {"train": 3.0}) == (not said)
    printed = capsys.readouterr().out
    assert "leave out" not in printed
    demo.report(replace(config, steps=7), DataConfig("prepared"), {"train": 3.0})
    assert ("leave out scenes= and steps=" in capsys.readouterr().out) == bool(said)
    assert [line.startswith("FAILED") for line in printed.splitlines()].count(True) == len(said)
    assert all(fault in printed for fault in said)
    assert "sigma 0.2         3.0000" in printed
    kept = json.loads((tmp_path / "verdict.json").read_text())
    assert kept["ratio"] == pytest.approx(end)  # the loss at sigma 0.95 is not judged
    assert (kept["steps"], kept["losses"]["0.8"], kept["linear"]["0.8"]) == (7, end, 1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_told_to_end_ends_its_stage_and_what_that_started(tmp_path, number):
    """The stage starts a process that would hold its standard output open for an hour, and so this test."""
    stage = "import subprocess; subprocess.run(['sleep', '3600'])"
    stage = f"from pathlib import Path; Path({str(tmp_path / 'begun')!r}).touch(); {stage}"
    code = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom evaluation import demo\n"
    code += f"with demo.raised_signals():\n    demo.run([demo.Stage('one', 60, ['-c', {stage!r}])], threads=1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode in (128 + number, -number)
