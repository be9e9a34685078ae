"""The anchored part of MoC attention: what every query attends to whatever its routes, as a few dense calls.

Anchors are contiguous runs of keys shared by contiguous runs of queries: a shot's queries see their own shot and the
text of other groups. One dense call a shot takes both together (own rows and text rows side by side), so that there is
one LSE and no separate text part. About 80 % of the work of the attention is in these calls.

The own *chunk* (`own_anchor: chunk`) is not here: backends add it to the routes, as one more chunk of each query.

Shape letters: L packed tokens, Lq queries, Lt text tokens, N heads, D head dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moc.config import MoCConfig, OwnAnchor, TextAnchor
from moc.kernels.dense import DenseKernel
from moc.layout import Group, ShotLayout


@dataclass(frozen=True)
class AnchorCall:
    """Queries [start, end) attend to tokens [own_start, own_end) and to text rows [a0, a1) and [b0, b1).

    Queries count from the first one that is asked for, text rows along the text tokens alone (`layout.text_index`).
    """

    start: int
    end: int
    own_start: int
    own_end: int
    a0: int
    a1: int
    b0: int
    b1: int

    @property
    def num_own(self) -> int:
        return self.own_end - self.own_start

    @property
    def num_text(self) -> int:
        return self.a1 - self.a0 + self.b1 - self.b0

    @property
    def num_keys(self) -> int:
        return self.num_own + self.num_text

    def as_ints(self) -> list[int]:
        return [self.start, self.end, self.own_start, self.own_end, self.a0, self.a1, self.b0, self.b1]


def anchor_calls(layout: ShotLayout, config: MoCConfig, first_query: int = 0) -> list[AnchorCall]:
    """The dense calls of the anchored part of queries from `first_query` on, those with keys; together they hold each
    query at most once."""
    if config.dense:
        calls = [AnchorCall(start, end, start, end, 0, 0, 0, 0) for start, end in layout.sample_ranges]
    else:
        calls = list(_by_sample(layout) if _same_for_all(config) else _by_group(layout, config))
    calls = [replace(c, start=max(c.start - first_query, 0), end=c.end - first_query) for c in calls]
    return [call for call in calls if call.num_keys and call.end > call.start]


def covers_all(calls: Sequence[AnchorCall], num_tokens: int) -> bool:
    """Whether every query is in some call."""
    return sum(call.end - call.start for call in calls) == num_tokens


def with_own_chunk(routes: Tensor, layout: ShotLayout, config: MoCConfig, first_query: int = 0) -> Tensor:
    """Routes with the own chunk as one more slot, for `own_anchor: chunk`: [N, Lq, K] -> [N, Lq, K + 1].

    Global text has no own chunk, and the own chunk of a text token is left out where its text anchors cover it.
    """
    if config.own_anchor is not OwnAnchor.chunk:
        return routes
    own = layout.token_shot_chunk[first_query:]
    if config.text_anchor is not TextAnchor.none:
        own = own.masked_fill(layout.token_is_text[first_query:], -1)
    return torch.cat([routes, own[None, :, None].expand(len(routes), -1, 1)], dim=-1)


def _same_for_all(config: MoCConfig) -> bool:
    return config.own_anchor is not OwnAnchor.shot and config.text_anchor is TextAnchor.all


def _text_starts(layout: ShotLayout) -> list[int]:
    """First text row of each group, and the number of text rows at the end."""
    starts = [0]
    for group in layout.groups:
        starts.append(starts[-1] + group.text_tokens)
    return starts


def _sample_groups(layout: ShotLayout) -> Iterator[tuple[list[tuple[Group, int, int]], int, int]]:
    """For each sample its groups, each with the bounds of its text rows, and the bounds of the sample's text rows."""
    starts = _text_starts(layout)
    for sample in range(layout.num_samples):
        rows = [(g, starts[i], starts[i + 1]) for i, g in enumerate(layout.groups) if g.sample == sample]
        yield rows, rows[0][1], rows[-1][2]


