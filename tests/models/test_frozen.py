"""These tests are about weights kept in few bytes under an adapter: outputs and gradients within the format's error,
and what is saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moc import MoCConfig, Sample, make_batch
from moc.errors import UserError
from models import ModelConfig, build_model, load_model, save_model
from models.frozen import (
    Base,
    FrozenLinear,
    Rounded,
    has_fp8_matmuls,
    multiply_in_fp8,
    packed,
    replace_linears,
    rounded,
    taken_by,
    unpacked,
)
from models.lora import read_lora
from models.mmdit import MMDiT
from models.stream import StreamModel
from tests import pipeline
from tests.models.test_lora import DENSE, save_base, settings_for
from tests.rounding import assert_rounded_alike

KEPT = [Base.bf16, Base.fp8, Base.int8]
TARGETS = {"wan": ["to_q", "to_v", "net.0.proj", "net.2"], "mmdit": ["to_qkv", "ffn.0", "ffn.2"]}


def rounding(weight: Tensor, base: Base) -> Tensor:
    """Returns the most that a format may change each number of a weight."""
    row = weight.abs().amax(1, keepdim=True)
    if base is Base.int8:
        return (0.5 / 127) * row.expand_as(weight)
    if base is Base.bf16:
        return 2**-8 * weight.abs()
    return (2**-4 * weight.abs()).maximum(2**-10 / 448 * row)  # below 2**-6 fp8 has a fixed step of 2**-9


@pytest.mark.parametrize("base", KEPT)
def test_a_weight_is_kept_to_the_rounding_of_its_format(base: Base) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40) * torch.logspace(-30, 3, 24)[:, None]
    weight[3] = 0
    kept = packed(weight, base)
    assert kept["weight"].element_size() == (2 if base is Base.bf16 else 1)
    found = unpacked(kept["weight"], kept.get("scale"), torch.float32)
    assert ((found - weight).abs() <= 1.01 * rounding(weight, base)).all()
    assert not torch.equal(found, weight)
    again = packed(found, base)
    if base is not Base.bf16:  # packing maps a row's largest number to the format's largest
        assert torch.equal(again["weight"], kept["weight"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("base", KEPT)
def test_a_linear_computes_with_the_kept_weight(base: Base, device: str) -> None:
    """Output and gradient are those of a plain linear with the weight that is kept, in autocast's dtype too."""
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 20), torch.randn(7, 12, device=device, requires_grad=True)
    frozen, plain = (
        layer.to(device) for layer in (FrozenLinear(linear, base), nn.Linear(12, 20).requires_grad_(False))
    )
    plain.weight.copy_(unpacked(frozen.weight, frozen.scale, torch.float32))
    plain.bias.copy_(linear.bias)
    assert not any(weight.requires_grad for weight in frozen.parameters())
    for dtype in (None, torch.bfloat16):
        results = []
        for layer in (frozen, plain):
            with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
                out = layer(x)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), x)))
        (out, grad), (expected, expected_grad) = results
        assert (out.dtype, grad.dtype) == (expected.dtype, torch.float32)
        error = (
            {"rtol": 1e-5, "atol": 1e-4} if dtype is None else {"rtol": 2e-2, "atol": 2e-2 * float(grad.abs().max())}
        )
        torch.testing.assert_close(out, expected, **error)
        torch.testing.assert_close(grad, expected_grad, **error)


def test_a_cpu_without_fp8_matmuls_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("models.frozen.scaled_mm", missing)
    with pytest.raises(UserError, match=r"the CPU has no fp8 matmuls with torch .*; leave out fp8_matmuls"):
        multiply_in_fp8(nn.ModuleList(), torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_multiplies_in_fp8(has_bias: bool, device: str) -> None:
    """Both sides are rounded row by row, the input once for all linears that take it; other sizes multiply as they
    did."""
    if not has_fp8_matmuls(torch.device(device)):
        pytest.skip("this torch has no fp8 matmuls there")
    torch.manual_seed(0)
    layer = FrozenLinear(nn.Linear(48, 32, bias=has_bias), Base.fp8).to(device)
    odd = FrozenLinear(nn.Linear(12, 32), Base.fp8).to(device)
    x = torch.randn(2, 6, 48, device=device) * torch.logspace(-3, 3, 6, device=device)[:, None]
    multiply_in_fp8(nn.ModuleList([layer, odd]), torch.device(device))
    assert not odd.fp8_matmul
    rows = packed(x.flatten(0, 1), Base.fp8)
    rounded = unpacked(rows["weight"], rows["scale"], torch.float32).view_as(x)
    expected = rounded @ unpacked(layer.weight, layer.scale, torch.float32).T
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=False):
        found = layer(x)
        taken = taken_by(layer, x)
        assert isinstance(taken, Rounded)
        assert torch.equal(layer(taken), found)
        assert taken_by(odd, x) is x
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    if has_bias:
        found = found - layer.bias.bfloat16().float()
    error = (found - expected).abs()
    assert (error <= 2**-7 * (expected.abs() + (layer.bias.abs().max() if has_bias else 0)) + 1e-6).all()
    assert not torch.allclose(found, x @ unpacked(layer.weight, layer.scale, torch.float32).T, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 1536, 8960])
