"""Eigenvalues of the covariance T behind samples, from those of the sample covariance, which are spread too far.

The d eigenvalues l of S = (1/N) sum_n x_n x_n^T, d/N = gamma, follow the law of Marchenko and Pastur for T: the
transform v(z) = -(1 - gamma) / z + (gamma / d) sum 1 / (l - z) of the N x N companion of S solves, as d and N grow,

    z = -1 / v + gamma int t / (1 + t v) dH(t)

with the law H of the eigenvalues of T. This is linear in H: at many z, non-negative probabilities on a grid of t are
fitted to it by least squares (El Karoui 2008, who minimizes the largest residual by a linear program). A residual is an
error of v multiplied by -1 / v'(z), and v(z) has an error of about 1 / (N Im z): each row is divided by both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import HesscopeError, InputError
from hesscope.core.real_numbers import require_positive
from hesscope.theory.arguments import vector
from hesscope.theory.pointwise import tiles

Array = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]

# Equations are taken at z = x (1 + i height) for quantiles x of the positive sample eigenvalues, and for the largest,
# which may lie far apart.
QUANTILES = 100
LARGEST = 20
HEIGHTS = (0.1, 0.3, 1.0, 3.0)
# Weight of the rows that fix the total mass and the mean, in units of the largest other entry.
STRONG = 1e4
# With d >= N eigenvalues of T may lie below all positive sample eigenvalues: where they begin, in medians of these.
BELOW = 1e-3


@dataclass(frozen=True, eq=False)
class PopulationSpectrum:
    """Estimated law of the eigenvalues of T; `SpectralLaw` takes (eigenvalues, probabilities) as its covariance.

    Attributes:
        eigenvalues: [q], ascending, in the unit of the sample eigenvalues, whose mean they have.
        probabilities: [q], positive, sum 1.
    """

    eigenvalues: Array
    probabilities: Array


def population_spectrum(sample_eigenvalues: npt.ArrayLike, gamma: float, points: int = 400) -> PopulationSpectrum:
    """Estimate the eigenvalues of T from those of the sample covariance (1/N) sum_n x_n x_n^T, x_n ~ (0, T).

    The sample eigenvalues themselves would count the noise of the samples twice in a `SpectralLaw` of the same data:
    their second moment is that of T plus gamma times the squared mean. What cannot be resolved is the shape of H within
    a relative width of about sqrt(gamma): smooth parts come out as a few atoms, which have almost the same law.

    Args:
        sample_eigenvalues: all d of them, [d], zeros included. Zeros in excess of d - N are taken to be those of T.
        gamma: d/N > 0. (With the mean subtracted, divide by N - 1 instead of N here and in the covariance.)
        points: candidates for eigenvalues of T: half of them evenly in the logarithm, half quantiles of the sample.

    Raises:
        InputError: sample eigenvalues that are none, not finite, negative beyond rounding, all zero, or positive in a
            larger number than N = d / gamma; gamma or points not positive.

    Source: El Karoui, Annals of Statistics 36 (2008) 2757; Marchenko, Pastur 1967; Silverstein 1995.
    """
    from scipy.optimize import nnls

    require_positive("gamma", gamma)
    require_positive_int("points", points)
    sample = _sample(sample_eigenvalues, float(gamma))
    unit = float(sample[-1])
    sample = sample / unit
    positive, mean = sample[sample > 0], float(sample.mean())
    zeros = 1 - len(positive) / len(sample)
    null = zeros if zeros > max(0.0, 1 - 1 / gamma) + 0.5 / len(sample) else 0.0

    t = _candidates(positive, gamma, points)
    rows, target = _equations(positive, len(sample), gamma, t)
    strong = STRONG * float(np.abs(rows).max())
    rows = np.concatenate((rows, [np.full(len(t), strong), t * (strong / mean)]))
    target = np.concatenate((target, [(1 - null) * strong, strong]))
    # The same least squares problem with as few rows as columns.
    triangle = np.asarray(np.linalg.qr(np.column_stack((rows, target)), mode="r"))
    try:
        masses, _ = nnls(triangle[:, :-1], triangle[:, -1], maxiter=30 * len(t))
    except RuntimeError as error:
        raise HesscopeError(
            f"the fit of the population spectrum did not converge ({error}); try other points"
        ) from None

    t, masses = t[masses > 0], masses[masses > 0]
    masses *= (1 - null) / masses.sum()
    t *= mean / float(masses @ t)
    if null > 0:
        t, masses = np.concatenate(([0.0], t)), np.concatenate(([null], masses))
    return PopulationSpectrum(_frozen(t * unit), _frozen(masses))


def _sample(eigenvalues: npt.ArrayLike, gamma: float) -> Array:
    """Ascending sample eigenvalues [d], those of the size of rounding errors set to zero."""
    name = "sample_eigenvalues"
    sample = np.sort(vector(name, eigenvalues))
    given = np.asarray(eigenvalues).dtype
    eps = float(np.finfo(given if given.kind == "f" else np.float64).eps)
    rounding = len(sample) * eps * float(np.abs(sample).max())
    if sample[0] < -rounding:
        raise InputError(f"{name} must not be negative, got {sample[0]} (clip rounding errors with numpy.maximum)")
    sample[sample <= rounding] = 0.0
    positive, most = int((sample > 0).sum()), len(sample) / gamma
    if not positive:
        raise InputError(f"{name} must not all be zero")
    if positive > most + 0.5:
        raise InputError(
            f"{name}: at most d / gamma = {most:.6g} of them can be positive, got {positive} "
            "(set rounding errors to 0, or correct gamma)"
        )
    return sample


def _candidates(positive: Array, gamma: float, points: int) -> Array:
    """Candidates for the eigenvalues t of T, ascending, [at most points]; the largest sample eigenvalue is 1.

    For gamma < 1 no t lies outside the range of the sample eigenvalues, up to fluctuations.
    """
    lowest = float(positive[0]) if gamma < 1 else min(float(positive[0]), BELOW * float(np.median(positive)))
    even = np.geomspace(lowest, 1.0, points - points // 2)
    return np.unique(np.concatenate((even, np.quantile(positive, np.linspace(0, 1, points // 2)))))


def _equations(positive: Array, d: int, gamma: float, t: Array) -> tuple[Array, Array]:
    """Real rows [n, q] and right sides [n] of (z + 1 / v) / gamma = sum_k p_k t_k / (1 + t_k v), with equal noise."""
    x = np.concatenate((np.quantile(positive, (np.arange(QUANTILES) + 0.5) / QUANTILES), positive[-LARGEST:]))
    z = np.concatenate([x * (1 + 1j * height) for height in HEIGHTS])
    # m(z) = 1 + z s(z) and its derivative; then v = (gamma m - 1) / z, without cancellation at small gamma.
    m, slope = np.empty_like(z), np.empty_like(z)
    for some in tiles(len(z), len(positive)):
        kernel = 1 / (positive - z[some, None])
        m[some] = kernel @ positive / d
        slope[some] = kernel**2 @ positive / d
    v = (gamma * m - 1) / z
    weight = np.abs((1 - gamma * m) / z**2 + gamma * slope / z) * z.imag
    rows, target = weight[:, None] * t / (1 + v[:, None] * t), weight * m / v
    return np.concatenate((rows.real, rows.imag)), np.concatenate((target.real, target.imag))


def _frozen(values: Array) -> Array:
    values.flags.writeable = False
    return values
