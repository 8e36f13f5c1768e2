"""Outliers of a spectrum: which eigenvalues stand apart from the bulk, by a stated criterion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.estimate.nodes import Quadrature, standard_error, weighted_quantile

Array = npt.NDArray[np.float64]

# Nodes of fewer eigenvalues than NEGLIGIBLE do not fill a gap, of fewer than STRAY count as none.
NEGLIGIBLE, STRAY = 0.02, 1e-4


@dataclass(frozen=True, eq=False)
class Outliers:
    """Eigenvalues outside the bulk of a spectrum, at either end; see find_outliers.

    Attributes:
        count: number of distinct values found outside, len(values); copies of one eigenvalue count once.
        values: their places, ascending.
        lower, upper: ends of the bulk: the outermost values that are no outliers.
        mass: estimated number of eigenvalues outside, copies counted; mass_stderr: its standard error.
        criterion: in words.
    """

    count: int
    values: Array
    lower: float
    upper: float
    mass: float
    mass_stderr: float
    criterion: str


def find_outliers(
    merged: list[Quadrature], dimension: int, rounding: float, exact: bool, gap: float, share: float
) -> Outliers:
    """Eigenvalues that a gap separates from the bulk, at both ends; see SpectralDensity.outliers for the criterion.

    Args:
        merged: nodes and weights of every probe, with nodes nearer than `rounding` put together.
        dimension: number of eigenvalues.
        exact: whether nodes are all eigenvalues; gap, share: see there.

    Raises:
        InputError: gap or share outside (0, 1).
    """
    for name, value in (("gap", gap), ("share", share)):
        if not 0 < value < 1:
            raise InputError(f"{name} must lie between 0 and 1, got {value}")
    places, weights = (np.concatenate(parts) for parts in zip(*merged, strict=True))
    counted = weights * dimension >= NEGLIGIBLE
    places, weights = places[counted], weights[counted]
    middle = weighted_quantile(places, weights, 0.5)
    radius = weighted_quantile(np.abs(places - middle), weights, 1 - share)
    above, below = (_bulk_end(side * (places - middle), radius, gap, rounding) for side in (1.0, -1.0))
    upper, lower = float(places[places - middle <= above].max()), float(places[middle - places <= below].min())
    ends = [
        [(nodes[nodes < lower - rounding], shares[nodes < lower - rounding]) for nodes, shares in merged],
        [(nodes[nodes > upper + rounding], shares[nodes > upper + rounding]) for nodes, shares in merged],
    ]
    values = np.concatenate([_distinct(end, STRAY / dimension) for end in ends])
    mass = dimension * np.array([sum(end[probe][1].sum() for end in ends) for probe in range(len(merged))])
    return Outliers(
        count=len(values),
        values=values,
        lower=lower,
        upper=upper,
        mass=float(mass.mean()),
        mass_stderr=float(standard_error(mass, exact)),
        criterion=(
            f"beyond the innermost gap of more than {gap:g} of the distance from the median, farther from it than "
            f"{1 - share:.0%} of the eigenvalues"
        ),
    )


def _distinct(end: list[Quadrature], stray: float) -> Array:
    """Places of the eigenvalues at one end, given every probe's nodes there, and weights.

    The probes whose number of nodes (of more than `stray` weight) is the median number give the places: a probe may
    miss an eigenvalue that it is nearly orthogonal to, or have a node on the way to where it belongs.
    """
    solid = [(nodes[weights > stray], weights[weights > stray]) for nodes, weights in end]
    numbers = [len(nodes) for nodes, _ in solid]
    number = sorted(numbers)[len(numbers) // 2]
    places = np.array([nodes for nodes, _ in solid if len(nodes) == number])
    weights = np.array([weights for nodes, weights in solid if len(nodes) == number])
    result: Array = (places * weights).sum(axis=0) / weights.sum(axis=0)
    return result


def _bulk_end(distances: Array, radius: float, gap: float, rounding: float) -> float:
    """Distance of the bulk's end from the median, towards positive `distances`; infinite if nothing is beyond."""
    outward = np.sort(distances[distances > 0])
    inner = np.concatenate([[0.0], outward[:-1]])
    wide = (outward > radius) & (outward - inner > gap * outward) & (outward - inner > rounding)
    return float(inner[np.argmax(wide)]) if wide.any() else float("inf")
