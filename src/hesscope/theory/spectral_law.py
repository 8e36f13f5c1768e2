"""The limit law of the spectrum of H = (1/N) sum_n lambda_n x_n x_n^T, x_n ~ N(0, T), as d/N -> gamma.

With f the law of lambda and F that of the eigenvalues t of T, the Stieltjes transform s(z) = int dmu(x) / (x - z) is

    e = int t / (t g(e) - z) dF(t),   g(e) = E[lambda / (1 + gamma lambda e)],   s = int 1 / (t g(e) - z) dF(t),

where e is the only solution in the upper half plane (Marchenko, Pastur 1967 for T = I, where e = s; Paul, Silverstein
2009; [D], arXiv:2505.02809, for weights of either sign; MATH.md, section 4.1). The right-hand side of the first
equation maps the upper half plane into itself, for real z, too; so by the lemma of Schwarz and Pick it has at most one
fixed point there, and whichever way a root with Im e > 0 was found, it is the right one.

Outside the support e is real. The support is found from the real curve (w, y), w = 1 / (gamma e), y = z / g, on which

    E[lambda / (w + lambda)] = gamma int t / (t - y) dF(t),   z = y w E[lambda / (w + lambda)],

and whose points belong to a gap of the support where

    D = gamma E[(lambda / (w + lambda))^2] int (t / (t - y))^2 dF / E[lambda / (w + lambda)]^2 < 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, pi
from numbers import Real

import numpy as np
import numpy.typing as npt
from numpy.polynomial import legendre

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import HesscopeError, InputError

Array = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]
Pairs = npt.ArrayLike | tuple[npt.ArrayLike, npt.ArrayLike]

EPS = float(np.finfo(np.float64).eps)
# Probabilities sum to 1 up to this (float32 inputs).
SUM_TOLERANCE = 1e-5
# Relative difference up to which P(lambda != 0) = gamma P(t != 0), where the density diverges at 0.
CRITICAL = 1e-12
# Entries of a temporary table (points x atoms): it should fit in the cache.
TILE = 1 << 14
# Newton steps of one point on its way down to the real axis: 20 to 40 in the bulk, 100 at 1e-14 from an edge.
MAX_STEPS = 2000
# Relative accuracy at which a Newton step is rounding error and no sign of a lost path.
ROUNDING = 1e-13
# Panels of the distribution function: Legendre nodes each, first panels of an interval, and the mass that the last
# coefficients may carry.
NODES = 16
FIRST_PANELS = 4
PANEL_TOLERANCE = 1e-9
MAX_DEPTH = 45
# The integral of the density must be its known mass up to this.
MASS_TOLERANCE = 1e-5
# Points on one arc of the real curve that are searched for gaps (general T).
ARC_POINTS = 193
ZOOMS = 2
BISECTIONS = 64
NEWTON_STEPS = 12


@dataclass(frozen=True, eq=False)
class SpectralLaw:
    """Law of the eigenvalues of H = (1/N) sum_n lambda_n x_n x_n^T, x_n ~ N(0, T) in d dimensions, d/N -> gamma.

    Attributes:
        weights: lambda_n, samples or atoms, [L], of either sign; zeros count (they are the masked samples of a ReLU).
        gamma: d/N > 0.
        probabilities: of the atoms, [L], sum 1; None for equal ones.
        covariance: eigenvalues of T, [q], or (eigenvalues, probabilities); None for T = I.

    Eigenvalues come in the unit of lambda times that of T, and the law is equivariant: nothing depends on the scale of
    either. The time of `density` grows as the number of points times the number of different atoms.

    Raises:
        InputError: an argument that is empty, not finite, or outside these ranges.

    Source: Marchenko, Pastur 1967; Paul, Silverstein 2009; [D], arXiv:2505.02809; MATH.md, section 4.1.
    """

    weights: npt.ArrayLike
    gamma: float
    probabilities: npt.ArrayLike | None = None
    covariance: Pairs | None = None
    # The equation for weights and covariances divided by their largest magnitudes, whose product is the unit.
    _equation: _Equation = field(init=False, repr=False)
    _unit: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _require_gamma(self.gamma)
        weights = _vector("weights", self.weights)
        probabilities = None if self.probabilities is None else _vector("probabilities", self.probabilities)
        atoms = _atoms(weights, probabilities, "weights", "probabilities")
        covariance: Pairs | None = None
        spectrum = _Atoms(np.ones(1), np.ones(1), 1.0)
        if self.covariance is not None:
            values, masses = _covariance(self.covariance)
            spectrum = _atoms(values, masses, "covariance", "covariance probabilities")
            covariance = values if masses is None else (values, masses)
        equation = _Equation(atoms, spectrum, float(self.gamma))
        for name, value in (
            ("weights", weights),
            ("gamma", float(self.gamma)),
            ("probabilities", probabilities),
            ("covariance", covariance),
            ("_equation", equation),
            ("_unit", atoms.scale * spectrum.scale),
        ):
            object.__setattr__(self, name, value)

    @property
    def support(self) -> tuple[tuple[float, float], ...]:
        """Intervals (a, b) of the continuous part, in ascending order; the atom at zero is not among them.

        For T = I every gap is found. For other T, gaps are searched at about `ARC_POINTS` points of each arc of the
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
        x = _reals("x", x)
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
        weights, spectrum = self._equation.weights, self._equation.spectrum
        orders = range(1, k + 1)
        moments = moments_from_weight_moments(
            self.gamma,
            [float(weights.masses @ weights.values**order) for order in orders],
            [float(spectrum.masses @ spectrum.values**order) for order in orders],
        )
        return float(moments[-1]) * self._unit**k

    def cdf(self, x: npt.ArrayLike) -> Array:
        """mu((-inf, x]) at real x (any shape)."""
        x = _reals("x", x)
        continuous = self._distribution.cdf(x.ravel() / self._unit).reshape(x.shape)
        return np.asarray(continuous + self.atom_at_zero * (x >= 0))[()]

    def quantile(self, q: npt.ArrayLike) -> Array:
        """Inf { x : mu((-inf, x]) >= q } at q in [0, 1] (any shape); at q = 0, the left end of the spectrum.

        Raises:
            InputError: a q outside [0, 1].
        """
        q = _reals("q", q)
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
    def _distribution(self) -> _Distribution:
        return _Distribution.of(self._equation)


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
    _require_gamma(gamma)
    weight = _vector("weight_moments", weight_moments)
    K = len(weight)
    spectrum = np.ones(K) if covariance_moments is None else _vector("covariance_moments", covariance_moments)
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


