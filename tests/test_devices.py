"""Every tensor of a forward, a loss and a film is on one device: checked without a GPU, on torch's `meta` device.

Tensors there have shapes and no values. An operation that mixes them with the CPU's fails, and so does one that waits
for a value. Attention itself is left out: its kernels have tests of their own.
"""

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from film.plan import plan_film
from film.script import Script, ScriptShot
from moc import DropKey, MoCConfig, Sample, attention, make_batch
from moc.diffusion import Flow, SamplingConfig, Story, sample_shots
from moc.statistics import RoutingMap
from moc.training import EMA, Validator
from models import CodecConfig, ModelConfig, build_codec, build_model, wan

META = torch.device("meta")
CHANNELS, TEXT_DIM = 8, 32
SETTINGS = {
    "paper": MoCConfig(chunk_tokens=12, top_k=2),
    "forward": MoCConfig(chunk_tokens=12, top_k=2, text_anchor="global_and_own"),
    "before RoPE": MoCConfig(chunk_tokens=12, top_k=2, descriptor="pre_rope"),
    "dense": MoCConfig(chunk_tokens=12, dense=True),
}


class Kernels:
    """This backend gives results of the right shapes, and fails where its tensors do not share a device."""

    @staticmethod
    def route(q, k, layout, config, drops):
        assert q.device == k.device == layout.device
        width = config.top_k + (config.drop_in_max if drops and config.has_drops else 0)
        return q.new_zeros(q.shape[1], q.shape[0], width, dtype=torch.int32)

    @staticmethod
    def attend(q, k, v, routes, layout, config, execution, kept):
        assert routes is None or routes.device == q.device
        assert layout.device == q.device
        return q + k.mean() + v.mean()


class Drawn:
    """Generators exist on real devices only."""

    real = torch.Generator

    def __new__(cls, device="cpu"):
        return cls.real() if torch.device(device).type == "cpu" else object.__new__(cls)

    def manual_seed(self, seed):
        pass


class Owner:
    """This object gives what validation asks of `Parallel`."""

    device, is_sharded = META, False

    def autocast(self):
        return nullcontext()

    def put(self, tensor):
        return tensor.to(META)


@pytest.fixture(autouse=True)
def _no_values(monkeypatch):
    real_randn = torch.randn
    monkeypatch.setattr(attention, "resolve_backend", lambda *_: Kernels)
    monkeypatch.setattr(wan.packed, "attend", lambda q, k, v, windows: q + k.mean() + v.mean())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "Generator", Drawn)
    monkeypatch.setattr(
        torch,
        "randn",
        lambda *size, generator=None, device=None, **more: (
            real_randn(*size, device=device, **more)
            if isinstance(generator, Drawn)
            else real_randn(*size, generator=generator, device=device, **more)
        ),
    )


@pytest.fixture(params=["mmdit", "wan"])
def model(request):
    extra = {"input_skip": True, "frame_place": True} if request.param == "mmdit" else {}
    sizes = ModelConfig(request.param, dim=64, num_layers=2, num_heads=2, ffn_dim=64, **extra)
    return build_model(sizes, CHANNELS, TEXT_DIM).to(META)


def batch(model):
    """Returns two samples: three shots, one of them a still, and a lone one whose captions are dropped."""
    latents = [torch.randn(CHANNELS, frames, 8, 12) for frames in (3, 1, 2)]
    text = [torch.randn(rows, TEXT_DIM) for rows in (3, 4, 5, 6)]
    lone = Sample(latents[:1], [text[0][:1], text[1][:1]], position=1)
    return make_batch([Sample(latents, text), lone], model.stream, 24)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training(model, settings, recomputed):
    if recomputed:
        model.enable_gradient_checkpointing()
    on_cpu, flow = batch(model), Flow()
    levels = flow.draw_levels(on_cpu, seed=0)
    moved = on_cpu.rechunk(settings.chunk_tokens).to(META)
    loss = flow.loss(model.train(), moved, levels, settings, 0, DropKey(0, 1))
    assert loss.device == META
    loss.sum().backward()
    assert {weight.grad.device for weight in model.parameters() if weight.grad is not None} == {META}
    EMA(model, 0.9).update()


@pytest.mark.parametrize("clean_history", [False, True])
def test_validation(model, clean_history):
    validator = Validator([batch(model)], Flow(), clean_history=clean_history)
    assert validator.losses(model, SETTINGS["paper"], Owner()).device == META


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("lag", "cache"), [(0.0, False), (0.5, False), (1.0, False), (1.0, True)])
def test_sampling(model, lag, cache, given, monkeypatch):
    monkeypatch.setattr(Tensor, "isfinite", lambda self: torch.ones(1, dtype=torch.bool))  # each shot is asked once
    shapes = [(CHANNELS, frames, 8, 12) for frames in (3, 1, 2)]
    text = [torch.randn(rows, TEXT_DIM).to(META) for rows in (3, 4, 5, 6)]
    story = Story(shapes, text, text, {1: torch.randn(shapes[1])} if given else {})
    config, routing = SamplingConfig(steps=2, lag=lag, cache=cache), RoutingMap(3)
    shots = sample_shots(model, model.stream, SETTINGS["forward"], Flow(), story, config, None, routing)
    assert [latent.device for _, latent in shots] == [META] * (2 if given else 3)
    assert routing.counts.device == META


def test_a_script_with_a_picture(tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "ref.png")
    shots = (ScriptShot("a", 0.5), ScriptShot("b", 0.5, image=tmp_path / "ref.png"))
    codec = build_codec(CodecConfig()).to(META)
    plan = plan_film(Script("t", "whole", (64, 96), 12.0, "", shots), codec, META)
    assert plan.given[1].device == META
    decode = codec.shot_decoder()
    assert all(piece.device == META for piece in decode(torch.empty(54, 3, 8, 12, device=META)))


def test_tables_reach_a_gpu_through_pinned_memory():
    """A copy from other memory holds the host until the GPU has come to it, whatever `non_blocking` says."""
    root = Path(__file__).parents[1]
    # These copy pinned memory, or copy from the GPU.
    owners = {"moc/move.py", "moc/training/offload.py", "moc/training/outcome.py"}
    files = [file for package in ("moc", "models") for file in (root / package).rglob("*.py")]
    for file in files:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        copies = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "to"]
        at_once = [c.lineno for c in copies if any(word.arg == "non_blocking" for word in c.keywords)]
        name = str(file.relative_to(root))
        assert name in owners or not at_once, f"{name}, lines {at_once}: moc.move.move is what copies tables"
