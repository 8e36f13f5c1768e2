"""The Bernoulli kl and its inverses against arithmetic of many digits, over many orders of magnitude."""

import mpmath
import numpy as np
import pytest

from hesscope.bounds import bernoulli, bernoulli_kl, kl_inverse
from hesscope.core.errors import InputError

TINY = [10.0**-exponent for exponent in (300, 200, 100, 50, 30, 20)]
MIDDLE = [1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 0.03, 0.3, 0.5, 0.7, 0.97]
NEAR_ONE = [1 - 10.0**-exponent for exponent in (3, 6, 9, 12, 15)]
RISKS = [0.0, *TINY, *MIDDLE, *NEAR_ONE, 1.0]
NATS = [1e-300, 1e-30, 1e-15, 1e-14, 1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0, 100.0, 690.0, 1e3]


@pytest.fixture(autouse=True)
def many_digits():
    with mpmath.workdps(700):
        yield


def exact_kl(q, p):
    """By its definition, in 700 digits, of masses that are exactly the given numbers."""
    q, p = mpmath.mpf(q), mpmath.mpf(p)
    total = mpmath.mpf(0)
    for a, b in ((q, p), (1 - q, 1 - p)):
        if a > 0 and b <= 0:
            return mpmath.inf
        total += a * mpmath.log(a / b) if a > 0 else 0
    return total


def within(p, q, c, side, tolerance):
    """Whether the solution of kl(q || p') = c on that side of q lies within a relative `tolerance` of p.

    kl(q || p) is monotone on either side of q, so that its value at both ends decides; an end beyond q or beyond [0, 1]
    is on the right side of the solution whatever the value there would be.
    """
    p, q, c = mpmath.mpf(p), mpmath.mpf(q), mpmath.mpf(c)
    sign = 1 if side == "upper" else -1
    inner, outer = p * (1 - sign * tolerance), p * (1 + sign * tolerance)
    return (sign * (inner - q) <= 0 or exact_kl(q, inner) <= c) and (not 0 < outer < 1 or exact_kl(q, outer) >= c)


@pytest.mark.parametrize("side", ["upper", "lower"])
def test_inverse_is_accurate_over_all_magnitudes(side):
    """To 1e-12 of p, for q from 1e-300 to 1 - 1e-15 and c from 1e-300 to 1000."""
    checked = 0
    for q in RISKS:
        for c in NATS:
            p = kl_inverse(q, c, side)
            assert isinstance(p, float)
            if side == "upper":
                assert q <= p <= 1, (q, c, p)
            else:
                assert 0 <= p <= q, (q, c, p)
                if p < 1e-300:  # soon float64 has no twelve digits any more; the truth must be there, too
                    assert q == 0 or exact_kl(q, 1.01e-300) <= c, (q, c, p)
                    continue
            assert within(p, q, c, side, mpmath.mpf("1e-12")), (q, c, p)
            checked += 1
    assert checked > (350 if side == "upper" else 150)


def test_inverse_where_it_has_a_closed_form():
    c = np.array([1e-300, 1e-15, 1e-3, 1.0, 30.0])
    np.testing.assert_allclose(kl_inverse(0.0, c), -np.expm1(-c), rtol=1e-14)
    np.testing.assert_allclose(kl_inverse(1.0, c, side="lower"), np.exp(-c), rtol=1e-14)
    # Of a fair coin kl = -ln(4 p (1 - p)) / 2.
    np.testing.assert_allclose(kl_inverse(0.5, c), (1 + np.sqrt(-np.expm1(-2 * c))) / 2, rtol=1e-14)


@pytest.mark.parametrize("q", RISKS)
def test_inverse_at_the_ends_of_c(q):
    assert kl_inverse(q, 0.0) == kl_inverse(q, 0.0, side="lower") == q
    assert kl_inverse(q, np.inf) == 1
    assert kl_inverse(q, np.inf, side="lower") == 0


def test_inverse_of_random_numbers_inverts(monkeypatch):
    """Two hundred thousand pairs, in few steps: Newton's method from where it starts needs at most 9."""
    monkeypatch.setattr(bernoulli, "MOST_STEPS", 10)
    random = np.random.default_rng(0)
    q = np.exp(random.uniform(-30, 0, 200_000))
    q[::2] = 1 - q[::2]
    c = np.exp(random.uniform(-25, 5, q.size))
    for side in ("upper", "lower"):
        p = kl_inverse(q, c, side)
        inside = (p > 1e-300) & (p < 0.9)  # nearer to 1, p does not determine 1 - p
        assert inside.sum() > 50_000
        p, risk, nats = p[inside], q[inside], c[inside]
        rounding = np.abs(p - risk) / (1 - p)  # what kl changes by if p changes by its own size
        np.testing.assert_array_less(np.abs(bernoulli_kl(risk, p) - nats), 1e-14 * (rounding + nats))


