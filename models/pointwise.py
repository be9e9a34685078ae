"""On a GPU each pointwise function of `models.layers` and `models.rope` is one kernel, and one or two backward.

Eager, each of their operations reads and writes all tokens in fp32. torch.compile makes as few kernels, but takes many
seconds at the start of every process, and more for other lengths. `models.fuse` calls the functions here in place of
those, by name; arguments and results are the same, to rounding, and stand in the docstrings there.

Shape letters: L tokens, N heads, D head dim or width, G groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moc.kernels.sizes import cdiv, next_power_of_2
from models import head_kernels
from models import pointwise_kernels as kernels
from models.members import Members
from models.part import Part, Table

ROWS = 32  # rows for each program of a backward kernel
ELEMENTS = 512  # numbers of a row that each warp takes
HEADS, ROUNDS = 32, 16  # heads for each program that joins streams; blocks for each program of some backwards
GELU = {"BM": 8, "BN": 256}


def _sizes(width: int, num_heads: int | None = None) -> dict[str, int]:
    """Returns the constants of a kernel whose programs hold rows of num_heads * width numbers."""
    sizes = {"D": width, "DP": next_power_of_2(width)}
    if num_heads is not None:
        sizes |= {"N": num_heads, "NP": next_power_of_2(num_heads)}
    return sizes | {"num_warps": max(1, min(16, sizes["DP"] * sizes.get("NP", 1) // ELEMENTS))}


def _rows(x: Tensor) -> Tensor:
    """Returns x [G, D] with contiguous rows; they may lie apart, as those of a slice do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _group_sums(sums: Tensor, starts: Tensor | None, num_rows: int, num_groups: int) -> Tensor:
    """Sums the tables [blocks + G, ...] of a backward kernel to fp32 [G, ...]."""
    out = sums.new_empty(num_groups, *sums.shape[1:])
    width, block = out[0].numel(), 128 if starts is None else 8  # one group has few rows, the whole stream has many
    kernels.group_sums_kernel[(num_groups, cdiv(width, 64))](
        sums, starts, out, num_rows, width, ROWS=ROWS, BM=block, BN=64
    )
    return out


