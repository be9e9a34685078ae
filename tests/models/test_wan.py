"""These tests are about the Wan family: equal to diffusers' own model, and what Mixture of Contexts adds to it."""

from dataclasses import replace

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moc import DropKey, Execution, MoCConfig, Sample, make_batch
from moc.errors import UserError
from moc.exchange import Exchange
from moc.kernels import torch_backend
from models import Family, ModelConfig, build_model
from models.checkpoints.experts import Experts
from models.part import Part
from models.wan import TEXT_TOKENS, WanTransformer3DModel, text_windows
from tests.weights import randomized

TEXT_DIM = 24
REFERENCE = Execution("reference")
DENSE = MoCConfig(dense=True)
MOC = MoCConfig(chunk_tokens=12, top_k=1, text_anchor="global_and_own")

# (heads, FFN width, layers, channels) of Wan2.1-T2V-1.3B, 14B (and each A14B expert), Wan2.2-TI2V-5B
FULL = {"1.3B": (12, 8960, 30, 16), "14B": (40, 13824, 40, 16), "5B": (24, 14336, 30, 48)}
COUNTS = {"1.3B": (825, 1.419), "14B": (1095, 14.288), "5B": (825, 5.000)}
REDUCED = {"1.3B": (2, 192, 3, 16), "14B": (3, 320, 4, 16), "5B": (2, 256, 3, 48)}


def arguments(heads: int, ffn_dim: int, num_layers: int, channels: int) -> dict[str, int]:
    return {
        **{"num_attention_heads": heads, "ffn_dim": ffn_dim, "num_layers": num_layers},
        **{"in_channels": channels, "out_channels": channels},
    }


def reduced(shape: str = "1.3B", **changes) -> dict[str, int]:
    return {**arguments(*REDUCED[shape]), "text_dim": TEXT_DIM, **changes}


def small_model(**changes) -> WanTransformer3DModel:
    sizes = reduced(num_attention_heads=2, attention_head_dim=24, num_layers=2)
    model = randomized(WanTransformer3DModel(**sizes, **changes))
    model.execution = REFERENCE
    return model


def sample(num_shots: int = 3, channels: int = 16, frames: int = 2, global_rows: int = 3) -> Sample:
    latents = [torch.randn(channels, frames, 4, 6) for _ in range(num_shots)]
    return Sample(latents, [torch.randn(n, TEXT_DIM) for n in [global_rows, *range(2, 2 + num_shots)]])


def run(model, config: MoCConfig, *samples: Sample, sigma: Tensor | None = None, drops=None) -> list[Tensor]:
    batch = make_batch(samples, model.stream, config.chunk_tokens)
    sigma = torch.linspace(0.2, 0.9, batch.num_shots) if sigma is None else sigma
    return model(batch.latents, sigma, batch.text, batch.layout, config, drops)


@pytest.mark.parametrize("shape", FULL)
def test_names_and_shapes_are_diffusers_and_the_releases(shape: str) -> None:
    with init_empty_weights():
        models = [kind(**arguments(*FULL[shape])) for kind in (WanTransformer3DModel, diffusers.WanTransformer3DModel)]
    ours, theirs = ({name: tuple(w.shape) for name, w in model.state_dict().items()} for model in models)
    assert ours == theirs
    count = sum(torch.Size(size).numel() for size in ours.values())
    assert (len(ours), round(count / 1e9, 3)) == COUNTS[shape]


@pytest.mark.parametrize("shape", REDUCED)
@pytest.mark.parametrize("config", [DENSE, MoCConfig(chunk_tokens=24), MOC], ids=["dense", "moc", "windowed"])
def test_one_shot_equals_diffusers(shape: str, config: MoCConfig) -> None:
    theirs = randomized(diffusers.WanTransformer3DModel(**reduced(shape))).eval()
    ours = WanTransformer3DModel(**reduced(shape))
    ours.execution = REFERENCE
    ours.load_state_dict(theirs.state_dict())
    channels = REDUCED[shape][3]
    latent, text = torch.randn(channels, 3, 8, 12), torch.randn(20, TEXT_DIM)
    padded = torch.cat([text, torch.zeros(TEXT_TOKENS - 20, TEXT_DIM)])
    with torch.no_grad():
        expected = theirs(latent[None], torch.tensor([370.0]), padded[None], return_dict=False)[0][0]
        (out,) = run(ours, config, Sample([latent], [text[:6], text[6:]]), sigma=torch.tensor([0.37]))
    assert (out - expected).norm() < 1e-5 * expected.norm()


