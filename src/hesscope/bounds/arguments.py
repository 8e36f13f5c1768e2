"""Checks of the numbers that bounds are made of; each raises InputError naming the argument, and what is accepted."""

from __future__ import annotations

from numbers import Real

from hesscope.core.errors import InputError
from hesscope.core.real_numbers import Array, reals


def probabilities(argument: str, values: object) -> Array:
    """A float64 copy of any shape, all in [0, 1]."""
    array = reals(argument, values)
    outside = (array < 0) | (array > 1)
    if outside.any():
        raise InputError(f"{argument} must be in [0, 1], got {array[outside][0]}")
    return array


def require_risk(argument: str, value: object) -> None:
    """Raise unless `value` is a number in [0, 1]: a mean of losses that are in [0, 1]."""
    if not (isinstance(value, Real) and 0 <= float(value) <= 1):
        raise InputError(f"{argument} must be a number in [0, 1], got {value!r}")


def require_delta(argument: str, value: object) -> None:
    """Raise unless `value` is a number in (0, 1): the probability with which a bound may fail."""
    if not (isinstance(value, Real) and 0 < float(value) < 1):
        raise InputError(f"{argument} must be a number in (0, 1), got {value!r}")


def require_nats(argument: str, value: object) -> None:
    """Raise unless `value` is a number of at least 0; infinite is allowed."""
    if not (isinstance(value, Real) and float(value) >= 0):
        raise InputError(f"{argument} must be a number of at least 0, got {value!r}")
