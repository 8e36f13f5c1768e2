"""Moments of the softmax of independent Gaussian logits, for any number of classes, by one-dimensional quadrature.

With o_c independent N(0, s^2), S = sum_c e^{o_c} and k = sum_i a_i, 1 / S^k = (1/Gamma(k)) int_0^inf t^{k-1} e^{-tS} dt
makes the classes independent (MATH.md, section 4.2; these moments give the static force of [D], arXiv:2505.02809):

    E[prod_{i <= r} p_i^{a_i}] = (1/Gamma(k)) int_0^inf t^{k-1} prod_i phi_{a_i}(t) phi_0(t)^{C-r} dt,
    phi_a(t) = E[e^{az} exp(-t e^z)] = e^{a^2 s^2 / 2} phi_0(t e^{a s^2}),  z ~ N(0, s^2).

The integrand is log-concave and analytic in log t, and so is the inner one in z: the trapezoidal rule converges
exponentially in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import comb, exp, factorial, inf, lgamma, log, prod
from numbers import Real

import numpy as np
import numpy.typing as npt

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError

# Points of the outer rule, at which its logarithm has fallen by DROP below the peak at both ends.
POINTS = 512
DROP = 42.0
# The inner rule: half width in units of s, and the largest steps, in units of s and absolutely.
REACH = 9.0
STEP, STEP_OVER_SCALE = 0.2, 0.6
# Beyond this the tables grow too large, and p is one-hot for any purpose.
MAX_SCALE = 30.0

Array = npt.NDArray[np.float64]


def softmax_moment(exponents: Iterable[int], classes: int, scale: float = 1.0) -> float:
    """E[prod_i p_i^{a_i}] over r different classes of p = softmax(o), o_c independent N(0, scale^2).

    Args:
        exponents: a_1 ... a_r, positive integers, one for each of r <= classes different classes.
        classes: C >= 2.
        scale: standard deviation of a logit, from 0, which gives C^(-sum a_i), to 30.

    Returns:
        The moment (a pure number); relative error about 1e-13, below 1e-10 for all scales and C of 2 to 10^9.

    Raises:
        InputError: a value outside these ranges.

    Source: MATH.md, section 4.2.
    """
    if not isinstance(exponents, Iterable):
        raise InputError(f"exponents must be a tuple of positive integers, got {exponents!r}")
    exponents = tuple(exponents)
    for exponent in exponents:
        require_positive_int("exponents", exponent)
    _require_logits(classes, scale)
    if not 1 <= len(exponents) <= classes:
        raise InputError(f"exponents must name between 1 and classes = {classes} classes, got {len(exponents)}")
    return exp(_log_moment(exponents, classes, float(scale)))


def pair_moment(order: int, classes: int, scale: float = 1.0) -> float:
    """E[(p_1 p_2)^order], the moments of the weights -p_1 p_2 of an off-diagonal class block up to (-1)^order.

    Args:
        order: a positive integer; classes, scale: see `softmax_moment`.

    Raises:
        InputError: a value outside its range.

    Source: MATH.md, sections 2 and 4.3.
    """
    require_positive_int("order", order)
    return softmax_moment((order, order), classes, scale)


def variance_moment(order: int, classes: int, scale: float = 1.0) -> float:
    """E[q^order] of q = p_1 (1 - p_1), the weight of a diagonal class block.

    q = p_1 (p_2 + ... + p_C) is expanded into positive terms, one for each partition of `order`: nothing cancels, at
    C = 2 with small logits (where p_1^2 - p_1^3 would) no more than at C = 10^6.

    Args:
        order: a positive integer; classes, scale: see `softmax_moment`.

    Raises:
        InputError: a value outside its range.

    Source: MATH.md, sections 2 and 4.3; E[p(1 - p)] = (C - 1) E[p_1 p_2].
    """
    require_positive_int("order", order)
    _require_logits(classes, scale)
    total = 0.0
    for parts in _partitions(order, order):
        if len(parts) < classes:
            orders = factorial(order) // prod(factorial(part) for part in parts)
            repeats = prod(factorial(parts.count(part)) for part in set(parts))
            choices = comb(classes - 1, len(parts)) * factorial(len(parts)) // repeats
            total += exp(log(orders) + log(choices) + _log_moment((order, *parts), classes, float(scale)))
    return total


def _require_logits(classes: int, scale: object) -> None:
    """Raise unless there are at least two classes and the scale is a number from 0 to MAX_SCALE."""
    require_positive_int("classes", classes)
    if classes < 2:
        raise InputError(f"classes must be at least 2, got {classes}")
    if not (isinstance(scale, Real) and 0 <= float(scale) <= MAX_SCALE):
        raise InputError(f"scale must be a number from 0 to {MAX_SCALE:g}, got {scale!r}")


def _partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of positive integers, none above `largest`, in descending order."""
    if total == 0:
        yield ()
    for part in range(min(total, largest), 0, -1):
        for rest in _partitions(total - part, part):
            yield (part, *rest)


