"""These Triton kernels do the pointwise work around attention; `models.pointwise` launches them.

Forward, a program owns one row (a token) and reads it once. Backward, a program owns ROWS rows, one after another, and
keeps sums over them: over a group's rows for what its tokens share, over all rows for a norm's weight. Groups follow
one another in the stream, so the sums of block b for group g have a row of their own, b + g, in a table of
(blocks + groups) rows; `group_sums_kernel` adds them up in that order. There are no atomics, and gradients repeat.

All is computed in fp32. Shape letters: L rows, D width of a row, G groups (DP: a power of two). Those of heads are in
`models.head_kernels`.
"""

import triton
import triton.language as tl


@triton.jit
def _group(group, row):
    """Returns the row's group; all rows are of group 0 where `group` is None."""
    return 0 if group is None else tl.load(group + row).to(tl.int32)


@triton.jit
def _layer_norm(value, inside, eps, D: tl.constexpr):
    """Returns a row, normed, and the factor by which it was."""
    value = tl.where(inside, value - tl.sum(value, 0) / D, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    return value * factor, factor


@triton.jit
def _layer_norm_gradient(grad, normed, factor, D: tl.constexpr):
    """Returns the gradient of a row from that of its norm; normed and factor: as `_layer_norm` returned them."""
    return (grad - tl.sum(grad, 0) / D - normed * (tl.sum(grad * normed, 0) / D)) * factor


@triton.jit
def modulate_kernel(
    x, shift, scale, group, out, stride, eps, ONE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Writes out = norm(x) * (ONE + scale[group]) + shift[group]; shift and scale [G, D] have rows `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    inside = column < D
    normed, _ = _layer_norm(tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32), inside, eps, D)
    offset = _group(group, row) * stride + column
    gain = ONE + tl.load(scale + offset, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(shift + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, (normed * gain + added).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_sums(pointer, first, second, inside, D: tl.constexpr):
    """Writes two of a group's sums, each [D]."""
    tl.store(pointer, first, mask=inside)
    tl.store(pointer + D, second, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def modulate_backward_kernel(
    x, scale, group, dthrough, dout, dx, sums, num_rows, stride, eps,
    ONE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes dx, to which dthrough is added if there is one, and sums [blocks + G, 2, D]: of dout (for shift) and of
    dout * norm(x) (for scale)."""
    block = tl.program_id(0)
    column = tl.arange(0, DP)
    inside = column < D
    # Rows lie group by group: where a group ends its sum is written, to a row that block and group have alone.
    current = _group(group, block * ROWS)
    dshift = tl.zeros([DP], tl.float32)
    dscale = tl.zeros([DP], tl.float32)
    for index in range(tl.minimum(ROWS, num_rows - block * ROWS)):
        row = block.to(tl.int64) * ROWS + index
        own = _group(group, row)
        if own != current:
            _store_sums(sums + (block + current) * (2 * D) + column, dshift, dscale, inside, D)
            dshift, dscale = tl.zeros_like(dshift), tl.zeros_like(dscale)
            current = own
        value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dout + row * D + column, mask=inside, other=0.0).to(tl.float32)
        gain = ONE + tl.load(scale + own * stride + column, mask=inside, other=0.0).to(tl.float32)
        if dthrough is not None:
            through = tl.load(dthrough + row * D + column, mask=inside, other=0.0)
        normed, factor = _layer_norm(value, inside, eps, D)
        dshift += grad
        dscale += grad * normed
        grad *= gain
        grad = _layer_norm_gradient(grad, normed, factor, D)
        if dthrough is not None:
            grad += through.to(tl.float32)
        tl.store(dx + row * D + column, grad.to(dx.dtype.element_ty), mask=inside)
    _store_sums(sums + (block + current) * (2 * D) + column, dshift, dscale, inside, D)


@triton.jit
def biased(x, bias, offset, column, inside):
    """Returns numbers of x, with those of the bias that was left to be added, if any."""
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def add_gated_kernel(x, change, gate, bias, group, out, stride, D: tl.constexpr, DP: tl.constexpr):
    """Writes out = x + gate[group] * (change + bias); gate [G, D] has rows `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    inside = column < D
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + _group(group, row) * stride + column, mask=inside, other=0.0).to(tl.float32)
    value += factor * biased(change, bias, row * D + column, column, inside)
    tl.store(out + row * D + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def add_gated_backward_kernel(
    change, gate, bias, group, dout, dchange, sums, num_rows, stride, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Writes dchange, and sums [blocks + G, 2, D]: of dout * (change + bias), for gate, and of dchange, for bias."""
    block = tl.program_id(0)
    column = tl.arange(0, DP)
    inside = column < D
    current = _group(group, block * ROWS)
    dgate = tl.zeros([DP], tl.float32)
    dbias = tl.zeros([DP], tl.float32)
    for index in range(tl.minimum(ROWS, num_rows - block * ROWS)):
        row = block.to(tl.int64) * ROWS + index
        own = _group(group, row)
        if own != current:
            _store_sums(sums + (block + current) * (2 * D) + column, dgate, dbias, inside, D)
            dgate, dbias = tl.zeros_like(dgate), tl.zeros_like(dbias)
            current = own
        grad = tl.load(dout + row * D + column, mask=inside, other=0.0).to(tl.float32)
        dgate += grad * biased(change, bias, row * D + column, column, inside)
        grad *= tl.load(gate + own * stride + column, mask=inside, other=0.0).to(tl.float32)
        dbias += grad
        tl.store(dchange + row * D + column, grad.to(dchange.dtype.element_ty), mask=inside)
    _store_sums(sums + (block + current) * (2 * D) + column, dgate, dbias, inside, D)


@triton.jit
def add_modulate_kernel(
    x, change, gate, bias, shift, scale, group, out, modulated, stride, eps, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Writes what `add_gated_kernel` does, and that as `modulate_kernel` makes it of it, without reading it again."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    inside = column < D
    offset = _group(group, row) * stride + column
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + offset, mask=inside, other=0.0).to(tl.float32)
    rounded = (value + factor * biased(change, bias, row * D + column, column, inside)).to(out.dtype.element_ty)
    tl.store(out + row * D + column, rounded, mask=inside)
    normed, _ = _layer_norm(rounded.to(tl.float32), inside, eps, D)
    gain = 1.0 + tl.load(scale + offset, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(shift + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(modulated + row * D + column, (normed * gain + added).to(modulated.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def add_modulate_backward_kernel(
    out, change, gate, bias, scale, group, dout, dmodulated, dx, dchange, sums, num_rows, stride, eps,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes dx and dchange, and sums [blocks + G, 4, D], for shift, scale, gate and bias.

    The gradient of `out` is dout and, through norm and modulation, dmodulated's; dx is all of it.
    """
    block = tl.program_id(0)
    column = tl.arange(0, DP)
    inside = column < D
    current = _group(group, block * ROWS)
    dshift = tl.zeros([DP], tl.float32)
    dscale = tl.zeros([DP], tl.float32)
    dgate = tl.zeros([DP], tl.float32)
    dbias = tl.zeros([DP], tl.float32)
    for index in range(tl.minimum(ROWS, num_rows - block * ROWS)):
        row = block.to(tl.int64) * ROWS + index
        own = _group(group, row)
        if own != current:
            pointer = sums + (block + current) * (4 * D) + column
            _store_sums(pointer, dshift, dscale, inside, D)
            _store_sums(pointer + 2 * D, dgate, dbias, inside, D)
            dshift, dscale = tl.zeros_like(dshift), tl.zeros_like(dscale)
            dgate, dbias = tl.zeros_like(dgate), tl.zeros_like(dbias)
            current = own
        offset = own * stride + column
        # All of a row is loaded before its first reduction: a load after one would wait for memory once more.
        value = tl.load(out + row * D + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dmodulated + row * D + column, mask=inside, other=0.0).to(tl.float32)
        through = tl.load(dout + row * D + column, mask=inside, other=0.0)
        changed = biased(change, bias, row * D + column, column, inside)
        gain = 1.0 + tl.load(scale + offset, mask=inside, other=0.0).to(tl.float32)
        gate_value = tl.load(gate + offset, mask=inside, other=0.0)
        normed, factor = _layer_norm(value, inside, eps, D)
        dshift += grad
        dscale += grad * normed
        grad = _layer_norm_gradient(grad * gain, normed, factor, D) + through.to(tl.float32)
        tl.store(dx + row * D + column, grad.to(dx.dtype.element_ty), mask=inside)
        dgate += grad * changed
        grad *= gate_value.to(tl.float32)
        dbias += grad
        tl.store(dchange + row * D + column, grad.to(dchange.dtype.element_ty), mask=inside)
    pointer = sums + (block + current) * (4 * D) + column
    _store_sums(pointer, dshift, dscale, inside, D)
    _store_sums(pointer + 2 * D, dgate, dbias, inside, D)


@triton.jit
def _gelu_factor(value):
    """Returns what a number is multiplied by in GELU: (1 + tanh(z)) / 2 is sigmoid(2 z), and 2 sqrt(2 / pi) is
    1.5957..."""
    return tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))


@triton.jit(do_not_specialize=["num_rows"])
def gelu_kernel(x, bias, out, num_rows, width, BM: tl.constexpr, BN: tl.constexpr):
    """A program writes the GELU of x + bias for BM rows and BN columns."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    column = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    inside = (row < num_rows) & (column < width)
    value = biased(x, bias, row * width + column, column, inside)
    tl.store(out + row * width + column, (value * _gelu_factor(value)).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def gelu_backward_kernel(
    x, bias, dout, dx, sums, num_rows, width, ROUNDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """A program writes dx of ROUNDS times BM rows and BN columns, and sums [blocks, width] of it, for bias."""
    column = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    dbias = tl.zeros([BM, BN], tl.float32)
    for index in range(ROUNDS):
        row = (tl.program_id(0).to(tl.int64) * ROUNDS + index) * BM + tl.arange(0, BM)[:, None]
        inside = (row < num_rows) & (column < width)
        value = biased(x, bias, row * width + column, column, inside)
        factor = _gelu_factor(value)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * value * value)
        grad = tl.load(dout + row * width + column, mask=inside, other=0.0).to(tl.float32)
        grad *= factor * (1.0 + value * slope * (1.0 - factor))
        dbias += grad
        tl.store(dx + row * width + column, grad.to(dx.dtype.element_ty), mask=inside)
    total = tl.sum(dbias, 0)[None, :]
    tl.store(sums + tl.program_id(0) * width + column, total, mask=column < width)


@triton.jit
def round_kernel(
    x, numbers, scales, LARGEST: tl.constexpr, LEAST: tl.constexpr, GELU: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Writes each row of x, or of its GELU, over its scale, by which its largest number becomes LARGEST, and that scale
    [L]. No row's largest number counts as less than LEAST."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    inside = column < D
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value *= _gelu_factor(value)
    scale = tl.maximum(tl.max(tl.abs(value), 0), LEAST) * (1 / LARGEST)
    tl.store(scales + row, scale)
    # Every operation is rounded as those of the plain function are, so that the numbers are the same.
    tl.store(numbers + row * D + column, (value * tl.div_rn(1.0, scale)).to(numbers.dtype.element_ty), mask=inside)


@triton.jit
def _sum_blocks(sums, first, last, shift, column, width, BM: tl.constexpr, BN: tl.constexpr):
    """Returns the sum of rows [first + shift, last + shift) of sums [.., width], at BN columns."""
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(first, last, BM):
        block = start + tl.arange(0, BM)
        inside = (block < last)[:, None] & (column < width)[None, :]
        total += tl.load(sums + (block + shift)[:, None] * width + column[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["num_rows", "width"])
def group_sums_kernel(sums, starts, out, num_rows, width, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Writes to out [G, width] what blocks of ROWS rows have summed for each group, block b's for group g at b + g."""
    own = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    first, last = 0, num_rows
    if starts is not None:
        first, last = tl.load(starts + own), tl.load(starts + own + 1)
    last_block = tl.where(first < last, (last + ROWS - 1) // ROWS, 0)
    total = _sum_blocks(sums, first // ROWS, last_block, own, column, width, BM, BN)
    tl.store(out + own * width + column, total, mask=column < width)


@triton.jit(do_not_specialize=["text_blocks", "num_blocks", "width"])
def stream_sums_kernel(sums, out, text_blocks, num_blocks, width, BM: tl.constexpr, BN: tl.constexpr):
    """Writes to out [2, width] what the first blocks have summed, for text, and the others, for video."""
    of_video = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.where(of_video == 1, text_blocks, 0)
    total = _sum_blocks(sums, first, tl.where(of_video == 1, num_blocks, text_blocks), 0, column, width, BM, BN)
    tl.store(out + of_video * width + column, total, mask=column < width)
