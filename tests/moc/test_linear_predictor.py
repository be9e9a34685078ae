"""These tests are about the best linear denoiser: against the closed-form posterior of Gaussian data, and as a floor
for held-out loss."""

import pytest
import torch

from moc.diffusion.linear_predictor import LinearPredictor, linear_losses

SIGMAS = (0.1, 0.5, 0.9)


def closed_form(noisy, sigma, mean, covariance):
    """Returns E[noise - x | noisy] for x ~ N(mean, covariance), by Bayes."""
    seen = (1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
    gain = (1 - sigma) * torch.linalg.solve(seen, covariance).T
    latent = mean + (noisy - (1 - sigma) * mean) @ gain.T
    return (noisy - latent) / sigma  # noise - latent, where noise = (noisy - (1 - sigma) latent) / sigma


def gaussian(dim: int = 6):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(dim, generator=generator, dtype=torch.float64), mixing @ mixing.T / dim


def draw(count: int, mean, covariance, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    return mean + white @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("sigma", SIGMAS)
def test_velocity_is_the_posterior_mean(sigma):
    mean, covariance = gaussian()
    variance, basis = torch.linalg.eigh(covariance)
    predictor = LinearPredictor(mean, basis, variance, torch.tensor(0.0))
    noisy = torch.randn(20, 6, dtype=torch.float64)
    torch.testing.assert_close(predictor.velocity(noisy, sigma), closed_form(noisy, sigma, mean, covariance))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_directions_outside_the_basis_share_one_variance(sigma):
    mean, _ = gaussian()
    basis = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
    variance, rest = torch.tensor([3.0, 0.5], dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    outside = torch.eye(6, dtype=torch.float64) - basis @ basis.T
    covariance = basis @ torch.diag(variance) @ basis.T + rest * outside
    noisy = torch.randn(20, 6, dtype=torch.float64)
    predicted = LinearPredictor(mean, basis, variance, rest).velocity(noisy, sigma)
    torch.testing.assert_close(predicted, closed_form(noisy, sigma, mean, covariance))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_fitting_finds_mean_and_covariance(sigma):
    mean, covariance = gaussian()
    predictor = LinearPredictor.fit(draw(40_000, mean, covariance))
    noisy = torch.randn(200, 6, dtype=torch.float64)
    truth = closed_form(noisy, sigma, mean, covariance)
    error = (predictor.velocity(noisy, sigma) - truth).square().mean() / truth.square().mean()
    assert error < 2e-3


def test_a_small_sample_does_not_make_it_overconfident():
    """With fewer rows than widths it must still beat predicting the mean on rows it has not seen."""
    mean, low_rank = torch.zeros(60, dtype=torch.float64), torch.randn(60, 3, dtype=torch.float64)
    covariance = low_rank @ low_rank.T + 0.05 * torch.eye(60, dtype=torch.float64)
    predictor = LinearPredictor.fit(draw(40, mean, covariance))
    held_out, noise = draw(400, mean, covariance, seed=1), torch.randn(400, 60, dtype=torch.float64)
    for sigma in SIGMAS:
        noisy, target = (1 - sigma) * held_out + sigma * noise, noise - held_out
        error = (predictor.velocity(noisy, sigma) - target).square().mean()
        assert error < (noisy / sigma - target).square().mean()  # noisy / sigma is the velocity of a latent of 0
        assert error < target.square().mean()


def correlated(count: int, seed: int):
    """Returns latents [n, 2, 2, 4, 4] that are one picture, brighter or darker, plus a little noise."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn(1, 2, 2, 4, 4, generator=torch.Generator().manual_seed(9))
    brightness = torch.randn(count, 1, 1, 1, 1, generator=generator)
    return 2 + picture + brightness * picture.sign() + 0.1 * torch.randn(count, 2, 2, 4, 4, generator=generator)


def test_the_floor_lies_below_predicting_the_mean_and_above_the_truth():
    train, held_out = correlated(200, 0), correlated(100, 1)
    noise = torch.randn_like(held_out)
    floors = linear_losses(train, held_out, noise, SIGMAS)
    mean = train.mean(0)
    for sigma, floor in zip(SIGMAS, floors, strict=True):
        noisy = (1 - sigma) * held_out + sigma * noise
        assert floor < ((noisy - mean) / sigma - (noise - held_out)).square().mean()
        # Small independent values cannot be told from noise, so the floor is at least their Bayes error.
        variance = 0.1**2
        posterior = variance * sigma**2 / ((1 - sigma) ** 2 * variance + sigma**2)
        assert floor > 0.9 * posterior / sigma**2


def test_values_that_never_vary_are_known():
    """Two of four channels are constant in the first frame, where no linear predictor errs, one of tokens neither."""
    generator = torch.Generator().manual_seed(0)

    def latents(count: int):
        x = torch.randn(count, 4, 2, 4, 4, generator=generator)
        x[:, 2:, 0] = 0.3
        return x

    train, held_out = latents(100), latents(50)
    noise = torch.randn(held_out.shape, generator=generator)
    for sigma, floor in zip(SIGMAS, linear_losses(train, held_out, noise, SIGMAS), strict=True):
        bayes = 0.75 / ((1 - sigma) ** 2 + sigma**2)  # three values of four have variance 1
        assert 0.9 * bayes < floor < 1.1 * bayes


def test_tokens_are_predicted_apart_where_that_is_better():
    """Independent tokens with a covariance of their own: the whole shot has too few rows to learn it from."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 2, generator=generator)

    def tokens(count):
        inside = torch.randn(count, 3, 3, 3, 2, generator=generator) @ mixing.T  # [n, T, H/2, W/2, C 2 2]
        pixels = inside.unflatten(-1, (2, 2, 2)).permute(0, 4, 1, 2, 5, 3, 6)
        return pixels.reshape(count, 2, 3, 6, 6)

    train, held_out = tokens(30), tokens(50)
    noise = torch.randn(held_out.shape, generator=generator)
    (floor,) = linear_losses(train, held_out, noise, (0.5,))
    noisy, target = 0.5 * held_out + 0.5 * noise, noise - held_out
    whole = LinearPredictor.fit((train - train.mean(0)).flatten(1))
    whole_error = (whole.velocity((noisy - 0.5 * train.mean(0)).flatten(1), 0.5) - target.flatten(1)).square().mean()
    assert floor < 0.8 * whole_error
