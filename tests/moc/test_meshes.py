"""These tests are about one loss and one gradient, whatever the mesh of processes: data, shards, sequence and their
products. And checkpoints that open under any of them."""

import shutil
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

from moc.errors import UserError
from moc.exchange import Exchange
from moc.training import Parallel, ParallelConfig, read_metrics
from tests import meshes
from tests.runs import DROPS, losses, train


@pytest.fixture
def expected(tmp_path, request):
    """Returns a folder with what one process makes of the cases of the test, on its device."""
    PartialState._reset_state()
    meshes.write_expected(tmp_path, *request.param)
    return tmp_path


# These are a model of each family, one of them with an adapter, and one with dense attention.
SOME_CASES = [meshes.CASES[0], meshes.CASES[3], meshes.CASES[4]]


@pytest.mark.parametrize("expected", [("cpu", SOME_CASES)], ids=["cpu"], indirect=True)
def test_two_processes_take_the_step_of_one(expected):
    meshes.launch(2, expected, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("expected", [("cpu", meshes.CASES)], ids=["cpu"], indirect=True)
def test_processes_take_the_step_of_one_in_every_case(expected, processes):
    meshes.launch(processes, expected, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("expected", [("auto", meshes.CASES)], ids=["auto"], indirect=True)
def test_gpus_take_the_step_of_one(expected, processes):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    meshes.launch(processes, expected, "auto")


@pytest.mark.parametrize("axes", [{"shard": 2}, {"sequence": 3}, {"replicate": 2}])
def test_a_mesh_that_the_processes_do_not_fill(axes):
    PartialState._reset_state()
    with pytest.raises(UserError, match=r"their product \d must (be|divide) the number of processes, 1"):
        Parallel(ParallelConfig("cpu", **axes))


def test_processes_share_tokens_evenly_and_what_they_cannot_share_is_refused():
    exchange = Exchange(None, rank=0, size=4)
    bounds = exchange.bounds(2, 9)
    assert (bounds[0], bounds[-1]) == (2, 9)
    assert sorted(end - start for start, end in pairwise(bounds)) == [1, 2, 2, 2]
    with pytest.raises(UserError, match=r"a stream of 3 tokens is too short for parallel\.sequence=4: lower it"):
        exchange.bounds(2, 5)
    with pytest.raises(UserError, match=r"parallel\.sequence=4 does not divide the model's 6 heads"):
        exchange.to_heads(torch.zeros(2, 6, 8), 8)


def test_what_is_exchanged_may_lie_in_memory_in_any_order():
    """Attention may give it head by head."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        by_head = torch.arange(24.0).view(2, 3, 4).transpose(0, 1)
        assert torch.equal(Exchange(None, rank=0, size=1).to_tokens(by_head), by_head)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("axis", ["shard", "sequence"])
def test_a_run_of_two_processes_validates_saves_and_goes_on_as_one(cache, two_processes, tmp_path, axis):
    """There are three held-out scenes for two processes, so that one of them computes a scene a second time to keep
    step."""
    PartialState._reset_state()
    one, two = tmp_path / "one", tmp_path / "two"
    train(cache, one, num_steps=6, moc=DROPS, validation=3)
    shutil.copytree(two_processes / axis, two)
    train(cache, two, num_steps=6, moc=DROPS, validation=3, resume=True)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    held_out = [[row[key] for row in read_metrics(run) for key in row if "loss_0." in key] for run in (one, two)]
    assert held_out[1] == pytest.approx([*held_out[0][:4], *held_out[1][4:8], *held_out[0][4:]], rel=1e-5)
