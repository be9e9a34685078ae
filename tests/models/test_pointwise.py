"""These tests are about the kernels of the pointwise work, interpreted on a CPU, against the plain functions: results
and every gradient."""

import pytest
import torch
from torch import Tensor

from moc import MoCConfig, Shot, ShotLayout
from moc.batch import Sample, make_batch
from models import frozen, layers, rope
from models.members import Members
from models.mmdit import MMDiT
from models.part import Part
from tests.moc.against_reference import interpreted
from tests.rounding import assert_rounded_alike

pointwise = pytest.importorskip("models.pointwise", exc_type=ImportError)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def cases(length: int, groups: int, dtype: torch.dtype) -> dict[str, tuple]:
    """Returns each function with arguments for `length` tokens: no powers of two, slices, groups without tokens."""
    group = torch.randint(0, groups, (length,), dtype=torch.int32).sort().values
    members = Members(group, group.bincount(minlength=groups))
    rows = numbers(groups, 6 * 24).chunk(6, dim=-1)
    x, change = numbers(length, 24, dtype=dtype), numbers(length, 24, dtype=dtype)
    heads = numbers(length, 3, 3, 12, dtype=dtype).unbind(1)[1]
    angles = torch.randn(length, 6)
    return {
        "modulate": (layers.modulate, (x, rows[1], rows[3], members)),
        "fork": (layers.fork, (x, rows[1], rows[3], members)),
        "add_gated": (layers.add_gated, (x, change, rows[2], members)),
        "add_gated_with_bias": (layers.add_gated, (x, change, rows[2], members, numbers(24))),
        "add_modulate": (layers.add_modulate, (x, change, rows[2], rows[3], rows[4], members)),
        "add_modulate_with_bias": (layers.add_modulate, (x, change, *rows[2:5], members, numbers(24))),
        "gelu": (layers.gelu, (x,)),
        "gelu_with_bias": (layers.gelu, (x, numbers(24))),
        "layer_norm": (layers.layer_norm, (x, numbers(24), numbers(24), 1e-6)),
        "rms_norm": (layers.rms_norm, (heads, numbers(12), 1e-6)),
        "rms_norm_of_rows": (layers.rms_norm, (x, numbers(24), 1e-6)),
        "rotate": (rope.rotate, (heads, (angles.cos(), angles.sin()))),
    }


def results(function, arguments) -> list[Tensor]:
    """Returns what a function returns, and the gradient of each of its arguments that has one."""
    inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    found = function(*arguments)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    ends = [(1 + i) * torch.linspace(-1, 1, x.numel()).bfloat16().view_as(x) for i, x in enumerate(outputs)]
    directions = [end.to(x.dtype) for end, x in zip(ends, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, directions)]


