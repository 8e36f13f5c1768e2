"""Checks of arguments that are real numbers; each raises InputError naming the argument, and what is accepted."""

from __future__ import annotations

from math import inf
from numbers import Real

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError

Array = npt.NDArray[np.float64]


def reals(argument: str, values: object) -> Array:
    """A float64 copy of any shape without nan."""
    try:
        array = np.array(values)
        if np.iscomplexobj(array):
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{argument} must be real numbers, got {type(values).__name__}") from None
    if np.isnan(array).any():
        raise InputError(f"{argument} must not contain nan")
    return array


def finite(argument: str, values: object) -> Array:
    """A float64 copy of any shape, all finite."""
    array = reals(argument, values)
    if not np.isfinite(array).all():
        raise InputError(f"{argument} must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def require_positive(argument: str, value: object) -> None:
    """Raise unless `value` is a positive, finite number."""
    if not (isinstance(value, Real) and 0 < float(value) < inf):
        raise InputError(f"{argument} must be a positive, finite number, got {value!r}")