def test_shot_timesteps_equal_diffusers_token_timesteps() -> None:
    """Two shots under dense attention are diffusers' model with a timestep for each token, as TI2V-5B takes them."""
    theirs = randomized(diffusers.WanTransformer3DModel(**reduced(), eps=1e-2)).eval()
    ours = WanTransformer3DModel(**reduced(), eps=1e-2)
    ours.execution = REFERENCE
    ours.load_state_dict(theirs.state_dict())
    item = sample(num_shots=2)
    text = torch.cat(item.text)
    padded = torch.cat([text, torch.zeros(TEXT_TOKENS - len(text), TEXT_DIM)])
    times = torch.tensor([200.0, 700.0]).repeat_interleave(2 * 2 * 3)
    with torch.no_grad():
        expected = theirs(torch.cat(item.latents, 1)[None], times[None], padded[None], return_dict=False)[0][0]
        out = torch.cat(list(run(ours, DENSE, item, sigma=torch.tensor([0.2, 0.7]))), 1)
    assert (out - expected).norm() < 1e-5 * expected.norm()


def test_a_gap_at_the_cut_moves_later_shots_only() -> None:
    model, far = small_model(), small_model(cut_gap=4)
    far.load_state_dict(model.state_dict())
    item = sample(num_shots=2)
    plain, apart = (run(each, MoCConfig(chunk_tokens=12, top_k=9), item) for each in (model, far))
    torch.testing.assert_close(plain[0], apart[0])
    assert not torch.allclose(plain[1], apart[1], rtol=1e-3, atol=1e-4)


def test_samples_of_a_batch_never_see_each_other() -> None:
    model = small_model()
    one, two = sample(), sample(num_shots=2, global_rows=0)
    sigma = torch.full((5,), 0.5)
    together = run(model, MOC, one, two, sigma=sigma)
    apart = [*run(model, MOC, one, sigma=sigma[:3]), *run(model, MOC, two, sigma=sigma[:2])]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense", [{}, {"dense": True}, {"dense_layers": 1}], ids=str)
@pytest.mark.parametrize(("config", "paddings"), [(replace(MOC, causal=False), (504, 504)), (MOC, (507, 506))])
def test_windows_show_the_global_caption_the_own_one_and_the_padding(config, paddings, dense) -> None:
    """The padding is the whole prompt's; under strict forward flow what fills the captions seen up to 512, in dense
    steps and layers as in others."""
    model, config = small_model(), replace(config, **dense)
    batch = make_batch([sample(num_shots=2), sample(num_shots=1)], model.stream, 12)
    rows, windows = text_windows(batch.text, batch.layout, config)
    second = 8 + max(paddings)  # the second sample's first row
    assert rows.shape == (second + TEXT_TOKENS, TEXT_DIM)
    assert not rows[8:second].any()
    assert [window.ranges for window in windows] == [
        ((0, 3), (3, 5), (8, 8 + paddings[0])),
        ((0, 3), (5, 8), (8, 8 + paddings[1])),
        ((second, second + 3), (second + 3, second + 5), (second + 5, second + 512)),
    ]
    assert [(window.start, window.end) for window in windows] == [(0, 12), (12, 24), (24, 36)]


def test_windows_of_a_run_know_how_much_text_there_is() -> None:
    """Batches of one layout share its tables; these differ in a caption that the other process's shot alone sees."""
    model, first = small_model(), Exchange(None, rank=0, size=2)
    layout = make_batch([sample(num_shots=2), sample(num_shots=2)], model.stream, 12).layout
    for last_rows in (2, 7):
        text = [torch.randn(rows, TEXT_DIM) for rows in (3, 2, 2, 3, 2, last_rows)]
        part = Part(layout, 0, first)
        patches = torch.randn(part.num_tokens, 16 * 4)
        context, _, _, windows = model.embed(patches, torch.rand(6), text, part, MOC).inputs
        assert len(windows.row_starts) == len(context) + 1