def test_a_gpu_rounds_rows_to_the_same_numbers(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 40, width) * torch.logspace(-30, 3, 40)[:, None]).to(dtype)
    x[1, 3] = 0
    for gelu in (False, True):
        found = tuple(part.cpu() for part in rounded(x.cuda(), gelu))
        assert_rounded_alike(found, rounded(x, gelu), exactly=not gelu)


def loss_and_gradients(model: StreamModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients are those of the adapter, which is drawn alike whatever is under it."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(model.named_parameters()):
        if "lora" in name:
            weight.data.normal_(0, 0.1, generator=generator)
    channels, text_dim = (4, 12) if isinstance(model, MMDiT) else (16, 24)
    latents = [torch.randn(channels, 2, 4, 6, generator=generator) for _ in range(2)]
    text = [torch.randn(rows, text_dim, generator=generator) for rows in (3, 2, 4)]
    batch = make_batch([Sample(latents, text)], model.stream, DENSE.chunk_tokens)
    found = model(batch.latents, torch.tensor([0.3, 0.8]), batch.text, batch.layout, DENSE)
    loss = sum((x - y).square().mean() for x, y in zip(found, latents, strict=True))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("base", KEPT)
def test_an_adapter_learns_as_on_the_weights_in_fp32(family: str, base: Base, tmp_path: Path) -> None:
    path = save_base(family, tmp_path / "base")
    settings = settings_for(path, 2, TARGETS[family])
    plain = build_model(settings, 4, 12)
    model = build_model(ModelConfig(**vars(settings) | {"lora_base": base}), 4, 12)
    kept = {name: layer for name, layer in model.named_modules() if isinstance(layer, FrozenLinear)}
    assert kept
    assert all(name.startswith("blocks.") and "modulation" not in name for name in kept)
    linears, left = (
        [x for x in blocks.modules() if isinstance(x, nn.Linear) and not isinstance(x, FrozenLinear)]
        for blocks in (plain.blocks, model.blocks)
    )
    assert len(linears) - len(kept) == len(left)
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(plain)
    assert gradients.keys() == expected.keys()
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    most = {Base.bf16: 0.01, Base.fp8: 0.12, Base.int8: 0.03}[base]
    assert (loss - expected_loss).abs() < most * expected_loss
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < most * expected[name].norm(), name
    assert any(not torch.equal(gradient, expected[name]) for name, gradient in gradients.items())

    save_model(model, tmp_path / "tuned", MoCConfig())
    saved = load_file(tmp_path / "tuned/pytorch_lora_weights.safetensors")
    assert all(".lora_" in name for name in saved)
    assert read_lora(tmp_path / "tuned").base == str(path)
    restored = build_model(ModelConfig(**vars(settings) | {"lora_base": base}), 4, 12)
    restored.load_weights(tmp_path / "tuned")
    assert all(torch.equal(x, y) for x, y in zip(restored.parameters(), model.parameters(), strict=True))
    assert load_model(tmp_path / "tuned").state_dict().keys() == load_model(path).state_dict().keys()


def test_weights_are_packed_as_they_are_read(tmp_path: Path) -> None:
    path = save_base("wan", tmp_path / "base")
    model = load_model(path, base=Base.fp8)
    plain = load_model(path)
    size = sum(weight.nbytes for weight in model.blocks.parameters())
    assert size < 0.35 * sum(weight.nbytes for weight in plain.blocks.parameters())
    name = "blocks.1.attn1.to_q"
    layer, weight = model.get_submodule(name), plain.get_submodule(name).weight
    assert torch.equal(layer.weight, packed(weight, Base.fp8)["weight"])
    assert torch.equal(model.condition_embedder.time_proj.weight, plain.condition_embedder.time_proj.weight)
    assert replace_linears(model, Base.fp8) == {}  # packed weights are not packed again


def test_a_run_resumes_and_the_base_is_refused_without_an_adapter(trained, prepared, tmp_path: Path) -> None:
    """This holds in bf16 as well, in which the trainer computes on a GPU."""
    adapter = ("model.lora_rank=2", "model.lora_targets=[to_qkv,ffn.2]", "model.lora_base=int8")
    settings = (f"model.path={trained}", *adapter, "optim.lr=0.1", "optim.warmup_steps=0", "parallel.precision=bf16")
    for run, steps in (("whole", [2]), ("half", [1, 2])):
        for num_steps in steps:
            pipeline.train(prepared, tmp_path / run, *settings, f"trainer.num_steps={num_steps}")
    file = "checkpoints/step_0000002/model/pytorch_lora_weights.safetensors"
    one, two = (load_file(tmp_path / run / file) for run in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(one[name].any() for name in one if "lora_B" in name)
    with pytest.raises(UserError, match=r"lora_base=fp8 is of weights under an adapter: set"):
        ModelConfig(lora_base=Base.fp8)
