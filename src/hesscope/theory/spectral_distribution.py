"""The distribution function of the spectral law, and its inverse, from the density on panels."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import numpy as np
import numpy.typing as npt
from numpy.polynomial import legendre

from hesscope.core.errors import HesscopeError
from hesscope.theory.pointwise import bisect
from hesscope.theory.stieltjes_equation import StieltjesEquation

Array = npt.NDArray[np.float64]

# Legendre nodes of a panel, first panels of an interval, and the mass that the last coefficients of a panel may carry.
NODES = 16
FIRST_PANELS = 4
PANEL_TOLERANCE = 1e-9
MAX_DEPTH = 45
# The integral of the density must be its known mass up to this.
MASS_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class SpectralDistribution:
    """Continuous part of the distribution function as Legendre series on panels, which its ends do not disturb.

    On each interval (a, b) of the support, x = a + (b - a) sin^2(theta / 2): the density times dx/dtheta has neither
    the square roots at the ends nor 1 / sqrt(x) at a hard edge.

    Attributes:
        intervals: [k, 2]; of `StieltjesEquation.support`, cut at 0.
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
    def of(cls, equation: StieltjesEquation) -> SpectralDistribution:
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
        u = bisect(lambda u: rest - self._within(panel, u), np.full(mass.shape, -1.0), np.full(mass.shape, 1.0))
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
