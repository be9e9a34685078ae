"""These functions tell, inside Triton kernels, what a query may route to, as `moc.context`, and how it scores that."""

import triton
import triton.language as tl

from moc.config import OwnAnchor

OWN_ANCHORS = {OwnAnchor.shot: 0, OwnAnchor.chunk: 1, OwnAnchor.none: 2}


@triton.jit
def candidate_bounds(
    token, valid, token_chunk, chunk_group, chunk_sample, group_first_chunk, group_shot, sample_first_chunk,
    CAUSAL: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Finds the chunks [first, last) that each query may route to, and the run [skip_first, skip_last) to skip in them.

    It equals `moc.context.is_candidate`. token, valid: [BQ]. OWN is 0 (own_anchor shot), 1 (chunk) or 2 (none).
    """
    chunk = tl.load(token_chunk + token, mask=valid, other=0)
    group = tl.load(chunk_group + chunk)
    sample = tl.load(chunk_sample + chunk)
    first = tl.load(sample_first_chunk + sample)
    last = tl.load(sample_first_chunk + sample + 1)
    # The query's own shot, or own chunk, is an anchor and no candidate; with neither there is nothing to skip.
    if OWN == 0:
        skip_first, skip_last = tl.load(group_first_chunk + group), tl.load(group_first_chunk + group + 1)
    elif OWN == 1:
        skip_first, skip_last = chunk, chunk + 1
    else:
        skip_first, skip_last = chunk, chunk
    if CAUSAL:  # what comes before the own shot or chunk; global text precedes all
        last = tl.where(tl.load(group_shot + group) < 0, first, skip_first)
    return tl.where(valid, first, 0), tl.where(valid, last, 0), skip_first, skip_last


@triton.jit
def candidate_mask(chunk, first, last, skip_first, skip_last, chunk_is_text, num_chunks):
    """Returns bool [BQ, BC]: which of the chunks [BC] each query may route to."""
    video = tl.load(chunk_is_text + chunk, mask=chunk < num_chunks, other=1) == 0
    chunk = chunk[None, :]
    skipped = (chunk >= skip_first[:, None]) & (chunk < skip_last[:, None])
    return (chunk >= first[:, None]) & (chunk < last[:, None]) & (skipped == 0) & video[None, :]


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
