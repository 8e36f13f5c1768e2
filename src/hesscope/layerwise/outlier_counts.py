"""How many leading eigenvalues of a layer's Hessian are outliers: by the largest gap, and by the edge of a bulk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# 99 % quantile of the Tracy-Widom law of real matrices (Johnstone, Annals of Statistics 29, 2001, table 1).
TRACY_WIDOM = 2.02


@dataclass(frozen=True)
class GapOutliers:
    """Leading eigenvalues before the largest gap; see largest_gap.

    Attributes:
        count: of eigenvalues before it; ratio: of the eigenvalues on its two sides; searched: positions considered.
    """

    count: int
    ratio: float
    searched: int

    @property
    def criterion(self) -> str:
        """In words."""
        return f"before the largest ratio of neighbours among the {self.searched + 1} leading eigenvalues"


@dataclass(frozen=True)
class EdgeOutliers:
    """Leading eigenvalues beyond the edge of the spectral law of the others; see beyond_edge.

    Attributes:
        count: None where there is no such edge among the eigenvalues that are known, or no such law.
        edge: upper end of the law; threshold: what the largest eigenvalue of that law exceeds with 1 % probability.
            Both belong to `count`, and are nan where that is None.
    """

    count: int | None
    edge: float
    threshold: float

    @property
    def criterion(self) -> str:
        """In words."""
        return (
            "beyond the upper edge (and its 1 % fluctuation) of the Marchenko-Pastur law that has the first three "
            "moments of all other eigenvalues"
        )


def largest_gap(values: npt.ArrayLike, rounding: float, whole: bool = False) -> GapOutliers:
    """The number i of eigenvalues before the largest ratio lambda_i / lambda_(i+1).

    All positions i = 1 ... k - 1 between the given eigenvalues are searched, so the count depends on k only if a larger
    gap follows; of a whole spectrum only its upper half is, since most eigenvalues are no outliers. Eigenvalues below
    `rounding` (and negative ones) count as `rounding`: a drop to zero is a gap, what comes after it is none. The first
    of equal ratios counts.

    Args:
        values: the k leading eigenvalues, descending, [k]; rounding: their error, in their unit.
        whole: whether these are all eigenvalues of the matrix.
    """
    descending = np.asarray(values, dtype=np.float64)
    if whole:
        descending = descending[: len(descending) // 2 + 1]
    floored = np.maximum(descending, max(rounding, np.finfo(np.float64).tiny))
    ratios = floored[:-1] / floored[1:]
    if not len(ratios):
        return GapOutliers(count=0, ratio=1.0, searched=0)
    first = int(np.argmax(ratios))
    return GapOutliers(count=first + 1 if ratios[first] > 1 else 0, ratio=float(ratios[first]), searched=len(ratios))


def beyond_edge(values: npt.ArrayLike, rest: npt.ArrayLike) -> EdgeOutliers:
    """The largest number q of leading eigenvalues of which even the last lies beyond the bulk of all others.

    The bulk without the first q is described by the spectral law with equal weights (Marchenko-Pastur; MATH.md, section
    4.1) of unknown dimension, scale and ratio gamma, fitted to its power sums t_j = sum lambda^j, j = 1, 2, 3. The law
    times its argument is a semicircle, so with the mean m = t_2 / t_1 and variance s^2 = t_3 / t_1 - m^2 of eigenvalues
    that are drawn with probabilities lambda / t_1, its upper edge is e = m + 2 s: no zero eigenvalue (of dead inputs,
    say) changes it, nor does the scale. The largest eigenvalue of such a matrix exceeds e by about s (e / t_1)^(2/3)
    times a Tracy-Widom variable; lambda_q counts as beyond if it exceeds e by more than 2.02 of these, the 99 %
    quantile. For bulks whose inputs are not isotropic the law is an idealization: a spectrum that decays like a power
    has no edge, and count is None where even the last eigenvalue that is given lies beyond.

    What is left counts as a bulk only where it is spread over as many eigenvalues as have been taken away, t_1^2 / t_2
    >= q, and where t_1 > 0 and s^2 >= 0, which the eigenvalues of an indefinite matrix may not have.

    Args:
        values: the k leading eigenvalues, descending, [k]; rest: sums of lambda, lambda^2, lambda^3 over all others.

    Sources: Marchenko, Pastur 1967; Johnstone 2001 for the fluctuation, of which this is the form without dimensions.
    """
    descending, others = np.asarray(values, dtype=np.float64), np.asarray(rest, dtype=np.float64)
    unknown = EdgeOutliers(count=None, edge=float("nan"), threshold=float("nan"))
    scale = float(np.abs(descending).max())
    if scale == 0:
        return unknown
    unit = descending / scale
    orders = np.arange(1, 4)
    # Sums over the eigenvalues after the first q, q = 0 ... k.
    known = np.concatenate([(unit[::-1, None] ** orders).cumsum(axis=0)[::-1], np.zeros((1, 3))])
    t = (known + others / scale**orders).T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mean = t[1] / t[0]
        deviation = np.sqrt(t[2] / t[0] - mean**2)
        edge = mean + 2 * deviation
        threshold = edge + TRACY_WIDOM * deviation * (edge / t[0]) ** (2 / 3)
        is_bulk = (t[0] > 0) & np.isfinite(threshold) & (t[0] ** 2 >= np.arange(len(known)) * t[1])
    beyond = is_bulk[1:] & (unit > threshold[1:])
    count = int(np.flatnonzero(beyond)[-1]) + 1 if beyond.any() else 0
    if not is_bulk[count + 1 :].any():
        return unknown
    return EdgeOutliers(count=count, edge=float(edge[count]) * scale, threshold=float(threshold[count]) * scale)
