"""These tests are about the recipe of a run: any optimizer by name, rates of their own, drop schedules, the dense model
as target."""

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from moc import MoCConfig, Sample, make_batch
from moc.diffusion import Flow
from moc.diffusion.flow import NoiseLevels
from moc.errors import UserError
from moc.schedule import MoCSchedule, Stage
from moc.training import OptimConfig, find_checkpoint, offload
from moc.training import checkpoint as ckpt
from moc.training.optim import RateConfig, build_optimizer, freeze, kept_states, set_learning_rate
from models import stream
from models.mmdit import MMDiT
from tests.runs import DROPS, launch, losses, poisoned, train

OPTIMIZERS = {
    "adamw": OptimConfig(lr=3e-3),
    "muon": OptimConfig("muon", lr=3e-3),
    "adamw8bit": OptimConfig("adamw8bit", {"min_8bit_size": 16}, lr=3e-3),
    "torch.optim.Adafactor": OptimConfig("torch.optim.Adafactor", lr=3e-3),
    "torch.optim.SGD": OptimConfig("torch.optim.SGD", {"momentum": 0.9}, lr=1e-2),
    "schedulefree.AdamWScheduleFree": OptimConfig("schedulefree.AdamWScheduleFree", {"betas": [0.9, 0.95]}, lr=3e-3),
    "optimi.StableAdamW": OptimConfig("optimi.StableAdamW", lr=3e-3),
    "plain SGD": OptimConfig("torch.optim.SGD", lr=1e-2),
}
ATTENTION = [RateConfig("blocks.*.to_qkv.*"), RateConfig("*", 0)]


def model(num_layers=2):
    torch.manual_seed(0)
    return MMDiT(3, 8, dim=32, num_layers=num_layers, num_heads=2, ffn_dim=32)


def tensors(folder, pattern="model/*.safetensors"):
    return {name: x for file in find_checkpoint(folder).glob(pattern) for name, x in load_file(file).items()}


# Optimizers


