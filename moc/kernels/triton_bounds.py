"""These functions read, inside Triton kernels, what a query may route to, and score it."""

import triton
import triton.language as tl


@triton.jit
def candidate_bounds(token, valid, token_chunk, candidates):
    """Returns the chunks [first, last) that each query may route to, but for its own, [own_first, own_last).

    token, valid: [BQ]; the chunks of one that is not valid are none. candidates: `moc.context.candidate_runs`.
    """
    row = candidates + 4 * tl.load(token_chunk + token, mask=valid, other=0)
    first, last = tl.load(row, mask=valid, other=0), tl.load(row + 1, mask=valid, other=0)
    return first, last, tl.load(row + 2), tl.load(row + 3)


@triton.jit
def candidate_mask(chunk, first, last, own_first, own_last, chunk_is_text, num_chunks):
    """Returns bool [BQ, BC]: which of the chunks [BC] each query may route to."""
    video = tl.load(chunk_is_text + chunk, mask=chunk < num_chunks, other=1) == 0
    chunk = chunk[None, :]
    own = (chunk >= own_first[:, None]) & (chunk < own_last[:, None])
    return (chunk >= first[:, None]) & (chunk < last[:, None]) & (own == 0) & video[None, :]


@triton.jit
def chunk_scores(
    queries, means, head, chunk, num_heads, num_chunks,
    TERMS: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Returns fp32 [BQ, BC]: queries [BQ, DP] times the mean keys of chunks, by the means' first TERMS terms."""
    rows = (head * num_chunks + chunk).to(tl.int64)[:, None] * DP + tl.arange(0, DP)[None, :]
    scores = tl.zeros([BQ, BC], tl.float32)
    for term in tl.static_range(TERMS):
        table = means + (TERMS - 1 - term) * num_heads * num_chunks * DP
        mean = tl.load(table + rows, mask=(chunk < num_chunks)[:, None], other=0.0)
        scores = tl.dot(queries, mean.T, scores, input_precision="tf32x3")
    return scores


@triton.jit
def _subchunk_scores(
    queries, means, log_shares, head, subchunk, num_heads, num_subchunks,
    TERMS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Returns fp32 [BQ, BC]: what each of the subchunks [BC] adds to the mass of its chunk, as a logarithm."""
    scores = chunk_scores(queries, means, head, subchunk, num_heads, num_subchunks, TERMS, DP, BQ, BC)
    log_share = tl.load(log_shares + subchunk, mask=subchunk < num_subchunks, other=0.0)
    return scores * D**-0.5 + log_share[None, :]


@triton.jit
def log_mass(
    queries, means, log_shares, head, chunk, num_heads, num_chunks, subchunks,
    TERMS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Returns fp32 [BQ, BC]: scores of chunks by those of their subchunks, as `MoCConfig.descriptor_subchunks` says.

    means: of the subchunks. log_shares [M, subchunks]: of `moc.routing.subchunk_tables`. subchunks: their number in a
    chunk, which is no constant, since a loop that is unrolled spills registers.
    """
    first, num_subchunks = chunk * subchunks, num_chunks * subchunks
    # The last subchunk is never empty, so that `most`, the largest so far, is never -inf.
    most = _subchunk_scores(
        queries, means, log_shares, head, first + subchunks - 1, num_heads, num_subchunks, TERMS, D, DP, BQ, BC
    )
    total = tl.zeros([BQ, BC], tl.float32) + 1.0  # the sum of exp(score - most)
    for i in tl.range(0, subchunks - 1, num_stages=1):
        scores = _subchunk_scores(
            queries, means, log_shares, head, first + i, num_heads, num_subchunks, TERMS, D, DP, BQ, BC
        )
        less = tl.exp(-tl.abs(scores - most))
        total = tl.where(scores > most, total * less + 1.0, total + less)
        most = tl.maximum(most, scores)
    return most + tl.log(total)