def _log_moment(exponents: tuple[int, ...], classes: int, scale: float) -> float:
    """Logarithm of the moment: trapezoidal rule in u = log t between the ends of the integrand."""
    k = sum(exponents)
    if scale == 0:
        return -k * log(classes)

    def integrand(u: Array) -> Array:
        """Logarithm of t^k prod_i phi_{a_i}(t) phi_0(t)^(C - r), which is concave in u."""
        value = k * u + (classes - len(exponents)) * _log_phi(u, scale)
        for a in set(exponents):
            value += exponents.count(a) * (a * a * scale**2 / 2 + _log_phi(u + a * scale**2, scale))
        return value

    # By concavity the peak lies between the neighbours of the largest value, and whatever fell by DROP ends the range.
    low, high = -log(classes) - (max(exponents) + 1) * scale**2 - 10 * scale - 60.0, 10 * scale + 60.0
    width = inf
    while high - low < 0.9 * width:
        width = high - low
        u = np.linspace(low, high, 65)
        value = integrand(u)
        kept = np.flatnonzero(value > value.max() - DROP)
        low, high = u[max(kept[0] - 1, 0)], u[min(kept[-1] + 1, 64)]
    u = np.linspace(low, high, POINTS)
    value = integrand(u)
    peak = float(value.max())
    return peak + log(float(np.exp(value - peak).sum()) * float(u[1] - u[0])) - lgamma(k)


def _log_phi(u: Array, scale: float) -> Array:
    """Logarithm of phi_0(e^u) = E[exp(-e^{u+z})], z ~ N(0, scale^2), [n] -> [n], relatively accurate at both ends.

    Where phi_0 is near 1, log1p of -E[1 - exp(-e^{u+z})]; elsewhere the rule is centred at the integrand's peak,
    z* = -W(s^2 e^u), since it is log-concave with at least the curvature of the Gaussian.
    """
    from scipy.special import wrightomega

    step = min(STEP, STEP_OVER_SCALE * scale)
    # Median of e^{u+z} above or below about 1/2; both forms are accurate on both sides of the cut.
    small = u < -0.5
    out = np.empty_like(u)

    # E[1 - exp(-e^{u+z})]: the peak lies between 0 and s^2.
    z = np.arange(-REACH * scale, scale**2 + REACH * scale + step, step)
    density = np.exp(-((z / scale) ** 2) / 2) * (step / (scale * np.sqrt(2 * np.pi)))
    with np.errstate(over="ignore"):
        out[small] = np.log1p(np.expm1(-np.exp(u[small, None] + z)) @ density)

    u = u[~small, None]
    y = np.arange(-REACH * scale, REACH * scale + step, step)
    z = y - wrightomega(u + 2 * log(scale))
    value = -((z / scale) ** 2) / 2 - np.exp(u + z)
    peak = value.max(axis=1, keepdims=True)
    out[~small] = peak[:, 0] + np.log(np.exp(value - peak).sum(axis=1) * (step / (scale * np.sqrt(2 * np.pi))))
    return out
