"""The static force: off-diagonal ratios r that the architecture alone dictates at random initialization.

Inputs x ~ N(0, I_d), d and N -> infinity with d/N -> gamma, LeCun initialization, width m fixed: [D] and MATH.md,
sections 4.4 and 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import asin, pi, sqrt

import numpy as np
import numpy.typing as npt

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.rng import stream

# Monte Carlo size for cross-entropy: initializations V, and inputs seen by each.
INITIALIZATIONS = 512
INPUTS = 256

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StaticForce:
    """Predicted off-diagonal ratios r of the hidden layer's and the output layer's Hessian at initialization.

    Attributes:
        hidden_ratio, output_ratio: r at this number of classes; 0.0 where exactly block-diagonal.
        hidden_stderr, output_stderr: Monte Carlo standard errors; 0.0 where r is known in closed form.
        limit_hidden, limit_output: limits of C r and of C^2 r as the number of classes C grows.
    """

    hidden_ratio: float
    output_ratio: float
    hidden_stderr: float
    output_stderr: float
    limit_hidden: float
    limit_output: float


def static_force(model: str, loss: str, classes: int, gamma: float, width: int, seed: int = 0) -> StaticForce:
    """Predict r for a one-hidden-layer ReLU network without bias.

    Args:
        model: "one_hidden".
        loss: "cross_entropy" (Monte Carlo with standard error) or "mse" (closed form).
        classes: C >= 2; gamma: inputs per sample d/N > 0; width: m, at least 3 for cross-entropy.
        seed: root of the Monte Carlo streams.

    Raises:
        InputError: a value outside these ranges.
    """
    require_choice("model", model, ("one_hidden",))
    require_choice("loss", loss, ("cross_entropy", "mse"))
    require_positive_int("classes", classes)
    require_positive_int("width", width)
    if classes < 2:
        raise InputError(f"classes must be at least 2, got {classes}")
    if not 0 < gamma < float("inf"):
        raise InputError(f"gamma must be positive and finite, got {gamma}")
    if loss == "mse":
        constant = (1 / 16 + gamma / 4) / (1 / 4 + gamma / 2)
        return StaticForce(constant / (classes + 2), 0.0, 0.0, 0.0, constant, 0.0)
    if width < 3:
        raise InputError(
            f"cross-entropy needs width >= 3 (the moments diverge below, MATH.md section 4.5), got {width}"
        )
    hidden, output = _cross_entropy_samples(classes, gamma, width, seed)
    hidden_ratio, hidden_stderr = _ratio_of_means(hidden)
    output_ratio, output_stderr = _ratio_of_means(output)
    return StaticForce(
        hidden_ratio,
        output_ratio,
        hidden_stderr,
        output_stderr,
        _limit_hidden(width, gamma),
        _limit_output(width),
    )


def _cross_entropy_samples(C: int, gamma: float, m: int, seed: int) -> tuple[Array, Array]:
    """Unbiased (off-diagonal, diagonal) mean energies, [INITIALIZATIONS, 2] each, for the hidden and output layer.

    Squares of expectations over inputs are estimated by products of independent inputs n != n'.
    """
    rng = stream(seed, "static_force", C, m)
    hidden, output = np.empty((INITIALIZATIONS, 2)), np.empty((INITIALIZATIONS, 2))
    diagonal = np.eye(m, dtype=bool)
    for draw in range(INITIALIZATIONS):
        V = rng.standard_normal((C, m)) / sqrt(m)
        g = rng.standard_normal((INPUTS, m))
        h = np.maximum(g, 0.0)
        logits = h @ V.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)

        mean = p @ V
        a = (p @ (V[:, :, None] * V[:, None, :]).reshape(C, m * m)).reshape(-1, m, m)
        a -= mean[:, :, None] * mean[:, None, :]
        active = (g > 0).astype(float)
        weights = a * active[:, :, None] * active[:, None, :]
        second = (weights**2).mean(axis=0)
        squared_mean = (INPUTS * weights.mean(axis=0) ** 2 - second) / (INPUTS - 1)
        energy = squared_mean + gamma * second
        hidden[draw] = energy[~diagonal].mean(), energy[diagonal].mean()

        gram = (h @ h.T) ** 2
        np.fill_diagonal(gram, 0.0)
        q = p * (1 - p)
        pairs = INPUTS * (INPUTS - 1)
        off = (gram * ((p @ p.T) ** 2 - (p**2) @ (p**2).T)).sum() / pairs
        output[draw] = off / (C * (C - 1)), (gram * (q @ q.T)).sum() / pairs / C
    return hidden, output


def _ratio_of_means(samples: Array) -> tuple[float, float]:
    """Ratio of the two columns' means and its delta-method standard error."""
    top, bottom = samples.mean(axis=0)
    residuals = samples[:, 0] - top / bottom * samples[:, 1]
    return float(top / bottom), float(residuals.std(ddof=1) / sqrt(len(samples)) / bottom)


def _limit_hidden(m: int, gamma: float) -> float:
    """Limit of C r of the hidden layer (MATH.md, section 4.5)."""
    value, slope, _ = _half_plane(1 / m)
    A, B = 3 / 4 + value, value / m + slope / m**2
    root = 1 / sqrt(1 - 2 / m)
    A2 = (1 + root) / 2
    B2 = root / 2 * (1 / m + 1 / (m**2 * (1 - 2 / m)))
    return (A ** (m - 2) * B**2 + gamma * A2 ** (m - 2) * B2**2) / ((1 / 4 + gamma / 2) / m**2)


def _limit_output(m: int) -> float:
    """Limit of C^2 r of the output layer, (F^m)''(2/m) / (F^m)''(1/m) (MATH.md, section 4.5)."""

    def second_derivative(rho: float) -> float:
        value, slope, curvature = _half_plane(rho)
        F = 3 / 4 + value
        return m * (m - 1) * F ** (m - 2) * slope**2 + m * F ** (m - 1) * curvature

    return second_derivative(2 / m) / second_derivative(1 / m)


def _half_plane(rho: float) -> tuple[float, float, float]:
    """I(rho) = (1 - rho^2)^(-1/2) (1/4 + asin(rho)/(2 pi)) and its first two derivatives."""
    u = 1 - rho**2
    angle = 1 / 4 + asin(rho) / (2 * pi)
    value = angle / sqrt(u)
    slope = rho * value / u + 1 / (2 * pi * u)
    curvature = value / u + rho * slope / u + 2 * rho**2 * value / u**2 + rho / (pi * u**2)
    return value, slope, curvature
