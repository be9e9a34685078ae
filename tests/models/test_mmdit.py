"""These tests are about the multi-shot transformer: what LCT and MoC claim of it, on small random weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moc import DropKey, MoCConfig, Sample, Shot, ShotLayout, route
from moc.errors import UserError
from moc.exchange import Exchange
from models import ModelConfig, build_model, load_model, save_model
from models.kv_cache import KVCache
from models.layers import add_gated, layer_norm, modulate, rms_norm
from models.members import Members
from models.mmdit import MMDiT
from models.part import Part
from models.stream import patchify, unpatchify
from tests import plain_mmdit
from tests.small_mmdit import CHANNELS, DENSE, MOC, TEXT_DIM, pack, run, sample, small_model


def test_velocity_has_the_form_of_the_latents_and_starts_at_zero() -> None:
    model = build_model(ModelConfig(input_skip=True, frame_place=True), CHANNELS, TEXT_DIM)
    assert model.place is not None
    assert model.output.gain is not None
    batch = pack(model, sample(), sample(num_shots=1, frames=1))
    out = run(model, batch, MOC)
    assert [v.shape for v in out] == [x.shape for x in batch.latents]
    assert not any(v.any() for v in out)


@torch.no_grad()
@pytest.mark.parametrize("extras", [True, False])
def test_the_model_is_what_its_equations_say(extras: bool) -> None:
    """It equals its equations written out, for shots of different sizes, lengths and noise levels."""
    model = small_model(input_skip=extras, frame_place=extras, rope_theta=100.0)
    for weight in model.parameters():
        weight.mul_(3)  # weights are large enough for activations to be nonlinear
    story = Sample(
        [torch.randn(CHANNELS, t, 4, 2 * t + 2) for t in (1, 3)], [torch.randn(n, TEXT_DIM) for n in (3, 2, 5)]
    )
    expected = plain_mmdit.velocity(model, story.latents, [0.3, 0.8], story.text)
    for a, b in zip(run(model, pack(model, story), DENSE, torch.tensor([0.3, 0.8])), expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("config", [DENSE, MOC, MoCConfig(chunk_tokens=12, top_k=1, text_anchor="global_and_own")])
def test_samples_of_a_batch_never_see_each_other(config: MoCConfig) -> None:
    model = small_model()
    one, two = sample(), sample(num_shots=2, global_tokens=0)
    together = run(model, pack(model, one, two), config, torch.full((5,), 0.5))
    apart = [
        *run(model, pack(model, one), config, torch.full((3,), 0.5)),
        *run(model, pack(model, two), config, torch.full((2,), 0.5)),
    ]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_shot_is_the_single_shot_model_bit_for_bit() -> None:
    model = small_model()
    batch = pack(model, sample(num_shots=1, global_tokens=0))
    (single,), (multi,) = run(model, batch, DENSE), run(model, batch, MOC)
    assert torch.equal(single, multi)


def test_everything_selected_equals_dense() -> None:
    model = small_model()
    batch = pack(model, sample())
    everything = MoCConfig(chunk_tokens=12, top_k=50, causal=False)
    for a, b in zip(run(model, batch, everything), run(model, batch, DENSE), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    causal = run(model, batch, MoCConfig(chunk_tokens=12, top_k=50))
    assert not torch.allclose(causal[0], run(model, batch, DENSE)[0], rtol=1e-3, atol=1e-4)


def test_strict_forward_flow_takes_nothing_from_later_shots() -> None:
    model = small_model()
    batch = pack(model, sample())
    for x in (*batch.latents, *batch.text):
        x.requires_grad_()
    sigma = torch.full((3,), 0.5, requires_grad=True)
    run(model, batch, MoCConfig(chunk_tokens=12, top_k=9, text_anchor="global_and_own"), sigma)[1].sum().backward()
    assert not batch.latents[2].grad.any()
    assert batch.text[3].grad is None or not batch.text[3].grad.any()
    assert sigma.grad[2] == 0
    for x in (*batch.latents[:2], *batch.text[:3]):
        assert x.grad.any()


def test_each_shot_has_its_own_sigma() -> None:
    model = small_model()
    batch = pack(model, sample(num_shots=2))
    own_only = MoCConfig(chunk_tokens=12, top_k=0, text_anchor="global_and_own")
    before = run(model, batch, own_only, torch.tensor([0.3, 0.3]))
    after = run(model, batch, own_only, torch.tensor([0.3, 0.8]))
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_global_text_has_sigma_zero() -> None:
    layout = ShotLayout.pack([ShotLayout.build([Shot(1, (1, 1, 1))] * 2, 1), ShotLayout.build([Shot(1, (1, 1, 1))])])
    assert Part(layout).group_sigma(torch.tensor([0.1, 0.2, 0.3])).tolist() == pytest.approx([0, 0.1, 0.2, 0, 0.3])


def test_the_pooled_own_caption_modulates() -> None:
    """With no text in attention, a shot still knows its own caption, and only its own."""
    model = small_model()
    batch = pack(model, sample(num_shots=2))
    for x in batch.text:
        x.requires_grad_()
    alone = MoCConfig(chunk_tokens=12, top_k=0, own_anchor="chunk", text_anchor="none")
    run(model, batch, alone)[0].square().sum().backward()
    assert batch.text[1].grad.any()
    assert not batch.text[0].grad.any()
    assert not batch.text[2].grad.any()


def test_each_layer_routes_once_and_drops_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = small_model(), []

    def spy(*args, **kwargs) -> Tensor:
        layers.append(args[4].layer)
        return route(*args, **kwargs)

    monkeypatch.setattr("models.stream.route", spy)
    model.enable_gradient_checkpointing()
    sum(v.sum() for v in run(model, pack(model, sample()), MOC, drops=DropKey(0, 1))).backward()
    assert layers == [0, 1]


def test_empty_texts_are_no_tokens() -> None:
    model = small_model()
    silent = Sample([torch.randn(CHANNELS, 1, 4, 6)], [torch.randn(0, TEXT_DIM)] * 2)
    out = run(model, pack(model, silent), MOC)
    out[0].sum().backward()
    assert torch.isfinite(out[0]).all()


def test_norms_and_modulation_stay_wide_under_autocast() -> None:
    model = small_model()
    batch = pack(model, sample())
    exact = run(model, batch, MOC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(model, batch, MOC)
    halved = run(model.to(torch.bfloat16), batch, MOC)
    for a, b, c in zip(exact, mixed, halved, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() < 0.05 * a.norm()
        assert (a - c).norm() < 0.1 * a.norm()


def test_pointwise_functions_round_once() -> None:
    """In half precision they are the fp32 ones with a rounded result."""
    x, change = torch.randn(2, 64, 48).bfloat16()
    weight, bias, rows, members = (
        torch.randn(48),
        torch.randn(48),
        torch.randn(2, 48),
        Members(torch.arange(2).repeat_interleave(32), torch.tensor([32, 32])),
    )
    for function, inputs, rest in (
        (rms_norm, [x], (weight, 1e-6)),
        (layer_norm, [x], (weight, bias, 1e-6)),
        (modulate, [x], (rows, 2 * rows, members)),
        (add_gated, [x, change], (rows, members)),
    ):
        exact = function(*(value.float() for value in inputs), *rest)
        assert torch.equal(function(*inputs, *rest), exact.bfloat16()), function


def test_autocast_leaves_the_condition_alone_and_rounds_modulation_once() -> None:
    model = small_model(input_skip=True)
    sigma, captions, members = (
        torch.tensor([0.3]),
        torch.randn(1, TEXT_DIM),
        Members(torch.zeros(1, dtype=torch.int32), torch.tensor([1])),
    )

    def conditions() -> list[Tensor]:
        condition = model.condition(sigma, captions)
        gain = model.output(torch.zeros(1, 48), torch.ones(1, 16), condition, members)
        return [condition, gain, torch.cat(model.blocks[0].video.modulation(condition))]

    nn.init.zeros_(model.output.linear.weight)
    exact = conditions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = conditions()
    assert all(x.dtype == torch.float32 for x in mixed)
    assert torch.equal(exact[0], mixed[0])
    for index, most in ((1, 1e-3), (2, 1e-2)):  # in the gain only the bias is rounded
        assert (exact[index] - mixed[index]).abs().max() < most * exact[index].abs().max()


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    model = small_model(input_skip=True, frame_place=True)
    save_model(model, tmp_path / "a", MOC)
    loaded = load_model(tmp_path / "a")
    save_model(loaded, tmp_path / "b", MoCConfig.load(tmp_path / "a"))
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "moc.json"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_wrong_input_is_one_clear_message() -> None:
    model = small_model()
    batch = pack(model, sample())
    sigma = torch.rand(3)
    with pytest.raises(ValueError, match="2 latents, 3 sigmas"):
        model(batch.latents[:2], sigma, batch.text, batch.layout, MOC)
    with pytest.raises(UserError, match="latent has 5 channels, this model takes 4"):
        model([torch.zeros(5, 2, 4, 6)] * 3, sigma, batch.text, batch.layout, MOC)
    with pytest.raises(ValueError, match="is not the layout's"):
        model([torch.zeros(4, 3, 4, 6)] * 3, sigma, batch.text, batch.layout, MOC)
    with pytest.raises(UserError, match="text features are"):
        model(batch.latents, sigma, [x[:, :5] for x in batch.text], batch.layout, MOC)
    with pytest.raises(UserError, match="even head width"):
        MMDiT(dim=50, num_heads=4)


def test_forward_never_waits_for_the_device() -> None:
    """Fake tensors have no values, so whatever would copy one to the host fails."""
    model = small_model()
    batch = pack(model, sample(), sample(num_shots=1))
    run(model, batch, MOC, torch.rand(4), DropKey(0, 1))  # the first call makes the tables on the CPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = run(model, batch, MOC, torch.rand(4), DropKey(0, 1))
        sum(v.sum() for v in out).backward()
        with pytest.raises(DataDependentOutputException):
            out[0].sum().item()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("descriptor", ["post_rope", "pre_rope"])
@torch.no_grad()
def test_cached_history_gives_the_same_velocity(descriptor: str, offload: bool) -> None:
    model = small_model(input_skip=True, frame_place=True)
    config = MoCConfig(chunk_tokens=12, top_k=2, text_anchor="global_and_own", descriptor=descriptor)
    story = sample()
    sigma = torch.tensor([0.1, 0.1, 0.7])
    whole = run(model, pack(model, story), config, sigma)
    cache = model.new_cache(pack(model, story).layout.num_tokens, offload)
    computed = 0
    for shot in range(3):
        layout = pack(model, Sample(story.latents[: shot + 1], story.text[: shot + 2])).layout
        inputs = (story.latents[shot : shot + 1], sigma[shot : shot + 1], story.text[: shot + 2], layout, config)
        (first,) = model(*inputs, cache=cache)
        assert cache.num_tokens == computed  # without `remember` the cache stays the same
        (again,) = model(*inputs, cache=cache, remember=True)
        computed = layout.num_tokens
        assert torch.equal(first, again)
        torch.testing.assert_close(first, whole[shot], rtol=1e-4, atol=1e-5)
    assert cache.num_tokens == computed


def test_a_cache_needs_forward_flow_and_its_own_story() -> None:
    model = small_model()
    batch = pack(model, sample())
    with pytest.raises(UserError, match="strict forward flow"):
        model(batch.latents, torch.rand(3), batch.text, batch.layout, MOC, cache=model.new_cache(99))
    forward = MoCConfig(chunk_tokens=12, text_anchor="global_and_own")
    first = batch.layout.groups[2].start  # the offset of the second shot's text
    two = pack(model, sample(), sample())
    for inputs, num_tokens in ((batch, 16), (two, first)):
        cache = KVCache(99, 2, num_tokens=num_tokens)
        with pytest.raises(ValueError, match=f"the cache holds {num_tokens} tokens"):
            model(inputs.latents, torch.rand(6), inputs.text, inputs.layout, forward, cache=cache)


@pytest.mark.parametrize("patch", [(1, 2, 1), (2, 1, 3)])
def test_patches_are_undone(patch: tuple[int, int, int]) -> None:
    """The shots have several sizes, of which some are alike."""
    latents = [torch.randn(3, *size) for size in ((4, 4, 6), (2, 2, 3), (4, 4, 6))]
    grids = [tuple(n // p for n, p in zip(x.shape[1:], patch, strict=True)) for x in latents]
    tokens = patchify(latents, patch)
    assert torch.equal(tokens[: len(patchify(latents[:1], patch))], patchify(latents[:1], patch))
    for mine, latent in zip(unpatchify(tokens, grids, patch), latents, strict=True):
        assert torch.equal(mine, latent)


def test_parts_of_one_stream_have_tables_of_their_own() -> None:
    """A process's run may be the same after a finished shot as of the whole stream; its groups are then fewer."""
    layout, second = ShotLayout.build([Shot(0, (1, 1, 1)), Shot(0, (1, 1, 5))]), Exchange(None, rank=1, size=2)
    whole, later = Part(layout, 0, second), Part(layout, 1, second)
    assert (whole.start, whole.end) == (later.start, later.end) == (3, 6)
    assert whole.video_members.group.tolist() == [2, 2, 2]
    assert later.video_members.group.tolist() == [0, 0, 0]
