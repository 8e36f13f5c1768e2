"""The symmetric-log axis: linear near zero, logarithmic beyond, on which both ends of a spectrum can be seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Width of the Gaussians on the symmetric-log axis, in decades.
SYMLOG_BANDWIDTH = 0.05


def to_symlog(x: npt.ArrayLike, threshold: float) -> Array:
    """Coordinate u = sign(x) log10(1 + |x| / threshold) of eigenvalues x [...]."""
    values = np.asarray(x, dtype=np.float64)
    result: Array = np.sign(values) * np.log1p(np.abs(values) / threshold) / np.log(10)
    return result


def from_symlog(u: npt.ArrayLike, threshold: float) -> Array:
    """Eigenvalues [...] at the coordinates u [...]; inverse of `to_symlog`."""
    coordinates = np.asarray(u, dtype=np.float64)
    result: Array = np.sign(coordinates) * threshold * np.expm1(np.abs(coordinates) * np.log(10))
    return result
