"""These Triton kernels work on the heads of queries, keys and values: they norm and rotate them, and join those of text
and video.

`models.pointwise` launches them. Forward, a program owns a row, or a block of heads; backward, it owns ROWS rows, one
after another, and keeps sums over them, as in `models.pointwise_kernels`. There are no atomics, and gradients repeat.

All is computed in fp32. Shape letters: L rows, N heads, D width of a head (NP, DP: powers of two).
"""

import triton
import triton.language as tl

from models.pointwise_kernels import biased


@triton.jit
def _normed_heads(value, eps, D: tl.constexpr):
    """Returns heads [BLOCK, DP] over their root mean square, and the factor by which they were."""
    factor = (1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps))[:, None]
    return value * factor, factor


@triton.jit
def _heads_gradient(grad, normed, factor, D: tl.constexpr):
    """Returns the gradient of heads from that of their norm; normed and factor: as `_normed_heads` returned them."""
    return (grad - normed * (tl.sum(grad * normed, 1) / D)[:, None]) * factor


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
    normed, _ = _normed_heads(value, eps, D)
    tl.store(out + row * (N * D) + head * D + column, (normed * gain).to(out.dtype.element_ty), inside)


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
        normed, factor = _normed_heads(value, eps, D)
        dweight += grad * normed
        grad *= gain  # next comes the norm's gradient, which has no part along x
        grad = _heads_gradient(grad, normed, factor, D)
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
def _join_block(
    qkv, bias, q_weight, k_weight, index, cos, sin, q, k, v, block, num_rows, eps,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms, turns and writes to q, k, v [L, N, D] what BLOCK heads of qkv [rows, 3, N, D] hold, with its bias."""
    row, head, token, inside = _heads(index, block, num_rows, N, BLOCK)
    column = tl.arange(0, DP)[None, :]
    some = inside[:, None] & (column < D)
    within = (head * D)[:, None] + column
    own = (row * (3 * N * D))[:, None] + within
    joint = (token * (N * D))[:, None] + within
    for which in tl.static_range(2):
        weight, target = (q_weight, q) if which == 0 else (k_weight, k)
        normed, _ = _normed_heads(biased(qkv, bias, own + which * N * D, within + which * N * D, some), eps, D)
        normed *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        normed = _turn(normed, token, inside, cos, sin, 1.0, D, DP, BLOCK)
        tl.store(target + joint, normed.to(target.dtype.element_ty), mask=some)
    tl.store(v + joint, biased(qkv, bias, own + 2 * N * D, within + 2 * N * D, some).to(v.dtype.element_ty), mask=some)


@triton.jit(do_not_specialize=["num_text", "num_video"])
def join_kernel(
    text, video, text_bias, video_bias, text_q_weight, text_k_weight, video_q_weight, video_k_weight,
    text_index, video_index, cos, sin, q, k, v, num_text, num_video, eps,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program norms, turns and joins BLOCK heads of text or of video, [rows, 3, N, D] each, in q, k, v [L, N, D]."""
    block, text_blocks = tl.program_id(0), tl.cdiv(num_text * N, BLOCK)
    if block < text_blocks:
        _join_block(
            text, text_bias, text_q_weight, text_k_weight, text_index, cos, sin, q, k, v, block, num_text, eps,
            N, D, DP, BLOCK,
        )  # fmt: skip
    else:
        _join_block(
            video, video_bias, video_q_weight, video_k_weight, video_index, cos, sin, q, k, v, block - text_blocks,
            num_video, eps, N, D, DP, BLOCK,
        )  # fmt: skip


@triton.jit
def _join_backward_rows(
    qkv, bias, q_weight, k_weight, index, cos, sin, dq, dk, dv, dqkv, sums, block, num_rows, eps,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Undoes rotation and norm of one head's q and k for some rows, and copies dV; sums what biases and norms get."""
    column = tl.arange(0, DP)[None, :]
    within = tl.program_id(0) * D + column
    for which in tl.static_range(3):
        weight, joint_grad = (q_weight, dq) if which == 0 else (k_weight, dk) if which == 1 else (k_weight, dv)
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        dbias = tl.zeros([BLOCK, DP], tl.float32)
        dweight = tl.zeros([BLOCK, DP], tl.float32)
        for i in range(ROUNDS):
            row = (block * ROUNDS + i).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = row < num_rows
            token = tl.load(index + row, mask=inside, other=0)
            some = inside[:, None] & (column < D)
            own = (row * (3 * N * D))[:, None] + within
            grad = tl.load(joint_grad + (token * (N * D))[:, None] + within, mask=some, other=0.0).to(tl.float32)
            if which < 2:
                grad = _turn(grad, token, inside, cos, sin, -1.0, D, DP, BLOCK)
                normed, factor = _normed_heads(
                    biased(qkv, bias, own + which * N * D, within + which * N * D, some), eps, D
                )
                dweight += grad * normed
                grad *= gain
                grad = _heads_gradient(grad, normed, factor, D)
            dbias += tl.where(some, grad, 0.0)
            tl.store(dqkv + own + which * N * D, grad.to(dqkv.dtype.element_ty), mask=some)
        tl.store(sums + which * (N * D) + within, tl.sum(dbias, 0)[None, :], mask=column < D)
        if which < 2:
            tl.store(sums + (3 + which) * (N * D) + within, tl.sum(dweight, 0)[None, :], mask=column < D)


@triton.jit(do_not_specialize=["num_text", "num_video", "text_blocks"])
def join_backward_kernel(
    text, video, text_bias, video_bias, text_q_weight, text_k_weight, video_q_weight, video_k_weight,
    text_index, video_index, cos, sin, dq, dk, dv, dtext, dvideo, sums, num_text, num_video, text_blocks, eps,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """A program writes dtext or dvideo of a head of ROUNDS times BLOCK rows.

    sums [blocks, 5, N, D]: for the biases of q, k and v, and for the weights of q's and k's norm.
    """
    block = tl.program_id(1)
    sums += block.to(tl.int64) * (5 * N * D)
    if block < text_blocks:
        _join_backward_rows(
            text, text_bias, text_q_weight, text_k_weight, text_index, cos, sin, dq, dk, dv, dtext, sums, block,
            num_text, eps, N, D, DP, BLOCK, ROUNDS,
        )  # fmt: skip
    else:
        _join_backward_rows(
            video, video_bias, video_q_weight, video_k_weight, video_index, cos, sin, dq, dk, dv, dvideo, sums,
            block - text_blocks, num_video, eps, N, D, DP, BLOCK, ROUNDS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_text", "num_rows"])
def split_kernel(
    stream, text, video, text_index, video_index, num_text, num_rows, width,
    BM: tl.constexpr, BN: tl.constexpr, JOINS: tl.constexpr,
):  # fmt: skip
    """A program copies BM rows of the stream to text or video [rows, width], or from there where it JOINS them."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    is_text, is_video = row < num_text, (row >= num_text) & (row < num_rows)
    token = tl.load(text_index + row, mask=is_text, other=0) + tl.load(
        video_index + (row - num_text), mask=is_video, other=0
    )
    for start in range(0, width, BN):
        column = start + tl.arange(0, BN)[None, :]
        joint = stream + token[:, None] * width + column
        of_text = text + row[:, None] * width + column
        of_video = video + (row - num_text)[:, None] * width + column
        some_text, some_video = is_text[:, None] & (column < width), is_video[:, None] & (column < width)
        if JOINS:
            tl.store(joint, tl.load(of_text, mask=some_text, other=0.0), mask=some_text)
            tl.store(joint, tl.load(of_video, mask=some_video, other=0.0), mask=some_video)
        else:
            value = tl.load(joint, mask=some_text | some_video, other=0.0)
            tl.store(of_text, value, mask=some_text)
            tl.store(of_video, value, mask=some_video)
