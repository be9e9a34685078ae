"""This module attends to MoC's anchors, what every query sees whatever its routes, in a few dense calls.

Anchors are contiguous runs of keys shared by contiguous runs of queries: a shot's queries see their own shot and the
text of other groups. One dense call a shot takes both together (own rows and text rows side by side), so that there is
one LSE and no separate call for text. About 80 % of the work of the attention is in these calls. Shots of one length
that see no other text are one call, so that a GPU is not half idle at the end of each. Where shots are short, so that
launches would cost more than work, all of them are one variable-length call (`packed`).

The own *chunk* (`own_anchor: chunk`) is not here: backends add it to the routes, as one more chunk of each query.

Shape letters: L packed tokens, Lq queries, Lt text tokens, N heads, D head dim.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from moc.config import MoCConfig, OwnAnchor, TextAnchor
from moc.context import Pair, is_own_anchor, is_text_anchor
from moc.kernels import packed as packed_calls
from moc.kernels.dense import DenseKernel
from moc.kernels.packed import MAX_RUNS, Packed
from moc.layout import Group, ShotLayout

SHORT = 4096  # below this mean number of keys a call's launches cost more than its work, on an H100


class AnchorCall(NamedTuple):
    """Queries [start, end) attend to tokens [own_start, own_end) and to two runs of text rows.

    The runs are [text_start, text_end) and, after it, [later_start, later_end); either may be empty. Queries count from
    the first one that is asked for, text rows along the text tokens alone (`layout.text_index`).
    """

    start: int
    end: int
    own_start: int
    own_end: int
    text_start: int
    text_end: int
    later_start: int
    later_end: int

    @property
    def num_own(self) -> int:
        return self.own_end - self.own_start

    @property
    def num_text(self) -> int:
        return self.text_end - self.text_start + self.later_end - self.later_start

    @property
    def num_keys(self) -> int:
        return self.num_own + self.num_text

    def text_spans(self) -> list[tuple[int, int]]:
        """Returns the runs of text rows that are not empty."""
        spans = ((self.text_start, self.text_end), (self.later_start, self.later_end))
        return [(start, end) for start, end in spans if end > start]


class AnchorPlan(NamedTuple):
    """A plan of anchored attention holds its calls, or, where they are short, the same as one variable-length call.

    text_index: the layout's; calls are empty where they are packed.
    """

    text_index: Tensor
    calls: list[AnchorCall]
    packed: Packed | None


def anchor_plan(layout: ShotLayout, config: MoCConfig, num_queries: int) -> AnchorPlan:
    """Returns the plan for the last `num_queries` queries of a stream, made once for each kind of anchors."""
    key = ("anchors", config.dense, config.own_anchor, config.text_anchor, num_queries)
    return layout.table(key, lambda: _plan(layout, config, num_queries))


def _plan(layout: ShotLayout, config: MoCConfig, num_queries: int) -> AnchorPlan:
    calls = anchor_calls(layout, config, num_queries)
    short = 1 < len(calls) <= MAX_RUNS and sum(call.num_keys for call in calls) < SHORT * len(calls)
    if short and covers_all(calls, num_queries):
        return AnchorPlan(layout.text_index, [], _packed(layout, calls))
    return AnchorPlan(layout.text_index, calls, None)


def _packed(layout: ShotLayout, calls: Sequence[AnchorCall]) -> Packed:
    size = layout.num_tokens
    texts = [(group.start, group.start + group.text_tokens) for group in layout.groups]
    keys = [
        [(call.own_start, call.own_end), *((size + start, size + end) for start, end in call.text_spans())]
        for call in calls
    ]
    rows = [(0, size), *texts]  # all tokens, and after them those of text once more
    return Packed.build([call.end - call.start for call in calls], keys, size, layout.device, rows)


def anchor_calls(layout: ShotLayout, config: MoCConfig, num_queries: int) -> list[AnchorCall]:
    """Returns the dense calls of the anchored attention of the last `num_queries` queries, those with keys; together
    they hold each query at most once."""
    if config.dense:
        calls = [AnchorCall(start, end, start, end, 0, 0, 0, 0) for start, end in layout.sample_ranges]
    else:
        calls = list(_by_sample(layout) if _same_for_all(config) else _by_group(layout, config))
    first = layout.num_tokens - num_queries
    calls = [call._replace(start=max(call.start - first, 0), end=call.end - first) for call in calls]
    return [call for call in calls if call.num_keys and call.end > call.start]


def covers_all(calls: Sequence[AnchorCall], num_tokens: int) -> bool:
    """Returns whether every query is in some call."""
    return sum(call.end - call.start for call in calls) == num_tokens


def equal_shots(calls: Sequence[AnchorCall], q: Tensor, k: Tensor) -> int:
    """Returns the number of the calls where they are shots of one length, one after another, whose queries see their
    own tokens alone and are all asked for; 0 otherwise."""
    alone = all((call.start, call.end) == (call.own_start, call.own_end) and not call.num_text for call in calls)
    alike = len({call.num_own for call in calls}) == 1 and sum(call.num_own for call in calls) == len(q) == len(k)
    return len(calls) if alone and alike else 0


def with_own_chunk(routes: Tensor, layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Adds the own chunk to routes as one more slot, for `own_anchor: chunk`: [N, Lq, K] -> [N, Lq, K + 1].

    Global text has no own chunk, and the own chunk of a text token is left out where its text anchors cover it.
    """
    if config.own_anchor is not OwnAnchor.chunk:
        return routes
    own = layout.token_shot_chunk if config.text_anchor is TextAnchor.none else layout.token_video_chunk
    return torch.cat([routes, own[-routes.shape[1] :, None].expand(routes.shape[0], -1, 1)], dim=-1)