def _by_sample(layout: ShotLayout) -> Iterator[AnchorCall]:
    for rows, first, last in _sample_groups(layout):
        start, end = rows[0][0].start, rows[-1][0].end
        yield AnchorCall(start, end, start, start, first, last, last, last)


def _by_group(layout: ShotLayout, config: MoCConfig) -> Iterator[AnchorCall]:
    for rows, first, last in _sample_groups(layout):
        global_last = rows[0][2]
        for group, text_first, text_last in rows:
            own_end = group.start
            a0, a1, b0, b1 = first, first, last, last
            if config.text_anchor is TextAnchor.all:
                a1, b0 = last, last
            elif config.text_anchor is TextAnchor.global_and_own:
                a1, b0, b1 = global_last, text_first, text_last
                if group.shot < 0:
                    b0 = b1
            if config.own_anchor is OwnAnchor.shot and group.shot >= 0:
                own_end = group.end  # with its own text, so those rows are not taken twice
                if config.text_anchor is TextAnchor.all:
                    a1, b0 = text_first, text_last
                else:
                    b0 = b1
            yield AnchorCall(group.start, group.end, group.start, own_end, a0, a1, b0, b1)


def _text_rows(x: Tensor, text_index: Tensor, calls: Sequence[AnchorCall]) -> Tensor:
    """x's text rows [Lt, N, D], or none where no call takes any."""
    return x.index_select(0, text_index) if any(call.num_text for call in calls) else x[:0]


def _keys(call: AnchorCall, x: Tensor, text: Tensor) -> Tensor:
    """Rows of keys (or values) x [L, N, D] of one call; text: x's text rows."""
    parts = [x[call.own_start : call.own_end], text[call.a0 : call.a1], text[call.b0 : call.b1]]
    parts = [part for part in parts if len(part)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def forward(
    kernel: DenseKernel, q: Tensor, k: Tensor, v: Tensor, text_index: Tensor, calls: Sequence[AnchorCall]
) -> tuple[Tensor, Tensor]:
    """q [Lq, N, D], k, v [L, N, D] -> out [Lq, N, D], lse [N, Lq] (fp32 at least); without anchors: 0 and -inf."""
    k_text, v_text = _text_rows(k, text_index, calls), _text_rows(v, text_index, calls)
    if len(calls) == 1 and covers_all(calls, len(q)):
        out, lse = kernel.forward(q, _keys(calls[0], k, k_text), _keys(calls[0], v, v_text))
        return out.contiguous(), lse.contiguous()
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=wide)
    if not covers_all(calls, len(q)):
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
    text_index: Tensor,
    calls: Sequence[AnchorCall],
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the anchored part, given the merged out and lse."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not covers_all(calls, len(q)):
        dq.zero_()
    if not covers_all([call for call in calls if call.num_own], len(k)):
        dk.zero_()
        dv.zero_()
    k_text, v_text = _text_rows(k, text_index, calls), _text_rows(v, text_index, calls)
    text_grads = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k_text, v_text)]
    for call in calls:
        rows, own = slice(call.start, call.end), slice(call.own_start, call.own_end)
        keys, values = _keys(call, k, k_text), _keys(call, v, v_text)
        dq[rows], *grads = kernel.backward(dout[rows], q[rows], keys, values, out[rows], lse[:, rows], deterministic)
        targets = ((dk, text_grads[0]), (dv, text_grads[1]))
        for (total, text_total), grad in zip(targets, grads, strict=True):
            if call.num_own:
                total[own] = grad[: call.num_own]
            _add_text(text_total, grad[call.num_own :], call)
    for total, text_total in zip((dk, dv), text_grads, strict=True):
        if len(text_total):
            summed = total.index_select(0, text_index) + text_total
            total.index_copy_(0, text_index, summed.to(total.dtype))
    return dq, dk, dv


def _add_text(total: Tensor, grad: Tensor, call: AnchorCall) -> None:
    """Adds the gradient of a call's text rows to that of all text rows, in place."""
    middle = call.a1 - call.a0
    for first, last, part in ((call.a0, call.a1, grad[:middle]), (call.b0, call.b1, grad[middle:])):
        if last > first:
            total[first:last] += part
