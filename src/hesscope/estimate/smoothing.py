"""Nodes and weights smoothed with Gaussians, into densities and distribution functions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Positions evaluated at once against all nodes.
PAIRS_AT_ONCE = 2**22


def smoothed(nodes: Array, weights: Array, places: Array, width: float, cumulative: bool) -> Array:
    """Density, or distribution function, of every probe at `places` [...]; [probes, ...].

    Args:
        nodes, weights: [probes, steps].
        width: standard deviation of the Gaussians; 0 for the distribution function of the nodes themselves.
        cumulative: whether the distribution function is wanted.
    """
    from scipy.special import ndtr

    flat = places.ravel()
    result = np.empty((len(nodes), flat.size))
    stride = max(1, PAIRS_AT_ONCE // nodes.shape[1])
    for start in range(0, flat.size, stride):
        some = flat[start : start + stride, None]
        for probe, (row, shares) in enumerate(zip(nodes, weights, strict=True)):
            if not cumulative:
                heights = np.exp(-0.5 * ((some - row) / width) ** 2) / (width * np.sqrt(2 * np.pi))
            elif width == 0:
                heights = np.heaviside(some - row, 0.5)
            else:
                heights = ndtr((some - row) / width)
            result[probe, start : start + stride] = heights @ shares
    return result.reshape(len(nodes), *places.shape)
