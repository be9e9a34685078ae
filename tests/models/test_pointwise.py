"""The kernels of the pointwise work, interpreted on a CPU, against the plain functions: results and every gradient."""

import pytest
import torch
from torch import Tensor

from moc import Shot, ShotLayout
from models import frozen, layers, rope
from models.members import Members
from models.part import Part
from tests.moc.against_reference import interpreted
from tests.rounding import assert_rounded_alike

pointwise = pytest.importorskip("models.pointwise", exc_type=ImportError)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def cases(length: int, groups: int, dtype: torch.dtype) -> dict[str, tuple]:
    """Each function with arguments for `length` tokens: no powers of two, slices, groups without tokens."""
    group = torch.randint(0, groups, (length,), dtype=torch.int32).sort().values
    members = Members(group, group.bincount(minlength=groups))
    rows = numbers(groups, 6 * 24).chunk(6, dim=-1)
    x, change = numbers(length, 24, dtype=dtype), numbers(length, 24, dtype=dtype)
    heads = numbers(length, 3, 3, 12, dtype=dtype).unbind(1)[1]
    angles = torch.randn(length, 6)
    return {
        "modulate": (layers.modulate, (x, rows[1], rows[3], members)),
        "add_gated": (layers.add_gated, (x, change, rows[2], members)),
        "layer_norm": (layers.layer_norm, (x, numbers(24), numbers(24), 1e-6)),
        "rms_norm": (layers.rms_norm, (heads, numbers(12), 1e-6)),
        "rms_norm_of_rows": (layers.rms_norm, (x, numbers(24), 1e-6)),
        "rotate": (rope.rotate, (heads, (angles.cos(), angles.sin()))),
    }


def results(function, arguments) -> list[Tensor]:
    inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    out = function(*arguments)
    direction = torch.linspace(-1, 1, out.numel()).bfloat16().view_as(out)
    return [out, *torch.autograd.grad(out, inputs, direction.to(out.dtype))]


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
@pytest.mark.parametrize("name", cases(1, 1, torch.bfloat16))
def test_kernels_in_half_precision_round_once(name: str):
    function, arguments = cases(70, 5, torch.bfloat16)[name]
    kernel = getattr(pointwise, function.__name__)
    wide = [x.detach().float().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in arguments]
    for found, expected in zip(results(kernel, arguments), results(function, wide), strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-5)


@interpreted
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize(
    ("texts", "grid", "heads", "width", "dtype"),
    [((3, 5), (2, 3, 4), 3, 12, torch.float32), ((0, 0), (1, 1, 1), 2, 16, torch.float32),
     ((7, 2), (3, 5, 7), 4, 8, torch.bfloat16)],
)  # fmt: skip
def test_streams_are_joined_as_the_plain_function_joins_them(rotates, texts, grid, heads, width, dtype):
    part = Part(ShotLayout.build([Shot(texts[0], grid), Shot(texts[1], grid)], texts[0], 8))
    text, video = (numbers(len(x), 3 * heads * width, dtype=dtype) for x in (part.text_index, part.video_index))
    weights, angles = [numbers(width) for _ in range(4)], torch.randn(part.num_tokens, width // 2)
    table = (angles.cos(), angles.sin()) if rotates else None

    def results(function, text: Tensor, video: Tensor) -> list[Tensor]:
        out = torch.stack(function(text, video, (weights[:2], weights[2:]), part, table))
        direction = torch.linspace(-1, 1, out.numel()).bfloat16().view_as(out)
        return [out, *torch.autograd.grad(out, [text, video, *weights], direction.to(out.dtype))]

    wide = (x.detach().float().requires_grad_() for x in (text, video))
    tolerance = {"rtol": 2**-7, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for found, expected in zip(results(pointwise.join, text, video), results(layers.join, *wide), strict=True):
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
