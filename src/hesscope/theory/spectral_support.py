"""The support of the spectral law and its mass at zero, from the real solutions of its equation.

Outside the support e is real. The support is found from the real curve (w, y), w = 1 / (gamma e), y = z / g, on which

    E[lambda / (w + lambda)] = gamma int t / (t - y) dF(t),   z = y w E[lambda / (w + lambda)],

and whose points belong to a gap of the support where

    D = gamma E[(lambda / (w + lambda))^2] int (t / (t - y))^2 dF / E[lambda / (w + lambda)]^2 < 1.

Notation of `stieltjes_equation`; MATH.md, section 4.1.
"""

from __future__ import annotations

from math import pi

import numpy as np
import numpy.typing as npt

from hesscope.theory.atoms import Atoms
from hesscope.theory.pointwise import bisect, tiles

Array = npt.NDArray[np.float64]

# Relative difference up to which P(lambda != 0) = gamma P(t != 0), where the density diverges at 0.
CRITICAL = 1e-12
# Error of an edge at 0, in units of the largest |weight| times the largest covariance eigenvalue.
EDGE_ROUNDING = 1e-13
# Points on one arc of the real curve that are searched for gaps (general T).
ARC_POINTS = 193
ZOOMS = 2
NEWTON_STEPS = 12


def is_critical(weights: Atoms, spectrum: Atoms, gamma: float) -> bool:
    """Whether P(lambda != 0) = gamma P(t != 0) up to rounding, so that the density diverges at 0."""
    return abs(weights.mass - gamma * spectrum.mass) < CRITICAL * weights.mass


def atom_at_zero(weights: Atoms, spectrum: Atoms, gamma: float) -> float:
    """Mass of the eigenvalue 0."""
    rank = spectrum.mass if is_critical(weights, spectrum, gamma) else min(spectrum.mass, weights.mass / gamma)
    return 1.0 - rank


def support(weights: Atoms, spectrum: Atoms, gamma: float) -> tuple[tuple[float, float], ...]:
    """Intervals of the continuous part, in ascending order."""
    if not (weights.values.size and spectrum.values.size):
        return ()
    find = _gaps_one_covariance if len(spectrum.values) == 1 else _gaps
    gaps = find(weights, spectrum, gamma)
    ends = [(a, b) for a, b in gaps if a < b]
    (right, left) = next((a, b) for a, b in gaps if a > b)
    edges = [left]
    for a, b in sorted(ends):
        if b > edges[-1] and a < right:
            edges += [max(a, edges[-1]), b]
    edges.append(right)
    if is_critical(weights, spectrum, gamma):
        # Then 0 belongs to the support: an edge next to it is 0 with a rounding error.
        nearest = min(range(len(edges)), key=lambda number: abs(edges[number]))
        edges[nearest] = 0.0 if abs(edges[nearest]) < EDGE_ROUNDING else edges[nearest]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


def _arcs(values: Array, masses: Array, level: float) -> tuple[Array, Array]:
    """Arcs of the projective real line on which phi(w) = E[(a / (w + a))^2] < level, as (starts [k], ends [k]).

    Between two poles, w = -a, phi is convex: each such interval holds at most one arc. The last arc runs from right of
    all poles through infinity to left of all, so its end is smaller than its start.
    """
    poles, c = -values[::-1], (masses * values**2)[::-1]

    def phi(w: Array, power: int = 2) -> Array:
        out = np.empty(w.shape)
        for rows in tiles(len(w), len(poles)):
            with np.errstate(divide="ignore"):
                out[rows] = (1 / (w[rows, None] - poles)) ** power @ c
        return out

    # The two nearest poles alone bound phi from below, and most intervals away.
    width = np.diff(poles)
    kept = np.flatnonzero((np.cbrt(c[:-1]) + np.cbrt(c[1:])) ** 3 < level * width**2)
    left, right = poles[kept], poles[kept + 1]
    lowest = bisect(lambda w: phi(w, 3), left, right)
    deep = phi(lowest) < level
    left, lowest, right = left[deep], lowest[deep], right[deep]
    reach = np.asarray([(float(c.sum()) / level) ** 0.5])
    first, last = poles[:1], poles[-1:]
    starts = bisect(lambda w: phi(w) - level, np.concatenate((left, last)), np.concatenate((lowest, last + reach)))
    ends = bisect(lambda w: level - phi(w), np.concatenate((lowest, first - reach)), np.concatenate((right, first)))
    return starts, ends


