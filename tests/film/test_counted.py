"""These tests are about the count of a film's FLOPs, against `moc.cost` on each forward that sampling has, and without
tables for a film of millions of chunks."""

import tracemalloc
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from film.estimate import estimate
from moc import ShotLayout, route
from moc.cost import attention_cost
from moc.diffusion import sample_shots
from tests.film.filming import SHOT, STORY, open_filmmaker


def attention_flops(layout: ShotLayout, config, num_heads: int, head_dim: int) -> float:
    """Returns those of pairs and of scores in one layer, by random routes: each chunk has as many tokens as any
    other."""
    q, k = torch.randn(2, layout.num_tokens, num_heads, head_dim)
    routes = None if config.dense else route(q, k, layout, config)
    cost = attention_cost(layout, config, routes, num_heads, head_dim)
    pooled = int((~layout.token_is_text).sum()) * head_dim * num_heads if cost.routing_flops else 0
    return cost.flops - pooled


def forward_flops(model, layout: ShotLayout, config, first: int) -> float:
    """Returns the FLOPs of a forward that computes the tokens from `first` on, those of all that is before being
    remembered: where attention flows strictly forward, these have the FLOPs of a stream without the later ones."""
    linears = [m.weight.numel() for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    found = 2.0 * sum(linears) * (layout.num_tokens - first)
    heads = model.config.num_heads, model.config.dim // model.config.num_heads
    shots = [shot for _, shots in layout.samples for shot in shots]
    known = [shots[: g.shot] for g in layout.groups if first and g.start == first]
    for layer in range(len(model.blocks)):
        own = config.at_layer(layer)
        found += attention_flops(layout, own, *heads)
        for before in known:
            found -= attention_flops(
                ShotLayout.build(before, layout.groups[0].text_tokens, layout.chunk_tokens), own, *heads
            )
    return found


MODES = {
    "joint": {"lag": 0.0},
    "staggered": {"lag": 0.5},
    "extend": {},
    "extend without cache": {"cache": False},
    "one shot of context": {"context_shots": 1},
    "one shot of context without cache": {"context_shots": 1, "cache": False},
    "no guidance": {"guidance_scale": 1.0},
    "guidance in an interval": {"guidance_interval": [0.0, 0.9]},
    "a dense step": {"dense_steps": 1},
    "a dense step, staggered": {"dense_steps": 1, "lag": 0.5},
}
ATTENTION = {
    "all text": {"text_anchor": "all"},
    "not causal": {"causal": False},
    "own chunk": {"own_anchor": "chunk"},
    "a dense layer": {"dense_layers": 1},
    "dense": {"dense": True},
}


@pytest.mark.parametrize(
    ("sampler", "moc"),
    [*((mode, {}) for mode in MODES.values()), *((MODES["staggered"], kind) for kind in ATTENTION.values())],
    ids=[*MODES, *ATTENTION],
)
def test_a_film_has_the_flops_of_the_forwards_that_sampling_has(trained, write, sampler, moc, monkeypatch):
    filmmaker = open_filmmaker(trained, **sampler)
    shots = [SHOT, SHOT | {"cut": False, "prompt": "He stops and looks around."}, SHOT | {"seconds": 8 / 12}, SHOT]
    plan = filmmaker.plan(filmmaker.read(write(STORY | {"shots": shots})))
    model = filmmaker.model
    frame = plan.shapes[0][2] * plan.shapes[0][3] // (model.stream.patch[1] * model.stream.patch[2])
    config = replace(filmmaker.moc, chunk_tokens=frame, top_k=2, **moc)
    counted, forward = [], model.forward

    def counting(latents, sigma, text, layout, config, cache=None, **others):
        counted.append(forward_flops(model, layout, config, cache.num_tokens if cache else 0))
        return forward(latents, sigma, text, layout, config, cache=cache, **others)

    monkeypatch.setattr(model, "forward", counting)
    list(sample_shots(model, model.stream, config, filmmaker.flow, plan.story(), filmmaker.sampler))
    found = estimate(plan, filmmaker.sampler, model, config, filmmaker.flow, filmmaker.encoders.codec)
    assert found.forwards == len(counted)
    assert found.flops == pytest.approx(sum(counted))


class Sizes(TorchDispatchMode):
    """This mode keeps how many numbers the largest tensor has that is made within it."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in [out] if isinstance(out, torch.Tensor) else []:
            self.largest = max(self.largest, tensor.numel() if tensor.device.type != "meta" else 0)
        return out


@pytest.mark.parametrize("sampler", [{}, {"lag": 0.5}, {"lag": 0.0}], ids=str)
def test_a_film_of_two_million_chunks_is_counted_without_a_table_of_them(trained, write, sampler):
    filmmaker = open_filmmaker(trained, **sampler)
    plan = filmmaker.plan(filmmaker.read(write(STORY)))
    num_shots, num_frames, (channels, _, *size) = 40, 50_000, plan.shapes[0]
    shapes = [(channels, num_frames, *size)] * num_shots
    text, negative = ([texts[0]] + [texts[1]] * num_shots for texts in (plan.text, plan.negative))
    plan = replace(plan, shapes=shapes, text=text, negative=negative, noise_keys=[], cuts=[])
    plan = replace(plan, script=replace(plan.script, shots=[plan.script.shots[0]] * num_shots))
    plan = replace(plan, filmed=list(range(num_shots)))
    moc = replace(filmmaker.moc, chunk_tokens=size[0] * size[1] // 4)
    settings = filmmaker.model, moc, filmmaker.flow, filmmaker.encoders.codec
    tracemalloc.start()
    with Sizes() as sizes:
        found = estimate(plan, filmmaker.sampler, *settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(found.shot_tokens) > 2_000_000 * moc.chunk_tokens
    assert sizes.largest < 20_000
    assert peak < 2_000_000
    assert found.sparsity > 0.9