# --- arguments --------------------------------------------------------------------------------------------------------


def _require_gamma(gamma: object) -> None:
    if not (isinstance(gamma, Real) and 0 < float(gamma) < inf):
        raise InputError(f"gamma must be a positive, finite number, got {gamma!r}")


def _reals(argument: str, values: object) -> Array:
    """A float64 copy of any shape without nan."""
    try:
        array = np.array(values)
        if np.iscomplexobj(array):
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{argument} must be real numbers, got {type(values).__name__}") from None
    if np.isnan(array).any():
        raise InputError(f"{argument} must not contain nan")
    return array


def _vector(argument: str, values: object) -> Array:
    """A read-only float64 copy [n], n >= 1, all finite."""
    array = _reals(argument, values)
    if array.ndim != 1 or not array.size:
        raise InputError(f"{argument} must be a non-empty one-dimensional array, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{argument} must be finite, got {array[~np.isfinite(array)][0]}")
    array.flags.writeable = False
    return array


def _covariance(covariance: Pairs) -> tuple[Array, Array | None]:
    """Eigenvalues and probabilities (None: equal) of the argument `covariance`."""
    values, masses = covariance, None
    if isinstance(values, tuple) and len(values) == 2 and np.ndim(values[0]) > 0:
        masses = _vector("covariance probabilities", values[1])
        values = values[0]
    values = _vector("covariance", values)
    if (values < 0).any():
        raise InputError(
            f"covariance must be the eigenvalues of T, none negative, got {values.min()} "
            "(clip rounding errors with numpy.maximum)"
        )
    return values, masses