def _gaps_one_covariance(weights: Atoms, spectrum: Atoms, gamma: float) -> list[tuple[float, float]]:
    """Gaps (a, b) of the support if all non-zero t are equal (to 1); the one through infinity has a > b.

    Then y = 1 - gamma mass(t) / E[lambda / (w + lambda)] is explicit, and D = phi(w) / (gamma mass(t)).
    """
    values, masses = weights.values, weights.masses
    level = gamma * spectrum.mass
    starts, ends = _arcs(values, masses, level)

    def x(w: float) -> float:
        return w * (float(masses @ (values / (w + values))) - level)

    return [(x(end), x(start)) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _gaps(weights: Atoms, spectrum: Atoms, gamma: float) -> list[tuple[float, float]]:
    """Gaps (a, b) of the support for several different t; the one through infinity has a > b.

    By Jensen's inequality D < 1 needs phi(w) < gamma and int (t / (t - y))^2 dF < 1 / gamma: it is enough to search the
    products of an arc in w and an arc in y, on each of which the curve is the graph of a function y of w.
    """
    w_arcs = _angles(*_arcs(weights.values, weights.masses, gamma))
    y_arcs = _angles(*_arcs(-spectrum.values[::-1], spectrum.masses[::-1], 1 / gamma))
    sheets = (_Sheet(weights, spectrum, gamma, w_arc, y_arc) for w_arc in w_arcs for y_arc in y_arcs)
    return [gap for sheet in sheets for gap in sheet.gaps()]


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

    def __init__(self, weights: Atoms, spectrum: Atoms, gamma: float, w_arc: Array, y_arc: Array) -> None:
        self.weights, self.spectrum, self.gamma = weights, spectrum, gamma
        self.y_arc, self.levels = y_arc, self._of_y(y_arc)[0]
        # Where the curve enters, crosses and leaves the arc of y, however short the way.
        left = np.cos(w_arc) * self._of_w(w_arc)[0]
        targets = gamma * self.levels[:: len(y_arc) // 16]
        step, target = np.nonzero((left[:-1, None] > targets) != (left[1:, None] > targets))
        sign = np.where(left[step] > targets[target], 1.0, -1.0)
        crossings = bisect(
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
        entries = bisect(lambda angle: 1 - self.at(angle)[0], theta[first], before)
        exits = bisect(lambda angle: 1 - self.at(angle)[0], theta[last], after)
        return list(zip(self.at(exits)[1].tolist(), self.at(entries)[1].tolist(), strict=True))

    def at(self, theta: Array) -> tuple[Array, Array]:
        """D and x on the curve, [n] each; D is infinite where y leaves its arc."""
        gamma = self.gamma
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
        lam, p = self.weights.values, self.weights.masses
        A, Q = np.empty(theta.shape), np.empty(theta.shape)
        for rows in tiles(len(theta), len(lam)):
            kernel = lam / (np.sin(theta[rows, None]) + np.cos(theta[rows, None]) * lam)
            A[rows], Q[rows] = kernel @ p, kernel**2 @ p
        return A, Q

    def _of_y(self, beta: Array) -> tuple[Array, Array, Array, Array]:
        """M = int t / (t - y) dF = v B, its derivative in beta, B, and X = int t^2 / (t v - u)^2 dF, [n] each."""
        t, f = self.spectrum.values, self.spectrum.masses
        rate, B, X = np.empty(beta.shape), np.empty(beta.shape), np.empty(beta.shape)
        for rows in tiles(len(beta), len(t)):
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
