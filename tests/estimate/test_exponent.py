"""Exponents: known power laws, coverage of the intervals, bad input."""

import numpy as np
import pytest

import hesscope as hs
from hesscope.estimate.exponent import fit_exponent

CLASSES = np.array([10, 30, 100, 300, 1000])


def test_a_power_law_is_found_exactly():
    ratio = 3.0 * CLASSES[:, None] ** -1.7 * np.ones((5, 4))
    fit = fit_exponent(CLASSES, ratio, np.ones((5, 4)))
    assert (fit.exponent, fit.low, fit.high) == pytest.approx((-1.7, -1.7, -1.7))


def test_the_prediction_takes_the_finite_classes_out():
    bent = 2.0 * CLASSES**-2.0 * (1 - 4 / (CLASSES + 9))
    diagonal = np.linspace(1, 2, 3) * np.ones((5, 1))
    off = bent[:, None] * diagonal
    assert abs(fit_exponent(CLASSES, off, diagonal).exponent + 2) > 0.03
    fit = fit_exponent(CLASSES, off, diagonal, predicted=5 * bent, asymptotic=-2.0)
    assert fit.exponent == pytest.approx(-2)
    assert fit.contains(fit.exponent)


def test_the_prediction_s_error_widens_the_interval():
    ones, ratio = np.ones((5, 3)), CLASSES[:, None] ** -1.0 * np.ones((5, 3))
    stderr = 0.02 / CLASSES
    fit = fit_exponent(CLASSES, ratio, ones, 1 / CLASSES, stderr, -1.0)
    x = np.log(CLASSES)
    expected = 4.302652729911275 * 0.02 / np.sqrt(((x - x.mean()) ** 2).sum())  # Student's 97.5 % point for 3 networks
    assert fit.high - fit.exponent == pytest.approx(expected)


def test_intervals_cover_the_truth():
    """500 simulated sweeps of 8 networks: lognormal energies, correlated between numerator and denominator."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(500):
        diagonal = np.exp(0.3 * rng.standard_normal((5, 8)))
        off = diagonal * CLASSES[:, None] ** -1.0 * np.exp(0.3 * rng.standard_normal((5, 8)))
        hits += fit_exponent(CLASSES, off, diagonal).contains(-1.0)
    assert 0.92 * 500 <= hits <= 0.98 * 500


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": CLASSES[:4]}, "one row for each of the 4 classes"),
        ({"classes": np.full(5, 10)}, "at least 2 numbers of classes"),
        ({"off_diagonal": np.ones((5, 1)), "diagonal": np.ones((5, 1))}, "2 networks of each, got 5 and 1"),
        ({"off_diagonal": np.zeros((5, 3))}, "off_diagonal must be positive"),
        ({"diagonal": np.full((5, 3), np.nan)}, "diagonal must be positive and finite"),
        ({"diagonal": np.ones(5)}, "2 dimensions"),
        ({"predicted": np.ones(3), "asymptotic": -1.0}, "must have 5 entries"),
        ({"predicted": np.ones(5)}, "given together"),
        ({"asymptotic": -1.0}, "given together"),
    ],
)
def test_bad_input(changes, words):
    arguments = {"classes": CLASSES, "off_diagonal": np.ones((5, 3)), "diagonal": np.ones((5, 3)), **changes}
    with pytest.raises(hs.HesscopeError, match=words):
        fit_exponent(**arguments)
