"""The limit law of the spectrum of H = (1/N) sum_n lambda_n x_n x_n^T, x_n ~ N(0, T), as d/N -> gamma.

The record and what it answers; the mathematics is in `stieltjes_equation`, `spectral_support`, `spectral_distribution`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.real_numbers import reals, require_positive
from hesscope.theory.arguments import vector
from hesscope.theory.atoms import Atoms, distinct_atoms
from hesscope.theory.compression import few_atoms
from hesscope.theory.spectral_distribution import SpectralDistribution
from hesscope.theory.stieltjes_equation import StieltjesEquation

Array = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]
Pairs = npt.ArrayLike | tuple[npt.ArrayLike, npt.ArrayLike]


@dataclass(frozen=True, eq=False)
class SpectralLaw:
    """Law of the eigenvalues of H = (1/N) sum_n lambda_n x_n x_n^T, x_n ~ N(0, T) in d dimensions, d/N -> gamma.

    Attributes:
        weights: lambda_n, samples or atoms, [L], of either sign; zeros count (they are the masked samples of a ReLU).
        gamma: d/N > 0.
        probabilities: of the atoms, [L], sum 1; None for equal ones.
        covariance: eigenvalues of T, [q], or (eigenvalues, probabilities); None for T = I.

    Eigenvalues come in the unit of lambda times that of T, and the law is equivariant: nothing depends on the scale of
    either. The time of `density` grows as the number of points times the number of different atoms, up to 4096. More of
    them, in weights or covariance, are replaced by about 2000 (by more where the accuracy needs it: gamma > 1, heavy
    tails) with the same mass and first three moments. This changes edges of the support by less than 1e-6 of the
    largest and densities, except very close to an edge, by less than 1e-6 of the peak; `weights` and `moment` stay
    exact.

    Raises:
        InputError: an argument that is empty, not finite, or outside these ranges.

    Source: Marchenko, Pastur 1967; Paul, Silverstein 2009; [D], arXiv:2505.02809; MATH.md, section 4.1.
    """

    weights: npt.ArrayLike
    gamma: float
    probabilities: npt.ArrayLike | None = None
    covariance: Pairs | None = None
    # Weights and eigenvalues of the covariance, divided by their largest magnitudes, whose product is the unit.
    _atoms: tuple[Atoms, Atoms] = field(init=False, repr=False)
    _equation: StieltjesEquation = field(init=False, repr=False)
    _unit: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_positive("gamma", self.gamma)
        weights = vector("weights", self.weights)
        probabilities = None if self.probabilities is None else vector("probabilities", self.probabilities)
        atoms = distinct_atoms(weights, probabilities, "weights", "probabilities")
        covariance: Pairs | None = None
        spectrum = Atoms(np.ones(1), np.ones(1), 1.0)
        if self.covariance is not None:
            values, masses = _covariance(self.covariance)
            spectrum = distinct_atoms(values, masses, "covariance", "covariance probabilities")
            covariance = values if masses is None else (values, masses)
        few = few_atoms(atoms, float(self.gamma)), few_atoms(spectrum, 1 / float(self.gamma))
        equation = StieltjesEquation(*few, float(self.gamma))
        for name, value in (
            ("weights", weights),
            ("gamma", float(self.gamma)),
            ("probabilities", probabilities),
            ("covariance", covariance),
            ("_atoms", (atoms, spectrum)),
            ("_equation", equation),
            ("_unit", atoms.scale * spectrum.scale),
        ):
            object.__setattr__(self, name, value)

    @property
    def support(self) -> tuple[tuple[float, float], ...]:
        """Intervals (a, b) of the continuous part, in ascending order; the atom at zero is not among them.

        For T = I every gap is found. For other T, gaps are searched at about 200 points of each arc of the
        real curve that can hold any, and closer near minima of D; a much narrower one can be missed.
        """
        return tuple((a * self._unit, b * self._unit) for a, b in self._equation.support)

    @property
    def atom_at_zero(self) -> float:
        """Mass of the eigenvalue 0: the larger of 1 - P(t != 0) and 1 - P(lambda != 0) / gamma, if positive."""
        return self._equation.atom

    def density(self, x: npt.ArrayLike) -> Array:
        """Density of the continuous part at real x (any shape), per unit of eigenvalue; exactly 0 outside the support.

        inf at x = 0 if P(lambda != 0) = gamma P(t != 0) and 0 belongs to the support: it diverges there.
        """
        x = reals("x", x)
        return np.asarray(self._equation.density(x.ravel() / self._unit).reshape(x.shape) / self._unit)[()]

    def stieltjes(self, z: npt.ArrayLike) -> ComplexArray:
        """s(z) = int dmu(x) / (x - z), the atom at zero included, at complex z off the real axis (any shape).

        Raises:
            InputError: a z that is real or not finite.
        """
        z = np.asarray(z, dtype=np.complex128)
        if not (np.isfinite(z).all() and (z.imag != 0).all()):
            raise InputError("z must be finite and off the real axis (on it, use density)")
        scaled = z.ravel() / self._unit
        lower = scaled.imag < 0
        s = self._equation.stieltjes(np.where(lower, scaled.conj(), scaled))
        signed = np.asarray(np.where(lower, s.conj(), s), dtype=np.complex128).reshape(z.shape)
        return np.asarray(signed / self._unit, dtype=np.complex128)[()]

    def moment(self, k: int) -> float:
        """Int x^k dmu(x) for k = 0, 1, 2, ..., in units of eigenvalue^k, from the moments of lambda and T."""
        if k == 0:
            return 1.0
        require_positive_int("k", k)
        weights, spectrum = self._atoms
        orders = range(1, k + 1)
        moments = moments_from_weight_moments(
            self.gamma,
            [float(weights.masses @ weights.values**order) for order in orders],
            [float(spectrum.masses @ spectrum.values**order) for order in orders],
        )
        return float(moments[-1]) * self._unit**k

    def cdf(self, x: npt.ArrayLike) -> Array:
        """mu((-inf, x]) at real x (any shape)."""
        x = reals("x", x)
        continuous = self._distribution.cdf(x.ravel() / self._unit).reshape(x.shape)
        return np.asarray(continuous + self.atom_at_zero * (x >= 0))[()]

    def quantile(self, q: npt.ArrayLike) -> Array:
        """Inf { x : mu((-inf, x]) >= q } at q in [0, 1] (any shape); at q = 0, the left end of the spectrum.

        Raises:
            InputError: a q outside [0, 1].
        """
        q = reals("q", q)
        if not ((q >= 0) & (q <= 1)).all():
            raise InputError(f"q must lie between 0 and 1, got {q[(q < 0) | (q > 1)][0]}")
        law, atom, mass = self._distribution, self.atom_at_zero, q.ravel()
        below = float(law.cdf(np.zeros(1))[0])
        left = (mass <= below) & (mass + below > 0) if atom > 0 else mass <= below
        right = (mass > below + atom) & (below < law.mass)
        x = np.zeros(mass.shape)
        x[left] = law.inverse(mass[left])
        x[right] = law.inverse(mass[right] - atom)
        return np.asarray(x.reshape(q.shape) * self._unit)[()]

    @cached_property
    def _distribution(self) -> SpectralDistribution:
        return SpectralDistribution.of(self._equation)


def moments_from_weight_moments(
    gamma: float, weight_moments: npt.ArrayLike, covariance_moments: npt.ArrayLike | None = None
) -> Array:
    """Moments m_1 ... m_K of the law from those of the weights, without the weights' law.

    The free cumulants are gamma^{k-1} E[lambda^k] for T = I. In general the two equations are solved as power series in
    1/z: with e = -eps(1/z) / z, eps = int t / (1 - t g / z) dF and g = sum_j E[lambda^{j+1}] (gamma eps / z)^j.

    Args:
        gamma: d/N > 0.
        weight_moments: E[lambda^k], k = 1 ... K, [K].
        covariance_moments: int t^k dF(t), k = 1 ... K, [K]; None for T = I.

    Returns:
        [K], in units of eigenvalue^k.

    Raises:
        InputError: gamma not positive; moments that are not finite, none, or not as many of T as of the weights.

    Source: Paul, Silverstein 2009; MATH.md, section 4.1.
    """
    require_positive("gamma", gamma)
    weight = vector("weight_moments", weight_moments)
    K = len(weight)
    spectrum = np.ones(K) if covariance_moments is None else vector("covariance_moments", covariance_moments)
    if len(spectrum) != K:
        raise InputError(f"covariance_moments must be as many as weight_moments ({K}), got {len(spectrum)}")

    def compose(coefficients: Array, series: Array) -> Array:
        """sum_j coefficients[j] (series / z)^j as a series in 1/z, up to order K."""
        shifted = np.concatenate(([0.0], series[:K]))
        out = np.zeros(K + 1)
        for coefficient in coefficients[::-1]:
            out = np.convolve(out, shifted)[: K + 1]
            out[0] += coefficient
        return out

    eps, g = np.zeros(K + 1), np.zeros(K + 1)
    for _ in range(K + 1):
        g = compose(weight, gamma * eps)
        eps = compose(spectrum, g)
    return compose(np.concatenate(([1.0], spectrum)), g)[1:]


def _covariance(covariance: Pairs) -> tuple[Array, Array | None]:
    """Eigenvalues and probabilities (None: equal) of the argument `covariance`."""
    values, masses = covariance, None
    if isinstance(values, tuple) and len(values) == 2 and np.ndim(values[0]) > 0:
        masses = vector("covariance probabilities", values[1])
        values = values[0]
    values = vector("covariance", values)
    if (values < 0).any():
        raise InputError(
            f"covariance must be the eigenvalues of T, none negative, got {values.min()} "
            "(clip rounding errors with numpy.maximum)"
        )
    return values, masses
