"""These tests are about weights and activations that wait on the host: steps are those without, bit for bit, and the
right ones move."""

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor

from moc.batch import make_batch
from moc.diffusion import Flow
from moc.errors import UserError
from moc.host_memory import Offsets, host_memory
from moc.schedule import MoCSchedule
from moc.training import OptimConfig, Parallel, ParallelConfig, Trainer, TrainerConfig, find_checkpoint
from moc.training.offload import OffloadActivations, OffloadedAdamW
from moc.training.optim import RateConfig
from moc.training.swap import Swap
from models.mmdit import MMDiT
from tests import runs
from tests.meshes import SETTINGS, Case, assert_alike, make_model, make_samples, state, step
from tests.runs import losses, make_cache, train

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"))


def make_trainer(case: Case, device: str, folder: Path = Path(), optim: OptimConfig | None = None, **parallel: object):
    PartialState._reset_state()
    torch.manual_seed(0)
    config = ParallelConfig(device, "fp32", activation_checkpointing=True, **parallel)
    return Trainer(
        Parallel(config), make_model(case), Flow(dense_attention=0.5), SETTINGS[case.family], MoCSchedule(),
        optim or OptimConfig(), TrainerConfig(), folder, 0, save_extras=lambda _: None,
    )  # fmt: skip


def two_steps(case: Case, device: str, **parallel: object) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Returns the loss and the gradients of a step, and what is there after another one."""
    trainer = make_trainer(case, device, **parallel)
    return step(case, trainer), [*step(case, trainer).values(), *state(trainer)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["mmdit", "wan"])
def test_steps_are_those_without(family: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are equal bit for bit on a CPU; on a GPU attention adds up its gradients in no fixed order."""
    case = Case(family, True, 2, True)
    first, later = two_steps(case, device)
    monkeypatch.setattr("moc.training.offload._LEAST", 1)
    monkeypatch.setattr("moc.training.offload._PIECE", 64)
    for more in ({"swap_blocks": 2}, {"swap_blocks": 3}, {"offload_activations": True}):
        found, found_later = two_steps(case, device, **more)
        assert_alike(found, first, str(more))
        if device == "cpu":
            assert all(torch.equal(found[name], value) for name, value in first.items()), more
            assert len(found_later) == len(later)
            assert all(map(torch.equal, found_later, later)), more


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_comes_while_the_one_before_it_computes(device: str) -> None:
    """When a block begins, forward or backward, it and the next one of that direction are on the device, and the frozen
    weights of all others are on the host."""
    case = Case("wan", True, 1, True)
    model = make_model(case)
    alone = {name: weight.clone() for name, weight in model.named_parameters()}
    swap = Swap(model, len(model.blocks), torch.device(device))
    begun: list[tuple[int, list[int]]] = []

    def here() -> list[int]:
        held = [slot.holds for slot in swap._slots]
        for index, block in enumerate(model.blocks):
            frozen = [weight for weight in block.parameters() if not weight.requires_grad]
            memory = swap._slots[held.index(index)].memory if index in held else swap._waiting[index].host
            storages = {weight.untyped_storage().data_ptr() for weight in frozen}
            assert storages == {memory.untyped_storage().data_ptr()}
        return sorted(x for x in held if x is not None)

    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: begun.append((index, here())))
    batch = make_batch(make_samples(), model.stream, 6).to(torch.device(device))
    sigma = torch.full((batch.layout.num_shots,), 0.5, device=device)
    for _ in range(2):
        found = model(batch.latents, sigma, batch.text, batch.layout, SETTINGS["wan"])
        torch.stack([x.square().mean() for x in found]).sum().backward()
    both = [(0, [0, 1]), (1, [1, 2]), (2, [1, 2]), (2, [1, 2]), (1, [0, 1]), (0, [0, 1])]
    assert begun == both + both
    assert all(torch.equal(weight.cpu(), alone[name]) for name, weight in model.named_parameters())


