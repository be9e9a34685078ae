"""These tests are about training: one loss whatever the processes, the packing or a restart; checkpoints whole or
absent; what is logged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moc import MoCConfig
from moc.errors import UserError
from moc.schedule import Stage
from moc.training import EMA, OptimConfig, find_checkpoint, read_metrics
from moc.training import checkpoint as ckpt
from moc.training.optim import build_optimizer, learning_rate
from tests.runs import DROPS, MOC, losses, make_trainer, train


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """Returns a run of six steps that nothing disturbed, with a checkpoint at step three."""
    folder = tmp_path_factory.mktemp("whole")
    train(cache, folder, num_steps=6, checkpoint_every=3, keep_checkpoints=5)
    return folder


def weights(folder: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(folder) / kind / "diffusion_pytorch_model.safetensors")


def assert_same_weights(a: Path, b: Path, **tolerance) -> None:
    for kind in ("model", "ema"):
        torch.testing.assert_close(weights(a, kind), weights(b, kind), **tolerance)


# Learning


def test_held_out_loss_falls(cache, tmp_path):
    train(cache, tmp_path, num_steps=40, log_every=20, validate_every=0, validation=2)
    rows = [row for row in read_metrics(tmp_path) if "validation/loss_0.8" in row]
    assert [row["step"] for row in rows] == [0, 40]
    assert rows[1]["validation/loss_0.8"] < 0.6 * rows[0]["validation/loss_0.8"]
    assert {"routing/sparsity", "routing/flops_of_dense", "validation/loss_0.2"} <= rows[1].keys()


def test_what_a_step_logs(whole):
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    expected = {"loss", "grad_norm", "lr", "chunk_tokens", "top_k", "step_seconds", "data_wait", "tokens_per_second"}
    assert expected <= rows[0].keys()
    assert rows[0]["lr"] == pytest.approx(1.5e-3)  # warm-up over two steps
    assert rows[1]["lr"] == rows[5]["lr"] == pytest.approx(3e-3)


# One loss, however it is computed


def test_micro_batches_add_up_to_the_packed_step(cache, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(cache, one, moc=DROPS)
    train(cache, two, moc=DROPS, accumulation=2)
    assert losses(two) == pytest.approx(losses(one), rel=2e-6)
    assert_same_weights(one, two, atol=1e-5, rtol=1e-4)


def test_two_processes_train_as_one(cache, two_processes, tmp_path):
    one, two = tmp_path / "one", two_processes / "plain"
    train(cache, one, moc=DROPS)  # one process has all scenes in one pack
    assert losses(two) == pytest.approx(losses(one), rel=2e-6)
    assert_same_weights(one, two, atol=1e-5, rtol=1e-4)


# Resuming


def test_a_resumed_run_repeats_the_uninterrupted_one(cache, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/step_0000006")
    train(cache, tmp_path, num_steps=6, resume=True, checkpoint_every=3)
    assert losses(tmp_path) == losses(whole)
    assert_same_weights(tmp_path, whole, atol=0, rtol=0)


def test_metrics_past_the_checkpoint_are_dropped_on_resuming(cache, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/step_0000006")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1')  # a line that a crash cut off
    train(cache, tmp_path, num_steps=4, resume=True)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_finished_run_stays_finished(cache, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    trainer = train(cache, tmp_path, num_steps=6, resume=True, before_step=pytest.fail)
    assert trainer.step == 6
    assert losses(tmp_path) == losses(whole)


def test_a_fresh_run_does_not_mix_with_an_older_ones_checkpoints(cache, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"step_0000003, step_0000006.*remove them or set another name"):
        train(cache, tmp_path, num_steps=2)
    assert find_checkpoint(tmp_path).name == "step_0000006"


def test_another_seed_or_model_is_refused(whole, tmp_path):
    checkpoint = find_checkpoint(whole)
    with pytest.raises(UserError, match=r"seed=0, not 1"):
        make_trainer(tmp_path, seed=1).resume(checkpoint)
    with pytest.raises(UserError, match=r"another model: dim=32, not 48"):
        make_trainer(tmp_path, dim=48).resume(checkpoint)


def test_optimizer_states_of_another_model_are_refused(whole, tmp_path):
    trainer = make_trainer(tmp_path, dim=48)
    trainer.bare_model.register_parameter("new", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(UserError, match=r"another model; they differ in \['new'\]"):
        ckpt.load_optimizer(find_checkpoint(whole), trainer.bare_model, trainer.optimizer)


# Checkpoints


def test_a_checkpoint_holds_everything_and_nothing_pickled(whole):
    checkpoint = find_checkpoint(whole)
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    model_files = {f"{kind}/{name}" for kind in ("model", "ema") for name in ("config.json", "moc.json")}
    assert model_files | {"complete", "state.json", "optimizer.safetensors", "rng_00000.safetensors"} <= files
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ""}
    assert [name for name in files if not Path(name).suffix] == ["complete"]
    for path in checkpoint.rglob("*.safetensors"):
        assert load_file(path)
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["seed"]) == (6, 0)
    assert state["data"]["position"] > 6
    assert state["flow"]["shift"] == 3.0


def test_the_averaged_weights_are_their_own(whole):
    model, ema = weights(whole), weights(whole, "ema")
    assert model.keys() == ema.keys()
    assert any(not torch.equal(model[name], ema[name]) for name in model)


def test_a_crash_while_writing_leaves_nothing_that_looks_whole(cache, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)

    def disk_full(folder):
        assert not (folder / "complete").exists()
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        train(cache, tmp_path, num_steps=7, resume=True, save_extras=disk_full)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000003", "step_0000006"]
    assert find_checkpoint(tmp_path).name == "step_0000006"


def test_leavings_of_a_killed_process_are_passed_over(cache, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints/step_0000006/complete").unlink()
    (tmp_path / "checkpoints/partial_0000009").mkdir()
    assert find_checkpoint(tmp_path).name == "step_0000003"
    assert find_checkpoint(tmp_path / "checkpoints/step_0000006") is None
    assert find_checkpoint(tmp_path / "nowhere") is None


def test_a_half_written_checkpoint_does_not_stand_in_the_way(cache, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    partial = tmp_path / "checkpoints/partial_0000006"
    (tmp_path / "checkpoints/step_0000006").rename(partial)
    (partial / "complete").unlink()
    (tmp_path / "checkpoints/partial_results").mkdir()  # somebody else's
    train(cache, tmp_path, num_steps=6, resume=True)
    assert not partial.exists()
    assert (tmp_path / "checkpoints/partial_results").exists()
    assert_same_weights(tmp_path, whole, atol=0, rtol=0)


def test_old_checkpoints_are_removed(cache, tmp_path):
    train(cache, tmp_path, num_steps=4, checkpoint_every=1, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_0000003", "step_0000004"]


def test_checkpoints_of_every_so_many_steps_stay(tmp_path):
    for step in range(1, 7):
        (tmp_path / f"checkpoints/step_{step:07d}").mkdir(parents=True)
    ckpt.remove_old(tmp_path, keep=1, every=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_0000002", "step_0000004", "step_0000006"]


def test_a_checkpoint_takes_the_place_of_one_that_was_not_whole(tmp_path):
    left = tmp_path / "checkpoints/step_0000003/model"
    left.mkdir(parents=True)
    with ckpt.new_checkpoint(tmp_path, 3) as folder:
        (folder / "state.json").write_text("{}")
    assert find_checkpoint(tmp_path).name == "step_0000003"
    assert not left.exists()


def test_checkpoints_are_numbered_not_named(tmp_path):
    for name in ("step_0000009", "step_9999999", "step_10000000", "step_old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "complete").touch()
    assert find_checkpoint(tmp_path).name == "step_10000000"
    ckpt.remove_old(tmp_path, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_10000000", "step_old"]


# What goes wrong


def test_a_diverged_loss_ends_the_run_with_a_remedy(cache, tmp_path):
    def run(**settings):
        return train(cache, tmp_path, num_steps=6, optim=OptimConfig(lr=1e30, warmup_steps=0), **settings)

    with pytest.raises(FloatingPointError, match=r"the loss is .* at step \d; lower optim\.lr or resume"):
        run(log_every=100, checkpoint_every=3)
    assert find_checkpoint(tmp_path) is None


# Schedules


def test_the_progressive_schedule_changes_routing_at_its_steps(cache, tmp_path):
    stages = [Stage(step=1, chunk_tokens=12, top_k=2), Stage(step=3, chunk_tokens=3, top_k=1)]
    train(cache, tmp_path, num_steps=5, schedule=stages)
    seen = [(row["chunk_tokens"], row["top_k"]) for row in read_metrics(tmp_path)]
    assert seen == [(6, 1), (12, 2), (12, 2), (3, 1), (3, 1)]
    saved = MoCConfig.load(find_checkpoint(tmp_path) / "ema")
    assert saved == replace(MOC, chunk_tokens=3, top_k=1)


def test_the_model_gets_the_stages_chunks(cache, tmp_path, monkeypatch):
    seen = []
    trainer_loss = make_trainer(tmp_path).flow.loss.__func__

    def watch(flow, model, batch, levels, moc, *others):
        seen.append((batch.layout.chunk_tokens, moc.chunk_tokens, moc.top_k))
        return trainer_loss(flow, model, batch, levels, moc, *others)

    monkeypatch.setattr("moc.diffusion.flow.Flow.loss", watch)
    train(cache, tmp_path / "run", num_steps=3, schedule=[Stage(step=2, chunk_tokens=12, top_k=2)])
    assert seen == [(6, 6, 1), (6, 6, 1), (12, 12, 2)]


def test_learning_rate_warms_up_and_decays():
    constant = OptimConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(step, 20, constant) for step in (0, 1, 3, 4, 19)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = replace(constant, decay="cosine")
    rates = [learning_rate(step, 20, cosine) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[12] == pytest.approx(1.0)  # halfway through the decay
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.05
    assert learning_rate(0, 20, replace(constant, warmup_steps=0)) == 2.0


def test_weight_decay_spares_vectors():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    decayed, spared = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert [tuple(p.shape) for p in spared["params"]] == [(4,), (4,)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_averaged_weights_warm_up():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, expected = EMA(model, decay=0.5), None
    for number in range(12):
        with torch.no_grad():
            model.weight.fill_(float(number**2))
        ema.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = number**2 if number == 0 else decay * expected + (1 - decay) * number**2
        assert ema.averages["weight"].item() == pytest.approx(expected)
    assert not ema.averages["weight"].requires_grad


def test_a_model_has_the_averages_for_a_while_and_a_frozen_weight_none():
    model = torch.nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(7.0)
        ema.averages["weight"].fill_(3.0)
    with ema.applied():
        assert (model.weight.item(), ema.averages["weight"].item()) == (3.0, 7.0)
    assert (model.weight.item(), ema.averages["weight"].item()) == (7.0, 3.0)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert (model.weight.item(), ema.averages["weight"].item()) == (7.0, 3.0)
    assert ema.averages.keys() == {"weight"}


def test_averages_go_on_after_a_restart():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, resumed = EMA(model, decay=0.9), EMA(model, decay=0.9)
    for number in range(6):
        with torch.no_grad():
            model.weight.fill_(float(number))
        ema.update()
        if number == 2:
            resumed.averages["weight"].copy_(ema.averages["weight"])
            resumed.restore(3)
        elif number > 2:
            resumed.update()
    assert torch.equal(ema.averages["weight"], resumed.averages["weight"])
