"""Activations with their first two derivatives as NumPy functions, and expectations of them over Gaussian inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# The trapezoidal rule for Gaussian expectations: half width in standard deviations, step for an input of scale 1.
REACH = 9.0
STEP = 0.05


@dataclass(frozen=True)
class Activation:
    """Values s(z), slopes s'(z) and bends s''(z) of an activation.

    Attributes:
        derivatives: z (any shape) -> (s, s', s''), each of the same shape.
        growth: limit of |s(z)| / |z| for large |z|: moments of e^{s(z)^2} need it to be small enough.
        smooth: whether s'' is a function (it is zero almost everywhere for ReLU, and has a kink at 0).
    """

    derivatives: Callable[[Array], tuple[Array, Array, Array]]
    growth: float
    smooth: bool


def _relu(z: Array) -> tuple[Array, Array, Array]:
    return np.maximum(z, 0.0), (z > 0).astype(z.dtype), np.zeros_like(z)


def _tanh(z: Array) -> tuple[Array, Array, Array]:
    s = np.tanh(z)
    slope = 1 - s**2
    return s, slope, -2 * s * slope


def _gelu(z: Array) -> tuple[Array, Array, Array]:
    from scipy.special import erf

    below = (1 + erf(z / sqrt(2))) / 2
    density = np.exp(-(z**2) / 2) / sqrt(2 * pi)
    return z * below, below + z * density, density * (2 - z**2)


ACTIVATIONS = {
    "relu": Activation(_relu, growth=1.0, smooth=False),
    "tanh": Activation(_tanh, growth=0.0, smooth=True),
    "gelu": Activation(_gelu, growth=1.0, smooth=True),
}


def gaussian_nodes(scale: float, widening: float = 1.0) -> tuple[Array, Array]:
    """Nodes z [n] and weights [n] (sum 1) of the trapezoidal rule for E f(z), z ~ N(0, scale^2), f analytic.

    The rule converges exponentially. `widening` >= 1 stretches the range for functions that grow like
    exp((1 - widening^-2) z^2 / (2 scale^2)).
    """
    step = STEP / max(1.0, scale)
    g = np.arange(-REACH * widening, REACH * widening + step, step)
    return scale * g, np.exp(-(g**2) / 2) * (step / sqrt(2 * pi))
