"""A run that is told to end saves within a step and says that it is not finished, whatever it is doing just then."""

import os
import shutil
import signal
from pathlib import Path

import pytest

import models
from moc.diffusion import Flow, sample_shots
from moc.errors import UserError
from moc.training import Metrics, Validator, find_checkpoint, read_metrics
from moc.training.interruption import NOT_FINISHED, SIGNALS, Interruption
from moc.training.saving import Saver
from tests import pipeline
from tests.runs import DROPS, losses, make_trainer, poisoned, train


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """Returns six steps of three micro-batches that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train(cache, folder, num_steps=6, accumulation=3)
    return folder


def at_call(number, act):
    """Returns a stand-in for Flow.loss that acts before its `number`-th call."""
    healthy, calls = Flow.loss, []

    def loss(*arguments, **others):
        calls.append(None)
        if len(calls) == number:
            act()
        return healthy(*arguments, **others)

    return loss


def send(number):
    os.kill(os.getpid(), number)


def at_step(step, number):
    return lambda n: send(number) if n == step else None


def same_end(a: Path, b: Path) -> bool:
    """Returns whether two runs ended with the same weights, byte for byte."""
    one, two = ((find_checkpoint(folder) / "ema/diffusion_pytorch_model.safetensors").read_bytes() for folder in (a, b))
    return one == two


def told(run: Path) -> dict[tuple[int, str], float]:
    """Returns what a run says of what it learned, by step."""
    rows = read_metrics(run)
    return {(row["step"], key): row[key] for row in rows for key in row if key == "loss" or "/" in key}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_waiting_for_data(cache, whole, tmp_path, number, caplog):
    before = [signal.getsignal(n) for n in SIGNALS]
    stopped = train(
        cache,
        tmp_path,
        num_steps=6,
        accumulation=3,
        log_every=100,
        before_step=at_step(3, number),
    )
    assert [signal.getsignal(n) for n in SIGNALS] == before
    assert (stopped.step, stopped.finished) == (3, False)
    assert find_checkpoint(tmp_path).name == "step_0000003"
    assert caplog.messages[-1] == f"{number.name}: step 3 of 6 is saved; the same command goes on"
    assert train(cache, tmp_path, num_steps=6, accumulation=3, resume=True).finished
    assert same_end(tmp_path, whole)


@pytest.mark.parametrize("call", [4, 5, 6])
def test_a_signal_within_a_step(cache, whole, tmp_path, monkeypatch, call):
    """The second step has micro-batches 4 to 6: it is dropped, but for the last one, which ends it."""
    with monkeypatch.context() as patch:
        patch.setattr(Flow, "loss", at_call(call, lambda: send(signal.SIGTERM)))
        stopped = train(cache, tmp_path, num_steps=6, accumulation=3, log_every=100)
    assert stopped.step == (2 if call == 6 else 1)
    train(cache, tmp_path, num_steps=6, accumulation=3, resume=True)
    assert same_end(tmp_path, whole)


def test_a_signal_in_validation(cache, tmp_path, monkeypatch):
    """It is left, and made up for when the run goes on."""
    settings = {"num_steps": 4, "validation": 3, "validate_every": 2}
    train(cache, tmp_path / "whole", **settings)
    calls = 3 * 4 + 1 + 2 + 4  # calls: validation with routing before the first step, two steps, one scene of three
    with monkeypatch.context() as patch:
        patch.setattr(Flow, "loss", at_call(calls, lambda: send(signal.SIGUSR1)))
        stopped = train(cache, tmp_path / "run", **settings)
    assert stopped.step == 2
    train(cache, tmp_path / "run", resume=True, **settings)
    assert told(tmp_path / "run") == told(tmp_path / "whole")


def test_nothing_is_saved_twice_nor_before_the_first_step(cache, tmp_path):
    stopped = train(cache, tmp_path, num_steps=6, before_step=at_step(0, signal.SIGTERM))
    assert not stopped.finished
    assert find_checkpoint(tmp_path) is None
    train(cache, tmp_path, num_steps=6, checkpoint_every=2, before_step=at_step(2, signal.SIGTERM))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000002"]


def test_a_signal_at_the_last_step_finds_a_finished_run(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Flow, "loss", at_call(2, lambda: send(signal.SIGTERM)))
    stopped = train(cache, tmp_path, num_steps=2)
    assert stopped.finished
    assert find_checkpoint(tmp_path).name == "step_0000002"


def test_weights_that_give_no_finite_loss_are_not_saved(cache, tmp_path, caplog):
    with poisoned(*(f"scene{number / 4}" for number in range(8)), gradient_only=False):
        train(cache, tmp_path, num_steps=6, before_step=at_step(2, signal.SIGTERM))
    assert find_checkpoint(tmp_path) is None
    assert caplog.messages[-1].startswith("SIGTERM: the weights give no finite loss and are not saved")


def test_one_process_that_is_told_ends_all_at_the_same_step(cache, two_processes, tmp_path):
    shutil.copytree(two_processes / "told", tmp_path / "run")  # its processes have asserted that each took two steps
    assert find_checkpoint(tmp_path / "run").name == "step_0000002"
    train(cache, tmp_path / "whole", moc=DROPS)
    train(cache, tmp_path / "run", moc=DROPS, resume=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_only_the_first_signal_counts():
    with Interruption() as interruption:
        send(signal.SIGUSR1)
        send(signal.SIGINT)
        assert interruption.signal == "SIGUSR1"
        assert interruption.wait(pytest.fail) is None


def test_a_failure_of_helpers_that_were_told_to_end_as_well():
    def fail():
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated")

    def both():
        interruption.signal = "SIGTERM"
        fail()

    with Interruption() as interruption:
        with pytest.raises(RuntimeError, match="is killed"):
            interruption.wait(fail)
        assert interruption.wait(both) is None


def test_a_launcher_that_ends_what_a_dead_process_has_left(tmp_path, monkeypatch, handlers):
    """It tells the others to end, as a scheduler does, while they find out which one is dead."""
    parallel, heard = make_trainer(tmp_path).parallel, []
    monkeypatch.setattr(parallel, "world_size", 2)
    monkeypatch.setattr("moc.training.parallel.silent", lambda _: send(signal.SIGTERM) or ["rank 1 on host"])
    signal.signal(signal.SIGTERM, lambda *_: heard.append("no step was taken; the same command goes on"))
    with pytest.raises(UserError, match="do not answer: rank 1 on host"), parallel.naming_absent():
        raise RuntimeError("[/a/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert heard == []


# The command


def one_of_each(signals, moments):
    """Pairs of which one for each moment is fast, of another signal: the trainer's tests above have every signal."""
    return [
        pytest.param(number, moment, marks=() if index == at else pytest.mark.slow)
        for index, number in enumerate(signals)
        for at, moment in enumerate(moments)
    ]


