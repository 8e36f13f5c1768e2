"""What theory says about the output Hessian of a random two-layer network's hidden layer, at finite width.

o = W2 s(z) with z = W1 x, x ~ N(0, I_d), so z ~ N(0, K), K = W1 W1^T. With D = diag(s'(z)) and A = diag(p) - p p^T,

    E[M]_ij = w_i^T E[ A s'(z_i) s'(z_j) ] w_j,    w_i: columns of W2, entries of size 1/sqrt(m).

Derivation (a correction to the theorem of [W], arXiv:2010.04261, which is the first term). Off the diagonal K is of
size 1/sqrt(d), and one neuron's share in o is of size 1/sqrt(m): s'_i = s'(z_i), s'_j and o are nearly independent. To
first order in that dependence, with o Gaussian (central limit theorem), Stein's lemma E[f(o) y] = E[f'(o)] Cov(o, y)
for a Gaussian y of mean 0, and Abar = E[A], e_i = E[s'_i],

    E[A s'_i s'_j] = Abar E[s'_i s'_j] + sum_k E[dA/do_k] ( e_j Cov(o_k, s'_i) + e_i Cov(o_k, s'_j) ).

The first term alone, with E[s'_i s'_j] = e^2, is e^2 W2^T Abar W2: of rank C - 1, for A 1 = 0, with the row space of W2
without W2^T 1 as its range. What E[s'_i s'_j] has beyond e^2 (on the diagonal: the variance of s') is a bulk of size
1/m. The second term tilts the top eigenvectors out of the range by angles of size sqrt(1/m + 1/d), whose squares are
what the overlap lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
import numpy.typing as npt

from hesscope.core.rng import stream
from hesscope.theory.activations import ACTIVATIONS

Array = npt.NDArray[np.float64]

# Nodes of expectations over one neuron: midpoints, because the slope of ReLU jumps at 0.
REACH, STEP = 9.0, 0.01
# Gaussian outputs for the softmax moments, in pairs of opposite signs; entries of a table of pairs of classes.
OUTPUTS, TABLE = 2**16, 2**22


@dataclass(frozen=True, eq=False)
class OutputHessianPrediction:
    """Prediction for one network.

    Attributes:
        matrix: E[M] to first order, [m, m].
        first_order: limit of m (1 - overlap) as m -> infinity at this d/m, with Abar and E[dA/do] of this network.
        sampling: N times what an average over N samples adds to 1 - overlap.
    """

    matrix: Array
    first_order: float
    sampling: float


@dataclass(frozen=True, eq=False)
class _Neurons:
    """Expectations over z_i ~ N(0, scale_i^2), [n] each, with s = s(z_i): means, slopes e_i = E s', bends E s''."""

    mean: Array
    variance: Array
    slope: Array
    slope_variance: Array
    bend: Array
    covariance: Array  # Cov(s, s')
    growth: Array  # d e_i / d log scale_i


def predict_output_hessian(
    hidden_weight: Array, output_weight: Array, activation: str, seed: int
) -> OutputHessianPrediction:
    """E[M] of the network with weights W1 [m, d] and W2 [C, m], to first order; see the module's docstring.

    All that is random are the moments of softmax at Gaussian outputs, from OUTPUTS of them.
    """
    W2 = output_weight
    C, m = W2.shape
    K = hidden_weight @ hidden_weight.T
    neurons = _neurons(np.sqrt(K.diagonal()), activation)
    e, bend = neurons.slope, neurons.bend
    own = np.arange(m)
    # Exact for a neuron with itself, to first order in K for two of them.
    covariance = np.outer(e, e) * K
    covariance[own, own] = neurons.variance
    A, third, squared = _softmax_moments(W2 @ neurons.mean, W2 @ covariance @ W2.T, seed)
    toward = np.outer(e, bend) * K
    toward[own, own] = neurons.covariance
    toward = W2 @ toward  # Cov(o, s'_i), [C, m]
    slopes = np.outer(e, e) + np.outer(bend, bend) * K  # E[s'_i s'_j]
    slopes[own, own] = e**2 + neurons.slope_variance
    pairs = (toward[:, None] * W2).reshape(C * C, m)
    tilt = pairs.T @ third.reshape(C * C, C) @ (W2 * e)
    return OutputHessianPrediction(
        matrix=slopes * (W2.T @ A @ W2) + tilt + tilt.T,
        first_order=_first_order(A, third, m / hidden_weight.shape[1], activation),
        sampling=float((neurons.slope_variance / e**2).mean() * _relative(A, squared)),
    )


