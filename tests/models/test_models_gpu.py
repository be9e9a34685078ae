"""These tests are about whole models on a GPU: pytest -m gpu tests/models/test_models_gpu.py"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from moc import DropKey, MoCConfig
from moc.batch import Batch, Sample, make_batch
from models import ModelConfig, build_model, stream
from models.linear import Linear

pytestmark = pytest.mark.gpu

FAMILIES = ("mmdit", "wan")
CONFIG = MoCConfig(chunk_tokens=128, top_k=2)
DROPS = DropKey(seed=1, step=2)


def build(family: str) -> nn.Module:
    sizes = {"dim": 256, "num_layers": 3, "num_heads": 4, "ffn_dim": 512}
    model = build_model(ModelConfig(family=family, **sizes), latent_channels=8, text_dim=32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.enable_gradient_checkpointing()
    return model.train()


def story(model: nn.Module, frames: tuple[int, ...] = (5, 3, 4)) -> Batch:
    generator = torch.Generator().manual_seed(sum(frames))
    latents = [torch.randn(8, length, 16, 24, generator=generator) for length in frames]
    text = [torch.randn(7 + i, 32, generator=generator) for i in range(len(frames) + 1)]
    return make_batch([Sample(latents, text)], model.stream, CONFIG.chunk_tokens)


def results(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Outputs and every gradient of one forward and backward in the weights' precision, on the CPU."""
    sigma = torch.linspace(0, 1, batch.num_shots, device=batch.layout.device)
    out = model(batch.latents, sigma, batch.text, batch.layout, CONFIG, DROPS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(sum(x.square().mean() for x in out), parameters, allow_unused=True)
    return [x.detach().cpu() for x in (*out, *grads) if x is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_and_fast_on_a_gpu_equals_plain_on_a_cpu_at_many_lengths(family):
    model = build(family)
    on_gpu = deepcopy(model).cuda()
    for frames in ((5, 3, 4), (4, 4), (1, 6, 2, 2), (3,), (7, 2, 5)):
        batch = story(model, frames)
        for a, b in zip(results(on_gpu, batch.to("cuda")), results(model, batch), strict=True):
            assert (a - b).norm() <= 2e-4 * b.norm() + 1e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_never_wait_for_the_host(family):
    model = build(family).cuda()
    batch = story(model).to("cuda")
    sigma = torch.tensor([0.0, 0.3, 0.9], device="cuda")
    direction = [torch.randn_like(x) for x in batch.latents]
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                out = model(batch.latents, sigma, batch.text, batch.layout, CONFIG, DROPS)
            torch.autograd.backward(out, direction)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_keeps_the_routes(family, monkeypatch):
    model = build(family).cuda()
    batch = story(model).to("cuda")
    calls, route = [], stream.route
    monkeypatch.setattr(stream, "route", lambda *args, **kwargs: calls.append(args) or route(*args, **kwargs))
    results(model, batch)
    assert len(calls) == 3  # one for each layer


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_history_gives_the_same_velocity(family, offload):
    model, config = build(family).eval().cuda(), replace(CONFIG, text_anchor="global_and_own")
    whole = story(model).to("cuda")
    sigma = torch.tensor([0.1, 0.1, 0.7], device="cuda")
    expected = model(whole.latents, sigma, whole.text, whole.layout, config)
    cache = model.new_cache(whole.layout.num_tokens, offload)
    for shot in range(3):
        texts = whole.text[: shot + 2]
        layout = make_batch([Sample(whole.latents[: shot + 1], texts)], model.stream, 128).layout.to("cuda")
        inputs = (whole.latents[shot : shot + 1], sigma[shot : shot + 1], texts, layout, config)
        (out,) = model(*inputs, cache=cache, remember=True)
        assert (out - expected[shot]).norm() <= 1e-3 * expected[shot].norm()


def test_gradients_of_weights_are_not_rounded_to_half_precision():
    linear, x = Linear(192, 320).cuda(), torch.randn(4096, 192, device="cuda")
    direction = torch.randn(4096, 320, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = linear(x)
    found = torch.autograd.grad(out, (linear.weight, linear.bias), direction.to(out.dtype))
    halves = x.bfloat16().double(), direction.bfloat16().double()
    for grad, exact in zip(found, (halves[1].T @ halves[0], halves[1].sum(0)), strict=True):
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() < 1e-4 * exact.norm()
