"""How many probes each block column gets, and how many of its directions are taken exactly: the fewest products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

BISECTIONS = 50


@dataclass(frozen=True)
class Plan:
    """For each of B columns the choice [B] among its forms, and the number [B] of samples (not rounded, maybe inf)."""

    choice: Integers
    counts: Array


def planned(fixed: Array, variance: Array, least: Array, allowed: float) -> Plan:
    """The fewest products with which the variances of the columns' means add up to no more than `allowed`.

    A column in form f costs fixed_f products and one for each sample; n samples have a variance of variance_f / n. For
    a multiplier m the best form has the least fixed + n + m variance / n, with n = sqrt(m variance) (Neyman's
    allocation, Journal of the Royal Statistical Society 97, 1934) or the least number, if that is larger; m is found by
    bisection. It is exact up to the jumps between forms.

    Args:
        fixed: [B, F] products before the first sample; infinite for a form that there is not.
        variance: [B, F] of a sample, as far as it matters to what is tolerated.
        least: [B, F] least number of samples (0 for a form that is exact).
        allowed: the tolerated variance; every variance 0 is tolerated by 0.
    """
    roots = np.sqrt(variance)

    def at(root: float) -> tuple[Integers, Array, float]:
        counts = np.maximum(least, root * roots)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.where(variance > 0, variance / counts, 0.0)
            cost = fixed + counts + np.where(means > 0, root * root * means, 0.0)
        choice = np.nan_to_num(cost, nan=np.inf).argmin(axis=1)
        rows = np.arange(len(choice))
        return choice, counts[rows, choice], float(means[rows, choice].sum())

    choice, counts, reached = at(0.0)
    if reached <= allowed:
        return Plan(choice, counts)
    if not allowed > 0:
        return Plan(choice, np.where(variance[np.arange(len(choice)), choice] > 0, np.inf, counts))
    # At the upper end even the worst forms, sampled in proportion to their deviations, would do.
    finite = np.where(np.isfinite(fixed), roots, 0.0)
    low, high = 0.0, float(finite.max(axis=1).sum()) / allowed
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        choice, counts, reached = at(middle)
        low, high = (low, middle) if reached <= allowed else (middle, high)
    choice, counts, _ = at(high)
    return Plan(choice, counts)


def within_budget(counts: Array, least: Array, budget: int) -> Integers:
    """Whole numbers of samples [B], scaled down evenly to add up to at most `budget`, but no less than `least`.

    `counts` may be infinite: those share what is left.
    """
    endless = np.isinf(counts)
    if endless.any():
        counts = np.where(endless, float(budget), np.minimum(counts, budget))
    wanted = np.ceil(np.maximum(counts, least))
    if wanted.sum() <= budget:
        return wanted.astype(np.int64)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = np.floor(np.maximum(middle * counts, least)).sum() <= budget
        low, high = (middle, high) if fits else (low, middle)
    return np.floor(np.maximum(low * counts, least)).astype(np.int64)
