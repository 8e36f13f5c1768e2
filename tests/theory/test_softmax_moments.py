"""Softmax moments against MATH.md's numbers, identities, and quadratures over the logits themselves."""

import time
from math import comb, exp, lgamma

import numpy as np
import pytest

from hesscope.core.errors import InputError
from hesscope.theory.softmax_moments import pair_moment, softmax_moment, variance_moment

SCALES = [0.1, 0.3, 1.0, 2.0, 3.0]
CLASSES = [2, 3, 10, 1000, 131072, 10**6]

# MATH.md, section 4.2, as printed: C -> E[p1 p2], E[p1^2 p2^2], E[p^2].
TABLE = {
    2: ("0.181580923", "0.0370266121", "0.318419077"),
    10: ("0.00894791785", "2.23112209e-4", "0.0194687394"),
    100: ("9.84304566e-5", "5.72574392e-8", "2.55384799e-4"),
    1000: ("9.98300098e-7", "7.15281867e-12", "2.69820189e-6"),
}


@pytest.mark.parametrize("C", TABLE)
def test_table_of_math_md(C):
    found = [softmax_moment(exponents, C) for exponents in ((1, 1), (2, 2), (2,))]
    assert [f"{value:.8e}" for value in found] == [f"{float(text):.8e}" for text in TABLE[C]]


def logistic_normal(a, b, scale):
    """E[p^a (1 - p)^b] at C = 2: one integral over o_1 - o_2 ~ N(0, 2 scale^2)."""
    step = min(0.05, 0.1 * scale)
    x = np.arange(-12 * 2**0.5 * scale, 12 * 2**0.5 * scale, step)
    density = np.exp(-((x / scale) ** 2) / 4) / (scale * (4 * np.pi) ** 0.5)
    return step * float(np.sum(density * np.exp(-a * np.logaddexp(0, -x) - b * np.logaddexp(0, x))))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 2), (4, 4), (4, 1), (4, 0), (3, 0)])
def test_two_classes_are_logistic_normal(a, b, scale):
    truth = logistic_normal(a, b, scale)
    assert softmax_moment((a, b) if b else (a,), 2, scale) == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("exponents", [(1,), (1, 1, 1), (2, 1), (4, 3, 1)])
def test_three_classes_against_two_dimensions(exponents, scale):
    """Trapezoidal rule over u = o_1 - o_3 and v = o_2 - o_3, whose covariance is scale^2 (I + 1 1^T)."""
    step = min(0.25, 0.4 * scale)
    x = np.arange(-9 * 2**0.5 * scale, 9 * 2**0.5 * scale, step)
    u, v = x[:, None], x[None, :]
    density = np.exp(-(u**2 + v**2 - u * v) / (3 * scale**2)) / (2 * np.pi * 3**0.5 * scale**2)
    total = np.logaddexp(np.logaddexp(u, v), 0.0)
    a, b, c = (*exponents, 0, 0)[:3]
    truth = step**2 * float(np.sum(density * np.exp(a * u + b * v - (a + b + c) * total)))
    assert softmax_moment(exponents, 3, scale) == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("C", CLASSES)
def test_identities(C, scale):
    assert softmax_moment((1,), C, scale) == pytest.approx(1 / C, rel=1e-11)
    second = softmax_moment((2,), C, scale) * C + softmax_moment((1, 1), C, scale) * C * (C - 1)
    assert second == pytest.approx(1, rel=1e-11)
    # The four-fold multinomial expansion of (p_1 + ... + p_C)^4 = 1.
    terms = {(4,): 1, (3, 1): 4, (2, 2): 3, (2, 1, 1): 6, (1, 1, 1, 1): 1}
    total = 0.0
    for parts, orders in terms.items():
        if len(parts) <= C:
            total += orders * np.prod([float(C - i) for i in range(len(parts))]) * softmax_moment(parts, C, scale)
    assert total == pytest.approx(1, rel=1e-11)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("C", [2, 3, 10, 131072])
