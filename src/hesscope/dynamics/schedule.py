"""Which steps of a training run are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError


@dataclass(frozen=True)
class Adaptive:
    """Measure whenever the parameters have moved by `change` times their norm since the last step that was due.

    Often at the beginning, when everything moves, and seldom once it has settled, whatever the number of steps. Takes
    one pass over the parameters a step, and a copy of them.
    """

    change: float = 0.1

    def __post_init__(self) -> None:
        if not (isinstance(self.change, int | float) and self.change > 0):
            raise InputError(f"change must be positive, got {self.change!r}")


# Listed steps, every so many steps, or by movement.
Schedule: TypeAlias = Sequence[int] | int | Adaptive


def log_spaced(last: int, count: int = 20) -> tuple[int, ...]:
    """Steps 0 to `last`, at most `count` of them, about evenly spaced in the logarithm of step + 1.

    Raises:
        InputError: `last` is no positive integer, or fewer than two steps.
    """
    require_positive_int("last", last)
    require_positive_int("count", count)
    if count < 2:
        raise InputError("count must be at least 2: the first and the last step")
    wanted = np.rint(np.geomspace(1, last + 1, min(count, last + 1))).astype(np.int64) - 1
    for number in range(1, len(wanted)):  # the first steps are nearer to each other than 1: one after the other
        wanted[number] = max(wanted[number], wanted[number - 1] + 1)
    return tuple(int(step) for step in np.minimum(wanted, last))


def checked_schedule(at: Any) -> Schedule:
    """The schedule, listed steps as a tuple.

    Raises:
        InputError: not a schedule, or listed steps that do not increase.
    """
    if isinstance(at, Adaptive):
        return at
    if isinstance(at, Integral):
        require_positive_int("at", at)
        return int(at)
    if not isinstance(at, tuple | list | range | np.ndarray):
        raise InputError(f"at must be a list of steps, a number of steps between two, or Adaptive(), got {at!r}")
    steps = list(at)
    if not steps:
        raise InputError("at lists no step")
    for step in steps:
        require_step("each step of at", step)
    for early, late in pairwise(steps):
        if late <= early:
            raise InputError(f"the steps of at must increase, but {late} comes after {early}")
    return tuple(int(step) for step in steps)


def require_step(argument: str, step: object) -> None:
    """Raise InputError unless `step` is an integer of at least 0."""
    if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
        raise InputError(f"{argument} must be an integer of at least 0, the number of updates done, got {step!r}")