def _same_for_all(config: MoCConfig) -> bool:
    return config.own_anchor is not OwnAnchor.shot and config.text_anchor is TextAnchor.all


def _sample_groups(layout: ShotLayout) -> Iterator[tuple[list[tuple[Group, int, int]], int, int]]:
    """Yields each sample's groups, each with the bounds of its text rows, and the bounds of the sample's text rows."""
    rows: list[tuple[Group, int, int]] = []
    start = 0
    for group in layout.groups:
        if rows and group.sample != rows[-1][0].sample:
            yield rows, rows[0][1], start
            rows = []
        rows.append((group, start, start + group.text_tokens))
        start += group.text_tokens
    yield rows, rows[0][1], start


def _by_sample(layout: ShotLayout) -> Iterator[AnchorCall]:
    for rows, first, last in _sample_groups(layout):
        start, end = rows[0][0].start, rows[-1][0].end
        yield AnchorCall(start, end, start, start, first, last, last, last)


def _by_group(layout: ShotLayout, config: MoCConfig) -> Iterator[AnchorCall]:
    anchors = _anchors_by_kind(config)
    for rows, _, _ in _sample_groups(layout):
        for group, _, _ in rows:
            in_shot = group.shot >= 0
            has_own, _ = anchors[in_shot, True, not in_shot]
            # The own shot is taken with its own text, so those rows are not taken twice.
            seen = [
                (first, last)
                for other, first, last in rows
                if not (has_own and other is group) and anchors[in_shot, other is group, other.shot < 0][1]
            ]
            yield AnchorCall(group.start, group.end, group.start, group.end if has_own else group.start, *_runs(seen))


def _anchors_by_kind(config: MoCConfig) -> dict[tuple[bool, bool, bool], tuple[bool, bool]]:
    """Returns whether tokens of one group attend to their own shot, and to the text of another group, by whether they
    are in a shot, the groups are the same, and the other is global text. A pack has thousands of pairs of groups, but
    only these eight kinds."""
    found = {}
    for in_shot, same_group, is_global in product((False, True), repeat=3):
        pair = Pair(True, same_group, False, in_shot=in_shot, is_text=True, is_global=is_global)
        found[in_shot, same_group, is_global] = is_own_anchor(pair, config), is_text_anchor(pair, config)
    return found


def _runs(spans: Sequence[tuple[int, int]]) -> tuple[int, int, int, int]:
    """Joins spans of rows, in order, where they touch: gives the bounds of two runs at most, the second often empty."""
    bounds: list[int] = []
    for first, last in spans:
        if last > first:
            bounds = [*bounds[:-1], last] if bounds and bounds[-1] == first else [*bounds, first, last]
    text_start, text_end, later_start, later_end = [*bounds, *[0] * (4 - len(bounds))]
    return text_start, text_end, later_start, later_end


