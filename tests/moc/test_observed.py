"""These tests are about what is seen of a run while it goes on: the time of phases, the loss taken apart, density,
FLOPs, where routes go."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.loading.dataset import DataConfig, Kind, SourceConfig, open_dataset
from moc import MoCConfig, Sample, make_batch
from moc.cost import attention_cost
from moc.diffusion import Flow
from moc.diffusion.flow import NoiseLevels
from moc.statistics import routing_statistics
from moc.training import read_metrics
from moc.training.breakdown import Breakdown
from moc.training.clock import Clock, about
from moc.training.metrics import headline
from moc.training.outcome import Outcome
from moc.training.survey import Survey, peak_flops
from models import layers, linear, pointwise
from models.mmdit import MMDiT
from models.wan import WanTransformer3DModel
from tests.caches import scene, write_cache
from tests.runs import DROPS, train

TEXT_DIM = 6


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.1, "less than a second"), (3, "about 3 s"), (9000, "about 2.5 hours"), (172_800, "about 2.0 days")],
)
def test_a_time_is_said_in_its_unit(seconds, said):
    assert about(seconds) == said


def samples(source=""):
    """Returns two films of three shots and of two."""
    latent, text = torch.randn(4, 2, 4, 6), torch.randn(2, TEXT_DIM)
    return [Sample([latent] * n, [text] * (n + 1), n, f"film{n}", source=source) for n in (3, 2)]


def mmdit():
    return MMDiT(4, TEXT_DIM, dim=32, num_layers=3, num_heads=2, ffn_dim=48)


def wan():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48, "num_layers": 3}
    return WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=TEXT_DIM, **sizes)


@pytest.fixture(scope="module")
def rows(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    train(cache, folder, moc=DROPS)
    return read_metrics(folder)


def test_what_a_run_tells_of_each_step(rows):
    for row in rows:
        phases = {name: row[f"{name}_seconds"] for name in ("data", "forward", "backward", "optimizer")}
        assert all(seconds > 0 for seconds in phases.values())
        assert sum(phases.values()) <= row["step_seconds"]
        assert row["communication_seconds"] == 0
        assert 0 < row["density"] < 1
        assert row["flops_per_token"] > 0
        routes = {int(name.removeprefix("routes/back_")): x for name, x in row.items() if name.startswith("routes/")}
        assert set(routes) <= {0, 1, 2}
        assert sum(routes.values()) == pytest.approx(1)
        assert "mfu" not in row  # the peak of a CPU is not known
        assert "memory_gib" not in row


def test_the_parts_of_the_loss_are_those_of_all_processes(rows, two_processes):
    for one, two in zip(rows, read_metrics(two_processes / "plain"), strict=True):
        losses = {name: value for name, value in one.items() if name.startswith("loss/")}
        assert {"loss/shot_1", "loss/shot_2", "loss/shot_3"} <= losses.keys()
        assert any(name.startswith("loss/noise_") for name in losses)
        assert losses == pytest.approx({name: two.get(name) for name in losses}, rel=1e-5)


def test_the_loss_is_taken_apart_by_noise_shot_and_source():
    batches = [make_batch(samples(source), mmdit().stream, 6) for source in ("", "films")]
    sigma = torch.tensor([0.0, 0.55, 1.0, 0.58, 0.2])
    levels = [NoiseLevels(sigma, torch.tensor([False, True, True, True, True])), NoiseLevels.equal(0.55, 5)]
    losses = torch.tensor([9.0, 1, 2, 4, torch.nan, 10, 10, 10, 10, 10])
    outcome, breakdown = Outcome(1, batches, levels, losses, torch.tensor([0.0, 0, 9])), Breakdown()
    outcome.read()
    breakdown.add(outcome)
    assert breakdown.read() == {
        "loss/noise_0.5": pytest.approx((1 + 4 + 50) / 7), "loss/noise_0.9": 2.0, "loss/source_films": 10.0,
        "loss/shot_1": pytest.approx((4 + 20) / 3), "loss/shot_2": pytest.approx((1 + 20) / 3), "loss/shot_3": 6.0,
    }  # fmt: skip
    assert breakdown.read() == {}


def test_the_shots_of_a_long_film_count_as_one_from_the_sixteenth_on():
    latent, text = torch.randn(4, 2, 4, 6), torch.randn(2, TEXT_DIM)
    batch = make_batch([Sample([latent] * 18, [text] * 19, 0, "long")], mmdit().stream, 6)
    outcome = Outcome(1, [batch], [NoiseLevels.equal(0.5, 18)], torch.arange(1.0, 19), torch.tensor([0.0, 0, 18]))
    outcome.read()
    breakdown = Breakdown()
    breakdown.add(outcome)
    by_shot = {name: loss for name, loss in breakdown.read().items() if name.startswith("loss/shot_")}
    assert by_shot == {f"loss/shot_{number}": float(number) for number in range(1, 16)} | {"loss/shot_16": 17.0}


def test_samples_of_a_mix_know_their_source(tmp_path):
    for name in "ab":
        write_cache(tmp_path / name, [scene(number, shots=1 + number) for number in range(2)])
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    mix = open_dataset(DataConfig(sources=[SourceConfig(a), SourceConfig(b, kind=Kind.multi)]))
    assert [sample.source for sample in mix] == [a, a, f"{b} (multi)"]
    assert {sample.source for sample in open_dataset(DataConfig(path=a))} == {""}


@pytest.mark.parametrize("build", [mmdit, wan])
@pytest.mark.parametrize("dense_layers", [0, 1])
def test_a_survey_counts_what_attention_and_linears_do(build, dense_layers):
    """They are compared with the count of `moc.cost` with the routes themselves, and torch's own count of matrix
    products."""
    model, seen, config = build(), {}, MoCConfig(chunk_tokens=6, top_k=2, dense_layers=dense_layers)
    batch = make_batch(samples(), model.stream, config.chunk_tokens)
    survey = Survey(model, config)
    with survey.forward(batch.layout) as on_routes, FlopCounterMode(display=False) as counted:

        def observe(layer, routes):
            seen[layer] = routes
            on_routes(layer, routes)

        Flow().loss(model, batch, NoiseLevels.equal(0.5, batch.num_shots), config, 0, on_routes=observe)
    values = survey.read(1.0, torch.float32)

    costs = [attention_cost(batch.layout, config.at_layer(i), seen.get(i), 2, 16) for i in range(3)]
    assert values["density"] == pytest.approx(sum(cost.attended for cost in costs) / sum(cost.dense for cost in costs))
    attention = sum(3 * cost.attended * cost.flops_per_pair for cost in costs)
    routing = sum(cost.routing_flops / 2 for cost in costs) * 2
    linears = values["flops_per_token"] * batch.layout.num_tokens - attention - routing
    products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    assert 0.8 * products < linears / 3 <= products  # `flops_per_token` leaves out the embeddings of patches and time
    shares = [routing_statistics(routes, batch.layout).share_by_distance for routes in seen.values()]
    for distance in (1, 2):
        mean = sum(share.get(distance, 0) for share in shares) / len(shares)
        assert values[f"routes/back_{distance}"] == pytest.approx(mean)


def linear_flops(model):
    config, batch = MoCConfig(dense=True), make_batch(samples(), model.stream, 6)
    survey = Survey(model, config)
    with survey.forward(batch.layout) as on_routes:
        Flow().loss(model, batch, NoiseLevels.equal(0.5, batch.num_shots), config, 0, on_routes=on_routes)
    assert survey.read(1.0, torch.float32)["density"] == 1
    return survey.linear_flops


def test_a_frozen_weight_has_no_gradient_to_compute():
    model = mmdit()
    trained = linear_flops(model)
    model.requires_grad_(False)
    assert linear_flops(model) == pytest.approx(2 / 3 * trained)


def test_linears_that_leave_their_bias_are_counted(monkeypatch):
    """They do so on a GPU."""
    model = mmdit()
    whole = linear_flops(model)
    for name in ("modulate", "fork", "add_gated", "add_modulate", "gelu", "join", "split"):
        monkeypatch.setattr(layers, name, getattr(pointwise, name))  # those of a GPU, which add biases
    for module in (layers, linear):
        monkeypatch.setattr(module, "left_bias", lambda layer, _: getattr(layer, "bias", None))
    assert linear_flops(model) == whole


def test_utilization_is_of_the_gpus_own_peak(monkeypatch):
    def peak(name, dtype=torch.bfloat16, device="cuda:0"):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
        return peak_flops(torch.device(device), dtype)

    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "Some GPU")
    assert [peak(name) for name in names] == [989e12, 756e12, 312e12, None]
    assert peak(names[0], torch.float32) is None
    assert peak(names[0], device="cpu") is None


def test_a_clock_adds_up_the_phases_of_micro_batches(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds
        return [make_batch(samples(), mmdit().stream, 6)]

    clock = Clock()
    for _ in range(2):
        clock.wait(lambda: spend(1.0))
        for phase, seconds in (("forward", 2.0), ("backward", 3.0), ("forward", 2.0), ("optimizer", 1.0)):
            clock.begin(phase)
            spend(seconds)
        clock.begin("")
        spend(1.0)
    values = clock.read()
    assert {name.removesuffix("_seconds"): value for name, value in values.items() if name.endswith("_seconds")} == {
        "step": 10, "data": 1, "forward": 4, "backward": 3, "optimizer": 1, "communication": 0
    }  # fmt: skip
    assert values["data_wait"] == 0.1
    assert values["tokens_per_second"] == 2 * spend(0)[0].layout.num_tokens / 20


def test_communication_is_told_apart_where_processes_hold_a_stream_together(two_processes):
    """Each layer's attention waits for the other process."""
    for row in read_metrics(two_processes / "sequence"):
        if "step_seconds" in row:
            assert 0 < row["communication_seconds"] < row["step_seconds"]


def test_a_clock_counts_communication_within_phases(monkeypatch):
    moments = iter([0.0, 1.0, 2.0, 4.0, 5.0, 8.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = Clock()
    clock.steps = 2
    clock.begin("forward")
    for _ in range(2):
        with clock.communication():
            pass
    clock.begin("")
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0)
    values = clock.read()
    assert values["communication_seconds"] == (2 + 3) / 2
    assert values["forward_seconds"] == 9 / 2
    assert not clock._communications  # read() takes them, so they count once


def test_the_progress_line_has_loss_and_speed(rows):
    assert headline(rows[0]).keys() == {"loss", "tokens/s"}
    assert headline({"tokens_per_second": 12345.6, "mfu": 0.384}) == {
        "loss": "not finite", "tokens/s": "12,346", "MFU": "38%"
    }  # fmt: skip