@dataclass(frozen=True, eq=False)
class _Atoms:
    """Different non-zero values, ascending, divided by the largest magnitude (`scale`), and their masses."""

    values: Array
    masses: Array
    scale: float

    @cached_property
    def mass(self) -> float:
        """Probability of not being zero."""
        return min(float(self.masses.sum()), 1.0)


def _atoms(values: Array, masses: Array | None, argument: str, masses_argument: str) -> _Atoms:
    """Merge duplicates, drop zeros and what has no probability."""
    if masses is None:
        masses = np.full(len(values), 1 / len(values))
    if masses.shape != values.shape:
        raise InputError(f"{masses_argument} must be one for each of the {len(values)} {argument}, got {len(masses)}")
    if (masses < 0).any() or abs(float(masses.sum()) - 1) > SUM_TOLERANCE:
        raise InputError(f"{masses_argument} must be non-negative and sum to 1, got sum {masses.sum()}")
    kept = (values != 0) & (masses > 0)
    distinct, index = np.unique(values[kept], return_inverse=True)
    scale = float(np.abs(distinct).max()) if distinct.size else 1.0
    return _Atoms(distinct / scale, np.bincount(index, masses[kept], len(distinct)) / masses.sum(), scale)


# --- the equation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Equation:
    """The equation of e for weights and covariance whose largest magnitudes are 1 (or which are all zero)."""

    weights: _Atoms
    spectrum: _Atoms
    gamma: float

    @cached_property
    def critical(self) -> bool:
        """Whether P(lambda != 0) = gamma P(t != 0) up to rounding, so that the density diverges at 0."""
        return abs(self.weights.mass - self.gamma * self.spectrum.mass) < CRITICAL * self.weights.mass

    @cached_property
    def atom(self) -> float:
        """Mass of the eigenvalue 0."""
        rank = self.spectrum.mass if self.critical else min(self.spectrum.mass, self.weights.mass / self.gamma)
        return 1.0 - rank

    @cached_property
    def support(self) -> tuple[tuple[float, float], ...]:
        """Intervals of the continuous part."""
        if not (self.weights.values.size and self.spectrum.values.size):
            return ()
        identity = len(self.spectrum.values) == 1
        gaps = _gaps_one_covariance(self) if identity else _gaps(self)
        ends = [(a, b) for a, b in gaps if a < b]
        (right, left) = next((a, b) for a, b in gaps if a > b)
        edges = [left]
        for a, b in sorted(ends):
            if b > edges[-1] and a < right:
                edges += [max(a, edges[-1]), b]
        edges.append(right)
        if self.critical:
            edges = [0.0 if abs(edge) < EPS else edge for edge in edges]
        return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)

    def density(self, x: Array) -> Array:
        """Density at x, [n]; see `SpectralLaw.density`."""
        inside = np.zeros(x.shape, dtype=bool)
        out = np.zeros(x.shape)
        for a, b in self.support:
            inside |= (a < x) & (x < b)
            if self.critical and a <= 0 <= b:
                out[x == 0] = np.inf
        inside &= np.isfinite(out)
        z = x[inside].astype(np.complex128)
        out[inside] = self._transform(z, self.solve(z)).imag / pi
        return out

    def stieltjes(self, z: ComplexArray) -> ComplexArray:
        """S at z in the upper half plane, [n]."""
        lost = -(1 - self.spectrum.mass) / z
        if not (self.weights.values.size and self.spectrum.values.size):
            return -1 / z
        return lost + self._transform(z, self.solve(z))

    def _transform(self, z: ComplexArray, e: ComplexArray) -> ComplexArray:
        """Part of s from t != 0, [n]."""
        out = np.empty_like(z)
        for rows in _tiles(len(z), max(len(self.weights.values), len(self.spectrum.values))):
            g, _ = self._g(e[rows])
            kernel = 1 / (g[:, None] * self.spectrum.values - z[rows, None])
            out[rows] = kernel @ self.spectrum.masses
        return out

    def _g(self, e: ComplexArray) -> tuple[ComplexArray, ComplexArray]:
        """g(e) and g'(e), [n] each."""
        # With gamma e = r + i j, 1 + gamma lambda e = c + i j lambda: real tables are much faster than complex ones.
        values, masses = self.weights.values, self.weights.masses
        r, j = self.gamma * e.real, self.gamma * e.imag
        c = r[:, None] * values
        c += 1
        inverse = c * c
        inverse += (j**2)[:, None] * values**2
        np.reciprocal(inverse, out=inverse)
        c *= inverse
        inverse *= values
        # Now c and -j inverse are the real and imaginary parts of 1 / (1 + gamma lambda e).
        g = c @ (masses * values) - 1j * j * (inverse @ (masses * values))
        cross = (c * inverse) @ (masses * values**2)
        c *= c
        inverse *= inverse
        squared = masses * values**2
        slope = -self.gamma * (c @ squared - j**2 * (inverse @ squared) - 2j * j * cross)
        return g.astype(np.complex128), slope.astype(np.complex128)

    def _map(self, z: ComplexArray, e: ComplexArray) -> tuple[ComplexArray, ComplexArray, ComplexArray]:
        """h(e, z) = int t / (t g(e) - z) and its derivatives in e and z, [n] each."""
        t, masses = self.spectrum.values, self.spectrum.masses
        h, slope, drift = np.empty_like(e), np.empty_like(e), np.empty_like(e)
        for rows in _tiles(len(z), max(len(self.weights.values), len(t))):
            g, dg = self._g(e[rows])
            kernel = 1 / (g[:, None] * t - z[rows, None])
            h[rows] = kernel @ (masses * t)
            np.multiply(kernel, kernel, out=kernel)
            slope[rows] = -dg * (kernel @ (masses * t**2))
            drift[rows] = kernel @ (masses * t)
        return h, slope, drift

    def solve(self, z: ComplexArray) -> ComplexArray:
        """Solution e at z with Im z >= 0, [n]; real z must belong to the support.

        Every point walks from high above, where e = -E[t] / z, straight down to z. Where a Newton step is small the
        point takes a stride down by the first-order change of e, as far as that stays well inside the upper half plane.
        Where one is large the last stride was too long, and is taken again at a quarter of its length. At z Newton's
        method goes on until rounding ends its progress.
        """
        target = z.imag
        height = np.maximum(target, 4 * (1 + self.gamma**0.5) ** 2 + np.abs(z.real))
        e: ComplexArray = -float(self.spectrum.masses @ self.spectrum.values) / (z.real + 1j * height)
        # Where the last stride began, de/dz there, its length (0: none yet), and the size of the last Newton step.
        base, rate, stride, last = e.copy(), np.zeros_like(e), np.zeros(e.shape), np.full(e.shape, np.inf)
        active = np.arange(len(z))
        for _ in range(MAX_STEPS):
            if not active.size:
                return e
            here, at = e[active], height[active]
            h, slope, drift = self._map(z.real[active] + 1j * at, here)
            step = (h - here) / (1 - slope)
            size, room = np.abs(step), here.imag
            lost = (size > 0.6 * room) & (size > ROUNDING * np.abs(here)) & (stride[active] > 0)
            # A Newton step that keeps at least a quarter of Im e.
            here = here + step * np.minimum(1.0, 0.75 * room / np.maximum(-step.imag, 0.75 * room))
            arrived = at <= target[active]
            settled = (size <= 0.05 * room) | (size <= ROUNDING * np.abs(here))
            stalled = (size > 0.5 * last[active]) & (size <= 1e-6 * np.abs(here)) & ~lost
            done = arrived & ((size <= 4 * EPS * np.abs(here)) | stalled)
            e[active] = here
            last[active] = np.where(arrived, size, np.inf)

            go = active[settled & ~arrived & ~lost]
            rate[go] = (drift / (1 - slope))[settled & ~arrived & ~lost]
            base[go] = e[go]
            longest = np.where(stride[go] > 0, 4 * stride[go], np.inf)
            stride[go] = np.minimum(np.minimum(height[go] - target[go], 0.4 * e[go].imag / np.abs(rate[go])), longest)
            height[go] = np.where(stride[go] < height[go] - target[go], height[go] - stride[go], target[go])

            back = active[lost]
            height[back] += 0.75 * stride[back]
            stride[back] /= 4
            last[back] = np.inf
            moved = np.concatenate((go, back))
            # d e / d height = i de/dz
            e[moved] = base[moved] - 1j * stride[moved] * rate[moved]
            active = active[~done]
        raise HesscopeError(
            f"the equation of the spectral law did not converge at {len(active)} of {len(z)} points, "
            f"the first at {z[active[0]]} (in units of the largest |weight| times the largest covariance eigenvalue)"
        )


