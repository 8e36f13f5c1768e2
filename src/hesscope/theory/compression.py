"""Few atoms in place of very many, such that the solutions of the spectral law's equation do not notice.

The equation knows the law of the weights only through E[lambda / (w + lambda)], and its solutions obey

    E[lambda^2 / |w + lambda|^2] <= level,   level = gamma,

by the imaginary part of the equation and the inequality of Cauchy and Schwarz; the eigenvalues t of the covariance obey
the same with the poles at y = z / g in place of -w, and level = 1 / gamma. So a pole keeps a distance delta from every
place where there are atoms: if those on an interval have the second moment S, and its farther end is r away from that
place, then S / (delta + r)^2 <= level. A bin of width h and mass m, |lambda| <= b, may therefore be replaced by the two
nodes of its Gauss quadrature, which keep its moments up to the third, with an error in E[lambda / (w + lambda)] of at
most m (h / delta)^4 (1 + b / delta) / 64. Bins are cut in halves until that is small; the bound is far from sharp.

Source: Gauss quadrature and its error as in Davis, Rabinowitz 1984; the distance and the bound are derived here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hesscope.theory.atoms import Atoms

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

# More atoms than MANY are replaced by at least FEW.
MANY = 4096
FEW = 2000
# Largest bound on the error of one bin, and the factor by which it shrinks while there are fewer atoms than FEW.
TOLERANCE = 1e-5
TIGHTER = 1 / 16
# A bin keeps this many atoms as they are: its quadrature would have as many.
PAIR = 2
# Widths r that are tried for the distance of poles, in units of the bin's own |lambda| and of the largest.
OWN_REACHES = 2.0 ** np.arange(-10, 1)
REACHES = 2.0 ** np.arange(-20, 1)


def few_atoms(atoms: Atoms, level: float) -> Atoms:
    """The atoms themselves if they are at most MANY; otherwise fewer, with the same mass and first three moments.

    The smallest and the largest atom stay, and positive and negative ones are never merged.

    Args:
        atoms: of the weights or of the covariance's eigenvalues.
        level: gamma for the weights, 1 / gamma for the covariance.
    """
    if len(atoms.values) <= MANY:
        return atoms
    values, masses = _quadrature(atoms.values, atoms.masses, _bins(atoms.values, atoms.masses, level))
    return Atoms(values, masses, atoms.scale)


def _bins(values: Array, masses: Array, level: float) -> Indices:
    """First index of every bin, [n]."""
    size = len(values)
    negative = int(np.searchsorted(values, 0.0))
    start = np.unique([0, 1, negative % size, size - 1]).astype(np.intp)
    stop = np.append(start[1:], size)
    cumulated = np.stack([_cumulated(masses * values**k, negative) for k in (0, 2)])
    error = _error(values, cumulated, start, stop, level)
    tolerance = TOLERANCE
    while True:
        rough = (error > tolerance) & (stop - start > PAIR)
        if rough.any():
            left, right = start[rough], stop[rough]
            middle = _middle(values, left, right)
            new_start, new_stop = np.concatenate((left, middle)), np.concatenate((middle, right))
            new_error = _error(values, cumulated, new_start, new_stop, level)
            start = np.concatenate((start[~rough], new_start))
            stop = np.concatenate((stop[~rough], new_stop))
            error = np.concatenate((error[~rough], new_error))
        elif np.minimum(stop - start, PAIR).sum() < FEW and error.max() > 0:
            tolerance *= TIGHTER
        else:
            return np.sort(start)


def _cumulated(parts: Array, origin: int) -> Array:
    """Sums [n + 1] of the parts from `origin` on, such that differences next to it are not lost in the others."""
    return np.concatenate((-np.cumsum(parts[:origin][::-1])[::-1], [0.0], np.cumsum(parts[origin:])))


def _middle(values: Array, start: Indices, stop: Indices) -> Indices:
    """Where to cut bins of at least two atoms, none of which has atoms of either sign."""
    a, b = values[start], values[stop - 1]
    near, far = np.minimum(np.abs(a), np.abs(b)), np.maximum(np.abs(a), np.abs(b))
    # Over orders of magnitude, halves of the logarithm.
    middle = np.where(far > 4 * near, np.sign(b) * np.sqrt(near) * np.sqrt(far), a + (b - a) / 2)
    return np.clip(np.searchsorted(values, middle, side="right"), start + 1, stop - 1)


def _error(values: Array, cumulated: Array, start: Indices, stop: Indices, level: float) -> Array:
    """Bound on the error that each bin makes in E[lambda / (w + lambda)], for all w that the equation can have."""
    a, b = values[start], values[stop - 1]
    width, far = b - a, np.maximum(np.abs(a), np.abs(b))
    distance = np.zeros(len(start))
    for reach in (np.zeros(len(far)), *(r * far for r in OWN_REACHES), *(np.full(len(far), r) for r in REACHES)):
        low = np.searchsorted(values, a - reach, side="left")
        high = np.searchsorted(values, b + reach, side="right")
        second = np.maximum(cumulated[1, high] - cumulated[1, low], 0.0)
        distance = np.maximum(distance, np.sqrt(second / level) - width - reach)
    out = np.full(len(start), np.inf)
    mass = cumulated[0, stop] - cumulated[0, start]
    np.divide(width, distance, out=out, where=distance > 0)
    ratio = np.divide(far, distance, out=np.full(len(start), np.inf), where=distance > 0)
    return np.asarray(mass * out**4 * (1 + ratio) / 64)


def _quadrature(values: Array, masses: Array, start: Indices) -> tuple[Array, Array]:
    """Nodes and masses: of each bin's Gauss quadrature, or its atoms where they are at most PAIR."""
    count = np.diff(np.append(start, len(values)))
    bin_of = np.repeat(np.arange(len(start)), count)
    merged = count > PAIR
    kept = ~merged[bin_of]
    if not merged.any():
        return values, masses

    # Moments around the mean, in units of the bin's width.
    v, p, index = values[~kept], masses[~kept], np.repeat(np.arange(int(merged.sum())), count[merged])
    first = np.concatenate(([0], np.cumsum(count[merged])[:-1]))
    mass = np.add.reduceat(p, first)
    last = first + count[merged] - 1
    width = v[last] - v[first]
    u = (v - v[first][index]) / width[index]
    mean = np.add.reduceat(p * u, first) / mass
    u -= mean[index]
    second = np.add.reduceat(p * u**2, first) / mass
    skew = np.add.reduceat(p * u**3, first) / (mass * second)
    root = np.sqrt(skew**2 / 4 + second)
    above, below = skew / 2 + root, skew / 2 - root
    share = -below / (above - below)
    nodes = [v[first] + width * (mean + node) for node in (below, above)]

    out = np.concatenate((values[kept], *nodes))
    order = np.argsort(out)
    return out[order], np.concatenate((masses[kept], mass * (1 - share), mass * share))[order]
