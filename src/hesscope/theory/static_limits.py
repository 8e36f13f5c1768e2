"""Closed forms and quadratures of the static force: squared error at any C, cross-entropy as C -> infinity.

With z ~ N(0, a^2), tau = b^2 / m the variance of an entry of V, s the activation, and E over independent z, z'
(MATH.md, sections 4.4 and 4.5, there for ReLU, a = b = 1):

Squared error: off-diagonal weights are B_ij s'(z_i) s'(z_j) with B = V^T V, and E B_ij^2 = C tau^2. On the diagonal the
residual adds (V^T e)_i s''(z_i), which vanishes for ReLU only.

Cross-entropy: as C -> infinity the softmax average of V is the Gaussian tilted by h; a_ij fluctuates around
delta_ij tau by O(1 / sqrt(C)), with covariance over two inputs tau-tilted: prod_k e^{tau h_k h'_k} and so on.
"""

from __future__ import annotations

from math import asin, pi, sqrt

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.theory.activations import ACTIVATIONS, gaussian_nodes
from hesscope.theory.ensemble import critical_width

Array = npt.NDArray[np.float64]

# Widest range of the two-dimensional quadrature, in units of its usual one.
MAX_WIDENING = 12.0


def squared_error_hidden(
    classes: float, gamma: float, width: int, activation: str, hidden_scale: float, output_scale: float
) -> float:
    """C r of the hidden layer under squared error, at any C up to infinity; labels are uniform and one-hot."""
    x, m, tau = 1 / classes, width, output_scale**2 / width
    if activation == "relu":
        # s' is 0 or 1 with equal probability, whatever the scale; s'' = 0.
        return (1 / 16 + gamma / 4) / (1 / 4 + gamma / 2) / (1 + 2 * x)
    z, p = gaussian_nodes(hidden_scale)
    s, slope, bend = ACTIVATIONS[activation].derivatives(z)
    off = (p @ slope) ** 4 + gamma * (p @ slope**2) ** 2
    # lambda_ii = B_ii own + s'' (sum_{j != i} B_ij h_j - v_yi); energies are divided by (C tau)^2.
    own = slope**2 + s * bend
    mean = (p @ own) ** 2 * (1 + 2 * x) + (m - 1) * x * ((p @ s) * (p @ bend)) ** 2 + (p @ bend) ** 2 * x**3 / tau
    second = (p @ own**2) * (1 + 2 * x) + (m - 1) * x * (p @ bend**2) * (p @ s**2) + (p @ bend**2) * x**2 / tau
    return float(off / (mean + gamma * second))


def limit_hidden(gamma: float, width: int, activation: str, hidden_scale: float, output_scale: float) -> float:
    """Limit of C r of the hidden layer under cross-entropy as C -> infinity; width above `critical_width`."""
    m, tau = width, output_scale**2 / width
    if activation == "relu":
        rho, a2 = tau * hidden_scale**2, hidden_scale**2
        value, rate, _ = _half_plane(rho)
        root = 1 / sqrt(1 - 2 * rho)
        A, B = 3 / 4 + value, tau * value + tau**2 * a2 * rate
        A2, B2 = (1 + root) / 2, root / 2 * (tau + tau**2 * a2 / (1 - 2 * rho))
        diagonal = tau**2 * (1 / 4 + gamma / 2)
    else:
        z, p = gaussian_nodes(hidden_scale, _widening(width, activation, hidden_scale, output_scale))
        s, slope, bend = ACTIVATIONS[activation].derivatives(z)
        weights = _tilted(p, s, tau)
        B_weights = weights * (tau + tau**2 * np.multiply.outer(s, s))
        A, B = float(weights.sum()), float(slope @ B_weights @ slope)
        one = p * np.exp(tau * s**2)
        A2, B2 = float(one.sum()), float(one @ (slope**2 * (tau + tau**2 * s**2)))
        own = slope**2 + s * bend
        diagonal = float(tau**2 * (p @ own) ** 2 + gamma * (tau**2 * (p @ own**2) + tau * (p @ bend**2)))
    return float((A ** (m - 2) * B**2 + gamma * A2 ** (m - 2) * B2**2) / diagonal)


def limit_output(width: int, activation: str, hidden_scale: float, output_scale: float) -> float:
    """Limit of C^2 r of the output layer under cross-entropy: (F^m)''(2 tau) / (F^m)''(tau), F(rho) = E e^{rho ss'}."""
    m, tau = width, output_scale**2 / width

    def second_derivative(rho: float) -> float:
        if activation == "relu":
            a2 = hidden_scale**2
            value, slope, curvature = _half_plane(rho * a2)
            F, first, second = 3 / 4 + value, a2 * slope, a2**2 * curvature
        else:
            z, p = gaussian_nodes(hidden_scale, _widening(width, activation, hidden_scale, output_scale))
            s = ACTIVATIONS[activation].derivatives(z)[0]
            weights = _tilted(p, s, rho)
            F, first, second = float(weights.sum()), float(s @ weights @ s), float(s**2 @ weights @ s**2)
        return m * (m - 1) * F ** (m - 2) * first**2 + m * F ** (m - 1) * second

    return second_derivative(2 * tau) / second_derivative(tau)


def _widening(width: int, activation: str, hidden_scale: float, output_scale: float) -> float:
    """How much wider than the Gaussian the integrands with e^{2 tau s s'} are."""
    widening = 1 / sqrt(1 - critical_width(activation, hidden_scale, output_scale) / width)
    if widening > MAX_WIDENING:
        raise InputError(
            f"width {width} is too close to {critical_width(activation, hidden_scale, output_scale):g}, "
            "where the moments of the limit diverge"
        )
    return widening


def _tilted(p: Array, s: Array, rho: float) -> Array:
    """Table [n, n] of p_i p_j e^{rho s_i s_j}."""
    table: Array = np.exp(rho * np.multiply.outer(s, s) + np.add.outer(np.log(p), np.log(p)))
    return table


def _half_plane(rho: float) -> tuple[float, float, float]:
    """I(rho) = (1 - rho^2)^(-1/2) (1/4 + asin(rho)/(2 pi)) and its first two derivatives (MATH.md, section 4.5)."""
    u = 1 - rho**2
    angle = 1 / 4 + asin(rho) / (2 * pi)
    value = angle / sqrt(u)
    slope = rho * value / u + 1 / (2 * pi * u)
    curvature = value / u + rho * slope / u + 2 * rho**2 * value / u**2 + rho / (pi * u**2)
    return value, slope, curvature