@interpreted
@pytest.mark.parametrize("name", cases(1, 1, torch.float32))
@pytest.mark.parametrize(("length", "groups"), [(70, 5), (33, 1), (1, 3), (0, 2)])
def test_kernels_equal_the_plain_functions(name: str, length: int, groups: int):
    function, arguments = cases(length, groups, torch.float32)[name]
    kernel = getattr(pointwise, function.__name__)
    for found, expected in zip(results(kernel, arguments), results(function, arguments), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("name", [name for name in cases(1, 1, torch.bfloat16) if not name.startswith("add_modulate")])
def test_kernels_in_half_precision_round_once(name: str):
    function, arguments = cases(70, 5, torch.bfloat16)[name]
    kernel = getattr(pointwise, function.__name__)
    wide = [x.detach().float().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in arguments]
    for found, expected in zip(results(kernel, arguments), results(function, wide), strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-5)


@interpreted
@pytest.mark.parametrize("name", ["add_modulate", "add_modulate_with_bias"])
def test_one_kernel_modulates_the_sum_that_it_writes_in_half_precision(name: str):
    """It equals the kernels of the two, which round the sum too; gradients meet in fp32 and not rounded."""
    _, arguments = cases(70, 5, torch.bfloat16)[name]

    def one_by_one(x, change, gate, shift, scale, members, bias=None):
        total = pointwise.add_gated(x, change, gate, members, bias)
        return total, pointwise.modulate(total, shift, scale, members)

    (out, modulated, *grads), expected = results(pointwise.add_modulate, arguments), results(one_by_one, arguments)
    assert torch.equal(out, expected[0])
    assert torch.equal(modulated, expected[1])
    for found, apart in zip(grads, expected[2:], strict=True):
        assert (found - apart).norm() <= 2**-7 * apart.norm()


def two_shots(texts: tuple[int, int], grid: tuple[int, int, int]) -> Part:
    return Part(ShotLayout.build([Shot(texts[0], grid), Shot(texts[1], grid)], texts[0], 8))


@interpreted
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("biased", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("texts", "grid", "heads", "width", "dtype"),
    [((3, 5), (2, 3, 4), 3, 12, torch.float32), ((0, 0), (1, 1, 1), 2, 16, torch.float32),
     ((7, 2), (3, 5, 7), 4, 8, torch.bfloat16)],
)  # fmt: skip
def test_streams_are_joined_as_the_plain_function_joins_them(rotates, biased, texts, grid, heads, width, dtype):
    part = two_shots(texts, grid)
    text, video = (numbers(len(x), 3 * heads * width, dtype=dtype) for x in (part.text_index, part.video_index))
    weights, angles = [numbers(width) for _ in range(4)], torch.randn(part.num_tokens, width // 2)
    biases = [numbers(3 * heads * width) if given else None for given in biased]
    table = (angles.cos(), angles.sin()) if rotates else None

    def joined(function, text: Tensor, video: Tensor) -> list[Tensor]:
        def call(text: Tensor, video: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            return function(text, video, (weights[:2], weights[2:]), part, table, biases)

        return results(call, (text, video, *weights, *biases))

    wide = (x.detach().float().requires_grad_() for x in (text, video))
    tolerance = {"rtol": 2**-7, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for found, expected in zip(joined(pointwise.join, text, video), joined(layers.join, *wide), strict=True):
        torch.testing.assert_close(found.float(), expected, **tolerance)


@interpreted
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("length", "width", "dtype"), [(9, 48, torch.float32), (5, 70, torch.bfloat16)])
def test_rows_are_rounded_as_the_plain_function_rounds_them(gelu, length, width, dtype):
    """The interpreter casts to fp8 wrongly where a carry makes the exponent larger, so that torch casts here; a test on
    a GPU has it cast itself."""
    x = (torch.randn(length, width) * torch.logspace(-30, 0, length)[:, None]).to(dtype)
    x[1] = 0
    numbers, scale = torch.full((length, width), torch.nan), torch.full((length, 1), torch.nan)
    least = torch.finfo(torch.float32).tiny * 448
    pointwise.kernels.round_kernel[(length,)](x, numbers, scale, 448.0, least, gelu, **pointwise._sizes(width))
    assert_rounded_alike((numbers.to(torch.float8_e4m3fn), scale), frozen.rounded(x, gelu), exactly=not gelu)


@interpreted
@pytest.mark.parametrize(("texts", "grid"), [((3, 5), (2, 3, 4)), ((0, 0), (1, 1, 1))])
def test_streams_are_split_as_the_plain_function_splits_them(texts, grid):
    part = two_shots(texts, grid)
    stream = numbers(part.num_tokens, 3, 12)
    for found, expected in zip(*(results(f, (stream, part)) for f in (pointwise.split, layers.split)), strict=True):
        assert torch.equal(found, expected)


@interpreted
def test_blocks_of_kernels_equal_blocks_of_plain_functions(monkeypatch):
    """The output and every gradient of a model are compared, with the biases that linears leave to the kernels on a
    GPU."""
    model = MMDiT(latent_channels=2, text_dim=5, dim=24, num_layers=2, num_heads=2, ffn_dim=40)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    latents = [torch.randn(2, frames, 4, 6) for frames in (3, 1, 2)]
    samples = [
        Sample(some, [torch.randn(2 + i, 5) for i in range(len(some) + 1)]) for some in (latents[:2], latents[2:])
    ]
    batch = make_batch(samples, model.stream, 6)

    def computed() -> list[Tensor]:
        out = model(batch.latents, torch.tensor([0.2, 0.7, 0.9]), batch.text, batch.layout, MoCConfig(top_k=1))
        return [*out, *torch.autograd.grad(sum((x**2).sum() for x in out), list(model.parameters()), allow_unused=True)]

    plain = computed()
    for name in ("modulate", "fork", "add_gated", "add_modulate", "gelu", "join", "split"):
        monkeypatch.setattr(layers, name, getattr(pointwise, name))
    monkeypatch.setattr(layers, "left_bias", lambda layer, _: layer.bias)
    monkeypatch.setattr(layers, "product", lambda layer, x: (layer(x, add_bias=False), layer.bias))
    for (name, _), found, expected in zip(
        [*enumerate(latents), *model.named_parameters()], computed(), plain, strict=True
    ):
        assert (found is None) == (expected is None), name
        assert expected is None or (found - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name