def test_512_rows_bound_what_a_shot_sees_not_a_story() -> None:
    texts = [torch.randn(0, TEXT_DIM), *(torch.randn(500, TEXT_DIM) for _ in range(80))]
    item = Sample([torch.randn(16, 1, 2, 2) for _ in range(80)], texts)
    model = small_model()
    layout = make_batch([item], model.stream, 12).layout
    rows, windows = text_windows(texts, layout, MOC)
    assert len(rows) == 80 * 500 + 12
    assert {sum(end - start for start, end in window.ranges) for window in windows} == {TEXT_TOKENS}
    with pytest.raises(UserError, match="a prompt of 40000 text rows exceeds Wan's 512"):
        text_windows(texts, layout, replace(MOC, text_anchor="all"))
    with pytest.raises(UserError, match="a prompt of 513 text rows exceeds Wan's 512"):
        text_windows([torch.randn(13, TEXT_DIM), *texts[1:]], layout, MOC)


@torch.no_grad()
def test_strict_forward_flow_is_blind_to_how_much_text_follows() -> None:
    model, item = small_model(), sample()
    sigma = torch.tensor([0.2, 0.5, 0.8])
    config = replace(MOC, top_k=9)
    whole = run(model, config, item, sigma=sigma)
    first = run(model, config, Sample(item.latents[:2], item.text[:3]), sigma=sigma[:2])
    for a, b in zip(whole, first, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "cut_gap", "backend"), [({}, 0, "reference"), ({"descriptor": "pre_rope"}, 1.5, "torch")]
)
@torch.no_grad()
def test_cached_history_gives_the_same_velocity(settings, cut_gap, backend) -> None:
    model, story = small_model(cut_gap=cut_gap), sample()
    model.execution = Execution(backend)
    story = replace(story, latents=[torch.randn(16, frames, 4, 6) for frames in (1, 2, 4)])
    config = replace(MOC, **settings)
    sigma = torch.tensor([0.1, 0.1, 0.7])
    whole = run(model, config, story, sigma=sigma)
    cache = model.new_cache(99)
    for shot in range(3):
        texts = story.text[: shot + 2]
        layout = make_batch([Sample(story.latents[: shot + 1], texts)], model.stream, 12).layout
        inputs = (story.latents[shot : shot + 1], sigma[shot : shot + 1], texts, layout, config)
        (out,) = model(*inputs, cache=cache)
        assert torch.equal(model(*inputs, cache=cache, remember=True)[0], out)
        assert cache.num_tokens == layout.num_tokens
        torch.testing.assert_close(out, whole[shot], rtol=1e-4, atol=1e-5)


def test_strict_forward_flow_takes_nothing_from_later_shots() -> None:
    model = small_model()
    item = sample()
    for x in (*item.latents, *item.text):
        x.requires_grad_()
    run(model, MoCConfig(chunk_tokens=12, top_k=9, text_anchor="global_and_own"), item)[1].sum().backward()
    assert not item.latents[2].grad.any()
    assert not item.text[3].grad.any()
    assert not item.text[1].grad.any() or item.latents[0].grad.any()  # an earlier caption can act through its shot only
    for x in (*item.latents[:2], item.text[0], item.text[2]):
        assert x.grad.any()


def test_all_captions_reach_all_shots_without_windows() -> None:
    model = small_model()
    item = sample()
    item.text[3].requires_grad_()
    own_only = MoCConfig(chunk_tokens=12, top_k=0, text_anchor="all")
    run(model, own_only, item)[0].sum().backward()
    assert item.text[3].grad.any()


def test_first_layers_can_stay_dense() -> None:
    model = small_model()
    item = sample()
    dense, all_dense, one_dense, none_dense = (
        run(model, config, item)[0]
        for config in (DENSE, *(replace(MOC, text_anchor="all", dense_layers=n) for n in (2, 1, 0)))
    )
    assert torch.equal(dense, all_dense)
    assert not torch.equal(dense, one_dense)
    assert not torch.equal(one_dense, none_dense)


def test_recomputation_gives_the_same_gradients_under_drops() -> None:
    model = small_model()
    item = sample(num_shots=4)
    gradients, calls = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(len(gradients)))
    for recompute in (False, True):
        if recompute:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        sum(v.square().sum() for v in run(model, MOC, item, drops=DropKey(0, 1))).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert calls == [0, 1, 1]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("config", [MOC, DENSE], ids=["moc", "dense"])
