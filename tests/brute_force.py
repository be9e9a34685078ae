"""This is MoC attention by loops over single queries, straight from the words of its definition: the tests' second
opinion.

It knows nothing of `moc.ShotLayout`: it lays the stream out itself from plain numbers (`tests.strategies.Stream`).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import moc
from tests.strategies import Stream


@dataclass(frozen=True)
class Token:
    sample: int
    shot: int  # index in the sample, -1 for its global text
    is_text: bool
    chunk: int


def split(total: int, most: int) -> list[int]:
    """Returns as few numbers of at most `most` as possible, each the rounded-up mean of what is left: even, longer
    first."""
    count, left = -(-total // most), total
    sizes = []
    for remaining in range(count, 0, -1):
        sizes.append(-(-left // remaining))
        left -= sizes[-1]
    return sizes


def video_chunks(grid: tuple[int, int, int], chunk_tokens: int) -> list[int]:
    frames, height, width = grid
    if height * width > chunk_tokens:
        return [rows * width for _ in range(frames) for rows in split(height, max(1, chunk_tokens // width))]
    return [f * height * width for f in split(frames, max(1, chunk_tokens // (height * width)))]


def tokens_of(stream: Stream) -> list[Token]:
    """Returns every token of the stream in order."""
    tokens: list[Token] = []
    chunk = 0
    for sample, (global_text, shots) in enumerate(stream.samples):
        runs = [(-1, True, global_text)]
        for index, shot in enumerate(shots):
            runs.append((index, True, shot.text_tokens))
            runs += [(index, False, length) for length in video_chunks(shot.grid, stream.chunk_tokens)]
        for shot, is_text, length in runs:
            tokens += [Token(sample, shot, is_text, chunk)] * length
            chunk += length > 0
    return tokens


def chunks_of(tokens: list[Token]) -> list[list[int]]:
    """Returns the positions of each chunk's tokens."""
    chunks: list[list[int]] = [[] for _ in range(tokens[-1].chunk + 1)]
    for position, token in enumerate(tokens):
        chunks[token.chunk].append(position)
    return chunks


def own_anchor(tokens: list[Token], i: int, config: moc.MoCConfig) -> set[int]:
    """Returns keys of the query's own shot or chunk; global text has no shot, so none of its own."""
    query = tokens[i]
    if query.shot < 0 or config.own_anchor == "none":
        return set()
    if config.own_anchor == "chunk":
        return {j for j, key in enumerate(tokens) if key.chunk == query.chunk}
    return {j for j, key in enumerate(tokens) if (key.sample, key.shot) == (query.sample, query.shot)}


def text_anchor(tokens: list[Token], i: int, config: moc.MoCConfig) -> set[int]:
    """Returns text keys the query always sees."""
    query = tokens[i]
    text = {j for j, key in enumerate(tokens) if key.is_text and key.sample == query.sample}
    if config.text_anchor == "all":
        return text
    if config.text_anchor == "global_and_own":
        return {j for j in text if tokens[j].shot in (-1, query.shot)}
    return set()


def anchors(tokens: list[Token], i: int, config: moc.MoCConfig) -> set[int]:
    return own_anchor(tokens, i, config) | text_anchor(tokens, i, config)


def candidates(tokens: list[Token], i: int, config: moc.MoCConfig) -> list[int]:
    """Returns chunks the query may choose: video of its sample that no anchor covers, earlier ones only where
    causal."""
    query, covered = tokens[i], anchors(tokens, i, config)
    found = []
    for chunk, positions in enumerate(chunks_of(tokens)):
        key = tokens[positions[0]]
        if key.is_text or key.sample != query.sample or covered.issuperset(positions):
            continue
        earlier = key.shot < query.shot if config.own_anchor == "shot" else chunk < query.chunk
        if earlier or not config.causal:
            found.append(chunk)
    return found


def scores(q: Tensor, k: Tensor, stream: Stream, subchunks: int = 1) -> list[list[list[float]]]:
    """Returns fp64 scores [N][L][M] of every chunk: q . mean(K_chunk), or the log of the mean over tokens of the
    exponential of what the mean of a token's sub-chunk scores, scaled as in attention."""
    if subchunks > 1:
        return _scores_of_subchunks(q, k, stream, subchunks)
    means = torch.stack([k[positions].double().mean(0) for positions in chunks_of(tokens_of(stream))])
    table = []
    for head in range(q.shape[1]):
        rows, columns = q[:, head].double().tolist(), means[:, head].tolist()
        table.append([[sum(a * b for a, b in zip(row, col, strict=True)) for col in columns] for row in rows])
    return table


def _scores_of_subchunks(q: Tensor, k: Tensor, stream: Stream, subchunks: int) -> list[list[list[float]]]:
    chunks = chunks_of(tokens_of(stream))
    table = q.new_zeros(q.shape[1], len(q), len(chunks), dtype=torch.float64)
    for chunk, positions in enumerate(chunks):
        cuts = [len(positions) * subchunk // subchunks for subchunk in range(subchunks + 1)]
        runs = [positions[start:end] for start, end in pairwise(cuts) if end > start]
        total = 0.0
        for run in runs:
            mean = k[run].double().mean(0)
            total += len(run) * ((q.double() * mean).sum(-1) / q.shape[-1] ** 0.5).exp()
        table[..., chunk] = (total / len(positions)).log().T
    return table.tolist()


def route(q: Tensor, k: Tensor, stream: Stream, config: moc.MoCConfig) -> list[list[list[int]]]:
    """Returns routes [N][L] of every head and query: the best chunks first, ties to the lowest index."""
    tokens, table = tokens_of(stream), scores(q, k, stream, config.descriptor_subchunks)
    allowed = [candidates(tokens, i, config) for i in range(len(tokens))]
    return [
        [sorted(allowed[i], key=lambda c: (-row[c], c))[: config.top_k] for i, row in enumerate(rows)] for rows in table
    ]


def attended(routes: list[list[list[int]]], stream: Stream, config: moc.MoCConfig) -> list[list[set[int]]]:
    """Returns the keys [N][L] of every head and query: anchors and routed chunks, each once."""
    tokens = tokens_of(stream)
    chunks = chunks_of(tokens)
    fixed = [anchors(tokens, i, config) for i in range(len(tokens))]
    return [[fixed[i].union(*(chunks[c] for c in row)) for i, row in enumerate(rows)] for rows in routes]


def attention(q: Tensor, k: Tensor, v: Tensor, keys: list[list[set[int]]]) -> Tensor:
    """Returns softmax(q . K / sqrt(D)) V over the given keys of each query; zero where there are none."""
    rows = []
    for i in range(q.shape[0]):
        for head in range(q.shape[1]):
            seen = sorted(keys[head][i])
            weights = (k[seen, head] @ q[i, head] / q.shape[2] ** 0.5).softmax(0)
            rows.append(weights @ v[seen, head])
    return torch.stack(rows).view(v.shape)


def as_table(routes: list[list[list[int]]], width: int) -> Tensor:
    """Returns routes as the int32 table [N, L, width] that `moc` takes, -1 where a slot is empty."""
    return torch.tensor([[row + [-1] * (width - len(row)) for row in rows] for rows in routes], dtype=torch.int32).view(
        len(routes), len(routes[0]), width
    )


def as_lists(routes: Tensor) -> list[list[list[int]]]:
    """Returns a route table without its empty slots."""
    return [[[c for c in row if c >= 0] for row in rows] for rows in routes.tolist()]