def _tiles(points: int, atoms: int) -> Iterator[slice]:
    """Slices of the points, such that a table of one slice and all atoms has about TILE entries."""
    size = max(1, TILE // atoms)
    return (slice(start, start + size) for start in range(0, points, size))


# --- the support ------------------------------------------------------------------------------------------------------


def _bisect(function: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Roots [n] of a function that is positive at `low` and not at `high`: the last points where it is positive."""
    for _ in range(BISECTIONS):
        middle = low + (high - low) / 2
        positive = function(middle) > 0
        low, high = np.where(positive, middle, low), np.where(positive, high, middle)
    return low


def _arcs(values: Array, masses: Array, level: float) -> tuple[Array, Array]:
    """Arcs of the projective real line on which phi(w) = E[(a / (w + a))^2] < level, as (starts [k], ends [k]).

    Between two poles, w = -a, phi is convex: each such interval holds at most one arc. The last arc runs from right of
    all poles through infinity to left of all, so its end is smaller than its start.
    """
    poles, c = -values[::-1], (masses * values**2)[::-1]

    def phi(w: Array, power: int = 2) -> Array:
        out = np.empty(w.shape)
        for rows in _tiles(len(w), len(poles)):
            with np.errstate(divide="ignore"):
                out[rows] = (1 / (w[rows, None] - poles)) ** power @ c
        return out

    # The two nearest poles alone bound phi from below, and most intervals away.
    width = np.diff(poles)
    kept = np.flatnonzero((np.cbrt(c[:-1]) + np.cbrt(c[1:])) ** 3 < level * width**2)
    left, right = poles[kept], poles[kept + 1]
    lowest = _bisect(lambda w: phi(w, 3), left, right)
    deep = phi(lowest) < level
    left, lowest, right = left[deep], lowest[deep], right[deep]
    reach = np.asarray([(float(c.sum()) / level) ** 0.5])
    first, last = poles[:1], poles[-1:]
    starts = _bisect(lambda w: phi(w) - level, np.concatenate((left, last)), np.concatenate((lowest, last + reach)))
    ends = _bisect(lambda w: level - phi(w), np.concatenate((lowest, first - reach)), np.concatenate((right, first)))
    return starts, ends


def _gaps_one_covariance(equation: _Equation) -> list[tuple[float, float]]:
    """Gaps (a, b) of the support if all non-zero t are equal (to 1); the one through infinity has a > b.

    Then y = 1 - gamma mass(t) / E[lambda / (w + lambda)] is explicit, and D = phi(w) / (gamma mass(t)).
    """
    values, masses = equation.weights.values, equation.weights.masses
    level = equation.gamma * equation.spectrum.mass
    starts, ends = _arcs(values, masses, level)

    def x(w: float) -> float:
        return w * (float(masses @ (values / (w + values))) - level)

    return [(x(end), x(start)) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _gaps(equation: _Equation) -> list[tuple[float, float]]:
    """Gaps (a, b) of the support for several different t; the one through infinity has a > b.

    By Jensen's inequality D < 1 needs phi(w) < gamma and int (t / (t - y))^2 dF < 1 / gamma: it is enough to search the
    products of an arc in w and an arc in y, on each of which the curve is the graph of a function y of w.
    """
    gamma, weights, spectrum = equation.gamma, equation.weights, equation.spectrum
    w_arcs = _angles(*_arcs(weights.values, weights.masses, gamma))
    y_arcs = _angles(*_arcs(-spectrum.values[::-1], spectrum.masses[::-1], 1 / gamma))
    return [gap for w_arc in w_arcs for y_arc in y_arcs for gap in _Sheet(equation, w_arc, y_arc).gaps()]


def _angles(starts: Array, ends: Array) -> list[Array]:
    """Search points on every arc, as increasing angles atan(w), past pi/2 if it leads through infinity.

    They are dense at both ends of the arc and, logarithmically, on both sides of w = 0.
    """
    arcs = []
    near_zero = np.geomspace(1e-9, 1e3, ARC_POINTS // 4)
    for start, end in zip(np.arctan(starts).tolist(), np.arctan(ends).tolist(), strict=True):
        low, high = start, end
        if start > end:
            # Keep w = 0 at the angle 0, where floating-point numbers are dense.
            low, high = (start - pi, end) if end > 0 else (start, end + pi)
        even = low + (high - low) * (1 - np.cos(np.linspace(0, pi, ARC_POINTS))) / 2
        angles = np.concatenate(([low, high], even, np.arctan(near_zero), -np.arctan(near_zero)))
        arcs.append(np.unique(angles[(angles >= low) & (angles <= high)]))
    return arcs


class _Sheet:
    """The piece of the real curve over one arc of w = a/b = tan(theta) and one arc of y = u/v = tan(beta).

    With A = E[lambda / (a + b lambda)] and B = int t / (t v - u) dF, the curve is b A = gamma v B and x = u a A / v; in
    these homogeneous coordinates neither w nor y nor both being infinite is special.
    """

    def __init__(self, equation: _Equation, w_arc: Array, y_arc: Array) -> None:
        self.equation = equation
        self.y_arc, self.levels = y_arc, self._of_y(y_arc)[0]
        # Where the curve enters, crosses and leaves the arc of y, however short the way.
        left = np.cos(w_arc) * self._of_w(w_arc)[0]
        targets = equation.gamma * self.levels[:: len(y_arc) // 16]
        step, target = np.nonzero((left[:-1, None] > targets) != (left[1:, None] > targets))
        sign = np.where(left[step] > targets[target], 1.0, -1.0)
        crossings = _bisect(
            lambda theta: sign * (np.cos(theta) * self._of_w(theta)[0] - targets[target]), w_arc[step], w_arc[step + 1]
        )
        self.w_arc = np.unique(np.concatenate((w_arc, crossings)))

    def gaps(self) -> list[tuple[float, float]]:
        """Images (a, b) of the pieces with D < 1; x decreases along theta, and a > b if one leads through infinity."""
        theta = self.w_arc
        D, _ = self.at(theta)
        for _ in range(ZOOMS):
            # A gap between two points: look closer around minima that do not yet reach below 1.
            k = np.flatnonzero((D[1:-1] <= D[:-2]) & (D[1:-1] <= D[2:]) & (D[1:-1] >= 1) & (D[1:-1] < 3)) + 1
            finer = np.concatenate((np.linspace(theta[k - 1], theta[k + 1], 18)[1:-1].ravel(), theta))
            theta = np.unique(finer)
            D, _ = self.at(theta)
        low = np.concatenate(([False], D < 1, [False]))
        first = np.flatnonzero(low[1:] & ~low[:-1])
        last = np.flatnonzero(low[:-1] & ~low[1:]) - 1
        if not first.size:
            return []
        before, after = theta[np.maximum(first - 1, 0)], theta[np.minimum(last + 1, len(theta) - 1)]
        entries = _bisect(lambda angle: 1 - self.at(angle)[0], theta[first], before)
        exits = _bisect(lambda angle: 1 - self.at(angle)[0], theta[last], after)
        return list(zip(self.at(exits)[1].tolist(), self.at(entries)[1].tolist(), strict=True))

    def at(self, theta: Array) -> tuple[Array, Array]:
        """D and x on the curve, [n] each; D is infinite where y leaves its arc."""
        gamma = self.equation.gamma
        a, b = np.sin(theta), np.cos(theta)
        A, Q = self._of_w(theta)
        level = b * A / gamma
        inside = (level > self.levels[0]) & (level < self.levels[-1])
        D, x = np.full(theta.shape, np.inf), np.full(theta.shape, np.nan)
        a, b, A, Q = a[inside], b[inside], A[inside], Q[inside]
        beta = self._y_at(level[inside])
        u, v = np.sin(beta), np.cos(beta)
        _, _, B, X = self._of_y(beta)
        with np.errstate(divide="ignore", invalid="ignore"):
            by_b = np.abs(b) > np.abs(v)
            D[inside] = np.where(by_b, b**2 * Q * X / (gamma * B**2), gamma * v**2 * Q * X / A**2)
            x[inside] = a * u * np.where(by_b, gamma * B / b, A / v)
        return D, x

    def _of_w(self, theta: Array) -> tuple[Array, Array]:
        """A and Q = E[lambda^2 / (a + b lambda)^2], [n] each."""
        lam, p = self.equation.weights.values, self.equation.weights.masses
        A, Q = np.empty(theta.shape), np.empty(theta.shape)
        for rows in _tiles(len(theta), len(lam)):
            kernel = lam / (np.sin(theta[rows, None]) + np.cos(theta[rows, None]) * lam)
            A[rows], Q[rows] = kernel @ p, kernel**2 @ p
        return A, Q

    def _of_y(self, beta: Array) -> tuple[Array, Array, Array, Array]:
        """M = int t / (t - y) dF = v B, its derivative in beta, B, and X = int t^2 / (t v - u)^2 dF, [n] each."""
        t, f = self.equation.spectrum.values, self.equation.spectrum.masses
        rate, B, X = np.empty(beta.shape), np.empty(beta.shape), np.empty(beta.shape)
        for rows in _tiles(len(beta), len(t)):
            kernel = 1 / (t * np.cos(beta[rows, None]) - np.sin(beta[rows, None]))
            B[rows], kernel = kernel @ (f * t), kernel**2
            rate[rows], X[rows] = kernel @ (f * t), kernel @ (f * t**2)
        return np.cos(beta) * B, rate, B, X

    def _y_at(self, level: Array) -> Array:
        """The angle beta on this arc at which M, which increases, is `level`: Newton's method between brackets."""
        index = np.searchsorted(self.levels, level)
        low, high = self.y_arc[index - 1], self.y_arc[index]
        beta = (low + high) / 2
        for _ in range(NEWTON_STEPS):
            value, rate, _, _ = self._of_y(beta)
            low, high = np.where(value < level, beta, low), np.where(value < level, high, beta)
            beta = beta - (value - level) / rate
            middle, half = (low + high) / 2, (high - low) / 2
            beta = np.where(np.abs(beta - middle) <= 2 * half, np.clip(beta, low, high), middle)
        return beta


# --- the distribution function ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Distribution:
    """Continuous part of the distribution function as Legendre series on panels, which its ends do not disturb.

    On each interval (a, b) of the support, x = a + (b - a) sin^2(theta / 2): the density times dx/dtheta has neither
    the square roots at the ends nor 1 / sqrt(x) at a hard edge.

    Attributes:
        intervals: [k, 2]; of `_Equation.support`, cut at 0.
        start, width: [P] first value and length of each panel in the coordinate pi * (number of the interval) + theta.
        series: [NODES + 1, P] Legendre coefficients of the mass from the panel's start.
        below: [P + 1] mass below each panel's start; `mass`: of the whole continuous part.
    """

    intervals: Array
    start: Array
    width: Array
    series: Array
    below: Array
    mass: float

    @classmethod
    def of(cls, equation: _Equation) -> _Distribution:
        """Adaptive panels; raises if the density's integral is not its known mass."""
        ends = [end for a, b in equation.support for end in ([(a, 0.0), (0.0, b)] if a < 0 < b else [(a, b)])]
        intervals = np.asarray(ends, dtype=np.float64).reshape(-1, 2)
        mass = 1.0 - equation.atom
        nodes, node_weights = legendre.leggauss(NODES)
        # Legendre coefficients from values at the nodes.
        transform = legendre.legvander(nodes, NODES - 1).T * node_weights * (np.arange(NODES)[:, None] + 0.5)
        interval = np.repeat(np.arange(len(intervals)), FIRST_PANELS)
        left = np.tile(np.arange(FIRST_PANELS) * (pi / FIRST_PANELS), len(intervals))
        width = np.full(len(left), pi / FIRST_PANELS)
        starts, widths, series = [np.empty(0)], [np.empty(0)], [np.empty((NODES + 1, 0))]
        for depth in range(MAX_DEPTH + 1):
            theta = left + width * (nodes[:, None] + 1) / 2
            a, b = intervals[interval].T
            slope = (b - a) / 2 * np.sin(theta)
            density = equation.density(_x_at(theta, a, b).ravel()).reshape(theta.shape)
            coefficients = transform @ (density * slope * (width / 2))
            rough = np.abs(coefficients[-3:]).max(axis=0, initial=0.0) > PANEL_TOLERANCE * mass
            done = ~rough | (depth == MAX_DEPTH)
            starts.append(interval[done] * pi + left[done])
            widths.append(width[done])
            series.append(legendre.legint(coefficients[:, done], lbnd=-1, axis=0))
            interval, left, width = (np.repeat(values[~done], 2) for values in (interval, left, width / 2))
            left[1::2] += width[1::2]
            if not left.size:
                break
        start, order = np.concatenate(starts), np.argsort(np.concatenate(starts))
        table = np.concatenate(series, axis=1)[:, order]
        masses = table.sum(axis=0)
        total = float(masses.sum())
        if abs(total - mass) > MASS_TOLERANCE * mass:
            raise HesscopeError(
                f"the density of the spectral law integrates to {total}, but should to {mass}: "
                "a part of the support is missing or not resolved"
            )
        if total > 0:
            table = table * (mass / total)
        below = np.concatenate(([0.0], np.cumsum(table.sum(axis=0))))
        return cls(intervals, start[order], np.concatenate(widths)[order], table, below, float(below[-1]))

    def cdf(self, x: Array) -> Array:
        """Mass of the continuous part below x, [n]."""
        if not len(self.start):
            return np.zeros(x.shape)
        index = np.searchsorted(self.intervals[:, 0], x, side="right") - 1
        interval = np.maximum(index, 0)
        a, b = self.intervals[interval].T
        theta = 2 * np.arcsin(np.sqrt(np.clip((x - a) / (b - a), 0.0, 1.0)))
        panel = np.searchsorted(self.start, interval * pi + theta, side="right") - 1
        u = np.clip(2 * (interval * pi + theta - self.start[panel]) / self.width[panel] - 1, -1.0, 1.0)
        out = np.clip(self.below[panel] + self._within(panel, u), self.below[panel], self.below[panel + 1])
        return np.where(index < 0, 0.0, np.where(x >= self.intervals[-1, 1], self.mass, out))

    def inverse(self, mass: Array) -> Array:
        """The smallest x with `mass` below it, [n]."""
        panel = np.clip(np.searchsorted(self.below, mass, side="left") - 1, 0, len(self.start) - 1)
        rest = mass - self.below[panel]
        u = _bisect(lambda u: rest - self._within(panel, u), np.full(mass.shape, -1.0), np.full(mass.shape, 1.0))
        coordinate = self.start[panel] + self.width[panel] * (u + 1) / 2
        interval = np.minimum(self.start[panel] // pi, len(self.intervals) - 1).astype(int)
        a, b = self.intervals[interval].T
        return _x_at(coordinate - interval * pi, a, b)

    def _within(self, panel: npt.NDArray[np.intp], u: Array) -> Array:
        """Mass between the start of the panel and u in [-1, 1], [n] each."""
        mass: Array = np.einsum("nk,kn->n", legendre.legvander(u, NODES), self.series[:, panel])
        return mass


def _x_at(theta: Array, a: Array, b: Array) -> Array:
    """A + (b - a) sin^2(theta / 2), accurate relative to the distance from either end."""
    x: Array = np.where(theta < pi / 2, a + (b - a) * np.sin(theta / 2) ** 2, b - (b - a) * np.cos(theta / 2) ** 2)
    return x
