"""These tests are about how often kernels are compiled: once for each kind of model and settings, whatever the streams'
lengths.

Triton compiles a kernel anew for other types and constants, for integers that are 1 or multiples of 16, and for
pointers that are no multiples of 16 bytes. What it would compile is counted here over many packs.
"""

import random
from collections import defaultdict

import pytest
import torch
from torch import Tensor

import moc
from models.members import Members
from models.part import Part
from tests.moc.against_reference import interpreted
from tests.strategies import attention_tensors

pytestmark = pytest.mark.usefixtures("listed")

CONFIGS = {
    "causal": moc.MoCConfig(chunk_tokens=256, top_k=5, text_anchor="global_and_own"),
    "not_causal": moc.MoCConfig(chunk_tokens=64, top_k=5, causal=False, own_anchor="chunk"),
    "few_routes": moc.MoCConfig(chunk_tokens=64, top_k=4, drop_in_max=2),
    "subchunks": moc.MoCConfig(chunk_tokens=64, top_k=5, descriptor_subchunks=3),
    "many_routes": moc.MoCConfig(chunk_tokens=16, top_k=20, causal=False),
}


def random_stream(rng: random.Random, chunk_tokens: int) -> moc.ShotLayout:
    """Returns a pack of one to three samples: stills, shots of one token and of several chunks, absent texts."""

    def shot() -> moc.Shot:
        return moc.Shot(rng.choice((0, 1, 5, 16)), (rng.randint(1, 9), rng.randint(1, 9), rng.choice((1, 4, 16))))

    samples = [
        moc.ShotLayout.build([shot() for _ in range(rng.randint(1, 4))], rng.choice((0, 1, 7)), chunk_tokens)
        for _ in range(rng.randint(1, 3))
    ]
    return moc.ShotLayout.pack(samples)


def as_on_a_device(layout: moc.ShotLayout, monkeypatch: pytest.MonkeyPatch) -> moc.ShotLayout:
    """Returns `layout` with its tables where `to` puts them on a device."""
    with monkeypatch.context() as patch:
        patch.setattr(moc.ShotLayout, "device", torch.device("meta"))
        return layout.to("cpu")


def train_and_sample(layout: moc.ShotLayout, config: moc.MoCConfig) -> None:
    """Computes attention with drops, forward and backward, then without gradients and from a later shot on."""
    q, k, v = attention_tensors(layout, dtype=torch.bfloat16, num_heads=3, head_dim=64, requires_grad=True)
    drops = moc.DropKey(seed=0, step=layout.num_tokens)
    moc.moc_attention(q, k, v, layout, config, backend="triton", drops=drops).sum().backward()
    with torch.no_grad():
        for first in (0, layout.groups[-1].start):
            moc.moc_attention(q[first:], k, v, layout, config, backend="triton")


@interpreted
@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_are_compiled_once_whatever_the_stream(name, capability, monkeypatch):
    from moc.kernels import compilation

    rng, config = random.Random(0), CONFIGS[name]
    with compilation.recorded(capability) as launches:
        for _ in range(12):
            train_and_sample(as_on_a_device(random_stream(rng, config.chunk_tokens), monkeypatch), config)
    variants = defaultdict(set)
    for launch in launches:
        variants[launch.name].add(launch.variant)
    assert {"route_kernel", "drop_kernel", "fill_kernel", "merge_kernel", "dkv_kernel", "dq_kernel"} <= set(variants)
    several = {kernel: keys for kernel, keys in variants.items() if len(keys) > 1}
    assert not several, "\n".join(key for keys in several.values() for key in sorted(keys))


def pointwise_work(num_tokens: int, groups: int, num_heads: int, head_dim: int, across_heads: bool) -> Tensor:
    """Returns every pointwise function on one stream of bf16 tokens; across_heads: as Wan norms q and k."""
    from models import pointwise

    def tokens(*shape: int) -> Tensor:
        return torch.randn(num_tokens, *shape).bfloat16().requires_grad_()

    dim, table = num_heads * head_dim, torch.randn(2, num_tokens, head_dim // 2)
    group = torch.randint(0, groups, (num_tokens,), dtype=torch.int32).sort().values
    members = Members(group, group.bincount(minlength=groups))
    shift, scale, gate = torch.randn(groups, 6 * dim).requires_grad_().chunk(6, dim=-1)[:3]
    weight, bias = torch.ones(dim).requires_grad_(), torch.zeros(dim)
    part = Part(moc.ShotLayout.build([moc.Shot(groups, (1, 1, num_tokens))]))
    text, video = (
        torch.randn(len(x), 3 * dim).bfloat16().requires_grad_() for x in (part.text_index, part.video_index)
    )
    turns = torch.randn(2, part.num_tokens, head_dim // 2).unbind()
    heads = tokens(dim) if across_heads else tokens(3, num_heads, head_dim).unbind(1)[0]
    outputs = (
        pointwise.modulate(tokens(dim), shift, scale, members),
        pointwise.add_gated(tokens(dim), tokens(dim), gate, members),
        *pointwise.add_modulate(tokens(dim), tokens(dim), gate, shift, scale, members, weight),
        pointwise.gelu(tokens(dim), weight),
        pointwise.layer_norm(tokens(dim), weight, bias, 1e-6),
        pointwise.rms_norm(heads, weight if across_heads else weight[:head_dim], 1e-6),
        pointwise.rotate(tokens(num_heads, head_dim), (table[0], table[1])),
        *pointwise.split(torch.cat([text, video])[:, :dim], part),
        *pointwise.join(text, video.requires_grad_(), 2 * [2 * [weight[:head_dim]]], part, turns),
    )
    return sum(output.float().nan_to_num().sum() for output in outputs)


@interpreted
@pytest.mark.parametrize("across_heads", [False, True])
def test_pointwise_kernels_are_compiled_once_whatever_the_stream(across_heads):
    from moc.kernels import compilation

    with compilation.recorded((9, 0)) as launches:
        for num_tokens, groups in ((100, 5), (1, 1), (7, 1), (1, 3), (160, 16), (33, 2)):
            for train in (True, False):
                with torch.set_grad_enabled(train):
                    total = pointwise_work(num_tokens, groups, 12, 64, across_heads)
                if train:
                    total.backward()
    variants = defaultdict(set)
    for launch in launches:
        variants[launch.name].add(launch.variant)
    # Three kernels also serve a norm with weights, which has no groups; the fourth splits and joins.
    twice = {"modulate_kernel", "modulate_backward_kernel", "group_sums_kernel", "split_kernel"}
    assert {name: len(keys) for name, keys in variants.items()} == {name: 1 + (name in twice) for name in variants}
    assert len(variants) == 16
