"""Intervals for means over few probes of densities and distribution functions, which are skewed.

Student intervals of the inverse cube root, since what one probe sees of few eigenvalues is chi-square, whose mean they
cover in 92 to 96 % of all cases at level 95 % (1 to 100 degrees of freedom, 3 to 32 probes), those of the mean itself
in 82 % at worst. With two or three probes an upper end may be infinite.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hesscope.estimate.energies import Interval

Array = npt.NDArray[np.float64]


def positive_interval(mean: Array, stderr: Array, quantile: float) -> Interval:
    """Interval for positive numbers: Student's of their inverse cube root, with its `quantile`."""
    return _positive(mean, np.divide(stderr, mean, out=np.zeros_like(mean), where=mean > 0), quantile)


def share_interval(mean: Array, stderr: Array, quantile: float) -> Interval:
    """Interval for shares, of the odds of the rarer side: near either end it is few eigenvalues that count."""
    rarer = np.clip(np.minimum(mean, 1 - mean), 0.0, None)
    known = rarer * (1 - rarer)
    relative = np.divide(stderr, known, out=np.zeros_like(mean), where=known > 0)
    odds = _positive(rarer / (1 - rarer), relative, quantile)
    lower, upper = (1 - 1 / (1 + end) for end in (odds.lower, odds.upper))
    return Interval(np.where(mean <= 0.5, lower, 1 - upper), np.where(mean <= 0.5, upper, 1 - lower))


def _positive(mean: Array, relative: Array, quantile: float) -> Interval:
    """Student interval of the inverse cube root of positive numbers with `relative` standard errors."""
    shift = quantile * relative / 3
    growth = np.full_like(mean, np.inf)
    np.power(1 - shift, -3.0, out=growth, where=shift < 1)
    upper = np.multiply(mean, growth, out=np.zeros_like(mean), where=mean > 0)
    return Interval(mean * (1 + shift) ** -3.0, upper)
