"""These tests are about rectified flow: the noise convention, which noise levels are drawn and for whom, and the loss
of each shot."""

import pytest
import torch

from moc import DropKey, MoCConfig, Sample, StreamSpec, make_batch
from moc.diffusion import Flow, NoiseLevels
from moc.diffusion.flow import draw_key
from moc.errors import UserError
from moc.training import Validator

CHUNK_TOKENS = 12


def sample(position: int, frames=(2, 1, 3), dtype=torch.float32) -> Sample:
    generator = torch.Generator().manual_seed(position)
    latents = [torch.randn(3, n, 4, 6, generator=generator).to(dtype) for n in frames]
    return Sample(latents, [torch.zeros(2, 8) for _ in range(1 + len(frames))], position)


def batch(*samples: Sample):
    return make_batch(samples, StreamSpec(), CHUNK_TOKENS)


def many(num_shots: int, count: int = 500, first: int = 0):
    frames, text = [torch.zeros(1, 1, 2, 2)] * num_shots, [torch.zeros(0, 1)] * (1 + num_shots)
    return batch(*[Sample(frames, text, first + position) for position in range(count)])


class Recorder:
    """This model notes what it is called with and predicts nothing."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, latents, sigma, text, layout, config, **others):
        self.calls.append({"latents": latents, "sigma": sigma, "text": text, "layout": layout, "moc": config} | others)
        return [torch.zeros_like(x) for x in latents]


def test_the_convention_holds_together():
    flow, latent, noise = Flow(), torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 6)
    assert torch.equal(flow.add_noise(latent, noise, 0.0), latent)
    assert torch.equal(flow.add_noise(latent, noise, 1.0), noise)
    velocity = flow.velocity(latent, noise)
    torch.testing.assert_close(velocity, noise - latent)
    for sigma in (0.1, 0.5, 0.9):
        noisy = flow.add_noise(latent, noise, sigma)
        torch.testing.assert_close(noisy - sigma * velocity, latent)
        torch.testing.assert_close(noisy + (1 - sigma) * velocity, noise)


def test_shift_multiplies_the_odds_of_noise():
    sigma = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    moved = Flow(shift=3.0).shifted(sigma)
    torch.testing.assert_close(moved / (1 - moved), 3.0 * sigma / (1 - sigma))
    assert Flow(shift=3.0).shifted(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    torch.testing.assert_close(Flow(shift=1.0).shifted(sigma), sigma)


def test_levels_without_history_are_shifted_logit_normal():
    flow = Flow(shift=2.0, logit_mean=0.3, logit_std=0.8, history_rate=0.0)
    levels = flow.draw_levels(many(3), seed=1)
    assert levels.is_target.all()
    assert levels.sigma.dtype == torch.float32
    logits = torch.logit(levels.sigma.double()) - torch.log(torch.tensor(2.0))
    assert abs(logits.mean() - 0.3) < 0.06
    assert abs(logits.std() - 0.8) < 0.06
    by_sample = logits.view(-1, 3)
    assert abs(torch.corrcoef(by_sample.T)[0, 1]) < 0.12  # levels are drawn for each shot, not for each sample


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the distance of Kolmogorov and Smirnov, which is the largest difference of two samples' distribution
    functions."""
    every = torch.cat([a, b]).sort().values
    shares = [torch.searchsorted(x.sort().values, every, right=True) / len(x) for x in (a, b)]
    return float((shares[0] - shares[1]).abs().max())


@pytest.mark.parametrize(("low", "high"), [(0.875, 1.0), (0.0, 0.875), (0.3, 0.4)])
def test_an_experts_levels_are_those_of_all_that_lie_in_its_range(low, high):
    settings = {"shift": 5.0, "logit_mean": 0.3, "logit_std": 1.2, "history_rate": 0.0}
    drawn = Flow(**settings, sigma_min=low, sigma_max=high).draw_levels(many(4), seed=1).sigma
    assert low <= drawn.min() < low + 0.1
    assert high - 0.1 < drawn.max() <= high
    everything = Flow(**settings).draw_levels(many(4, count=4000, first=10_000), seed=2).sigma
    kept = everything[(everything >= low) & (everything <= high)]
    assert distance(drawn, kept) < 1.63 * (1 / len(drawn) + 1 / len(kept)) ** 0.5  # 1 in 100 seeds exceeds this
    assert distance(drawn, everything) > 0.1


