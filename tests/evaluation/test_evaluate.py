"""These tests are about evaluation: rivals at the same noise, with equal noise and with clean history."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.loading.dataset import DataConfig, open_dataset
from data.loading.loader import held_out
from evaluation.evaluate import with_scenes
from evaluation.rivals import compare
from moc import MoCConfig, Sample, Shot, ShotLayout, StreamSpec, make_batch
from moc.batch import Batch
from moc.diffusion import Flow, NoiseLevels
from moc.training import Parallel, ParallelConfig, Validator, rivals
from models import ModelConfig, build_model
from models.checkpoints.contents import Contents
from models.mmdit import MMDiT
from tests import pipeline
from tests.caches import CHANNELS, TEXT_DIM
from tests.weights import randomized


def test_clean_history_leaves_one_noisy_target_a_sample():
    shots = [Shot(2, (1, 2, 2))] * 3
    layout = ShotLayout.pack([ShotLayout.build(shots), ShotLayout.build(shots[:1])])
    levels = NoiseLevels.after_clean_history(0.8, layout)
    assert levels.sigma.tolist() == pytest.approx([0.0, 0.0, 0.8, 0.8])
    assert levels.is_target.tolist() == [False, False, True, True]


@pytest.mark.parametrize("is_training", [True, False])
def test_held_out_losses_leave_the_model_in_its_mode(is_training):
    model = MMDiT(CHANNELS, TEXT_DIM, dim=32, num_layers=1, num_heads=2, ffn_dim=32).train(is_training)
    latents, text = [torch.randn(CHANNELS, 1, 2, 2)], [torch.randn(2, TEXT_DIM)] * 2
    validator = Validator([make_batch([Sample(latents, text)], model.stream, 4)], Flow())
    validator.losses(model, MoCConfig(chunk_tokens=4), Parallel(ParallelConfig("cpu")))
    assert model.training is is_training


def test_dense_layers_count_as_dense():
    """Without routed chunks all layers that route have one sparsity; the mean over layers falls with each dense one."""
    model = MMDiT(CHANNELS, TEXT_DIM, dim=32, num_layers=4, num_heads=2, ffn_dim=32)
    latents = [torch.randn(CHANNELS, 1, 2, 2) for _ in range(3)]
    text = [torch.randn(2, TEXT_DIM) for _ in range(4)]
    batch = make_batch([Sample(latents, text)], model.stream, 4)
    validator = Validator([batch], Flow())

    def routing(dense_layers: int) -> dict[str, float]:
        config = MoCConfig(chunk_tokens=4, top_k=0, text_anchor="none", dense_layers=dense_layers)
        return validator.routing(model, config, Parallel(ParallelConfig("cpu")))

    none, some, most, every = (routing(count) for count in (0, 1, 3, 4))
    assert 0.5 < none["sparsity"] < 1
    assert some["sparsity"] == pytest.approx(none["sparsity"] * 3 / 4)
    assert most["flops_of_dense"] == pytest.approx((3 + none["flops_of_dense"]) / 4)
    assert every == {"sparsity": 0, "flops_of_dense": 1}


@pytest.mark.parametrize("family", ["mmdit", "wan"])
@pytest.mark.parametrize(
    "settings",
    [{"dense_layers": 1}, {"own_anchor": "chunk"}, {"own_anchor": "none"}, {"dense": True}, {"causal": False}],
    ids=str,
)
@torch.no_grad()
def test_own_shot_only_takes_nothing_from_the_history(family, settings):
    sizes = ModelConfig(family, dim=24, num_layers=2, num_heads=1, ffn_dim=32)
    model = randomized(build_model(sizes, CHANNELS, TEXT_DIM))
    text = [torch.randn(2, TEXT_DIM) for _ in range(4)]
    shown = torch.randn(CHANNELS, 2, 4, 4)

    def last_shot(name: str, history: list) -> torch.Tensor:
        moc = rivals(MoCConfig(chunk_tokens=4, top_k=2, **settings))[name]
        batch = make_batch([Sample([*history, shown], text)], model.stream, moc.chunk_tokens)
        return model(batch.latents, torch.tensor([0.0, 0.0, 0.8]), batch.text, batch.layout, moc)[-1]

    one, other = (list(torch.randn(2, CHANNELS, 2, 4, 4)) for _ in range(2))
    assert torch.equal(last_shot("own shot only", one), last_shot("own shot only", other))
    for name in ("dense", "MoC"):
        assert not torch.allclose(last_shot(name, one), last_shot(name, other), rtol=1e-3)


@pytest.mark.parametrize("dense", [False, True])
def test_rivals_have_the_settings_of_the_checkpoint(dense):
    moc = MoCConfig(chunk_tokens=4, top_k=3, causal=False, own_anchor="chunk", dense_layers=1, dense=dense)
    own = {"top_k": 0, "dense_layers": 0, "own_anchor": "shot", "text_anchor": "global_and_own"}
    changes = {"dense": {"dense": True}, "MoC": {"dense": False}, "own shot only": own | {"dense": False}}
    expected = {name: moc.to_dict() | change for name, change in changes.items()}
    assert {name: config.to_dict() for name, config in rivals(moc).items()} == expected


def test_rivals_are_measured_at_the_same_noise(trained, prepared, tmp_path, capsys):
    rows_file = tmp_path / "rows.json"
    arguments = (f"checkpoint={trained}", f"data.path={prepared}", "data.validation=2", "device=cpu")
    page = tmp_path / "page.html"
    pipeline.command("scripts/evaluate.py", *arguments, f"output={rows_file}", f"page={page}", "draws=5")
    rows = json.loads(rows_file.read_text())["losses"]
    assert [(row["attention"], row["clean_history"]) for row in rows] == [
        (name, history) for history in (False, True) for name in ("dense", "MoC", "own shot only")
    ]
    assert "own shot only" in capsys.readouterr().out
    by_name = {row["attention"]: row for row in rows if row["clean_history"]}
    assert by_name["dense"]["sparsity"] == 0
    assert 0 < by_name["MoC"]["sparsity"] < by_name["own shot only"]["sparsity"] < 1
    assert all(torch.tensor(list(row["loss"].values())).isfinite().all() for row in rows)
    # The same command again gives the same numbers, since noise depends on keys alone.
    assert all(half > 0 for row in rows for half in row["draws"].values())
    assert all(half is None for row in rows for half in row["scenes"].values())  # two scenes say too little
    assert "±" not in page.read_text().partition("<table>")[2]
    assert page.read_text().count("own shot only") == 2
    pipeline.command("scripts/evaluate.py", *arguments, f"output={rows_file}", "draws=5")
    assert json.loads(rows_file.read_text())["losses"] == rows
    pipeline.command("scripts/evaluate.py", *arguments, f"output={rows_file}", "seed=1", "moc.top_k=0")
    for row, other in zip(rows, json.loads(rows_file.read_text())["losses"], strict=True):
        assert row["loss"].keys() == other["loss"].keys()
        assert row["loss"] != other["loss"]
        assert set(other["draws"].values()) == {None}  # one draw has no spread
        assert (row["sparsity"] < other["sparsity"]) == (row["attention"] == "MoC")


def test_sparsity_is_that_of_all_scenes_together_not_of_the_first():
    model = MMDiT(CHANNELS, TEXT_DIM, dim=32, num_layers=2, num_heads=2, ffn_dim=32)
    config = MoCConfig(chunk_tokens=4, top_k=1, text_anchor="none")

    def scene(shots: int) -> Batch:
        latents = [torch.randn(CHANNELS, 1, 4, 4) for _ in range(shots)]
        return make_batch([Sample(latents, [torch.randn(2, TEXT_DIM) for _ in range(shots + 1)])], model.stream, 4)

    def sparsity(*shots: int) -> float:
        rows = compare(model, config, Flow(), [scene(number) for number in shots], 0, Parallel(ParallelConfig("cpu")))
        return next(row.sparsity for row in rows if row.attention == "MoC")

    pairs = [scene(number).layout.num_tokens ** 2 for number in (1, 6)]
    together = (pairs[0] * sparsity(1) + pairs[1] * sparsity(6)) / sum(pairs)
    assert sparsity(1) < 0.5 < together
    assert sparsity(1, 6) == sparsity(6, 1) == pytest.approx(together)


def test_the_scenes_are_those_that_the_run_held_out(trained, prepared, world, tmp_path, monkeypatch, caplog):
    def ids(checkpoint: Path, data: Path, *settings: str) -> list[str]:
        seen: list[str] = []
        monkeypatch.setattr("evaluation.evaluate.compare", lambda *given: seen.extend(b.ids[0] for b in given[3]) or [])
        paths = (f"checkpoint={checkpoint}", f"data.path={data}", "device=cpu")
        pipeline.command("scripts/evaluate.py", *paths, *settings)
        return seen

    dataset = open_dataset(DataConfig(str(prepared)))
    one, everyone = ([dataset.items[i][1].id for i in dataset.split(number).held_out] for number in (1, 4))
    assert ids(trained, prepared) == ids(trained / "checkpoints/step_0000003", prepared) == one
    assert "evaluated on up to 1 scene that the run held out; data.validation=NUMBER takes another" in caplog.text
    caplog.clear()
    assert ids(trained, prepared, "data.validation=4") == everyone  # evaluation may hold out everything
    assert "data.validation" not in caplog.text
    online = pipeline.prepare(world, tmp_path / "online", "online=true")  # these are other data
    assert ids(trained, online) == everyone
    assert "evaluated on up to 16 scenes of other data than the run's;" in caplog.text


def test_the_scenes_may_be_those_of_the_recall_world(trained, monkeypatch):
    seen = []
    monkeypatch.setattr("evaluation.evaluate.compare", lambda *given: seen.extend(given[3]) or [])
    world = "recall={size: [32, 48], frames: 1, shots: 3, paintings: 1}"
    pipeline.command("scripts/evaluate.py", f"checkpoint={trained}", world, "data.validation=2", "device=cpu")
    assert [(batch.ids, batch.num_shots) for batch in seen] == [(["recall_0"], 3), (["recall_1"], 3)]


def test_a_run_that_held_no_scene_out_is_evaluated_on_what_it_was_trained_on(tmp_path, caplog):
    """The user is told so."""
    caplog.set_level("INFO")
    (tmp_path / "config.yaml").write_text("data: {path: prepared, validation: 0}")
    taken = with_scenes(DataConfig("prepared"), tmp_path / "checkpoints/step_0000003")
    assert (taken.validation, taken.held_out) == (16, [])
    assert "evaluated on up to 16 scenes that the run was trained on, as it held out none;" in caplog.text


def test_scenes_that_the_user_names_are_not_said_to_be_those_that_the_run_held_out(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "config.yaml").write_text("data: {path: prepared, validation: 2, held_out: ['a*']}")
    checkpoint = tmp_path / "checkpoints/step_0000003"
    assert with_scenes(DataConfig("prepared", held_out=["a*"]), checkpoint).validation == 2
    assert "that the run held out" in caplog.text
    caplog.clear()
    assert with_scenes(DataConfig("prepared", held_out=["b*"]), checkpoint).held_out == ["b*"]
    assert "of data.held_out=['b*'], other than the run held out" in caplog.text


def test_a_run_that_held_scenes_out_by_name_is_evaluated_on_these(tmp_path, monkeypatch):
    """The run's config names its data relative to where it was started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {path: prepared, validation: 0, held_out: ['film_*']}")
    checkpoint = tmp_path / "checkpoints/step_0000003"
    taken = with_scenes(DataConfig(str(tmp_path / "prepared")), checkpoint)
    assert (taken.validation, taken.held_out) == (16, ["film_*"])
    assert with_scenes(DataConfig(str(tmp_path / "other")), checkpoint).held_out == []


