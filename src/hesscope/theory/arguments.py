"""Checks of arguments that are vectors, for the spectral law and what is estimated for it."""

from __future__ import annotations

from hesscope.core.errors import InputError
from hesscope.core.real_numbers import Array, finite


def vector(argument: str, values: object) -> Array:
    """A read-only float64 copy [n], n >= 1, all finite."""
    array = finite(argument, values)
    if array.ndim != 1 or not array.size:
        raise InputError(f"{argument} must be a non-empty one-dimensional array, got shape {array.shape}")
    array.flags.writeable = False
    return array
