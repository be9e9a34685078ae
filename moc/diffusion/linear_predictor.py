"""The best linear denoiser is what a trained model must beat to have learned more than means and covariances.

For data with mean m and covariance C, the velocity that is linear in the noisy x and has the least squared error is
`-m + sum_i gain(s_i) u_i u_i^T (x - (1 - sigma) m)` over the eigenpairs (s_i, u_i) of C, with
`gain(s) = (sigma - (1 - sigma) s) / ((1 - sigma)^2 s + sigma^2)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PATCH = 2  # rows and columns of a latent that are one token
CONSTANT = 1e-6  # a value that varies less than this share of the mean variance is constant up to rounding


@dataclass(frozen=True)
class LinearPredictor:
    """The predictor takes latents for a Gaussian: mean [d], basis [d, r] of unit eigenvectors, variance [r] along them
    and `rest` along all other directions."""

    mean: Tensor
    basis: Tensor
    variance: Tensor
    rest: Tensor

    @classmethod
    def fit(cls, rows: Tensor) -> "LinearPredictor":
        """Fits to rows [n, d]. Directions come from four fifths of them, variances from the others, so that a sample
        smaller than d does not make the predictor believe too much."""
        rows = rows.double()
        held = torch.arange(len(rows)) % 5 == 0
        mean = rows.mean(0)
        basis = _principal_directions(rows[~held] - mean)
        centred = rows[held] - mean
        inside = centred @ basis
        variance = inside.square().mean(0)
        outside = centred.square().sum(1).mean() - variance.sum()
        rest = (outside / max(1, rows.shape[1] - basis.shape[1])).clamp(min=0)
        return cls(mean, basis, variance, rest)

    def velocity(self, noisy: Tensor, sigma: float) -> Tensor:
        """Predicts the velocity of noisy rows [n, d] at a noise level."""

        def gain(s: Tensor) -> Tensor:
            return (sigma - (1 - sigma) * s) / ((1 - sigma) ** 2 * s + sigma**2)

        centred = noisy.double() - (1 - sigma) * self.mean
        inside = centred @ self.basis
        rest = gain(self.rest) * (centred - inside @ self.basis.T)
        return (gain(self.variance) * inside) @ self.basis.T + rest - self.mean


def linear_losses(train: Tensor, latents: Tensor, noise: Tensor, sigmas: Sequence[float]) -> list[float]:
    """Returns the held-out velocity error at each noise level of the better of two linear predictors fitted to `train`:
    one of the whole shot, and one of each token apart about the mean of those that stand where it does. Both know the
    values that do not vary, and so have no error there: a codec's constant channels are no loss that a model could seem
    to save. train, latents, noise: [n, C, T, H, W]."""
    mean = train.mean(0, keepdim=True)
    variance = (train - mean).square().mean(0, keepdim=True)
    varies = variance > CONSTANT * variance.mean()
    views: list[Callable[[Tensor], Tensor]] = [lambda x: x.flatten(1), _tokens]
    predictors = [LinearPredictor.fit(view(train - mean)) for view in views]
    best = []
    for sigma in sigmas:
        noisy = (1 - sigma) * (latents - mean) + sigma * noise
        target = noise - (latents - mean)
        errors = [
            (p.velocity(view(noisy), sigma) - view(target)) * view(varies.expand_as(target))
            for p, view in zip(predictors, views, strict=True)
        ]
        best.append(min(float(error.square().mean()) for error in errors))
    return best


def _principal_directions(rows: Tensor) -> Tensor:
    """Returns orthonormal [d, r] spanning centred rows [n, d], from the smaller of the two Gram matrices."""
    if rows.shape[0] >= rows.shape[1]:
        return torch.linalg.eigh(rows.T @ rows).eigenvectors
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > 1e-9 * values[-1]
    return (rows.T @ vectors[:, kept]) / values[kept].sqrt()


def _tokens(x: Tensor) -> Tensor:
    """Returns the tokens [n T H/p W/p, C p p] of x [n, C, T, H, W]."""
    x = x.unfold(3, PATCH, PATCH).unfold(4, PATCH, PATCH)
    return x.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(0, 3)