def test_rivals_get_the_same_noise_and_a_clean_history(trained, prepared, monkeypatch):
    seen, forward = [], MMDiT.forward

    def spy(self, latents, sigma, text, layout, config, on_routes=None, **others):
        if on_routes is None:  # calls with on_routes are for the routing statistics
            seen.append((config, latents, sigma))
        return forward(self, latents, sigma, text, layout, config, on_routes=on_routes, **others)

    monkeypatch.setattr(MMDiT, "forward", spy)
    settings = (f"data.path={prepared}", "data.validation=1", "device=cpu", "moc.chunk_tokens=12")
    pipeline.command("scripts/evaluate.py", f"checkpoint={trained}", *settings)
    contents = Contents(trained / "checkpoints/step_0000003")
    moc, flow = contents.moc, contents.flow
    moc = replace(moc, chunk_tokens=12)
    rows = [seen[at : at + 4] for at in range(0, len(seen), 4)]  # each row has four noise levels
    assert [{config for config, _, _ in row} for row in rows] == [{config} for config in rivals(moc).values()] * 2
    (scene,) = held_out(open_dataset(DataConfig(str(prepared))), 1, StreamSpec(), moc.chunk_tokens)
    noise = flow.draw_noise(scene, seed=0)
    for row, clean in zip(rows, [False] * 3 + [True] * 3, strict=True):
        for (_, latents, sigma), level in zip(row, (0.2, 0.5, 0.8, 0.95), strict=True):
            assert sigma.tolist() == pytest.approx([0.0, 0.0, level] if clean else [level] * 3)
            for shown, x, n, s in zip(latents, scene.latents, noise, sigma, strict=True):
                assert torch.equal(shown, flow.add_noise(x, n, s))


def test_recall_scenes_and_prepared_data_together_are_refused(capsys):
    said = pipeline.refusal(capsys, "scripts/evaluate.py", "checkpoint=nowhere", "recall={}", "data.path=prepared")
    pipeline.assert_one_message(said, "recall is set together with data.path")
