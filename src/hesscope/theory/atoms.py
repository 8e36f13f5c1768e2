"""Laws of finitely many values, as the spectral law's equation wants them: distinct, ascending, non-zero, scaled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError

Array = npt.NDArray[np.float64]

# Probabilities sum to 1 up to this (float32 inputs).
SUM_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Atoms:
    """Different non-zero values, ascending, divided by the largest magnitude (`scale`), and their masses."""

    values: Array
    masses: Array
    scale: float

    @cached_property
    def mass(self) -> float:
        """Probability of not being zero."""
        return min(float(self.masses.sum()), 1.0)


def distinct_atoms(values: Array, masses: Array | None, argument: str, masses_argument: str) -> Atoms:
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
    return Atoms(distinct / scale, np.bincount(index, masses[kept], len(distinct)) / masses.sum(), scale)