def test_an_inverse_that_does_not_settle_says_so(monkeypatch):
    monkeypatch.setattr(bernoulli, "MOST_STEPS", 2)
    with pytest.raises(RuntimeError, match="the inverse of the Bernoulli kl did not settle within 2 steps"):
        kl_inverse(0.1, 0.3)


def test_inverse_broadcasts_and_orders():
    q, c = np.array([[0.0], [0.2], [0.9], [1.0]]), np.array([0.0, 1e-6, 0.3, 7.0])
    for side, sign in (("upper", 1), ("lower", -1)):
        p = kl_inverse(q, c, side)
        assert p.shape == (4, 4) and p.dtype == np.float64
        assert (sign * np.diff(p, axis=1) >= 0).all()
        assert (np.diff(p, axis=0) >= 0).all()
        each = [[kl_inverse(float(row[0]), float(nats), side) for nats in c] for row in q]
        np.testing.assert_array_equal(p, each)


def test_kl_is_accurate_over_all_magnitudes():
    """To 1e-14 of the value; near the diagonal, too, where the terms of the definition cancel to 1e-26."""
    pairs = [(q, p) for q in RISKS for p in RISKS]
    for q in (1e-300, 1e-9, 0.01, 0.25, 0.5, 0.75, 0.99, 1 - 1e-9):
        pairs += [
            (q, q + sign * step * min(q, 1 - q)) for step in (1e-13, 1e-9, 1e-4, 0.1, 0.49, 0.51) for sign in (1, -1)
        ]
    found = bernoulli_kl(*np.array(pairs).T)
    for (q, p), value in zip(pairs, found, strict=True):
        truth = exact_kl(q, p)
        if truth == mpmath.inf:
            assert value == np.inf, (q, p)
        else:
            # Below 1e-308 numbers have fewer digits.
            assert abs(mpmath.mpf(float(value)) - truth) <= mpmath.mpf("1e-14") * truth + mpmath.mpf("1e-320"), (
                q,
                p,
                value,
            )


def test_kl_at_the_edges():
    assert bernoulli_kl(0.0, 0.0) == bernoulli_kl(1.0, 1.0) == bernoulli_kl(0.3, 0.3) == 0
    assert (
        bernoulli_kl(0.0, 1.0) == bernoulli_kl(1.0, 0.0) == bernoulli_kl(0.5, 0.0) == bernoulli_kl(0.5, 1.0) == np.inf
    )
    assert bernoulli_kl(0.0, 0.5) == pytest.approx(np.log(2), rel=1e-15)
    assert isinstance(bernoulli_kl(0.2, 0.3), float)
    assert bernoulli_kl(np.array([[0.1], [0.2]]), np.array([0.3, 0.4, 0.5])).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_inverse(-0.1, 1.0), r"q must be in \[0, 1\], got -0.1"),
        (lambda: kl_inverse(np.array([0.5, 1.5]), 1.0), r"q must be in \[0, 1\], got 1.5"),
        (lambda: kl_inverse(np.nan, 1.0), "q must not contain nan"),
        (lambda: kl_inverse("a", 1.0), "q must be real numbers, got str"),
        (lambda: kl_inverse(0.5j, 1.0), "q must be real numbers, got complex"),
        (lambda: kl_inverse(0.5, -1e-9), "c must be at least 0, got -1e-09"),
        (lambda: kl_inverse(0.5, np.nan), "c must not contain nan"),
        (
            lambda: kl_inverse(0.5, 1.0, side="uper"),
            "side must be one of 'upper', 'lower', got 'uper', did you mean 'upper'",
        ),
        (lambda: kl_inverse(np.zeros(2), np.zeros(3)), r"c must fit q, of shape \(2,\), got shape \(3,\)"),
        (lambda: bernoulli_kl(0.5, 1.1), r"p must be in \[0, 1\], got 1.1"),
        (lambda: bernoulli_kl(np.zeros(2), np.zeros(3)), r"p must fit q, of shape \(2,\), got shape \(3,\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