@pytest.fixture
def handlers():
    """Puts back what a command that was told to end has changed for good."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    return pipeline.train(prepared, tmp_path_factory.mktemp("undisturbed") / "run", "trainer.validate_every=1")


@pytest.mark.parametrize(("number", "moment"), one_of_each(SIGNALS, ["step", "validation"]))
def test_the_command_says_that_it_is_not_finished_and_goes_on(
    prepared, undisturbed, tmp_path, monkeypatch, handlers, moment, number, caplog, capfd
):
    """Its losses are those of a run that nothing disturbed, bit for bit. One who is impatient presses Ctrl-C again."""
    run = tmp_path / "run"
    validation = len(Validator.shares) + 1  # losses of the one scene at each level, and its routing
    call = validation + (1 if moment == "step" else 3)
    with monkeypatch.context() as patch:
        patch.setattr(Flow, "loss", at_call(call, lambda: send(number)))
        patch.setattr(Metrics, "close", lambda _: send(signal.SIGINT))
        with pytest.raises(SystemExit) as ending:
            pipeline.train(prepared, run, "trainer.validate_every=1")
    assert ending.value.code == NOT_FINISHED == 75
    assert find_checkpoint(run).name == "step_0000001"
    assert caplog.messages[-1] == f"{number.name}: step 1 of 3 is saved; the same command goes on"
    assert "Traceback" not in capfd.readouterr().err
    pipeline.train(prepared, run, "trainer.validate_every=1")
    assert told(run) == told(undisturbed)
    assert same_end(run, undisturbed)


@pytest.mark.parametrize(("number", "opened"), one_of_each(SIGNALS, ["open_dataset", "build_model"]))
def test_a_signal_before_training_begins(
    prepared, undisturbed, tmp_path, monkeypatch, handlers, number, opened, caplog, capfd
):
    """There is nothing to save; one who is impatient tells it twice."""
    module = {"open_dataset": "configs.world", "build_model": "models"}[opened]
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{opened}", lambda *_, **__: send(number))
        with pytest.raises(SystemExit) as ending:
            pipeline.train(prepared, tmp_path / "run", "trainer.validate_every=1")
    send(number)
    assert ending.value.code == NOT_FINISHED
    said = f"{number.name}: no step was taken since the newest checkpoint; the same command goes on"
    assert caplog.messages[-1] == said
    assert "Traceback" not in capfd.readouterr().err
    pipeline.train(prepared, tmp_path / "run", "trainer.validate_every=1")
    assert same_end(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, "model"), (signal.SIGINT, "first step"), (signal.SIGTERM, "last step"), (signal.SIGUSR1, "save")],
)
def test_a_trial_tells_nothing_and_leaves_nothing(
    prepared, tmp_path, monkeypatch, handlers, number, moment, caplog, capsys
):
    """It is no run that the same command goes on with, and what it did says nothing of the run."""
    build, save = models.build_model, Saver.save
    if moment == "model":
        monkeypatch.setattr("models.build_model", lambda *_: send(number) or build(*_))
    elif moment == "save":
        monkeypatch.setattr(Saver, "save", lambda *_: send(number) or save(*_))
    else:
        monkeypatch.setattr(Flow, "loss", at_call(1 if moment == "first step" else 3, lambda: send(number)))
    with pytest.raises(SystemExit) as ending:
        pipeline.train(prepared, tmp_path / "run", "preflight=true")
    assert ending.value.code == NOT_FINISHED
    assert caplog.messages[-1] == f"{number.name}: the trial was interrupted, and nothing of it is kept"
    said = capsys.readouterr().out
    assert "ok    checkpoint" in said
    assert "trial" not in said
    assert pipeline.stamps(tmp_path / "run") == {}


def test_a_signal_while_a_sample_is_drawn(prepared, tmp_path, monkeypatch, handlers):
    """It is not waited for: sampling takes as long as many steps."""

    def told(*arguments, **others):
        send(signal.SIGTERM)
        return sample_shots(*arguments, **others)

    monkeypatch.setattr("film.samples.sample_shots", told)
    with pytest.raises(SystemExit) as ending:
        pipeline.train(prepared, tmp_path / "run", "trainer.sample_every=1")
    assert ending.value.code == NOT_FINISHED
    assert find_checkpoint(tmp_path / "run").name == "step_0000001"
    assert not (tmp_path / "run/samples").exists()


def test_a_finished_command_leaves_signals_as_they_were(undisturbed, prepared):
    before = [signal.getsignal(number) for number in SIGNALS]
    pipeline.train(prepared, undisturbed, "trainer.validate_every=1")
    assert [signal.getsignal(number) for number in SIGNALS] == before
