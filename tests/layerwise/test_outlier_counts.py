"""Outliers that were planted beside a bulk of the law that the criterion names, and beside others."""

import numpy as np
import pytest

from hesscope.layerwise.outlier_counts import beyond_edge, largest_gap
from hesscope.theory import SpectralLaw

D, N, KNOWN = 200, 600, 40


def wishart(seed, planted=(), d=D, n=N):
    """Eigenvalues of a sample covariance whose population has these eigenvalues beside ones, descending."""
    scales = np.sqrt(np.concatenate([planted, np.ones(d - len(planted))]))
    X = scales[:, None] * np.random.default_rng(seed).standard_normal((d, n))
    return np.linalg.eigvalsh(X @ X.T / n)[::-1]


def count(values, known=KNOWN):
    return beyond_edge(values[:known], sums(values[known:]))


def sums(values):
    return [(values**order).sum() for order in (1, 2, 3)]


PLANTED = np.r_[100.0, 60, 12, 9, 7, 6, 5.5, 5, 4.5]


def test_planted_outliers_are_counted_by_the_edge():
    """Nine of them, of very different sizes, found in all but the few per cent that the level allows."""
    found = [count(wishart(seed, PLANTED)).count for seed in range(40)]
    assert found.count(9) >= 36
    assert set(found) <= {9, 10}


def test_a_bulk_alone_has_no_outliers():
    """At the 1 % level, and at several positions: few of 200 exceed the threshold, more than none would the edge."""
    found = [count(wishart(seed)).count for seed in range(200)]
    assert found.count(0) >= 190


def beyond_law(law, size):
    """The criterion for one far outlier and `size` eigenvalues with the law's own moments, one of which is known."""
    inside = law.quantile(0.5)
    rest = [size * law.moment(order) - inside**order for order in (1, 2, 3)]
    return beyond_edge([1e3 * law.support[-1][1], inside], rest)


@pytest.mark.parametrize("gamma", [0.1, 1 / 3, 0.9, 3.0])
def test_the_edge_is_that_of_the_spectral_law(gamma):
    """Moments of the law in place of samples: its upper end, for narrow and wide bulks, zeros in them or not."""
    law = SpectralLaw([2.0], gamma)
    found = beyond_law(law, 500)
    assert found.count == 1
    assert abs(found.edge / law.support[-1][1] - 1) < 1e-9
    # Johnstone's scale, with n = d / gamma samples of d dimensions.
    d, n = 500, 500 / gamma
    scale = 2 / n * (d**0.5 + n**0.5) * (d**-0.5 + n**-0.5) ** (1 / 3)
    assert abs((found.threshold - found.edge) / (2.02 * scale) - 1) < 1e-9


def test_the_threshold_is_exceeded_by_one_in_a_hundred():
    """Of 300 largest eigenvalues of bulks; their law's edge alone would be exceeded by one in six (Tracy-Widom)."""
    d, n = 60, 120
    reference = beyond_law(SpectralLaw([1.0], d / n), d)
    largest = np.array([wishart(seed, d=d, n=n)[0] for seed in range(300)])
    assert np.mean(largest > reference.threshold) < 0.03
    assert np.mean(largest > reference.edge) > 0.05


def test_neither_scale_nor_zero_eigenvalues_matter():
    values = wishart(3, PLANTED)
    truth = count(values)
    for scale in (1e-14, 1e14):
        found = count(values * scale)
        assert found.count == truth.count
        assert np.allclose([found.edge, found.threshold], [truth.edge * scale, truth.threshold * scale], rtol=1e-9)
    padded = count(np.r_[values, np.zeros(3 * D)])
    assert (padded.count, padded.edge) == (truth.count, pytest.approx(truth.edge))


def test_no_bulk_no_count():
    """A power law has no edge; an indefinite remainder no such law; and what is zero no bulk."""
    assert count(np.arange(1.0, 400) ** -1.5).count is None
    assert beyond_edge([3.0, 2.0, 1.0], [-1.0, 5.0, 0.1]).count is None
    assert beyond_edge([3.0, 1e-9], [0.0, 0.0, 0.0]).count is None
    assert beyond_edge([0.0, 0.0], [0.0, 0.0, 0.0]).count is None


def test_the_largest_gap():
    found = largest_gap([10.0, 9, 8, 2, 1.9, 1], 1e-12)
    assert (found.count, found.ratio, found.searched) == (3, 4.0, 5)
    assert largest_gap([5.0, 5, 5], 1e-12).count == 0
    assert largest_gap([5.0], 1e-12).count == 0


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_a_drop_to_rounding_is_a_gap_and_nothing_after_it_is(scale):
    values = scale * np.array([4.0, 3, 1, 1e-17, -1e-18, 1e-30])
    assert largest_gap(values, 1e-15 * scale).count == 3


def test_of_a_whole_spectrum_the_upper_half_is_searched():
    """The largest ratio may be the last one; most eigenvalues are no outliers."""
    values = [8.0, 7.0, 3.0, 2.5, 2.0, 0.01]
    assert largest_gap(values, 1e-12).count == 5
    found = largest_gap(values, 1e-12, whole=True)
    assert (found.count, found.searched) == (2, 3)
