"""Checks of arguments that are real numbers, for the spectral law and what is estimated for it."""

from __future__ import annotations

from math import inf
from numbers import Real

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError

Array = npt.NDArray[np.float64]


def require_gamma(gamma: object) -> None:
    """Raise unless gamma is a positive, finite number."""
    if not (isinstance(gamma, Real) and 0 < float(gamma) < inf):
        raise InputError(f"gamma must be a positive, finite number, got {gamma!r}")


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


def vector(argument: str, values: object) -> Array:
    """A read-only float64 copy [n], n >= 1, all finite."""
    array = reals(argument, values)
    if array.ndim != 1 or not array.size:
        raise InputError(f"{argument} must be a non-empty one-dimensional array, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{argument} must be finite, got {array[~np.isfinite(array)][0]}")
    array.flags.writeable = False
    return array
