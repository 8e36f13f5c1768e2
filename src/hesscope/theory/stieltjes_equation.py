"""The equation of the spectral law, and its solution at points of the upper half plane and of the support.

With f the law of lambda and F that of the eigenvalues t of T, the Stieltjes transform s(z) = int dmu(x) / (x - z) is

    e = int t / (t g(e) - z) dF(t),   g(e) = E[lambda / (1 + gamma lambda e)],   s = int 1 / (t g(e) - z) dF(t),

where e is the only solution in the upper half plane (Marchenko, Pastur 1967 for T = I, where e = s; Paul, Silverstein
2009; [D], arXiv:2505.02809, for weights of either sign; MATH.md, section 4.1). The right-hand side of the first
equation maps the upper half plane into itself, for real z, too; so by the lemma of Schwarz and Pick it has at most one
fixed point there, and whichever way a root with Im e > 0 was found, it is the right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import pi

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import HesscopeError
from hesscope.theory.atoms import Atoms
from hesscope.theory.pointwise import tiles
from hesscope.theory.spectral_support import atom_at_zero, is_critical, support

Array = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]

EPS = float(np.finfo(np.float64).eps)
# Newton steps of one point on its way down to the real axis: 20 to 40 in the bulk, 100 at 1e-14 from an edge.
MAX_STEPS = 2000
# Relative accuracy at which a Newton step is rounding error and no sign of a lost path.
ROUNDING = 1e-13


@dataclass(frozen=True, eq=False)
class StieltjesEquation:
    """The equation of e for weights and covariance whose largest magnitudes are 1 (or which are all zero)."""

    weights: Atoms
    spectrum: Atoms
    gamma: float

    @cached_property
    def critical(self) -> bool:
        """Whether the density diverges at 0."""
        return is_critical(self.weights, self.spectrum, self.gamma)

    @cached_property
    def atom(self) -> float:
        """Mass of the eigenvalue 0."""
        return atom_at_zero(self.weights, self.spectrum, self.gamma)

    @cached_property
    def support(self) -> tuple[tuple[float, float], ...]:
        """Intervals of the continuous part."""
        return support(self.weights, self.spectrum, self.gamma)

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
        for rows in tiles(len(z), max(len(self.weights.values), len(self.spectrum.values))):
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
        for rows in tiles(len(z), max(len(self.weights.values), len(t))):
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