def test_without_a_range_a_level_is_the_logistic_of_its_draw():
    flow = Flow(shift=3.0, logit_mean=-0.4, logit_std=1.4)
    normal = torch.cat([torch.randn(1000), torch.tensor([-5.5, 0.0, 5.5])])
    expected = flow.shifted((flow.logit_mean + flow.logit_std * normal).sigmoid())
    torch.testing.assert_close(flow._level_of(normal), expected, rtol=1e-6, atol=1e-6)


def test_the_history_of_an_expert_is_as_clean_as_any():
    high = Flow(history_rate=1.0, history_sigma=0.05, sigma_min=0.875).draw_levels(many(3), seed=0)
    assert high.sigma[~high.is_target].max() <= 0.05
    assert high.sigma[high.is_target].min() >= 0.875


def test_an_expert_is_validated_within_its_range():
    assert Validator([], Flow()).sigmas == [0.2, 0.5, 0.8, 0.95]
    assert Validator([], Flow(sigma_min=0.875)).sigmas == pytest.approx([0.9, 0.9375, 0.975, 0.99375])
    assert max(Validator([], Flow(sigma_max=0.5)).sigmas) < 0.5


@pytest.mark.parametrize(("rate", "num_shots"), [(0.5, 2), (0.2, 4), (1.0, 4)])
def test_the_set_share_of_samples_has_a_near_clean_history(rate, num_shots):
    levels = Flow(history_rate=rate, history_sigma=0.05).draw_levels(many(num_shots), seed=0)
    is_target, sigma = levels.is_target.view(-1, num_shots), levels.sigma.view(-1, num_shots)
    has_history = ~is_target.all(1)
    assert abs(has_history.double().mean() - rate) < 0.06
    assert is_target[:, -1].all()
    assert (is_target[:, 1:] >= is_target[:, :-1]).all()  # the history consists of the first shots
    lengths = (~is_target).sum(1)[has_history]
    assert set(lengths.tolist()) == set(range(1, num_shots))
    history = sigma[~is_target]
    assert history.max() <= 0.05
    assert abs(history.mean() - 0.025) < 0.003


def test_a_single_shot_has_no_history():
    levels = Flow(history_rate=1.0).draw_levels(many(1, count=50), seed=0)
    assert levels.is_target.all()
    assert levels.sigma.max() > 0.5


def test_a_shots_level_tells_nothing_of_its_noise():
    flow, scenes = Flow(history_rate=0.0), many(1)
    logits = flow.draw_levels(scenes, seed=0).sigma.logit()
    noise = torch.stack([x.flatten() for x in flow.draw_noise(scenes, seed=0)])
    assert torch.corrcoef(torch.cat([logits[:, None], noise], dim=1).T)[0, 1:].abs().max() < 0.2


def test_draws_belong_to_seed_and_position_alone():
    flow, samples = Flow(), [sample(7), sample(3, (1, 2)), sample(11, (2,))]
    packed = flow.draw_levels(batch(*samples), seed=5)
    packed_noise = flow.draw_noise(batch(*samples), seed=5)
    apart = [flow.draw_levels(batch(s), seed=5) for s in reversed(samples)][::-1]
    apart_noise = [x for s in samples for x in flow.draw_noise(batch(s), seed=5)]
    assert torch.equal(packed.sigma, torch.cat([level.sigma for level in apart]))
    assert torch.equal(packed.is_target, torch.cat([level.is_target for level in apart]))
    assert all(torch.equal(a, b) for a, b in zip(packed_noise, apart_noise, strict=True))
    other_seed, other_position = flow.draw_levels(batch(*samples), seed=6), flow.draw_levels(batch(sample(8)), seed=5)
    assert not torch.equal(packed.sigma, other_seed.sigma)
    assert not torch.equal(packed.sigma[:3], other_position.sigma)
    assert not torch.equal(packed_noise[0], flow.draw_noise(batch(sample(8)), seed=5)[0])


def test_noise_takes_one_draw_a_sample(monkeypatch):
    """Hundreds of shots would be hundreds of launches on a GPU."""
    draws, real = [], torch.randn
    packed = batch(*[sample(position, (4, 4)) for position in range(3)])
    monkeypatch.setattr(torch, "randn", lambda *size, **more: draws.append(size) or real(*size, **more))
    noise = Flow().draw_noise(packed, seed=0)
    assert len(draws) == 3
    assert [x.shape for x in noise] == [x.shape for x in packed.latents]
    assert not torch.equal(noise[0], noise[1])