def _text_rows(x: Tensor, text_index: Tensor, calls: Sequence[AnchorCall]) -> Tensor:
    """Returns x's text rows [Lt, N, D], or none where no call takes any."""
    return x[text_index] if any(call.num_text for call in calls) else x[:0]


def _keys(call: AnchorCall, x: Tensor, text: Tensor) -> Tensor:
    """Returns rows of keys (or values) x [L, N, D] of one call; text: x's text rows."""
    rows = [x[call.own_start : call.own_end]] if call.num_own else []
    rows += [text[first:last] for first, last in call.text_spans()]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def forward(kernel: DenseKernel, q: Tensor, k: Tensor, v: Tensor, plan: AnchorPlan) -> tuple[Tensor, Tensor]:
    """Returns out [Lq, N, D], lse [N, Lq] (fp32 at least) of q [Lq, N, D], k, v [L, N, D]; 0, -inf without anchors."""
    text_index, calls, packed = plan
    if packed is not None:
        return packed_calls.forward(kernel, q, k, v, packed)
    if shots := equal_shots(calls, q, k):
        out, lse = kernel.forward(*(x.unflatten(0, (shots, -1)) for x in (q, k, v)))
        return out.flatten(0, 1).contiguous(), lse.transpose(0, 1).flatten(1).contiguous()
    k_text, v_text = _text_rows(k, text_index, calls), _text_rows(v, text_index, calls)
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=wide)
    if not covers_all(calls, q.shape[0]):
        out.zero_()
        lse.fill_(-torch.inf)
    for call in calls:
        rows = slice(call.start, call.end)
        out[rows], lse[:, rows] = kernel.forward(q[rows], _keys(call, k, k_text), _keys(call, v, v_text))
    return out, lse


def backward(
    kernel: DenseKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AnchorPlan,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv of the anchored attention, given the merged out and lse."""
    text_index, calls, packed = plan
    if packed is not None:
        return packed_calls.backward(kernel, dout, q, k, v, out, lse, packed, deterministic)
    if shots := equal_shots(calls, q, k):
        by_shot = (x.unflatten(0, (shots, -1)) for x in (dout, q, k, v, out))
        lse_by_shot = lse.unflatten(1, (shots, -1)).transpose(0, 1)
        dq, dk, dv = kernel.backward(*by_shot, lse_by_shot, deterministic)
        return dq.flatten(0, 1).contiguous(), dk.flatten(0, 1).contiguous(), dv.flatten(0, 1).contiguous()
    k_text, v_text = _text_rows(k, text_index, calls), _text_rows(v, text_index, calls)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not covers_all(calls, q.shape[0]):
        dq.zero_()
    if not covers_all([call for call in calls if call.num_own], k.shape[0]):
        dk.zero_()
        dv.zero_()
    text_grads = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k_text, v_text)]
    for call in calls:
        rows = slice(call.start, call.end)
        keys, values = _keys(call, k, k_text), _keys(call, v, v_text)
        dq[rows], *grads = kernel.backward(dout[rows], q[rows], keys, values, out[rows], lse[:, rows], deterministic)
        for total, text_total, grad in zip((dk, dv), text_grads, grads, strict=True):
            _add(call, grad, total, text_total)
    for total, text_total in zip((dk, dv), text_grads, strict=True):
        if text_total.numel():
            summed = total[text_index] + text_total
            total.index_copy_(0, text_index, summed.to(total.dtype))
    return dq, dk, dv


def _add(call: AnchorCall, grad: Tensor, total: Tensor, text_total: Tensor) -> None:
    """Puts the gradient of a call's own rows into that of all tokens, and adds that of its text rows to all texts'."""
    if call.num_own:
        total[call.own_start : call.own_end] = grad[: call.num_own]
    for first, last, of_text in _text_grads(call, grad):
        text_total[first:last] += of_text


def _text_grads(call: AnchorCall, grad: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yields the bounds of each run of a call's text rows, and the gradient of these among the call's keys."""
    start = call.num_own
    for first, last in call.text_spans():
        yield first, last, grad[start : start + last - first]
        start += last - first
