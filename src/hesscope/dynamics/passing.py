"""When a quantity passes a threshold along training, and when it does so to stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
NEVER = -1


@dataclass(frozen=True, eq=False)
class Passing:
    """Steps at which numbers reach a threshold; arrays of one shape, with -1 for "never".

    Attributes:
        first: the first step at which the number is at least the threshold; first_after: the step measured before it.
        stays: the first step from which on it is, until the end; stays_after: the step measured before that one.
            It is -1 where the threshold was reached at the first step already.
    """

    first: Integers
    first_after: Integers
    stays: Integers
    stays_after: Integers


def passing(steps: Integers, values: Array, threshold: float) -> Passing:
    """Find these steps of numbers `values` [S, ...] at `steps` [S]; nan counts as not reached."""
    reached = values >= threshold
    # Reached here and at all later steps.
    lasting = np.logical_and.accumulate(reached[::-1], axis=0)[::-1]
    first, first_after = _first(steps, reached)
    stays, stays_after = _first(steps, lasting)
    return Passing(first, first_after, stays, stays_after)


def _first(steps: Integers, true: npt.NDArray[np.bool_]) -> tuple[Integers, Integers]:
    """First step at which each column is true, and the step before."""
    position = true.argmax(axis=0)
    before = np.where(position > 0, steps[np.maximum(position - 1, 0)], NEVER)
    return np.where(true.any(axis=0), steps[position], NEVER), before
