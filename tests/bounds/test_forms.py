"""Maurer's, McAllester's and Catoni's bounds: by hand, against each other, and where they are equalities."""

from fractions import Fraction
from math import comb, exp, inf, log, sqrt

import mpmath
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from hesscope.bounds import (
    SCALES,
    catoni_bound,
    confidence_cost,
    kl_inverse,
    least_samples,
    maurer_bound,
    mcallester_bound,
)
from hesscope.core.errors import InputError

CASES = [
    (risk, kl, n, delta)
    for risk in (0.0, 1e-3, 0.03, 0.2, 0.5, 0.9, 1.0)
    for kl in (0.0, 5.0, 4000.0)
    for n in (1, 50, 40_000)
    for delta in (0.05, 1e-6)
]


@pytest.mark.parametrize("n", [*range(1, 25), 100, 1000])
def test_maurers_constant_holds_for_every_n(n):
    """xi(n) = sum_k C(n, k) (k/n)^k (1 - k/n)^(n - k) <= 2 sqrt(n): proven for n >= 8, counted exactly below."""
    xi = sum(Fraction(comb(n, k) * k**k * (n - k) ** (n - k), n**n) for k in range(n + 1))
    assert xi**2 <= 4 * n
    assert n > 1 or xi == 2  # at n = 1 nothing is to spare


@pytest.mark.parametrize(("risk", "kl", "n", "delta"), CASES)
def test_maurer_by_hand(risk, kl, n, delta):
    """The bound is where kl(risk || p) reaches the right-hand side, in 50 digits."""
    bound = maurer_bound(risk, kl, n, delta)
    assert isinstance(bound, float) and risk <= bound <= 1
    with mpmath.workdps(50):
        right = (kl + mpmath.log(2 * mpmath.sqrt(n) / mpmath.mpf(delta))) / n
        q, reached = mpmath.mpf(risk), []
        for p in (mpmath.mpf(bound) * (1 - mpmath.mpf("1e-12")), mpmath.mpf(bound) * (1 + mpmath.mpf("1e-12"))):
            terms = [a * mpmath.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0 and b > 0]
            reached.append(sum(terms))
        assert risk == 1 or reached[0] <= right
        assert bound * (1 + 1e-12) >= 1 or reached[1] >= right


@pytest.mark.parametrize(("risk", "kl", "n", "delta"), CASES)
def test_mcallester_by_hand_and_above_maurer(risk, kl, n, delta):
    bound = mcallester_bound(risk, kl, n, delta)
    assert bound == pytest.approx(min(1.0, risk + sqrt((kl + log(2 * sqrt(n) / delta)) / (2 * n))), rel=1e-14)
    assert bound >= maurer_bound(risk, kl, n, delta) * (1 - 1e-14)


@pytest.mark.parametrize(("risk", "kl", "n", "delta"), CASES)
def test_catoni_by_hand(risk, kl, n, delta):
    bound = catoni_bound(risk, kl, n, delta)
    K = len(SCALES)
    with mpmath.workdps(50):
        by_scale = [
            (1 - mpmath.exp(-s * mpmath.mpf(risk) - (kl + mpmath.log(K / mpmath.mpf(delta))) / n))
            / (1 - mpmath.exp(-s))
            for s in map(mpmath.mpf, SCALES)
        ]
        assert bound == pytest.approx(float(min(1, *by_scale)), rel=1e-13)


def one_scale(risk, nats):
    """Catoni's bound of one scale, as the function of ln s that is to be minimized, for nats = (kl + ln(1/delta))/n."""
    n, delta = 1000, exp(-0.5)
    return lambda log_s: catoni_bound(risk, 1000 * nats - 0.5, n, delta, scales=[exp(log_s)])


@pytest.mark.parametrize("risk", [1e-4, 0.01, 0.1, 0.4, 0.7])
@pytest.mark.parametrize("nats", [6e-4, 0.01, 0.2, 1.0])
def test_catoni_at_the_best_scale_is_the_kl_inverse(risk, nats):
    """inf over s > 0 of Catoni's bound with ln(1/delta) is kl_inverse(risk, (kl + ln(1/delta))/n) exactly."""
    p = kl_inverse(risk, nats)
    best = log(log(p * (1 - risk) / (risk * (1 - p))))  # where the derivative vanishes
    bound = one_scale(risk, nats)
    assert bound(best) == pytest.approx(p, rel=1e-12)
    found = minimize_scalar(bound, bounds=(best - 2, best + 2), method="bounded", options={"xatol": 1e-9})
    assert found.fun == pytest.approx(p, rel=1e-12)
    assert bound(best - 0.1) > p < bound(best + 0.1)


