"""These Triton kernels do the pointwise work around attention; `models.pointwise` launches them.

Forward, a program owns one row (a token) and reads it once. Backward, a program owns ROWS rows, one after another, and
keeps sums over them: over a group's rows for what its tokens share, over all rows for a norm's weight. Groups follow
one another in the stream, so the sums of block b for group g have a row of their own, b + g, in a table of
(blocks + groups) rows; `group_sums_kernel` adds them up in that order. There are no atomics, and gradients repeat.

All is computed in fp32. Shape letters: L rows, N heads, D width of a row or head, G groups (NP, DP: powers of two).
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


@triton.jit(do_not_specialize=["num_rows"])
def modulate_backward_kernel(
    x, scale, group, dout, dx, sums, num_rows, stride, eps,
    ONE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes dx, and sums [blocks + G, 2, D]: of dout (for shift) and of dout * norm(x) (for scale)."""
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
        pointer = sums + (block + current) * (2 * D) + column
        tl.store(pointer, dshift, mask=inside & (own != current))
        tl.store(pointer + D, dscale, mask=inside & (own != current))
        dshift = tl.where(own == current, dshift, 0.0)
        dscale = tl.where(own == current, dscale, 0.0)
        current = own
        value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dout + row * D + column, mask=inside, other=0.0).to(tl.float32)
        gain = ONE + tl.load(scale + own * stride + column, mask=inside, other=0.0).to(tl.float32)
        normed, factor = _layer_norm(value, inside, eps, D)
        dshift += grad
        dscale += grad * normed
        grad *= gain
        grad = (grad - tl.sum(grad, 0) / D - normed * (tl.sum(grad * normed, 0) / D)) * factor
        tl.store(dx + row * D + column, grad.to(dx.dtype.element_ty), mask=inside)
    pointer = sums + (block + current) * (2 * D) + column
    tl.store(pointer, dshift, mask=inside)
    tl.store(pointer + D, dscale, mask=inside)


@triton.jit
def add_gated_kernel(x, change, gate, group, out, stride, D: tl.constexpr, DP: tl.constexpr):
    """Writes out = x + gate[group] * change; gate [G, D] has rows `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    inside = column < D
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(change + row * D + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + _group(group, row) * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, (value + factor * added).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def add_gated_backward_kernel(
    change, gate, group, dout, dchange, sums, num_rows, stride, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Writes dchange, and sums [blocks + G, D] of dout * change, for gate."""
    block = tl.program_id(0)
    column = tl.arange(0, DP)
    inside = column < D
    current = _group(group, block * ROWS)
    dgate = tl.zeros([DP], tl.float32)
    for index in range(tl.minimum(ROWS, num_rows - block * ROWS)):
        row = block.to(tl.int64) * ROWS + index
        own = _group(group, row)
        tl.store(sums + (block + current) * D + column, dgate, mask=inside & (own != current))
        dgate = tl.where(own == current, dgate, 0.0)
        current = own
        grad = tl.load(dout + row * D + column, mask=inside, other=0.0).to(tl.float32)
        dgate += grad * tl.load(change + row * D + column, mask=inside, other=0.0).to(tl.float32)
        grad *= tl.load(gate + own * stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dchange + row * D + column, grad.to(dchange.dtype.element_ty), mask=inside)
    tl.store(sums + (block + current) * D + column, dgate, mask=inside)


