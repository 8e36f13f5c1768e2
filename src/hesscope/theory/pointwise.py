"""Arithmetic at many points at once: tables of points and atoms cut to the size of the cache, and bisection."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Entries of a temporary table (points x atoms): it should fit in the cache.
TILE = 1 << 14
BISECTIONS = 64


def tiles(points: int, atoms: int) -> Iterator[slice]:
    """Slices of the points, such that a table of one slice and all atoms has about TILE entries."""
    size = max(1, TILE // atoms)
    return (slice(start, start + size) for start in range(0, points, size))


def bisect(function: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Roots [n] of a function that is positive at `low` and not at `high`: the last points where it is positive."""
    for _ in range(BISECTIONS):
        middle = low + (high - low) / 2
        positive = function(middle) > 0
        low, high = np.where(positive, middle, low), np.where(positive, high, middle)
    return low