def test_noise_is_normal_and_its_own_for_each_shot():
    noise = Flow().draw_noise(batch(*[sample(position, (4, 4)) for position in range(100)]), seed=0)
    stacked = noise.stacked().flatten(1)
    assert abs(stacked.mean()) < 0.01
    assert abs(stacked.std() - 1) < 0.01
    products = stacked @ stacked.T / stacked.shape[1]
    assert (products - torch.eye(len(products))).abs().max() < 0.5


def test_the_model_sees_noisy_shots_and_one_sigma_each():
    flow, model, packed = Flow(), Recorder(), batch(sample(0), sample(1, (1, 2)))
    levels = flow.draw_levels(packed, seed=2)
    moc, drops = MoCConfig(top_k=1), DropKey(seed=1, step=4)
    observe = print
    flow.loss(model, packed, levels, moc, seed=2, drops=drops, on_routes=observe)
    (call,) = model.calls
    assert torch.equal(call["sigma"], levels.sigma)
    assert call["sigma"].shape == (5,)
    noise = flow.draw_noise(packed, seed=2)
    for seen, latent, own, sigma in zip(call["latents"], packed.latents, noise, levels.sigma, strict=True):
        torch.testing.assert_close(seen, (1 - sigma) * latent + sigma * own)
    assert (call["moc"], call["drops"], call["on_routes"]) == (moc, drops, observe)
    assert call["layout"] is packed.layout
    assert call["text"] is packed.text


def test_loss_is_the_mean_over_each_shot():
    flow, packed = Flow(), batch(sample(0), sample(1, (1, 2)))
    levels, noise = NoiseLevels.equal(0.5, 5), flow.draw_noise(packed, seed=0)
    targets = [n - x for n, x in zip(noise, packed.latents, strict=True)]
    losses = flow.loss(Recorder(), packed, levels, MoCConfig(), seed=0)
    assert losses.shape == (5,)
    torch.testing.assert_close(losses, torch.stack([t.square().mean() for t in targets]))

    def one_off(latents, *_, **__):
        return [t + 0.5 * (i == 2) for i, t in enumerate(targets)]

    torch.testing.assert_close(
        flow.loss(one_off, packed, levels, MoCConfig(), seed=0), torch.tensor([0, 0, 0.25, 0, 0]), atol=1e-6, rtol=0
    )


def test_a_perfect_denoiser_has_no_loss():
    flow, packed = Flow(history_rate=1.0), batch(sample(3))

    def oracle(noisy, sigma, *_, **__):
        return [(n - x) / s for n, x, s in zip(noisy, packed.latents, sigma, strict=True)]

    losses = flow.loss(oracle, packed, flow.draw_levels(packed, 0), MoCConfig(), seed=0)
    assert losses.max() < 1e-4


def test_latents_stored_in_half_precision_train_in_float32():
    flow, model, packed = Flow(), Recorder(), batch(sample(0, dtype=torch.float16))
    losses = flow.loss(model, packed, flow.draw_levels(packed, 0), MoCConfig(), seed=0)
    assert all(x.dtype == torch.float32 for x in model.calls[0]["latents"])
    assert losses.dtype == torch.float32


@pytest.mark.parametrize(
    "wrong", [{"shift": 0.0}, {"history_rate": 1.5}, {"history_sigma": -0.1}, {"sigma_min": -0.1}, {"logit_std": 0.0}]
)
def test_values_out_of_range_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=rf"flow\.{name}"):
        Flow(**wrong)


def test_no_two_runs_share_a_draw():
    """If seeds were not hashed, draw 1 of seed 0 would be draw 0 of seed 1."""
    assert len({draw_key(seed, number) for seed in range(8) for number in range(64)}) == 8 * 64


def test_a_range_that_holds_nothing_is_refused():
    with pytest.raises(UserError, match=r"sigma_min=0\.9, flow\.sigma_max=0\.9 must be a range"):
        Flow(sigma_min=0.9, sigma_max=0.9)
    with pytest.raises(UserError, match=r"hold a share of .* set flow\.shift"):
        Flow(sigma_min=0.999, sigma_max=1.0, logit_std=0.1)