def _first_order(A: Array, third: Array, ratio: float, activation: str) -> float:
    """Limit of m (1 - overlap), for d = m / ratio.

    Second-order perturbation theory: 1 - overlap is the mean over the C - 1 eigenvectors u_a of Abar (eigenvalues
    alpha_a) of the squared tilt |P (E[M] - e^2 W2^T Abar W2) W2^T u_a|^2 / (e^2 alpha_a)^2, P the projection off the
    range, where E[M] is of size 1/m. With t_a = sum_k E[dA/do_k] u_ak, w_i of variance 1/m and Cov(o, s'_i) its sum
    Cov(s, s') w_i + e E[s''] sum_{l != i} K_il w_l, Wick's theorem gives the squares below. The last term is that of
    e_i, which varies with the standard deviation of z_i, whose variance is 1/(2 d).
    """
    unit = _neurons(np.ones(1), activation)
    e = unit.slope[0]
    values, vectors = _active(A)
    t = np.einsum("abc,cx->xab", third, vectors)
    traces, squares = t.trace(axis1=1, axis2=2) ** 2, (t**2).sum(axis=(1, 2))
    own = unit.covariance[0] ** 2 * (traces + 2 * squares)
    others = ratio * (e * unit.bend[0]) ** 2 * squares
    return float(((own + others) / (e * values) ** 2).mean() + ratio / 2 * (unit.growth[0] / e) ** 2)


def _relative(A: Array, squared: Array) -> float:
    """Mean over the eigenvectors u_a of E[A] of u_a^T E[A^2] u_a / alpha_a^2.

    An average over N samples leaves Var(s'_i) |W2^T A W2 W2^T u_a|^2 e^2 / N of noise off the range.
    """
    values, vectors = _active(A)
    return float(((vectors * (squared @ vectors)).sum(axis=0) / values**2).mean())


def _active(A: Array) -> tuple[Array, Array]:
    """Eigenpairs of E[A] but the one of the constant vector, which is the least: [C - 1], [C, C - 1]."""
    values, vectors = np.linalg.eigh(A)
    return values[1:], vectors[:, 1:]


def _neurons(scales: Array, activation: str) -> _Neurons:
    g = np.arange(-REACH + STEP / 2, REACH, STEP)
    weights = np.exp(-(g**2) / 2) * (STEP / sqrt(2 * pi))
    value, slope, _ = ACTIVATIONS[activation].derivatives(scales[:, None] * g)
    mean, e = value @ weights, slope @ weights
    return _Neurons(
        mean=mean,
        variance=value**2 @ weights - mean**2,
        slope=e,
        slope_variance=slope**2 @ weights - e**2,
        bend=slope @ (weights * g) / scales,  # Stein's lemma: for ReLU s'' is no function
        covariance=(value * slope) @ weights - mean * e,
        growth=slope @ (weights * (g**2 - 1)),
    )


def _softmax_moments(mean: Array, covariance: Array, seed: int) -> tuple[Array, Array, Array]:
    """E[A] [C, C], E[dA/do] [C, C, C] and E[A^2] [C, C] for o ~ N(mean, covariance)."""
    C = len(mean)
    g = stream(seed, "two_layer_theorem", "outputs").standard_normal((OUTPUTS // 2, C))
    deviations = g @ np.linalg.cholesky(covariance).T
    first, second, cubes = np.zeros(C), np.zeros((C, C)), np.zeros((C * C, C))
    squared, both = np.zeros((C, C)), np.zeros((C, C))
    step = max(1, TABLE // (C * C))
    for start in range(0, len(g), step):
        for sign in (1, -1):
            o = mean + sign * deviations[start : start + step]
            p = np.exp(o - o.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            squares = p**2
            first += p.sum(axis=0)
            second += p.T @ p
            cubes += (p[:, :, None] * p[:, None]).reshape(len(p), C * C).T @ p
            squared += squares.T @ p
            both += (p * squares.sum(axis=1, keepdims=True)).T @ p
    first, second, squared, both = (moment / (2 * len(g)) for moment in (first, second, squared, both))
    third = 2 * cubes.reshape(C, C, C) / (2 * len(g))
    c = np.arange(C)
    # The third cumulant of a random class: sum over classes a = b, a = c, b = c, and all three.
    third[c, c, :] -= second
    third[c, :, c] -= second
    third[:, c, c] -= second.T
    third[c, c, c] += first
    return np.diag(first) - second, third, np.diag(second.diagonal()) - squared - squared.T + both
