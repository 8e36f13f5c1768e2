"""Candidate prior variances, fixed before the data, among which the data may choose at the price of a union bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.real_numbers import finite, require_positive


@dataclass(frozen=True)
class VarianceGrid:
    """Variances that were fixed without the data.

    Attributes:
        values: positive and ascending, [K], K >= 1.

    Raises:
        InputError: no value, or values that are not positive, finite and ascending.
    """

    values: Sequence[float]

    def __post_init__(self) -> None:
        array = finite("values", self.values)
        if array.ndim != 1 or not array.size:
            raise InputError(f"values must be a non-empty one-dimensional sequence, got shape {array.shape}")
        if array[0] <= 0 or (np.diff(array) <= 0).any():
            raise InputError("values must be positive, ascending and distinct")
        object.__setattr__(self, "values", tuple(array.tolist()))

    @classmethod
    def geometric(cls, low: float, high: float, number: int) -> VarianceGrid:
        """`number` >= 2 variances from `low` to `high`, each the same multiple of the one before.

        Raises:
            InputError: ends that are not positive and ascending, or fewer than 2 variances.
        """
        require_positive("low", low)
        require_positive("high", high)
        require_positive_int("number", number)
        if not low < high or number < 2:
            raise InputError(
                f"a geometric grid needs low < high and a number of at least 2, got {low!r}, {high!r} and {number!r}"
            )
        return cls(np.geomspace(low, high, number).tolist())

    def __len__(self) -> int:
        """K."""
        return len(self.values)

    def cost(self, groups: int) -> float:
        """Cost groups * ln K, in nats, of the union bound over K^groups priors: one variance for each group.

        It is added to the divergence: a bound that holds for each prior with delta / K^groups holds for all with delta.

        Raises:
            InputError: groups below 1.
        """
        require_positive_int("groups", groups)
        return groups * log(len(self))

    def nearest(self, value: float) -> int:
        """Index of the variance with the smallest |ln(variance / value)|; the first of two that are equally near.

        Raises:
            InputError: a value that is not positive and finite.
        """
        require_positive("value", value)
        return int(np.argmin(np.abs(np.log(np.asarray(self.values)) - log(value))))


# From weights that are all but fixed to weights that are lost in noise, one per cent apart ([DR]'s spacing): 7.7 nats a
# group. The best variance is at most half a per cent from one of them, which adds at most 6e-6 nats a parameter.
DEFAULT_GRID = VarianceGrid.geometric(1e-8, 1e2, 2315)
