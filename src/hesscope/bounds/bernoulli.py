"""The Kullback-Leibler divergence of two Bernoulli variables, and its inverses, in which the bounds are stated.

kl(q || p) = q ln(q/p) + (1 - q) ln((1 - q)/(1 - p)), in nats (MATH.md, section 6).
"""

from __future__ import annotations

from typing import overload

import numpy as np
import numpy.typing as npt

from hesscope.bounds.arguments import probabilities
from hesscope.bounds.log_gap import gap_of_mass, log_gap
from hesscope.core.checks import require_choice
from hesscope.core.errors import InputError
from hesscope.core.real_numbers import reals

Array = npt.NDArray[np.float64]

SIDES = ("upper", "lower")

# e to this is below every positive float64: a mass that shrinks further is 0.
LOWEST = -800.0
# The starts are so much lower than they were computed, so that rounding does not put them past the solution.
MARGIN = 1e-14
# Newton steps. At most 9 were seen over 10^6 random pairs of extreme q and c.
MOST_STEPS = 100


@overload
def bernoulli_kl(q: float, p: float) -> float: ...
@overload
def bernoulli_kl(q: Array, p: Array | float) -> Array: ...
@overload
def bernoulli_kl(q: float, p: Array) -> Array: ...
def bernoulli_kl(q: Array | float, p: Array | float) -> Array | float:
    """kl(q || p) in nats, elementwise; relatively accurate also where p is very near q.

    Args:
        q, p: in [0, 1]; numbers, or arrays that can be broadcast.

    Returns:
        A float for two numbers, else a float64 array; infinite where p is 0 or 1 and q is not.

    Raises:
        InputError: a value outside [0, 1], or shapes that do not fit.
    """
    first, second = _broadcast("p", probabilities("q", q), probabilities("p", p))
    change = second - first
    kl = gap_of_mass(first, second, change) + gap_of_mass(1 - first, 1 - second, -change)
    return float(kl) if kl.ndim == 0 else kl


@overload
def kl_inverse(q: float, c: float, side: str = "upper") -> float: ...
@overload
def kl_inverse(q: Array, c: Array | float, side: str = "upper") -> Array: ...
@overload
def kl_inverse(q: float, c: Array, side: str = "upper") -> Array: ...
def kl_inverse(q: Array | float, c: Array | float, side: str = "upper") -> Array | float:
    """The largest p with kl(q || p) <= c, or with side="lower" the smallest; elementwise, to 1e-12 of p.

    On the way from q to p one of the masses q and 1 - q shrinks from a to a e^u, and the other grows from b to
    b - a (e^u - 1). In u <= 0 the divergence is -a u - b ln(1 - a (e^u - 1)/b), which falls and is convex (its slope is
    a (e^u - 1) / grown mass), so that Newton's method from where it is too large never passes the solution. Two such
    points are known: since the grown mass is at most 1, u = -(c - b ln b)/a; and since kl is the integral of
    (x - q)/(x (1 - x)) from q to p, and x (1 - x) is at most a times the grown mass, where the growth is
    a c + sqrt(a^2 c^2 + 2 a b c).

    Args:
        q: in [0, 1]; c: >= 0, in nats; numbers, or arrays that can be broadcast. An infinite c gives 1, or 0.
        side: "upper": sup {p : kl(q || p) <= c}; "lower": inf of the same set.

    Returns:
        A float for two numbers, else a float64 array.

    Raises:
        InputError: q outside [0, 1], a c that is negative or nan, shapes that do not fit, an unknown side.

    Source: MATH.md, section 6.
    """
    require_choice("side", side, SIDES)
    first = probabilities("q", q)
    nats = reals("c", c)
    if (nats < 0).any():
        raise InputError(f"c must be at least 0, got {nats[nats < 0][0]}")
    first, nats = _broadcast("c", first, nats)
    shrinking, growing = (1 - first, first) if side == "upper" else (first, 1 - first)
    u = _log_of_shrinkage(shrinking, growing, nats)
    p = growing - shrinking * np.expm1(u) if side == "upper" else shrinking * np.exp(u)
    return float(p) if p.ndim == 0 else p


def _log_of_shrinkage(a: Array, b: Array, c: Array) -> Array:
    """Logarithm u <= 0 with which the mass a shrinks to a e^u until the divergence is c; LOWEST if it is below that."""
    u = _start(a, b, c)
    moving = np.ones(u.shape, dtype=bool)
    for _ in range(MOST_STEPS):
        growth = -a * np.expm1(u)
        moving &= growth > 0
        with np.errstate(over="ignore"):  # of a descent, where c is huge
            step = (_divergence(a, b, u, growth) - c) / np.where(moving, growth, 1.0) * (b + growth)
        moving &= u + step > u  # the steps only ascend, until the rest is rounding
        if not moving.any():
            return u
        u = np.where(moving, u + step, u)
    raise RuntimeError(f"the inverse of the Bernoulli kl did not settle within {MOST_STEPS} steps")


def _start(a: Array, b: Array, c: Array) -> Array:
    """A u at which the divergence is at least c, or LOWEST; the higher of the two points that are known."""
    shrinking = np.where(a > 0, a, 1.0)
    # Where a is small, 1 - a has lost what log1p keeps.
    log_b = np.where(b < 0.5, np.log(np.where(b > 0, b, 1.0)), np.log1p(-np.minimum(a, 0.5)))
    with np.errstate(over="ignore"):
        by_logarithm = (b * log_b - c) / shrinking
        growth = c + np.sqrt(c) * np.sqrt(np.where(c > 0, c + 2 * b / shrinking, 0.0))  # in units of a
        by_square = np.where(growth < 1, np.log1p(-np.where(growth < 1, growth, 0.0)), -np.inf)
    return np.maximum(np.maximum(by_logarithm, by_square) * (1 + MARGIN), LOWEST)


def _divergence(a: Array, b: Array, u: Array, growth: Array) -> Array:
    """-a u - b ln(1 + growth / b), as two terms >= 0 that do not cancel."""
    lost = np.expm1(u)
    return a * log_gap(lost, lost - u) + gap_of_mass(b, b + growth, growth)


def _broadcast(argument: str, q: Array, other: Array) -> tuple[Array, Array]:
    try:
        first, second = np.broadcast_arrays(q, other)
    except ValueError:
        raise InputError(f"{argument} must fit q, of shape {q.shape}, got shape {other.shape}") from None
    return first, second
