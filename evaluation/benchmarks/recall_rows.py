"""This module tells what the rows of a recall record say: their names, which row is compared with which, and how."""

import json
import math
import re
from dataclasses import fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

import moc
from evaluation.estimates import half_width
from moc import MoCConfig
from moc.config import DropKey
from moc.cost import attention_cost

TITLES = {
    "dense": "dense",
    "dense_causal": "all earlier shots, by routing",
    "moc_progressive": "MoC, progressive",
    "moc": "MoC",
    "moc_no_drops": "MoC, no drops",
    "moc_no_drops_all_text": "MoC, no drops, all text anchored",
    "moc_all_text": "MoC, all text anchored",
    "moc_no_own_shot": "MoC, own shot not anchored",
    "moc_no_text": "MoC, no text anchored",
    "moc_not_causal": "MoC, not causal",
    "moc_not_causal_of_four": "MoC, not causal, four routes",
    "moc_dense_target": "MoC, dense velocity as half of the target",
    "moc_pre_rope": "MoC, routed before RoPE",
    "moc_lse": "MoC, log-sum-exp of three means a chunk",
    "moc_lse_not_causal_of_four": "MoC, not causal, four routes, log-sum-exp of three means a chunk",
    "moc_lse_of_frames": "MoC, chunks of a frame, log-sum-exp of four means",
    "moc_of_half_frames": "MoC, chunks of half a frame",
    "moc_of_frames": "MoC, chunks of a frame",
    "first_frame": "first frame of every shot",
    "random": "random routes",
    "own_shot": "own shot only",
}
# What attention sees of a scene of experiment=recall, whose captions all have as many tokens.
SHOTS, GLOBAL_TEXT = [moc.Shot(text_tokens=15, grid=(2, 4, 6))] * 8, 35
LAYERS, HEADS, HEAD_DIM = 6, 6, 32


def title(row: dict) -> str:
    """Returns what a row is called: its attention, seed, start and steps."""
    done = "" if row["steps_done"] == row["steps"] else f" (stopped at {row['steps_done']:,})"
    return f"{TITLES[row['row']]}, seed {row['seed']}{start_of(row)}, {row['steps']:,} steps{done}"


def start_of(row: dict) -> str:
    """Returns the end of a row's name that tells which weights it began with; empty for fresh ones."""
    return f", from {row['start']}" if row.get("start") else ""


def learning_rate(row: dict) -> str:
    """Returns the learning rate that a row's command sets; empty where it takes that of experiment=recall."""
    found = re.search(r"optim\.lr=(\S+)", row["command"])
    return found[1] if found else ""


def by_seeds(rows: list[dict]) -> list[list[dict]]:
    """Returns the rows that differ by their seed alone, or by where time ended them, together."""
    together: dict[tuple, list[dict]] = {}
    for row in rows:
        key = row["row"], row.get("start"), row["steps"], learning_rate(row)
        together.setdefault(key, []).append(row)
    return list(together.values())


def rival(row: dict, rows: list[dict], kind: str = "dense") -> dict | None:
    """Returns the dense row, or that of another kind, of the same seed that began with the same weights: that of as
    many steps or, where there is none, of the most."""
    alike = [r for r in rows if r["row"] == kind and all(r.get(name) == row.get(name) for name in ("seed", "start"))]
    alike.sort(key=lambda r: (r["steps"] == row["steps"], r["steps"]))
    return alike[-1] if alike and alike[-1] is not row else None


def difference_to(row: dict, rows: list[dict], kind: str) -> tuple[float, float] | None:
    """Returns the difference over the same scenes to the rival of a kind, and half of its 95 % interval, which is nan
    for few scenes; None where there is no rival that was tested on them."""
    other = rival(row, rows, kind)
    if other is None or len(other["all"].get("right", "")) != len(row["all"].get("right", "")):
        return None
    difference = (_right(row) - _right(other)).mean(1)
    return float(difference.mean()), half_width(difference)


def loss_to_dense(row: dict, rows: list[dict], name: str, sigma: str) -> tuple[float, float] | None:
    """Returns the share by which a loss exceeds the dense rival's, and half of its 95 % interval over blocks of the
    same scenes with the same noise, which is nan for older rows, whose records have no blocks; None where there is no
    rival."""
    dense = rival(row, rows)
    if dense is None:
        return None
    excess = row["all"][name][sigma][0] / dense["all"][name][sigma][0] - 1
    blocks = [torch.tensor(r["all"].get(f"{name}_of_blocks", {}).get(sigma, []), dtype=torch.float64)
              for r in (row, dense)]  # fmt: skip
    if not len(blocks[0]) or len(blocks[0]) != len(blocks[1]):
        return excess, math.nan
    return excess, half_width(blocks[0] - blocks[1]) / float(blocks[1].mean())


def _right(row: dict) -> Tensor:
    """Returns whether each look of each scene is right, fp64 [B, 2]."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["all"]["right"]), np.uint8))
    return torch.from_numpy(bits[: row["all"]["readings"]].reshape(-1, 2)).double()


def attention_flops(row: dict) -> float:
    """Returns the FLOPs of attention in a forward of one scene, with those of its routing."""
    known = {f.name for f in fields(MoCConfig)}  # older rows have further settings, which changed no result
    return _flops(json.dumps({name: value for name, value in row["moc"].items() if name in known}))


@cache
def _flops(settings: str) -> float:
    config = MoCConfig.from_dict(json.loads(settings))
    layout = moc.ShotLayout.build(shots=SHOTS, global_text_tokens=GLOBAL_TEXT, chunk_tokens=config.chunk_tokens)
    q, k = torch.randn(2, layout.num_tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    drops = None if config.top_k else DropKey(0, 0)  # with top_k=0 all routes are random, in tests too
    routes = None if config.dense else moc.route(q, k, layout, config, drops)
    return LAYERS * attention_cost(layout, config, routes, HEADS, HEAD_DIM).flops