def test_attention_that_is_kept_is_not_computed_again(monkeypatch, config) -> None:
    model, item = small_model(), sample(num_shots=4)
    model.execution = Execution("torch", dense_kernel="math")  # otherwise short samples are computed under a mask
    model.enable_gradient_checkpointing()
    computed, gradients, forward = [], [], torch_backend._forward
    monkeypatch.setattr(torch_backend, "_forward", lambda *inputs: computed.append(0) or forward(*inputs))
    for model.keeps_attention, times in ((False, 2), (True, 1)):
        computed.clear()
        model.zero_grad()
        sum(v.square().sum() for v in run(model, config, item, drops=DropKey(0, 1))).backward()
        assert len(computed) == times * len(model.blocks)
        gradients.append([weight.grad for weight in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_forward_never_waits_for_the_device() -> None:
    """Fake tensors have no values, so whatever would copy one to the host fails."""
    model = small_model()
    batch = make_batch([sample(), sample(num_shots=1)], model.stream, 12)
    model(batch.latents, torch.rand(4), batch.text, batch.layout, MOC, DropKey(0, 1))  # the first call makes the tables
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = model(batch.latents, torch.rand(4), batch.text, batch.layout, MOC, DropKey(0, 1))
        sum(v.sum() for v in out).backward()
        with pytest.raises(DataDependentOutputException):
            out[0].sum().item()


def test_norms_and_modulation_stay_wide_under_autocast() -> None:
    model = small_model()
    item = sample()
    exact = run(model, DENSE, item)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(model, DENSE, item)
        times = model.condition_embedder(torch.tensor([0.3]), item.text[0])[:2]
    for a, b in zip(exact, mixed, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() < 0.05 * a.norm()
    for a, b in zip(times, model.condition_embedder(torch.tensor([0.3]), item.text[0]), strict=False):
        assert torch.equal(a, b)


def test_wrong_input_is_one_clear_message() -> None:
    model = small_model()
    run(model, DENSE, Sample([torch.randn(16, 1, 4, 6)], [torch.zeros(256, TEXT_DIM)] * 2))  # the longest texts allowed
    with pytest.raises(UserError, match="600 text rows exceeds Wan's 512"):
        run(model, DENSE, Sample([torch.randn(16, 1, 4, 6)], [torch.zeros(300, TEXT_DIM)] * 2))
    with pytest.raises(UserError, match="leaves a Wan model without text"):
        run(model, MoCConfig(text_anchor="none", chunk_tokens=12), sample())
    with pytest.raises(UserError, match="latent has 48 channels, this model takes 16"):
        run(model, DENSE, sample(channels=48))
    for dim, num_heads in ((130, 4), (99, 3)):
        with pytest.raises(UserError, match=f"dim={dim} over num_heads={num_heads} must give an even head width"):
            build_model(ModelConfig(Family.wan, dim=dim, num_heads=num_heads), 16, TEXT_DIM)
    with pytest.raises(UserError, match=r"text features are \(3, 23\), expected \(3, 24\): encode with the text enc"):
        run(model, DENSE, Sample([torch.randn(16, 1, 4, 6)], [torch.zeros(3, TEXT_DIM - 1)] * 2))
    for change in ({"image_dim": 1280}, {"added_kv_proj_dim": 8}, {"pos_embed_seq_len": 4}, {"in_channels": 36}):
        with pytest.raises(UserError, match="image-to-video"):
            WanTransformer3DModel(**reduced(**change))
    for change in ({"cross_attn_norm": False}, {"qk_norm": None}, {"qk_norm": "rms_norm"}):
        with pytest.raises(UserError, match="is no Wan model that is supported"):
            WanTransformer3DModel(**reduced(**change))


def test_experts_switch_at_the_boundary() -> None:
    high, low = small_model(), small_model()
    pair, item = Experts(high, low, boundary=0.75), sample(num_shots=2)  # the boundary is exact in fp32
    for sigma, expert in (([0.05, 0.85], high), ([0.05, 0.75], high), ([0.05, 0.74], low)):
        levels = torch.tensor(sigma)
        for a, b in zip(run(pair, MOC, item, sigma=levels), run(expert, MOC, item, sigma=levels), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(UserError, match=r"they differ in \['ffn_dim'\]"):
        Experts(high, WanTransformer3DModel(**reduced(attention_head_dim=24, num_layers=2, ffn_dim=64)))