class _Modulate(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, group: Tensor | None, starts: Tensor | None, eps: float,
        one: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Takes x [L, D], shift and scale [G, D]; `one` is added to scale. Returns x too: the gradient of what becomes
        of it there is added by the kernel that writes x's."""
        x, shift, scale = x.contiguous(), _rows(shift), _rows(scale)
        if shift.stride() != scale.stride():
            shift, scale = shift.contiguous(), scale.contiguous()
        ctx.save_for_backward(x, scale, group, starts)
        ctx.eps, ctx.one, ctx.dtype = eps, one, shift.dtype
        ctx.set_materialize_grads(False)
        out, (num_rows, width) = torch.empty_like(x), x.shape
        if num_rows:
            kernels.modulate_kernel[(num_rows,)](
                x, shift, scale, group, out, scale.stride(0), eps, ONE=one, **_sizes(width)
            )
        return x, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dthrough: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, group, starts = ctx.saved_tensors
        if dout is None:
            return dthrough, *(None,) * 6
        (num_rows, width), num_groups = x.shape, scale.shape[0]
        dx, blocks = torch.empty_like(x), cdiv(num_rows, ROWS)
        sums = x.new_empty(blocks + num_groups, 2, width, dtype=torch.float32)
        dthrough = dthrough if dthrough is None else dthrough.contiguous()
        if num_rows:
            kernels.modulate_backward_kernel[(blocks,)](
                x, scale, group, dthrough, dout.contiguous(), dx, sums, num_rows, scale.stride(0), ctx.eps,
                ONE=ctx.one, **_sizes(width), ROWS=ROWS,
            )  # fmt: skip
        dshift, dscale = _group_sums(sums, starts, num_rows, num_groups).unbind(1)
        return dx, dshift.to(ctx.dtype), dscale.to(scale.dtype), None, None, None, None


class _AddGated(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, change: Tensor, gate: Tensor, bias: Tensor | None, group: Tensor, starts: Tensor
    ) -> Tensor:
        x, change, gate = x.contiguous(), change.contiguous(), _rows(gate)
        ctx.save_for_backward(change, gate, bias, group, starts)
        out, (num_rows, width) = torch.empty_like(x), x.shape
        if num_rows:
            kernels.add_gated_kernel[(num_rows,)](x, change, gate, bias, group, out, gate.stride(0), **_sizes(width))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        change, gate, bias, group, starts = ctx.saved_tensors
        (num_rows, width), num_groups = change.shape, gate.shape[0]
        dchange, blocks = torch.empty_like(change), cdiv(num_rows, ROWS)
        sums = change.new_empty(blocks + num_groups, 2, width, dtype=torch.float32)
        if num_rows:
            kernels.add_gated_backward_kernel[(blocks,)](
                change, gate, bias, group, dout.contiguous(), dchange, sums, num_rows, gate.stride(0),
                **_sizes(width), ROWS=ROWS,
            )  # fmt: skip
        dgate, dbias = _group_sums(sums, starts, num_rows, num_groups).unbind(1)
        return dout, dchange, dgate.to(gate.dtype), _of_bias(dbias, bias), None, None


class _AddModulate(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, change: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None,
        group: Tensor, starts: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, change = x.contiguous(), change.contiguous()
        gate, shift, scale = (_rows(rows) for rows in (gate, shift, scale))
        if len({rows.stride() for rows in (gate, shift, scale)}) > 1:
            gate, shift, scale = (rows.contiguous() for rows in (gate, shift, scale))
        out, modulated = torch.empty_like(x), torch.empty_like(x)
        ctx.save_for_backward(out, change, gate, scale, bias, group, starts)
        ctx.eps, ctx.dtype = eps, shift.dtype
        num_rows, width = x.shape
        if num_rows:
            kernels.add_modulate_kernel[(num_rows,)](
                x, change, gate, bias, shift, scale, group, out, modulated, gate.stride(0), eps, **_sizes(width)
            )
        return out, modulated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dmodulated: Tensor) -> tuple[Tensor | None, ...]:
        out, change, gate, scale, bias, group, starts = ctx.saved_tensors
        (num_rows, width), num_groups = change.shape, gate.shape[0]
        dx, dchange, blocks = torch.empty_like(out), torch.empty_like(change), cdiv(num_rows, ROWS)
        sums = change.new_empty(blocks + num_groups, 4, width, dtype=torch.float32)
        if num_rows:
            kernels.add_modulate_backward_kernel[(blocks,)](
                out, change, gate, bias, scale, group, dout.contiguous(), dmodulated.contiguous(), dx, dchange, sums,
                num_rows, gate.stride(0), ctx.eps, **_sizes(width), ROWS=ROWS,
            )  # fmt: skip
        dshift, dscale, dgate, dbias = _group_sums(sums, starts, num_rows, num_groups).unbind(1)
        of_rows = dgate.to(gate.dtype), dshift.to(ctx.dtype), dscale.to(scale.dtype)
        return dx, dchange, *of_rows, _of_bias(dbias, bias), None, None, None


def _of_bias(sums: Tensor, bias: Tensor | None) -> Tensor | None:
    """Returns the gradient of a bias, if there is one, of its parts [n, D]."""
    return None if bias is None else sums.sum(0).to(bias.dtype)


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        out, (num_rows, width) = torch.empty_like(x), x.shape
        if num_rows:
            grid = cdiv(num_rows, GELU["BM"]), cdiv(width, GELU["BN"])
            kernels.gelu_kernel[grid](x, bias, out, num_rows, width, **GELU)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, (num_rows, width) = torch.empty_like(x), x.shape
        blocks = cdiv(num_rows, GELU["BM"] * ROUNDS)
        sums = x.new_empty(blocks, width, dtype=torch.float32)
        if num_rows:
            kernels.gelu_backward_kernel[(blocks, cdiv(width, GELU["BN"]))](
                x, bias, dout.contiguous(), dx, sums, num_rows, width, ROUNDS=ROUNDS, **GELU
            )
        return dx, _of_bias(sums, bias)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Takes x [L, N, D], whose tokens may lie apart."""
        if x.stride()[1:] != (x.shape[2], 1):
            x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = x.new_empty(x.shape)
        num_rows, num_heads, width = x.shape
        if num_rows:
            head_kernels.rms_norm_kernel[(num_rows,)](x, weight, out, x.stride(0), eps, **_sizes(width, num_heads))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        num_rows, num_heads, width = x.shape
        dx, blocks = x.new_empty(x.shape), cdiv(num_rows, ROWS)
        sums = x.new_empty(blocks + 1, width, dtype=torch.float32)
        if num_rows:
            head_kernels.rms_norm_backward_kernel[(blocks,)](
                x, weight, dout.contiguous(), dx, sums, num_rows, x.stride(0), ctx.eps,
                **_sizes(width, num_heads), ROWS=ROWS,
            )  # fmt: skip
        return dx, _group_sums(sums, None, num_rows, 1)[0].to(weight.dtype), None


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.sign = sign
        x, out = x.contiguous(), x.new_empty(x.shape)
        num_rows, num_heads, width = x.shape
        if num_rows:
            head_kernels.rotate_kernel[(num_rows,)](x, cos, sin, out, sign, **_sizes(width, num_heads))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _Rotate.apply(dout, *ctx.saved_tensors, -ctx.sign), None, None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, text: Tensor, video: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Takes text and video [rows, 3 N D], then their biases, their norms' weights, their rows' tokens, the table
        and eps."""
        text, video = text.contiguous(), video.contiguous()
        *tensors, ctx.eps = rest
        ctx.save_for_backward(text, video, *tensors)
        rows, sizes = (len(text), len(video)), _head_sizes(video, tensors[2])
        q, k, v = (video.new_empty(sum(rows), sizes["N"], sizes["D"]) for _ in range(3))
        if blocks := sum(cdiv(number * sizes["N"], sizes["BLOCK"]) for number in rows):
            head_kernels.join_kernel[(blocks,)](text, video, *tensors, q, k, v, *rows, ctx.eps, **sizes)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        text, video, *tensors = ctx.saved_tensors
        rows, sizes = (len(text), len(video)), _head_sizes(video, tensors[2])
        dtext, dvideo = torch.empty_like(text), torch.empty_like(video)
        of_text, of_video = (cdiv(number, sizes["BLOCK"] * ROUNDS) for number in rows)
        blocks, shape = of_text + of_video, (5, sizes["N"], sizes["D"])
        sums, out = (
            video.new_empty(blocks, *shape, dtype=torch.float32),
            video.new_empty(2, *shape, dtype=torch.float32),
        )
        if blocks:
            head_kernels.join_backward_kernel[(sizes["N"], blocks)](
                text, video, *tensors, *(grad.contiguous() for grad in grads), dtext, dvideo, sums, *rows, of_text,
                ctx.eps, **sizes, ROUNDS=ROUNDS,
            )  # fmt: skip
        width = out[0].numel()
        kernels.stream_sums_kernel[(2, cdiv(width, 64))](sums, out, of_text, blocks, width, BM=128, BN=64)
        found = [*out[:, :3].flatten(1).unbind(), *out[:, 3:].sum(2).flatten(0, 1).unbind()]
        dweights = [None if x is None else grad.to(x.dtype) for grad, x in zip(found, tensors[:6], strict=True)]
        return dtext, dvideo, *dweights, *(None,) * 5


def _head_sizes(qkv: Tensor, weight: Tensor) -> dict[str, int]:
    """Returns the constants of the kernels that take heads of rows [Lx, 3 N D]; weight [D]."""
    width = len(weight)
    block = HEADS if width <= 64 else HEADS // 2  # all of wide ones would not fit into registers
    return {"N": qkv.shape[1] // (3 * width), "D": width, "DP": next_power_of_2(width), "BLOCK": block, "num_warps": 4}


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, text_index: Tensor, video_index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(text_index, video_index)
        stream = stream.contiguous()
        text, video = (stream.new_empty(len(index), *stream.shape[1:]) for index in (text_index, video_index))
        _copy_rows(stream, text, video, text_index, video_index, JOINS=False)
        return text, video

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, text: Tensor, video: Tensor) -> tuple[Tensor, None, None]:
        stream = video.new_empty(len(text) + len(video), *video.shape[1:])
        _copy_rows(stream, text.contiguous(), video.contiguous(), *ctx.saved_tensors, JOINS=True)
        return stream, None, None


def _copy_rows(stream: Tensor, text: Tensor, video: Tensor, *tokens: Tensor, **settings: bool) -> None:
    """Copies rows between a stream and its text and video; settings: of the kernel."""
    if num_rows := len(stream):
        width = stream[0].numel()
        block = min(1024, next_power_of_2(width))
        head_kernels.split_kernel[(cdiv(num_rows, 4),)](
            stream, text, video, *tokens, len(text), num_rows, width, BM=4, BN=block, **settings
        )


def modulate(x: Tensor, shift: Tensor, scale: Tensor, members: Members, eps: float = 1e-6) -> Tensor:
    return fork(x, shift, scale, members, eps)[1]


def fork(x: Tensor, shift: Tensor, scale: Tensor, members: Members, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    return _Modulate.apply(x, shift, scale, members.group, members.starts, eps, 1.0)


def add_gated(x: Tensor, change: Tensor, gate: Tensor, members: Members, bias: Tensor | None = None) -> Tensor:
    return _AddGated.apply(x, change, gate, bias, members.group, members.starts)


def add_modulate(
    x: Tensor, change: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, members: Members,
    bias: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _AddModulate.apply(x, change, gate, shift, scale, bias, members.group, members.starts, eps)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Gelu.apply(x.flatten(0, -2), bias).view(x.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _Modulate.apply(x, bias[None], weight[None], None, None, eps, 0.0)[1]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x if x.dim() == 3 else x[:, None], weight, eps).view(x.shape)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    return _Rotate.apply(x, *table, 1.0)


def rounded(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    x, scale = x.contiguous(), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    numbers = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    largest = torch.finfo(numbers.dtype).max
    if scale.numel():
        kernels.round_kernel[(scale.numel(),)](
            x, numbers, scale, LARGEST=largest, LEAST=torch.finfo(torch.float32).tiny * largest, GELU=gelu,
            **_sizes(x.shape[-1]),
        )  # fmt: skip
    return numbers, scale


def join(
    text: Tensor, video: Tensor, norms: Sequence[tuple[Tensor, Tensor]], part: Part, table: Table | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None), eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights = [weight for of_stream in norms for weight in of_stream]
    tokens = part.text_index, part.video_index
    return _Join.apply(text, video, *biases, *weights, *tokens, *(table or (None, None)), eps)


def split(stream: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    return _Split.apply(stream, part.text_index, part.video_index)
