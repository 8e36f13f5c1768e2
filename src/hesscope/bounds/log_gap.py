"""x - ln(1 + x), what a logarithm lacks to its tangent: every Kullback-Leibler divergence here is a sum of these.

The divergence of two near distributions is of second order in their difference, while its usual terms are of first
order and cancel. In x - ln(1 + x) >= 0 nothing is left to cancel, if it is itself computed without a difference.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Beyond this |x| the plain difference loses no more than three bits.
SMALL = 0.5
# Enough for |x| <= SMALL, where r^2 <= 1/9: the first term that is left out is below 1e-18 of the sum.
TERMS = 18


def log_gap(x: Array, plain: Array) -> Array:
    """The gap x - ln(1 + x), elementwise; relative error of a few units in the last place.

    With r = x / (2 + x), ln(1 + x) = 2 artanh(r) and x - 2 r = x r, so that the gap is
    r (x - 2 r^2 (1/3 + r^2/5 + ...)). Next to nothing cancels there: the second term is below a sixth of the first for
    |x| <= 1/2.

    Args:
        x: above -1; plain: the same by its definition, which is taken for |x| > 1/2. The caller may know the logarithm
            better than 1 + x does.
    """
    return np.where(np.abs(x) <= SMALL, _series(np.clip(x, -SMALL, SMALL)), plain)


def gap_of_mass(mass: Array, changed: Array, change: Array) -> Array:
    """What a mass adds to the Bernoulli kl when it changes: change - mass ln(changed / mass), elementwise.

    Args:
        mass: >= 0. A mass of 0 adds `change`; one that is lost adds infinity.
        changed, change: mass + change, and change. Both, because near 0 or near each other one is not known from the
            other without loss.
    """
    positive = np.where(mass > 0, mass, 1.0)
    with np.errstate(divide="ignore", over="ignore"):
        # A quotient that overflows has a mass below 1e-308, which adds nothing.
        ratio = np.minimum(np.where(mass > 0, changed / positive, 1.0), np.finfo(np.float64).max)
        x = np.clip(change / positive, -SMALL, SMALL)
        near = np.abs(change) <= SMALL * mass
        return np.where(near, mass * _series(x), change - np.where(mass > 0, mass * np.log(ratio), 0.0))


def _series(x: Array) -> Array:
    """The gap for |x| <= SMALL."""
    r = x / (2 + x)
    square = r * r
    total = np.zeros_like(r)
    for term in range(TERMS, 0, -1):
        total = total * square + 1 / (2 * term + 1)
    return r * (x - 2 * square * total)
