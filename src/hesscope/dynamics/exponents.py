"""Exponents of power laws along training, with intervals for points that are neither independent nor of one scatter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.estimate.exponent import CONFIDENCE, ExponentFit

Array = npt.NDArray[np.float64]

# One run is cut into so many segments. In simulations fewer made intervals needlessly wide, and more let neighbours
# that go together pass for independent.
SEGMENTS = 5
# Points that a segment, or one of several runs, needs.
FEWEST = 2


@dataclass(frozen=True)
class PowerLaw(ExponentFit):
    """A fitted exponent b of y = k x^b along training.

    Attributes:
        exponent, low, high: b and its 95 % interval; nan where there are too few points.
        used, left_out: points with both numbers positive and finite, and the others.
    """

    used: int
    left_out: int


def fit_power_law(x: Sequence[npt.ArrayLike], y: Sequence[npt.ArrayLike]) -> PowerLaw:
    """Least-squares slope of log y over log x, points of one run in the order of training, every run with its own k.

    Neighbouring points of a run deviate from a power law together, and not all by the same amount, so they are not left
    out singly: the standard error is the jackknife's, leaving out one of 5 contiguous segments of a run at a time, or
    one of several runs. Student's interval has the degrees of freedom that this standard error would have for
    independent deviations (Bell and McCaffrey, Survey Methodology 28, 2002): at most 4 for five segments, mostly about
    2, since those at the ends carry most of the slope; one less than the runs for runs of equal spread.

    Of one run's intervals 91 to 99 % covered the exponent in simulations (12 to 40 points, evenly spread or most of
    them at the ends, deviations that grow threefold along the run and have a correlation time of up to a tenth of it;
    of intervals for independent points 26 to 90 % did). Where deviations last for a fifth of the run it is 71 to 97 %:
    such a deviation is a trend of its own, which nothing in one run can tell from the exponent. Only runs with other
    seeds can; their intervals, of 3 to 8 runs, covered it in 95 to 96 %, and say how it varies from run to run.

    Args:
        x, y: one array [S] for each run; points where either is not positive and finite are left out and counted.

    Returns:
        nan for fewer than 10 points of a single run, 2 of one of several, or all at one x.

    Raises:
        InputError: no run, or x and y of different shapes.
    """
    from scipy.special import stdtrit

    if not x or len(x) != len(y):
        raise InputError(f"x and y must have one array for each run, got {len(x)} and {len(y)}")
    points = [_usable(number, *pair) for number, pair in enumerate(zip(x, y, strict=True))]
    planned = sum(np.size(each) for each in x)
    run = np.repeat(np.arange(len(points)), [len(each[0]) for each in points])
    logs = np.concatenate([each[0] for each in points]), np.concatenate([each[1] for each in points])
    used = len(run)
    group, groups = (run, len(points)) if len(points) > 1 else (np.arange(used) * SEGMENTS // max(used, 1), SEGMENTS)
    left_out = planned - used
    slopes = _slopes(logs[0], run, group, groups)
    if slopes is None:
        return PowerLaw(np.nan, np.nan, np.nan, used, left_out)
    changes = slopes[1:] - slopes[0]
    exponent = float(slopes[0] @ logs[1])
    stderr = float(np.sqrt((groups - 1) / groups * np.square(changes @ logs[1]).sum()))
    together = changes @ changes.T
    degrees = np.trace(together) ** 2 / np.square(together).sum()
    reach = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * stderr
    return PowerLaw(exponent, exponent - reach, exponent + reach, used, left_out)


def _usable(number: int, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Array, Array]:
    """Logarithms of the points of a run that have some."""
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise InputError(f"x and y of run {number} must be of one shape [S], got {first.shape} and {second.shape}")
    kept = (first > 0) & (second > 0) & np.isfinite(first) & np.isfinite(second)
    return np.log(first[kept]), np.log(second[kept])


def _slopes(x: Array, run: npt.NDArray[np.int64], group: npt.NDArray[np.int64], groups: int) -> Array | None:
    """Coefficients [1 + groups, S] of log y in the slope of all points, and without each group; None if undefined."""
    if len(x) == 0 or np.bincount(group, minlength=groups).min() < FEWEST:
        return None
    rows = []
    for without in range(-1, groups):
        kept = group != without
        counts = np.bincount(run, weights=kept)
        means = np.bincount(run, weights=kept * x) / np.maximum(counts, 1)
        centred = np.where(kept, x - means[run], 0.0)
        spread = float(centred @ centred)
        # Equal points have the spread of rounding, which is no slope to go by.
        if not np.sqrt(spread) > len(x) * np.finfo(np.float64).eps * float(np.abs(x).max()):
            return None
        rows.append(centred / spread)
    return np.stack(rows)
