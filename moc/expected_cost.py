"""This module counts what attention is expected to cost from the sizes of shots alone, before there is a stream.

It takes no table of chunks, so that a film of millions of them is counted at once. `moc.context` says what a query
sees, in a stream of three small shots: to a shot of any story, the shots before it are as the first of these is to the
second, and the shots after it as the third is. What then attends to what is a sum of products of sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moc.config import Candidates, MoCConfig
from moc.context import is_anchor, is_candidate
from moc.layout import ShotLayout
from moc.shot import Grid, Shot, chunk_lengths, chunk_runs

GLOBAL_TEXT = -1  # stands for the global text among shots, as in `moc.layout`
# In the stream of three shots, whose chunks these are, a query stands in the global text, in the second shot's text or
# in the middle chunk of its video. Its keys are the global text; text and video of the shot before; own text; own video
# before that chunk, the chunk itself, and own video after it; text and video of the shot after.
_QUERIES = (0, 5, 7)
_KEYS = (0, 1, 2, 5, 6, 7, 8, 9, 10)
_GLOBAL, _TEXT, _VIDEO = range(3)  # kinds of queries
_OWN_VIDEO = slice(4, 7)  # keys
_EXACT = torch.float64  # counts whole numbers to 2**53


@dataclass(frozen=True)
class ExpectedCost:
    """This is what one head of one layer is expected to compute.

    pairs: of a query and a key that it attends to. scores: of a query and a candidate. dense: pairs of dense attention.
    """

    pairs: float
    scores: float
    dense: float


class ExpectedCosts:
    """This object counts for streams that are made of some shots of one story.

    Anchors are counted as `moc.cost.attention_cost` counts them. Each query takes as many routes as it can, and all its
    candidates equally often: where chunks differ in length, the count of routed keys is an expectation.
    """

    def __init__(self, global_tokens: int, shots: Sequence[Shot], config: MoCConfig) -> None:
        """Takes the tokens of the story's global text, and its shots; config has the size of chunks."""
        self.config, self.global_tokens, self.shots = config, global_tokens, list(shots)
        by_grid = {grid: _sizes(grid, config) for grid in {shot.grid for shot in shots}}
        rows = [(shot.text_tokens, *by_grid[shot.grid]) for shot in shots]
        self._text, self._video, self._squares, self._count, self._length = torch.tensor(rows, dtype=_EXACT).unbind(1)
        layout = ShotLayout.build([Shot(1, (3, 1, 1))] * 3, 1, chunk_tokens=1)
        query, key = torch.tensor(_QUERIES)[:, None], torch.tensor(_KEYS)
        any_chunk = replace(config, candidates=Candidates.all)  # `_sizes` leaves out what is no first chunk
        self._anchors = is_anchor(layout, config, query, key).to(_EXACT)
        self._candidates = is_candidate(layout, any_chunk, query, key).to(_EXACT)

    def tokens(self, shots: Sequence[int]) -> int:
        """Returns the tokens of some shots, and of `GLOBAL_TEXT` where it is among them."""
        own = [shot for shot in shots if shot != GLOBAL_TEXT]
        return int((self._text + self._video)[own].sum()) + (self.global_tokens if len(own) < len(shots) else 0)

    def of(self, queries: Sequence[int], stream: Sequence[int], dense: bool = False) -> ExpectedCost:
        """Returns the cost of the queries of some shots, and of `GLOBAL_TEXT` where it is among them, in the stream of
        the global text and the shots `stream`, in ascending order. dense: whether attention is dense."""
        all_pairs = float(self.tokens(queries) * self.tokens([GLOBAL_TEXT, *stream]))
        if dense or self.config.dense:
            return ExpectedCost(all_pairs, 0.0, all_pairs)
        shots, wanted = list(stream), set(queries)
        rows = [row for row, shot in enumerate(shots) if shot in wanted]
        found = self._of_text(shots, rows) + self._of_video(shots, rows)
        if GLOBAL_TEXT in wanted:
            found += self._of_global_text(shots)
        pairs, scores = found.tolist()
        return ExpectedCost(pairs, scores if self.config.top_k else 0.0, all_pairs)

    def _of_text(self, stream: list[int], rows: list[int]) -> Tensor:
        """Returns pairs and scores [2] of the queries of texts. rows: where in the stream their shots are."""
        text, video, counts, lengths = (x[stream] for x in (self._text, self._video, self._count, self._length))
        anchored = self._keys(text, video, _itself(video))
        candidates = [self._keys(torch.zeros_like(text), x, _itself(x)) for x in (counts, lengths)]
        return self._seen(_TEXT, text[rows], anchored[rows], *(x[rows] for x in candidates))

    def _of_video(self, stream: list[int], rows: list[int]) -> Tensor:
        """Returns pairs and scores [2] of the queries of videos."""
        text, video, counts, lengths = (x[stream] for x in (self._text, self._video, self._count, self._length))
        # Each of two chunks queries the other, so half of the pairs between chunks have the key before the query.
        squares = self._squares[stream]
        others = (video**2 - squares) / 2
        anchored = self._keys(text, video, torch.stack([others, squares, others], 1) / video[:, None])
        candidates = [self._keys(torch.zeros_like(text), x, _itself(x)) for x in (counts, lengths)]
        if not self._candidates[_VIDEO, _OWN_VIDEO].any():
            return self._seen(_VIDEO, video[rows], anchored[rows], *(x[rows] for x in candidates))
        found = torch.zeros(2, dtype=_EXACT)
        for row in rows:  # the candidates differ from chunk to chunk, so that there is a table of a shot's chunks
            weights = torch.tensor(chunk_lengths(self.shots[stream[row]].grid, self.config.chunk_tokens), dtype=_EXACT)
            own = [_around_each(x) for x in self._choosable(weights)]
            of_chunks = [x[row].repeat(len(weights), 1) for x in candidates]
            for keys, x in zip(of_chunks, own, strict=True):
                keys[:, _OWN_VIDEO] = x
            found += self._seen(_VIDEO, weights, anchored[row].expand(len(weights), -1), *of_chunks)
        return found

    def _of_global_text(self, stream: list[int]) -> Tensor:
        """Returns pairs and scores [2] of the queries of global text, to which every shot is a later one."""
        totals = [x[stream].sum() for x in (self._text, self._video, self._count, self._length)]
        anchored, counts, lengths = torch.zeros(3, 1, len(_KEYS), dtype=_EXACT)
        anchored[0, 0], anchored[0, -2], anchored[0, -1] = self.global_tokens, totals[0], totals[1]
        counts[0, -1], lengths[0, -1] = totals[2:]
        return self._seen(_GLOBAL, torch.tensor([self.global_tokens], dtype=_EXACT), anchored, counts, lengths)

    def _keys(self, text: Tensor, video: Tensor, own_video: Tensor) -> Tensor:
        """Returns sizes of the keys around each shot of a stream, [S, 9] in the order of `_KEYS`. text, video: [S], the
        sizes of the shots. own_video: [S, 3], those of a shot's video as its query sees it."""
        before = [x.cumsum(0) - x for x in (text, video)]
        after = [x.sum() - x.cumsum(0) for x in (text, video)]
        whole = torch.full_like(text, self.global_tokens)
        return torch.stack([whole, *before, text, *own_video.unbind(1), *after], 1)

    def _seen(self, kind: int, weights: Tensor, anchored: Tensor, counts: Tensor, lengths: Tensor) -> Tensor:
        """Returns pairs and scores [2] of queries [X] of one kind, each of which stands for `weights` tokens. anchored,
        counts, lengths: [X, 9], tokens that may be anchors, chunks that may be candidates, and their tokens."""
        candidates = counts @ self._candidates[kind]
        mean_length = lengths @ self._candidates[kind] / candidates.clamp(min=1)
        routed = candidates.clamp(max=self.config.top_k) * mean_length
        return torch.stack([weights @ (anchored @ self._anchors[kind] + routed), weights @ candidates])

    def _choosable(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how many candidates each chunk of a video is, and with how many tokens."""
        counts = torch.ones_like(lengths)
        if self.config.candidates is Candidates.first:
            counts[1:] = 0
        return counts, counts * lengths


def _sizes(grid: Grid, config: MoCConfig) -> tuple[int, int, int, int]:
    """Returns the tokens of a shot's video, the sum of its chunks' squared lengths, and the number and tokens of the
    chunks that others may route to."""
    repeats, runs = chunk_runs(grid, config.chunk_tokens)
    tokens = repeats * sum(length * count for length, count in runs)
    squares = repeats * sum(length**2 * count for length, count in runs)
    if config.candidates is Candidates.first:
        return tokens, squares, 1, runs[0][0]
    return tokens, squares, repeats * sum(count for _, count in runs), tokens


def _itself(video: Tensor) -> Tensor:
    """Returns [S, 3], where the query sees its shot's video [S] as one."""
    nothing = torch.zeros_like(video)
    return torch.stack([nothing, video, nothing], 1)


def _around_each(sizes: Tensor) -> Tensor:
    """Returns the sum of the sizes [M] before each one, its own size, and the sum of those after it: [M, 3]."""
    through = sizes.cumsum(0)
    return torch.stack([through - sizes, sizes, through[-1] - through], 1)
