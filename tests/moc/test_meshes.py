"""One loss and one gradient, whatever the mesh of processes: data, shards, sequence and their products. And checkpoints
that open under any of them."""

import pytest
import torch
from accelerate import PartialState

from moc.errors import UserError
from moc.training import Parallel, ParallelConfig, read_metrics
from tests import meshes
from tests.runs import DROPS, launch, losses, make_cache, train


@pytest.fixture
def expected(tmp_path, request):
    """A folder with what one process makes of each case, on the device of the test."""
    PartialState._reset_state()
    meshes.write_expected(tmp_path, request.param)
    return tmp_path


@pytest.mark.parametrize("expected", ["cpu"], indirect=True)
def test_two_processes_take_the_step_of_one(expected):
    meshes.launch(2, expected, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("expected", ["cpu"], indirect=True)
def test_four_processes_take_the_step_of_one(expected):
    meshes.launch(4, expected, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("expected", ["auto"], indirect=True)
def test_gpus_take_the_step_of_one(expected, processes):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    meshes.launch(processes, expected, "auto")


@pytest.mark.parametrize("axes", [{"shard": 2}, {"sequence": 3}, {"replicate": 2}])
def test_a_mesh_that_the_processes_do_not_fill(axes):
    PartialState._reset_state()
    with pytest.raises(UserError, match=r"their product \d must (be|divide) the number of processes, 1"):
        Parallel(ParallelConfig("cpu", **axes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("axis", ["shard", "sequence"])
def test_a_run_of_two_processes_validates_saves_and_goes_on_as_one(cache, tmp_path, axis):
    """Three held-out scenes over two processes, so that one of them computes a scene a second time to keep step."""
    PartialState._reset_state()
    one, two = tmp_path / "one", tmp_path / "two"
    train(cache, one, num_steps=6, moc=DROPS, validation=3)
    launch(2, cache, two, "--axis", axis, "--validation", 3)
    train(cache, two, num_steps=6, moc=DROPS, validation=3, resume=True)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    held_out = [[row[key] for row in read_metrics(run) for key in row if "loss_0." in key] for run in (one, two)]
    assert held_out[1] == pytest.approx([*held_out[0][:4], *held_out[1][4:8], *held_out[0][4:]], rel=1e-5)
