"""The Kullback-Leibler divergence of Gaussian posteriors from isotropic Gaussian priors, and its dense twin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hesscope.bounds.log_gap import log_gap
from hesscope.core.errors import InputError
from hesscope.core.real_numbers import finite, require_positive

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GaussianKL:
    """KL(posterior || prior) in nats, in two parts that are both >= 0.

    Attributes:
        displacement: |m - m0|^2 / (2 lambda), for the distance of the means.
        variance: sum of (v/lambda - 1 - ln(v/lambda)) / 2, for the variances.
    """

    displacement: float
    variance: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.displacement + self.variance


def diagonal_gaussian_kl(shift: npt.ArrayLike, variance: npt.ArrayLike, prior_variance: float) -> GaussianKL:
    """KL( N(m, diag(variance)) || N(m0, prior_variance I) ), in any orthonormal basis: the prior is the same in all.

    Relatively accurate also where a variance is very near the prior's, and its part of second order in the difference.

    Args:
        shift: m - m0 in the basis in which the covariance is diagonal, of any shape.
        variance: the posterior's variances in that basis, of the same shape, positive.
        prior_variance: lambda.

    Raises:
        InputError: shapes that differ, or a value that is not finite or not positive.

    Source: MATH.md, section 6.
    """
    require_positive("prior_variance", prior_variance)
    difference, variances = finite("shift", shift), finite("variance", variance)
    if difference.shape != variances.shape:
        raise InputError(f"shift and variance must have one shape, got {difference.shape} and {variances.shape}")
    if (variances <= 0).any():
        raise InputError(f"variance must be positive, got {variances[variances <= 0][0]}")
    prior = float(prior_variance)
    with np.errstate(over="ignore"):  # an infinite divergence is the truth in float64, and its bound is 1
        x = (variances - prior) / prior
        gaps = log_gap(x, x - np.log(variances) + np.log(prior))
        displacement = float(np.square(difference / np.sqrt(prior)).sum()) / 2
        return GaussianKL(displacement, float(gaps.sum()) / 2)


def dense_gaussian_kl(
    mean: npt.ArrayLike, covariance: npt.ArrayLike, prior_mean: npt.ArrayLike, prior_covariance: npt.ArrayLike
) -> float:
    """KL( N(mean, covariance) || N(prior_mean, prior_covariance) ) in nats by Cholesky factors; the twin for tests.

    Args:
        mean, prior_mean: [d]; covariance, prior_covariance: [d, d], symmetric and positive definite.

    Raises:
        InputError: shapes that do not fit, a value that is not finite, a matrix that is not a covariance.
    """
    from scipy.linalg import solve_triangular

    shift = finite("mean", mean)
    if shift.ndim != 1:
        raise InputError(f"mean must be one-dimensional, got shape {shift.shape}")
    origin = finite("prior_mean", prior_mean)
    if origin.shape != shift.shape:
        raise InputError(f"prior_mean must have the shape of mean, {shift.shape}, got {origin.shape}")
    root = _cholesky("covariance", covariance, len(shift))
    prior_root = _cholesky("prior_covariance", prior_covariance, len(shift))
    ratio = solve_triangular(prior_root, root, lower=True)
    whitened = solve_triangular(prior_root, shift - origin, lower=True)
    log_determinant = 2 * float(np.log(np.diag(ratio)).sum())
    return (float(np.square(ratio).sum()) + float(np.square(whitened).sum()) - len(shift) - log_determinant) / 2


def _cholesky(argument: str, matrix: npt.ArrayLike, size: int) -> Array:
    """Lower Cholesky factor [size, size]."""
    entries = finite(argument, matrix)
    if entries.shape != (size, size):
        raise InputError(f"{argument} must have shape {(size, size)}, got {entries.shape}")
    if not np.allclose(entries, entries.T, rtol=1e-8, atol=1e-8 * float(np.abs(entries).max(initial=0.0))):
        raise InputError(f"{argument} must be symmetric")
    try:
        return np.asarray(np.linalg.cholesky(entries), dtype=np.float64)
    except np.linalg.LinAlgError:
        raise InputError(f"{argument} must be positive definite") from None
