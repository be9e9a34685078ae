"""This is what a query may see: the rule of anchors and candidates, written once for routing, attention and its cost.

All tokens of a chunk see the same, so the rule speaks of a chunk of queries and a chunk of keys. Triton's kernels read
candidates from the table of `candidate_runs`. `moc.reference` states anchors on its own: a test compares the two.

Source: arXiv 2508.21058, section 3 (anchors, causal routing).
"""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moc.config import Candidates, MoCConfig, OwnAnchor, TextAnchor
from moc.layout import ShotLayout

Flag = TypeVar("Flag", bool, Tensor)


@dataclass(frozen=True)
class Pair(Generic[Flag]):
    """A pair says how a chunk of queries and a chunk of keys stand to each other: bools, or bool tensors of many pairs.

    in_shot: the queries are of a shot, not of global text. is_text, is_global: the keys are text, are global text.
    """

    same_sample: Flag
    same_group: Flag
    same_chunk: Flag
    in_shot: Flag
    is_text: Flag
    is_global: Flag


def pairs(layout: ShotLayout, query: Tensor, key: Tensor) -> Pair[Tensor]:
    """Returns the pairs of two int tensors of chunks, which broadcast."""
    query_group, key_group = layout.chunk_group[query], layout.chunk_group[key]
    return Pair(
        same_sample=layout.chunk_sample[query] == layout.chunk_sample[key],
        same_group=query_group == key_group,
        same_chunk=query == key,
        in_shot=layout.group_shot[query_group] >= 0,
        is_text=layout.chunk_is_text[key],
        is_global=layout.group_shot[key_group] < 0,
    )


def is_own_anchor(pair: Pair[Flag], config: MoCConfig) -> Flag:
    """Returns whether the queries always attend to the keys as those of their own shot."""
    if config.own_anchor is OwnAnchor.shot:
        return pair.same_group & pair.in_shot
    if config.own_anchor is OwnAnchor.chunk:
        return pair.same_chunk & pair.in_shot
    return pair.same_chunk & False


def is_text_anchor(pair: Pair[Flag], config: MoCConfig) -> Flag:
    """Returns whether the queries always attend to the keys as text."""
    text = pair.same_sample & pair.is_text
    if config.text_anchor is TextAnchor.all:
        return text
    if config.text_anchor is TextAnchor.global_and_own:
        return text & (pair.is_global | pair.same_group)
    return text & False


def is_anchor(layout: ShotLayout, config: MoCConfig, query: Tensor, key: Tensor) -> Tensor:
    """Returns whether the queries of each pair of chunks attend to the keys whatever their routes; bool, broadcast."""
    pair = pairs(layout, query, key)
    return is_own_anchor(pair, config) | is_text_anchor(pair, config)


def candidate_runs(layout: ShotLayout, config: MoCConfig) -> Tensor:
    """Returns which chunks the queries of each chunk may route to, int32 [M, 4]: the video among [first, last), but for
    [own_first, own_last), its own chunks that are anchors.

    When causal, `last` is where the own shot or chunk begins. Global text precedes every shot: nothing is left for it.
    """
    return layout.table(("candidates", config.causal, config.own_anchor), lambda: _candidate_runs(layout, config))


def _candidate_runs(layout: ShotLayout, config: MoCConfig) -> Tensor:
    chunk = torch.arange(layout.num_chunks, dtype=torch.int32, device=layout.device)
    group, sample = layout.chunk_group, layout.chunk_sample
    itself = pairs(layout, chunk, chunk)
    neighbour = replace(itself, same_chunk=~itself.same_chunk)  # these pairs are of another chunk of the same shot
    has_own, has_shot = is_own_anchor(itself, config), is_own_anchor(neighbour, config)
    own_first = torch.where(has_shot, layout.group_first_chunk[group], chunk)
    own_last = torch.where(has_shot, layout.group_first_chunk[group + 1], chunk + has_own)
    last = own_first if config.causal else layout.sample_first_chunk[sample + 1]
    return torch.stack([layout.sample_first_chunk[sample], last, own_first, own_last], dim=1)


def is_candidate(layout: ShotLayout, config: MoCConfig, query: Tensor, key: Tensor) -> Tensor:
    """Returns whether the queries of each pair of chunks may route to the keys; bool, broadcast."""
    first, last, own_first, own_last = candidate_runs(layout, config)[query].to(key.dtype).unbind(-1)
    found = (key >= first) & (key < last) & ~((key >= own_first) & (key < own_last)) & ~layout.chunk_is_text[key]
    if config.candidates is Candidates.first:
        found = found & layout.table("first video chunks", lambda: _is_first(layout))[key]
    return found


def _is_first(layout: ShotLayout) -> Tensor:
    """Returns whether each chunk is the first one of a shot's video; bool [M]."""
    before = torch.arange(-1, layout.num_chunks - 1, device=layout.device)
    follows_video = (layout.chunk_group[before] == layout.chunk_group) & ~layout.chunk_is_text[before]
    return ~layout.chunk_is_text & ~(follows_video & (before >= 0))
