"""Nodes and weights of quadratures, one per probe: put together, made few, and their quantiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
# Nodes, ascending, and weights of one probe.
Quadrature = tuple[Array, Array]

# Exact eigenvalues are smoothed like a quadrature of so many nodes.
EXACT_NODES = 30


def used(nodes: Array, weights: Array) -> list[Quadrature]:
    """Nodes and weights of every probe, [probes, steps] both, without those of weight zero at a row's end."""
    return [(row[shares > 0], shares[shares > 0]) for row, shares in zip(nodes, weights, strict=True)]


def merged(nodes: Array, weights: Array, rounding: float) -> list[Quadrature]:
    """The same, sorted, with nodes that differ by no more than `rounding` put together."""
    result = []
    for row, shares in used(nodes, weights):
        order = np.argsort(row)
        row, shares = row[order], shares[order]
        starts = np.flatnonzero(np.diff(row, prepend=-np.inf) > rounding)
        together = np.add.reduceat(shares, starts)
        result.append((np.add.reduceat(row * shares, starts) / together, together))
    return result


def few_quantiles(values: Array, rounding: float) -> Quadrature:
    """EXACT_NODES quantiles of the values, each once but for `rounding`, with how often they come as weights."""
    count = min(EXACT_NODES, len(values))
    ranks = ((np.arange(count) + 0.5) / count * len(values)).astype(np.int64)
    chosen = np.sort(values)[ranks]
    # Equal eigenvalues come out apart by their rounding, which is no gap between them.
    ((nodes, weights),) = merged(chosen[None], np.full((1, count), 1 / count), rounding)
    return nodes, weights


def weighted_quantile(values: Array, weights: Array, level: float) -> float:
    """The smallest value with at least `level` of the weight at or below it."""
    order = np.argsort(values)
    # Sums of many equal weights fall short of round levels by rounding.
    below = np.cumsum(weights[order]) * (1 + 1e-12)
    return float(values[order][min(int(np.searchsorted(below, level * weights.sum())), len(values) - 1)])


def standard_error(samples: Array, exact: bool) -> Array:
    """Standard error [...] of the mean of samples [probes, ...]; 0 if exact, nan of a single probe."""
    if exact:
        return np.zeros(samples.shape[1:])
    if len(samples) < 2:
        return np.full(samples.shape[1:], np.nan)
    result: Array = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    return result