def test_averages_on_the_host_give_the_same_run(cache, tmp_path, monkeypatch):
    """This holds also over a restart and a step that is left out; parameters step in several runs of some."""
    monkeypatch.setattr("moc.training.offload._STEPPED", 2000)
    for name, on_host in (("plain", False), ("offloaded", True)):
        optim = OptimConfig(lr=3e-3, warmup_steps=2, offload=on_host)
        with poisoned("scene0.25"):
            train(cache, tmp_path / name, num_steps=2, optim=optim)
        trainer = train(cache, tmp_path / name, num_steps=4, optim=optim, resume=True)
    hosts, states = trainer.optimizer._hosts, trainer.optimizer.state
    assert len(hosts) == 2 * len(states) > 20
    assert all(states[parameter][key] is host for (parameter, key), host in hosts.items())
    assert losses(tmp_path / "offloaded") == losses(tmp_path / "plain")
    one, two = (tensors(tmp_path / run, "**/*.safetensors") for run in ("plain", "offloaded"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(key.endswith("exp_avg") for key in one)


def test_averages_that_are_loaded_never_lie_beside_the_weights():
    """The weights are on another device than the host's: torch's meta stands for a GPU."""
    weight = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    average, count = ("weight.exp_avg", torch.float32, (4, 3)), ("weight.step", torch.float32, ())
    for kind, where in ((torch.optim.AdamW, "meta"), (offload.OffloadedAdamW, "cpu")):
        optimizer = kind([weight], fused=False)
        assert ckpt._empty_state(average, weight, optimizer).device.type == where
        assert ckpt._empty_state(count, weight, optimizer).device.type == "meta"


def test_parameters_that_step_together_are_counted_once_each():
    class Counted:
        asked = 0

        def numel(self):
            Counted.asked += 1
            return offload._STEPPED // 100

    parameters = [Counted() for _ in range(1000)]
    runs = list(offload._together(parameters))
    assert [len(run) for run in runs] == [100] * 10
    assert [x for run in runs for x in run] == parameters
    assert Counted.asked == 1000


@pytest.mark.parametrize("name", ["adamw", "offloaded", *list(OPTIMIZERS)[1:]])
def test_an_optimizer_says_what_it_keeps_at_least_and_where(name):
    """The count is compared with what lies there after a step, counts of steps left out."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    net = model()
    optimizer = build_optimizer(net, OPTIMIZERS.get(name, OptimConfig(offload=True)))
    told = list(kept_states(optimizer))
    assert {id(p) for p, _, _ in told} == {id(p) for p in net.parameters()}
    assert {device.type for _, _, device in told} == {"cpu"}
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for parameter, bytes_a_byte, _ in told:
        states = optimizer.state.get(parameter, {}).values()
        held = sum(x.nbytes for x in states if isinstance(x, torch.Tensor) and x.dim())
        assert bytes_a_byte * parameter.nbytes <= held
        if name in ("adamw", "offloaded", "muon"):
            assert bytes_a_byte * parameter.nbytes == held


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_any_optimizer_learns_and_resumes_as_if_never_stopped(cache, tmp_path, name):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    optim = replace(OPTIMIZERS[name], warmup_steps=2)
    train(cache, tmp_path / "whole", num_steps=4, optim=optim)
    before, after = model().state_dict(), tensors(tmp_path / "whole")
    assert sum(not torch.equal(before[key], after[key]) for key in after) > 5
    train(cache, tmp_path / "half", num_steps=2, optim=optim)
    train(cache, tmp_path / "half", num_steps=4, optim=optim, resume=True)
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    one, two = (tensors(tmp_path / run, "*/*.safetensors") for run in ("half", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["muon", "torch.optim.SGD"])
def test_a_step_that_is_not_finite_is_left_out_by_any_optimizer(cache, tmp_path, name):
    optim = OPTIMIZERS[name]
    with poisoned(*(f"scene{number / 4}" for number in range(8))):
        train(cache, tmp_path, num_steps=2, optim=optim)
    before, after = model().state_dict(), tensors(tmp_path)
    assert all(torch.equal(before[key], after[key]) for key in after)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    net = model()
    muon, adamw = build_optimizer(net, OptimConfig("muon")).optimizers
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    names = {parameter: name for name, parameter in net.named_parameters()}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert "blocks.0.video.to_qkv.weight" in taken
    assert all(name.startswith("blocks.") and net.get_parameter(name).dim() == 2 for name in taken)
    rest = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert taken | rest == set(names.values())
    assert not taken & rest


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: OptimConfig("sgd"), "is not one of adamw, adamw8bit, muon, nor a class"),
        (lambda: build_optimizer(model(), OptimConfig("torch.optim.None_")), "torch.optim.None_ cannot be imported"),
        (lambda: build_optimizer(model(), OptimConfig("nowhere.Adam")), "nowhere.Adam cannot be imported"),
        (lambda: build_optimizer(model(), OptimConfig(args={"speed": 3})), "optim.args={'speed': 3}: .*'speed'"),
        (lambda: OptimConfig("muon", offload=True), "optim.offload=true is for optim.name=adamw, and this is muon"),
        (lambda: RateConfig(factor=-1), "optim.rates.factor=-1"),
        (lambda: freeze(model(), [RateConfig("attn.*")]), "no parameter's name matches 'attn.\\*'"),
        (lambda: freeze(model(), [RateConfig("*", 0)]), "freeze every parameter"),
    ],
)  # fmt: skip
def test_optimizers_that_cannot_be_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        config()


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [("torch.optim.SGD", {"momentum": -1}, "momentum value: -1"), ("torch.optim.LBFGS", {}, "parameter groups")],
)
def test_what_an_optimizer_says_of_its_arguments_is_for_the_user(name, args, said):
    with pytest.raises(UserError, match=rf"optim.name={name} does not take .*{said}.*; change them"):
        build_optimizer(model(), OptimConfig(name, args=args))


@pytest.mark.parametrize(
    ("name", "said"),
    [("torch.optim.SparseAdam", "does not support dense gradients"), ("tests.moc.test_recipe.Closed", "closure")],
)
def test_an_optimizer_that_fails_at_its_step_is_refused_before_the_first_one(name, said):
    net = model()
    with pytest.raises(UserError, match=rf"optim.name={name} .*cannot make a step here: .*{said}.*; take another"):
        build_optimizer(net, OptimConfig(name, weight_decay=0.0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), model().parameters(), strict=True))
    assert not any(parameter.grad is not None for parameter in net.parameters())


class Closed(torch.optim.SGD):
    """This optimizer asks for a function that computes the loss anew."""

    def step(self, closure):
        return closure()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"optim\.name=adamw8bit needs .*: pip install bitsandbytes"):
        build_optimizer(model(), OptimConfig("adamw8bit"))


@pytest.mark.parametrize("name", ["adamw8bit", "torch.optim.Adafactor", "offload=true"])
def test_what_takes_whole_weights_alone_is_refused_on_shards(name, monkeypatch):
    """It is refused before its package is asked for. Every weight passes for one that is sharded."""
    monkeypatch.setattr("moc.training.optim.DTensor", torch.nn.Parameter)
    optim = OptimConfig(offload=True) if name == "offload=true" else OptimConfig(name)
    with pytest.raises(UserError, match=rf"optim\.(name=)?{name} takes whole weights.*take adamw without offload"):
        build_optimizer(model(), optim)
    assert build_optimizer(model(), OptimConfig())


# Rates of some parameters


def test_parameters_learn_at_their_own_rates():
    net = model()
    config = OptimConfig(rates=[RateConfig("blocks.0.*", 0.5), RateConfig("blocks.*", 2)])
    optimizer = build_optimizer(net, config)
    set_learning_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        expected = 5e-4 if name.startswith("blocks.0.") else 2e-3 if name.startswith("blocks.") else 1e-3
        assert rates[id(parameter)] == pytest.approx(expected)
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.01}


def test_all_but_attention_is_frozen(cache, tmp_path):
    """This holds also over a restart; the averages are of what is trained alone."""
    optim = OptimConfig(lr=3e-3, warmup_steps=1, rates=ATTENTION)
    train(cache, tmp_path / "whole", num_steps=3, optim=optim)
    before = model().state_dict()
    for weights in ("model", "ema"):
        after = tensors(tmp_path / "whole", f"{weights}/*.safetensors")
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert {f"blocks.{block}.video.to_qkv.weight" for block in range(2)} <= changed
        assert all(".to_qkv." in name for name in changed)
    train(cache, tmp_path / "half", num_steps=2, optim=optim)
    train(cache, tmp_path / "half", num_steps=3, optim=optim, resume=True)
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


# Schedules


def test_drops_follow_the_schedule():
    schedule = MoCSchedule([Stage(2, drop_off_max=0.0, drop_in_rate=0.0), Stage(4, 640, 3), Stage(6, drop_in_rate=2.0)])
    config = MoCConfig(drop_off_max=0.8, drop_in_rate=0.3)
    seen = [schedule.at(step, config) for step in (0, 2, 4, 6)]
    assert [(c.drop_off_max, c.drop_in_rate) for c in seen] == [(0.8, 0.3), (0, 0), (0, 0), (0, 2.0)]
    assert [(c.chunk_tokens, c.top_k) for c in seen] == [(1280, 5), (1280, 5), (640, 3), (640, 3)]
    with pytest.raises(UserError, match=r"drop_off_max=1\.5"):
        Stage(2, drop_off_max=1.5)


def test_a_run_without_drops_from_a_step_on(cache, tmp_path):
    without = replace(DROPS, drop_off_max=0.0, drop_in_rate=0.0)
    for name, moc, schedule in (
        ("never", without, ()),
        ("always", DROPS, ()),
        ("until", DROPS, [Stage(0, drop_off_max=0.0, drop_in_rate=0.0)]),
        ("from", DROPS, [Stage(2, drop_off_max=0.0, drop_in_rate=0.0)]),
    ):
        train(cache, tmp_path / name, num_steps=3, moc=moc, schedule=schedule)
    never, always, until, from_2 = (losses(tmp_path / name) for name in ("never", "always", "until", "from"))
    assert until == never != always
    assert from_2[:2] == always[:2]
    assert from_2[2] != always[2]


# The dense model as target


def test_the_target_holds_a_share_of_the_dense_models_velocity():
    """At a share of one, a model that is dense itself has nothing to learn; validation compares with the data."""
    net, moc = model(), MoCConfig(chunk_tokens=6, top_k=1, text_anchor="none")
    sample = Sample([torch.randn(3, 2, 4, 6)] * 3, [torch.randn(2, 8)] * 4)
    batch, levels = make_batch([sample], net.stream, 6), NoiseLevels.equal(0.5, 3)

    def loss(share, config):
        return Flow(dense_target=share).loss(net, batch, levels, config, 0)

    def gradient(share):
        return torch.autograd.grad(loss(share, moc).sum(), list(net.parameters()), allow_unused=True)

    assert loss(1.0, replace(moc, dense=True)).abs().max() == 0
    assert not torch.equal(loss(0.5, moc), loss(0.0, moc))
    with torch.no_grad():
        assert torch.equal(loss(0.5, moc), loss(0.0, moc))
    plain, mixed, whole = (
        [*torch.autograd.grad(loss(s, moc).sum(), net.parameters(), allow_unused=True)] for s in (0.0, 0.25, 1.0)
    )
    for a, b, c in zip(plain, mixed, whole, strict=True):
        if a is not None:  # the gradient is linear in the target
            torch.testing.assert_close(b, 0.75 * a + 0.25 * c, atol=1e-6, rtol=1e-4)
    with pytest.raises(UserError, match=r"flow\.dense_target=1\.5"):
        Flow(dense_target=1.5)


@pytest.mark.parametrize("recomputed", [False, True])
def test_attention_is_drawn_to_dense_attention(recomputed):
    """The loss is the distance of each layer's output, with the queries, keys and values that the model has; validation
    and dense layers leave it out."""
    net, moc = model(num_layers=3), MoCConfig(chunk_tokens=6, top_k=1, text_anchor="none", dense_layers=1)
    sizes = [(2, 4, 6), (1, 4, 6), (3, 4, 4)]
    sample = Sample([torch.randn(3, *size) for size in sizes], [torch.randn(2, 8)] * 4)
    batch, levels = make_batch([sample, sample], net.stream, 6), NoiseLevels.equal(0.5, 6)
    if recomputed:
        net.enable_gradient_checkpointing()
        net.recompute_sublayers()

    def loss(weight, config):
        return Flow(dense_attention=weight).loss(net, batch, levels, config, 0)

    plain, drawn = loss(0.0, moc), loss(0.5, moc)
    with torch.no_grad():
        assert torch.equal(loss(0.5, moc), plain)
    assert torch.equal(loss(0.5, replace(moc, dense=True)), loss(0.0, replace(moc, dense=True)))
    assert torch.equal(loss(0.5, replace(moc, dense_layers=3)), loss(0.0, replace(moc, dense_layers=3)))

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        attend = stream.moc_attention
        patch.setattr(stream, "moc_attention", lambda *args, **more: seen.append(attend(*args, **more)) or seen[-1])
        loss(0.5, moc)
    lengths = [size[0] * size[1] * size[2] // 4 for size in sizes] * 2
    _, *by_layer = (x.detach()[batch.layout.video_index].split(lengths) for x in seen)  # the first layer is dense
    shares = torch.tensor(
        [
            [(x - y).square().sum() / y.square().sum() for x, y in zip(sparse, dense, strict=True)]
            for sparse, dense in zip(by_layer[::2], by_layer[1::2], strict=True)
        ]
    )
    assert shares.shape == (2, 6)
    torch.testing.assert_close(drawn - plain, 0.5 * shares.mean(0), rtol=1e-3, atol=1e-6)
    assert shares.min() > 0.01

    names = [name for name, _ in net.named_parameters()]
    total = {}
    for weight in (0.0, 0.5, 1.0):
        gradients = torch.autograd.grad(loss(weight, moc).sum(), net.parameters(), allow_unused=True)
        total[weight] = dict(zip(names, gradients, strict=True))
    for name, none in total[0.0].items():
        if none is not None:  # the gradient is linear in the weight
            torch.testing.assert_close(total[0.5][name], (none + total[1.0][name]) / 2, atol=1e-6, rtol=1e-4)
    changed = {name for name in names if not torch.equal(total[0.0][name], total[1.0][name])}
    assert "blocks.1.video.to_qkv.weight" in changed
    with pytest.raises(UserError, match=r"flow\.dense_attention=-1"):
        Flow(dense_attention=-1)


def test_a_run_drawn_to_dense_attention_resumes(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.runs.Flow", lambda: Flow(dense_attention=0.5))
    train(cache, tmp_path / "whole", num_steps=3, moc=DROPS)
    train(cache, tmp_path / "half", num_steps=2, moc=DROPS)
    train(cache, tmp_path / "half", num_steps=3, moc=DROPS, resume=True)
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def test_a_run_with_the_dense_target_trains_and_resumes(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.runs.Flow", lambda: Flow(dense_target=0.5))
    train(cache, tmp_path / "whole", num_steps=3, moc=DROPS)
    train(cache, tmp_path / "half", num_steps=2, moc=DROPS)
    train(cache, tmp_path / "half", num_steps=3, moc=DROPS, resume=True)
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    monkeypatch.undo()
    train(cache, tmp_path / "plain", num_steps=3, moc=DROPS)
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "schedulefree.AdamWScheduleFree", "optimi.StableAdamW"])
def test_shards_step_as_the_whole_does_and_go_on_alone(cache, tmp_path, name):
    """Two processes have half of every weight each, and then one has the whole of what they saved."""
    optim = OptimConfig(name, lr=3e-3, warmup_steps=2)
    train(cache, tmp_path / "one", num_steps=6, moc=DROPS, optim=optim)
    launch(2, cache, tmp_path / "two", "--axis", "shard", "--optim", name)
    train(cache, tmp_path / "two", num_steps=6, moc=DROPS, optim=optim, resume=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