@pytest.mark.parametrize("risk", [0.0, 1e-3, 0.03, 0.2])
@pytest.mark.parametrize("kl", [20.0, 500.0, 4000.0])
def test_catonis_grid_costs_little(risk, kl):
    """Above the same with the best scale and no union bound, by the union's ln K and 2 % of the gap for the grid."""
    n, delta = 40_000, 0.05
    best = kl_inverse(risk, (kl + log(1 / delta)) / n)
    with_union = kl_inverse(risk, (kl + log(len(SCALES) / delta)) / n)
    assert best < with_union <= catoni_bound(risk, kl, n, delta) * (1 + 1e-12)
    assert catoni_bound(risk, kl, n, delta) <= with_union + 0.02 * (with_union - risk)


def test_scales_are_few_and_geometric():
    assert (SCALES[0], SCALES[-1], len(SCALES)) == (2**-10, 2**5, 31)
    np.testing.assert_allclose(np.diff(np.log(SCALES)), log(2) / 2, rtol=1e-12)


def test_infinite_divergence_bounds_nothing():
    assert maurer_bound(0.1, inf, 100, 0.05) == mcallester_bound(0.1, inf, 100, 0.05) == 1
    assert catoni_bound(0.1, inf, 100, 0.05) == 1


@pytest.mark.parametrize("form", [maurer_bound, mcallester_bound, catoni_bound])
def test_bounds_rise_with_what_is_worse(form):
    base = form(0.1, 50.0, 1000, 0.05)
    assert base < form(0.101, 50.0, 1000, 0.05)
    assert base < form(0.1, 50.5, 1000, 0.05)
    assert base < form(0.1, 50.0, 990, 0.05)
    assert base < form(0.1, 50.0, 1000, 0.04)


@pytest.mark.parametrize("cost", [0.0, 4.8, 14.4, 500.0])
@pytest.mark.parametrize("vacuous", [0.01, 0.5, 0.9, 0.999999])
def test_least_samples_is_the_first_that_is_enough(cost, vacuous):
    n = least_samples(cost, 0.05, vacuous)
    assert maurer_bound(0.0, cost, n, 0.05) < vacuous
    assert n == 1 or maurer_bound(0.0, cost, n - 1, 0.05) >= vacuous


@pytest.mark.parametrize("form", [maurer_bound, mcallester_bound, catoni_bound])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1, 1.0, 10, 0.05), r"risk must be a number in \[0, 1\], got -0.1"),
        ((float("nan"), 1.0, 10, 0.05), r"risk must be a number in \[0, 1\], got nan"),
        (("0", 1.0, 10, 0.05), r"risk must be a number in \[0, 1\], got '0'"),
        ((0.1, -1.0, 10, 0.05), "kl must be a number of at least 0, got -1.0"),
        ((0.1, float("nan"), 10, 0.05), "kl must be a number of at least 0, got nan"),
        ((0.1, 1.0, 0, 0.05), "n must be a positive integer, got 0"),
        ((0.1, 1.0, 10.5, 0.05), "n must be a positive integer, got 10.5"),
        ((0.1, 1.0, 10, 0.0), r"delta must be a number in \(0, 1\), got 0.0"),
        ((0.1, 1.0, 10, 1.0), r"delta must be a number in \(0, 1\), got 1.0"),
    ],
)
def test_bad_input(form, arguments, message):
    with pytest.raises(InputError, match=message):
        form(*arguments)


def test_bad_scales():
    with pytest.raises(InputError, match="scales must contain at least one number"):
        catoni_bound(0.1, 1.0, 10, 0.05, scales=[])
    with pytest.raises(InputError, match="scales must be a positive, finite number, got 0"):
        catoni_bound(0.1, 1.0, 10, 0.05, scales=[1.0, 0])


def test_confidence_cost():
    assert confidence_cost(40_000, 0.05) == pytest.approx(log(2 * 200 / 0.05), rel=1e-14)
