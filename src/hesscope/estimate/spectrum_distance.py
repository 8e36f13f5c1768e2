"""Distance between two spectra: how heterogeneous the blocks of a matrix are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.estimate.density import SpectralDensity

Array = npt.NDArray[np.float64]

# A Gaussian is zero beyond this many widths (its tail there is 1e-15), and has this many grid points per width.
REACH, POINTS_PER_WIDTH = 8.0, 8


def jensen_shannon_distance(a: SpectralDensity, b: SpectralDensity, bandwidth: float | None = None) -> float:
    """Distance between two spectra, from 0 (equal) to 1 (nowhere in common): how heterogeneous two blocks are.

    The square root of the Jensen-Shannon divergence in bits, sqrt(KL(p || m) / 2 + KL(q || m) / 2) with
    m = (p + q) / 2, of the two densities smoothed with one bandwidth; a metric (Endres & Schindelin 2003). Zhang et al.
    (arXiv:2402.16788) compare the blocks of a Hessian so. Scales are compared, too: a block and its double differ.

    Args:
        a, b: spectra, of matrices of any sizes, exact or estimated.
        bandwidth: standard deviation of the Gaussians, in the matrices' units; the larger of the two defaults unless
            told, with which neither spectrum shows single nodes.

    Raises:
        InputError: a bandwidth that is not positive, or lost in the rounding of the largest eigenvalue.
    """
    largest = max(abs(end) for density in (a, b) for end in density.eigenvalue_range)
    width = max(a.default_bandwidth, b.default_bandwidth) if bandwidth is None else float(bandwidth)
    if bandwidth is None and width == 0:
        return 0.0  # two zero matrices
    if not (np.isfinite(width) and width > np.finfo(np.float64).eps * largest):
        raise InputError(f"bandwidth must be positive and more than rounding of the eigenvalues, got {width}")
    (places, p), (others, q) = _on_grid(a, width), _on_grid(b, width)
    common = np.union1d(places, others)
    P, Q = np.zeros(len(common)), np.zeros(len(common))
    P[np.searchsorted(common, places)], Q[np.searchsorted(common, others)] = p, q
    M = (P + Q) / 2
    divergence = sum(float((X[X > 0] * np.log2(X[X > 0] / M[X > 0])).sum()) / 2 for X in (P, Q))
    return float(np.sqrt(min(max(divergence, 0.0), 1.0)))


def _on_grid(density: SpectralDensity, width: float) -> tuple[npt.NDArray[np.int64], Array]:
    """Numbers of the grid points (multiples of width / POINTS_PER_WIDTH) with any mass, and the mass there.

    Only the neighbourhoods of nodes are held: outliers may be a million widths away. A node between two grid points is
    shared out between them.
    """
    seen = density.weights > 0
    positions = density.nodes[seen] / width * POINTS_PER_WIDTH
    shares = density.weights[seen] / density.probes
    floor = np.floor(positions)
    fraction = positions - floor
    numbers, index = np.unique(np.concatenate([floor, floor + 1]).astype(np.int64), return_inverse=True)
    masses = np.bincount(index, np.concatenate([shares * (1 - fraction), shares * fraction]))
    reach = int(REACH * POINTS_PER_WIDTH)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / POINTS_PER_WIDTH) ** 2)
    grid = np.unique((numbers[:, None] + offsets).ravel())
    result = np.zeros(len(grid))
    for offset, height in zip(offsets, kernel / kernel.sum(), strict=True):
        result[np.searchsorted(grid, numbers + offset)] += height * masses
    return grid, result / result.sum()