def test_frozen_parameters_are_swapped_and_saved_too(cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no adapter is trained but some of the weights themselves, a run goes on as it would without."""
    optim = OptimConfig(lr=3e-3, warmup_steps=1, rates=[RateConfig("blocks.*.to_qkv.*"), RateConfig("*", 0)])
    enable = MMDiT.enable_gradient_checkpointing
    monkeypatch.setattr(runs, "MMDiT", lambda *args, **sizes: enable(net := MMDiT(*args, **sizes)) or net)
    for name, axes in (("plain", {}), ("swapped", {"swap_blocks": 2, "activation_checkpointing": True})):
        train(cache, tmp_path / name, num_steps=2, optim=optim, axes=axes)
        train(cache, tmp_path / name, num_steps=3, optim=optim, axes=axes, resume=True)
    assert losses(tmp_path / "swapped") == losses(tmp_path / "plain")
    for file in sorted((tmp_path / "plain/checkpoints").rglob("*/*.safetensors")):
        one, two = load_file(file), load_file(tmp_path / "swapped" / file.relative_to(tmp_path / "plain"))
        assert all(torch.equal(one[name], two[name]) for name in one), file


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_saved_for_backward_waits_on_the_host(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors alone go to the host, in pieces that end where the tensor does; a weight stays."""
    monkeypatch.setattr("moc.training.offload._LEAST", 400)
    monkeypatch.setattr("moc.training.offload._PIECE", 256)
    hooks, kept = OffloadActivations(torch.device(device)), []
    pack = hooks.pack_hook
    hooks.pack_hook = lambda x: kept.append(pack(x)) or kept[-1]
    weight = torch.nn.Parameter(torch.randn(10, 10, device=device))
    small, large = (torch.randn(n, 10, device=device, requires_grad=True) for n in (9, 13))
    with hooks:
        out = ((small @ weight).square().sum() + (large @ weight).sin().sum()) * weight.sum()
    gradients = torch.autograd.grad(out, [weight, small, large])
    plain = ((small @ weight).square().sum() + (large @ weight).sin().sum()) * weight.sum()
    assert all(map(torch.equal, gradients, torch.autograd.grad(plain, [weight, small, large])))
    moved = [x for x in kept if not isinstance(x, Tensor)]
    assert {x.shape for x in moved} == {large.shape}
    assert [len(piece) for piece in moved[0].pieces] == [64, 64, 2]
    assert all(piece.device.type == "cpu" for x in moved for piece in x.pieces)
    assert any(x is weight for x in kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swap_blocks": 1}, "swap_blocks=1 needs blocks to be computed once more"),
        ({"swap_blocks": 1, "activation_checkpointing": True, "shard": 2}, "take it without parallel.shard"),
        ({"swap_blocks": -1}, "parallel.swap_blocks=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("lora", "count", "message"), [(True, 4, "more than the model's 3"), (False, 1, "set model.lo")]
)
def test_blocks_that_cannot_be_swapped_are_refused(lora: bool, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(Case("mmdit", lora, 1, True), "cpu", swap_blocks=count)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["mmdit", "wan"])
def test_sublayers_that_are_recomputed_give_the_same_and_keep_less(family: str, device: str) -> None:
    """An adapter and all weights are tried, with a swap as well. While a block's backward runs, less is kept for it."""
    for case in (Case(family, True, 2, True), Case(family, False, 1, True)):
        plain = make_trainer(case, device)
        expected = step(case, plain)
        trainer = make_trainer(case, device, recompute_sublayers=True, swap_blocks=2 * case.lora)
        trainer.bare_model.recompute_sublayers()
        found = step(case, trainer)
        assert_alike(found, expected, case.name)
    assert kept_bytes(trainer) < 0.6 * kept_bytes(plain)


def kept_bytes(trainer: Trainer) -> int:
    """Returns what a forward without outer recomputation keeps for its backward, weights left out."""
    model, storages = trainer.bare_model, {}
    model.disable_gradient_checkpointing()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
        return x

    batch = make_batch(make_samples(), model.stream, 6).to(trainer.parallel.device)
    sigma = torch.full((batch.layout.num_shots,), 0.5, device=trainer.parallel.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(batch.latents, sigma, batch.text, batch.layout, trainer.moc)
    return sum(storages.values())


def test_tensors_lie_in_memory_one_after_another() -> None:
    given = [torch.randn(3, 5), torch.randint(0, 9, (7,), dtype=torch.uint8), torch.randn(4).bfloat16(), torch.randn(2)]
    offsets = Offsets(given)
    memory = host_memory(offsets.size, pinned=False)
    assert (len(memory), memory.data_ptr() % 4096) == (4 * 256, 0)
    assert memory.untyped_storage().data_ptr() == memory.data_ptr()
    for here, tensor in zip(offsets.views(memory), given, strict=True):
        here.copy_(tensor)
    for here, tensor in zip(offsets.views(memory.clone()), given, strict=True):
        assert torch.equal(here, tensor)
        assert here.dtype == tensor.dtype


@pytest.mark.gpu
def test_memory_is_pinned_as_long_as_it_lasts() -> None:
    for _ in range(3):
        memory = host_memory(5000, pinned=True)
        assert memory[4000:].is_pinned()
        del memory


def test_memory_is_unpinned_when_all_copies_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        cudaHostRegister = staticmethod(lambda *_: said.append("pinned") or 0)
        cudaHostUnregister = staticmethod(lambda _: said.append("unpinned"))

    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("waited"))
    memory = host_memory(5000, pinned=True)
    assert said == ["pinned"]
    del memory
    assert said == ["pinned", "waited", "unpinned"]


@pytest.mark.parametrize("device", DEVICES)
def test_averages_come_to_the_device_for_a_step_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moc.training.offload._STEPPED", 100)
    nets = [torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    plain, offloaded = (
        kind(net.to(device).parameters(), lr=0.1, fused=True)
        for kind, net in zip((torch.optim.AdamW, OffloadedAdamW), nets, strict=True)
    )
    for skipped in (0.0, 1.0, 0.0, 0.0):
        for net, optimizer in zip(nets, (plain, offloaded), strict=True):
            optimizer.zero_grad()
            net(torch.ones(3, 8, device=device)).square().sum().backward()
            optimizer.found_inf = torch.tensor(skipped, device=device)
            optimizer.step()
    for one, two in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, two)
        assert offloaded.state[two]["exp_avg"].device.type == "cpu"
        for key, value in plain.state[one].items():
            assert torch.equal(offloaded.state[two][key].cpu(), value.cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_whose_averages_wait_on_the_host_is_saved_and_goes_on(device: str, tmp_path: Path) -> None:
    case, optim = Case("mmdit", False, 1, True), OptimConfig(offload=True)
    trainer = make_trainer(case, device, tmp_path, optim)
    step(case, trainer)
    trainer.save({"position": 0})
    resumed = make_trainer(case, device, tmp_path, optim)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    resumed.resume(checkpoint)
    waiting = [kept["exp_avg"].device.type for kept in resumed.optimizer.state.values()]
    assert len(waiting) > 20
    assert set(waiting) == {"cpu"}
    assert all(map(torch.equal, state(resumed), state(trainer)))
    assert_alike(step(case, resumed), step(case, trainer), device)