@triton.jit
def rms_norm_kernel(
    x, weight, out, stride, eps, N: tl.constexpr, D: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Writes each head of a row over its root mean square, times weight [D]; rows of x are `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, NP)[:, None], tl.arange(0, DP)[None, :]
    inside = (head < N) & (column < D)
    value = tl.load(x + row * stride + head * D + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(out + row * (N * D) + head * D + column, (value * factor[:, None] * gain).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_backward_kernel(
    x, weight, dout, dx, sums, num_rows, stride, eps,
    N: tl.constexpr, D: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes dx [L, N, D], and sums [blocks, D] of dout * x over its root mean square, for weight."""
    block = tl.program_id(0)
    head, column = tl.arange(0, NP)[:, None], tl.arange(0, DP)[None, :]
    inside = (head < N) & (column < D)
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([NP, DP], tl.float32)
    for index in range(tl.minimum(ROWS, num_rows - block * ROWS)):
        row = block.to(tl.int64) * ROWS + index
        value = tl.load(x + row * stride + head * D + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dout + row * (N * D) + head * D + column, mask=inside, other=0.0).to(tl.float32)
        factor = (1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps))[:, None]
        normed = value * factor
        dweight += grad * normed
        grad *= gain  # the norm's own gradient: without the part along x, which it takes out
        grad = (grad - normed * (tl.sum(grad * normed, 1) / D)[:, None]) * factor
        tl.store(dx + row * (N * D) + head * D + column, grad.to(dx.dtype.element_ty), mask=inside)
    column = tl.arange(0, DP)
    tl.store(sums + block * D + column, tl.sum(dweight, 0), mask=column < D)


@triton.jit
def rotate_kernel(
    x, cos, sin, out, sign, N: tl.constexpr, D: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Turns channel pairs of each head of a row by the angle of cos and sin [L, D / 2]; sign -1 turns them back."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, NP)[:, None] * D + tl.arange(0, DP)[None, :]
    inside = (tl.arange(0, NP) < N)[:, None] & (tl.arange(0, DP) < D)[None, :]
    value = tl.load(x + row * (N * D) + offset, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [NP, DP // 2, 2]))
    pair = tl.arange(0, DP // 2)
    a = tl.load(cos + row * (D // 2) + pair, mask=pair < D // 2, other=0.0)[None, :]
    b = tl.load(sin + row * (D // 2) + pair, mask=pair < D // 2, other=0.0)[None, :] * sign
    turned = tl.reshape(tl.join(even * a - odd * b, even * b + odd * a), [NP, DP])
    tl.store(out + row * (N * D) + offset, turned.to(out.dtype.element_ty), mask=inside)


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
    if GELU:  # its tanh, as a sigmoid: 1 + tanh(z) = 2 sigmoid(2 z), and 2 sqrt(2 / pi) = 1.5957...
        value *= tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    scale = tl.maximum(tl.max(tl.abs(value), 0), LEAST) * (1 / LARGEST)
    tl.store(scales + row, scale)
    # Every operation is rounded as those of the plain function are, so that the numbers are the same.
    tl.store(numbers + row * D + column, (value * tl.div_rn(1.0, scale)).to(numbers.dtype.element_ty), mask=inside)


@triton.jit
def _heads(index, block, num_rows, N: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the rows, heads and tokens of the BLOCK heads of a block of rows, and whether there are such; int64."""
    head = block * BLOCK + tl.arange(0, BLOCK)
    row = (head // N).to(tl.int64)
    return row, head % N, tl.load(index + row, mask=row < num_rows, other=0), row < num_rows


@triton.jit
def _turn(value, token, inside, cos, sin, sign, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """Returns heads [BLOCK, DP] whose channel pairs are turned by the angles of their tokens, where there are any."""
    if cos is not None:
        even, odd = tl.split(tl.reshape(value, [BLOCK, DP // 2, 2]))
        pair = tl.arange(0, DP // 2)[None, :]
        offset, some = token[:, None] * (D // 2) + pair, inside[:, None] & (pair < D // 2)
        a = tl.load(cos + offset, mask=some, other=0.0)
        b = tl.load(sin + offset, mask=some, other=0.0) * sign
        value = tl.reshape(tl.join(even * a - odd * b, even * b + odd * a), [BLOCK, DP])
    return value


@triton.jit
def _normed_heads(value, eps, D: tl.constexpr):
    """Returns heads [BLOCK, DP] over their root mean square, and the factor by which they were."""
    factor = (1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps))[:, None]
    return value * factor, factor


@triton.jit
def _join_block(
    qkv, q_weight, k_weight, index, cos, sin, q, k, v, block, num_rows, eps,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms, turns and writes to q, k, v [L, N, D] what BLOCK heads of qkv [rows, 3, N, D] hold."""
    row, head, token, inside = _heads(index, block, num_rows, N, BLOCK)
    column = tl.arange(0, DP)[None, :]
    some = inside[:, None] & (column < D)
    own = (row * (3 * N * D) + head * D)[:, None] + column
    joint = (token * (N * D) + head * D)[:, None] + column
    for part in tl.static_range(2):
        weight, target = (q_weight, q) if part == 0 else (k_weight, k)
        normed, _ = _normed_heads(tl.load(qkv + own + part * N * D, mask=some, other=0.0).to(tl.float32), eps, D)
        normed *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        normed = _turn(normed, token, inside, cos, sin, 1.0, D, DP, BLOCK)
        tl.store(target + joint, normed.to(target.dtype.element_ty), mask=some)
    tl.store(v + joint, tl.load(qkv + own + 2 * N * D, mask=some, other=0.0).to(v.dtype.element_ty), mask=some)


@triton.jit(do_not_specialize=["num_text", "num_video"])
def join_kernel(
    text, video, text_q_weight, text_k_weight, video_q_weight, video_k_weight, text_index, video_index, cos, sin,
    q, k, v, num_text, num_video, eps, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program norms, turns and joins BLOCK heads of text or of video, [rows, 3, N, D] each, in q, k, v [L, N, D]."""
    block, text_blocks = tl.program_id(0), tl.cdiv(num_text * N, BLOCK)
    if block < text_blocks:
        _join_block(
            text, text_q_weight, text_k_weight, text_index, cos, sin, q, k, v, block, num_text, eps, N, D, DP, BLOCK
        )
    else:
        _join_block(
            video, video_q_weight, video_k_weight, video_index, cos, sin, q, k, v, block - text_blocks, num_video, eps,
            N, D, DP, BLOCK,
        )  # fmt: skip


@triton.jit
def _join_backward_blocks(
    qkv, q_weight, k_weight, index, cos, sin, dq, dk, dv, dqkv, sums, first, num_rows, eps,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Undoes rotation and norm of q and k for some heads of some tokens, and copies dV; sums what the norms' weights
    get."""
    column = tl.arange(0, DP)[None, :]
    for part in tl.static_range(2):  # q, then k, which lie beside each other and before v
        weight, joint_grad = (q_weight, dq) if part == 0 else (k_weight, dk)
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        dweight = tl.zeros([BLOCK, DP], tl.float32)
        for i in range(ROUNDS):
            row, head, token, inside = _heads(index, first * ROUNDS + i, num_rows, N, BLOCK)
            some = inside[:, None] & (column < D)
            own = (row * (3 * N * D) + head * D)[:, None] + column + part * N * D
            joint = (token * (N * D) + head * D)[:, None] + column
            grad = tl.load(joint_grad + joint, mask=some, other=0.0).to(tl.float32)
            grad = _turn(grad, token, inside, cos, sin, -1.0, D, DP, BLOCK)
            normed, factor = _normed_heads(tl.load(qkv + own, mask=some, other=0.0).to(tl.float32), eps, D)
            dweight += grad * normed
            grad *= gain
            grad = (grad - normed * (tl.sum(grad * normed, 1) / D)[:, None]) * factor
            tl.store(dqkv + own, grad.to(dqkv.dtype.element_ty), mask=some)
            if part == 0:
                value = tl.load(dv + joint, mask=some, other=0.0)
                tl.store(dqkv + own + 2 * N * D, value.to(dqkv.dtype.element_ty), mask=some)
        tl.store(sums + part * D + column, tl.sum(dweight, 0)[None, :], mask=column < D)


@triton.jit(do_not_specialize=["num_text", "num_video", "text_blocks"])
def join_backward_kernel(
    text, video, text_q_weight, text_k_weight, video_q_weight, video_k_weight, text_index, video_index, cos, sin,
    dq, dk, dv, dtext, dvideo, sums, num_text, num_video, text_blocks, eps,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """A program writes dtext or dvideo of ROUNDS blocks of heads, and sums [programs, 2, D] for the norms' weights."""
    block = tl.program_id(0)
    sums += block * (2 * D)
    if block < text_blocks:
        _join_backward_blocks(
            text, text_q_weight, text_k_weight, text_index, cos, sin, dq, dk, dv, dtext, sums, block, num_text, eps,
            N, D, DP, BLOCK, ROUNDS,
        )  # fmt: skip
    else:
        _join_backward_blocks(
            video, video_q_weight, video_k_weight, video_index, cos, sin, dq, dk, dv, dvideo, sums,
            block - text_blocks, num_video, eps, N, D, DP, BLOCK, ROUNDS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "width"])
def group_sums_kernel(sums, starts, out, num_rows, width, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Writes to out [G, width] what blocks of ROWS rows have summed for each group, block b's for group g at b + g."""
    own = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    first, last = 0, num_rows
    if starts is not None:
        first, last = tl.load(starts + own), tl.load(starts + own + 1)
    total = tl.zeros([BM, BN], tl.float32)
    last_block = tl.where(first < last, (last + ROWS - 1) // ROWS, 0)
    for start in range(first // ROWS, last_block, BM):
        block = start + tl.arange(0, BM)
        inside = (block < last_block)[:, None] & (column < width)[None, :]
        total += tl.load(sums + (block + own)[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(out + own * width + column, tl.sum(total, 0), mask=column < width)
