"""How far measured eigenvalues are from a law."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.theory.spectral_law import SpectralLaw

# Eigenvalues this far below the largest magnitude are zeros of a matrix that lacks rank; in float32, more are.
ROUNDING = 1e-10


def kolmogorov_distance(law: SpectralLaw, eigenvalues: npt.ArrayLike) -> float:
    """Largest difference between the law's and the eigenvalues' distribution functions, from 0 to 1.

    Args:
        law: a spectral law.
        eigenvalues: [d], any order; those below 1e-10 of the largest magnitude count as 0, where the law may have an
            atom.

    Raises:
        InputError: no eigenvalues, or values that are not finite.
    """
    given = np.asarray(eigenvalues)
    values = np.sort(given.astype(np.float64).ravel())
    if not values.size or not np.isfinite(values).all():
        raise InputError("eigenvalues must be a non-empty array of finite numbers")
    eps = float(np.finfo(given.dtype).eps) if given.dtype.kind == "f" else 0.0
    rounding = max(ROUNDING, eps * len(values)) * np.abs(values).max()
    values = np.sort(np.where(np.abs(values) < rounding, 0.0, values))
    at = law.cdf(values)
    below = at - law.atom_at_zero * (values == 0)
    counts_at = np.searchsorted(values, values, side="right") / len(values)
    counts_below = np.searchsorted(values, values, side="left") / len(values)
    return float(max(np.abs(at - counts_at).max(), np.abs(below - counts_below).max()))