def test_moments_of_the_class_weights(C, scale):
    p = [softmax_moment((a,), C, scale) for a in range(1, 5)]
    assert variance_moment(1, C, scale) == pytest.approx((C - 1) * softmax_moment((1, 1), C, scale), rel=1e-12)
    # The differences cancel at C = 2, no more than by a factor of a thousand.
    assert variance_moment(1, C, scale) == pytest.approx(p[0] - p[1], rel=1e-9)
    assert variance_moment(2, C, scale) == pytest.approx(p[1] - 2 * p[2] + p[3], rel=1e-9)
    assert pair_moment(2, C, scale) == softmax_moment((2, 2), C, scale)
    if C == 2:
        for order in (1, 2, 3, 4):
            assert variance_moment(order, 2, scale) == pytest.approx(pair_moment(order, 2, scale), rel=1e-12)
            assert variance_moment(order, 2, scale) == pytest.approx(logistic_normal(order, order, scale), rel=1e-10)


def test_static_force_of_the_linear_model():
    """C^2 r of MATH.md, section 4.3, to all its digits, but for C = 100.

    There MATH.md prints 1.83612693 and 2.07641525; these are from Gauss-Hermite and adaptive quadrature.
    """
    printed = {
        (0.5, 10): 1.65963476, (0.5, 100): 1.83612695, (0.5, 1000): 1.96718088, (0.5, 131072): 1.98974569,
        (1.0, 10): 1.82563273, (1.0, 100): 2.07640415, (1.0, 1000): 2.22985028, (1.0, 131072): 2.25595038,
    }  # fmt: skip
    for (gamma, C), value in printed.items():
        off = pair_moment(1, C) ** 2 + gamma * pair_moment(2, C)
        on = variance_moment(1, C) ** 2 + gamma * variance_moment(2, C)
        assert C**2 * off / on == pytest.approx(value, abs=5.1e-9)


def test_limits_of_the_scale():
    assert softmax_moment((2, 1), 7, 0.0) == pytest.approx(7**-3, rel=1e-14)
    assert softmax_moment((2, 1), 7, 1e-9) == pytest.approx(7**-3, rel=1e-12)
    # Nearly one-hot: E p = 1/C from p in {0, 1}, E[p^3] just below.
    assert softmax_moment((1,), 5, 30.0) == pytest.approx(1 / 5, rel=1e-10)
    assert 0.9 / 5 < softmax_moment((3,), 5, 30.0) < 1 / 5


def test_high_orders_against_a_beta_integral():
    """At C = 2 and tiny scale p is 1/2 + N(0, s^2 / 8): the mean of p^50 (1-p)^50 to second order in s."""
    s = 1e-3
    assert softmax_moment((50, 50), 2, s) == pytest.approx(exp(-100 * np.log(2)) * (1 - 50 * s**2), rel=1e-8)
    many = softmax_moment((1,) * 10, 10, 1.0)
    assert 0 < many < 10.0**-10
    assert comb(10, 5) * exp(lgamma(6)) * many < 1


@pytest.mark.parametrize("C", [10, 10**6])
def test_it_takes_milliseconds(C):
    """Target 50 ms at scales up to 3; the limit allows for a busy machine."""
    softmax_moment((1,), C)
    begin = time.perf_counter()
    for _ in range(5):
        softmax_moment((4, 3, 2, 1), C, 3.0)
    assert (time.perf_counter() - begin) / 5 < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 0), 10), "exponents must be a positive integer, got 0"),
        (((1.5,), 10), "exponents must be a positive integer, got 1.5"),
        ((3, 10), "exponents must be a tuple of positive integers, got 3"),
        (((), 10), "exponents must name between 1 and classes = 10 classes, got 0"),
        (((1, 1, 1), 2), "exponents must name between 1 and classes = 2 classes, got 3"),
        (((1,), 1), "classes must be at least 2, got 1"),
        (((1,), 2.5), "classes must be a positive integer, got 2.5"),
        (((1,), 2, -1.0), "scale must be a number from 0 to 30, got -1.0"),
        (((1,), 2, float("nan")), "scale must be a number from 0 to 30, got nan"),
        (((1,), 2, 31), "scale must be a number from 0 to 30, got 31"),
        (((1,), 2, "1"), "scale must be a number from 0 to 30, got '1'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InputError) as caught:
        softmax_moment(*arguments)
    assert str(caught.value) == message


def test_what_the_weights_refuse():
    for moment in (pair_moment, variance_moment):
        with pytest.raises(InputError, match="order must be a positive integer, got 0"):
            moment(0, 10)
        with pytest.raises(InputError, match="classes must be at least 2, got 1"):
            moment(1, 1)
