"""Samples of single columns: their matrix, and errors of what follows from it, against plain formulas."""

import numpy as np
import pytest

from hesscope.estimate.column_samples import ColumnSamples

BLOCKS, COUNTS = 4, (5, 2, 7, 1)


def columns(mirrored=True, seed=0):
    generator = np.random.default_rng(seed)
    source = np.repeat(np.arange(BLOCKS), COUNTS)
    weights = generator.random(len(source))
    weights /= np.bincount(source, weights)[source]
    return ColumnSamples(generator.random((len(source), BLOCKS)), weights, source, source, mirrored)


def naive_variance(drawn, coefficients):
    """Variance of sum_ij c_ij E_ij, written out source by source."""
    total = 0.0
    for j in range(BLOCKS):
        mine = drawn.source == j
        seen = coefficients[:, j] + (coefficients[j] if drawn.mirrored else 0.0)
        if mine.sum() > 1:
            total += np.var(drawn.values[mine] @ seen, ddof=1) * np.sum(drawn.weights[mine] ** 2)
    return total


@pytest.mark.parametrize("mirrored", [True, False])
def test_matrix_and_variances(mirrored):
    drawn = columns(mirrored)
    half = np.stack([drawn.weights[drawn.source == j] @ drawn.values[drawn.source == j] for j in range(BLOCKS)], axis=1)
    assert np.allclose(drawn.matrix(), half + half.T if mirrored else half)
    variance = drawn.spread().variance
    for i in range(BLOCKS):
        for j in range(BLOCKS):
            unit = np.zeros((BLOCKS, BLOCKS))
            unit[i, j] = 1.0
            assert variance[i, j] == pytest.approx(naive_variance(drawn, unit))
            assert drawn.spread_of_sum(unit).degrees == pytest.approx(drawn.spread().degrees[i, j])
    coefficients = np.random.default_rng(1).random((BLOCKS, BLOCKS))
    assert drawn.spread_of_sum(coefficients).variance == pytest.approx(naive_variance(drawn, coefficients))


def test_degrees_of_freedom_are_satterthwaites():
    drawn = columns()
    degrees = drawn.spread().degrees
    assert degrees[0, 0] == pytest.approx(4)
    assert np.isinf(degrees[3, 3])  # one sample: known exactly
    assert degrees[0, 3] == pytest.approx(4)  # only column 0 is random
    one, other = (
        np.var(drawn.values[drawn.source == j, i], ddof=1) * np.sum(drawn.weights[drawn.source == j] ** 2)
        for i, j in ((2, 0), (0, 2))
    )
    assert degrees[0, 2] == pytest.approx((one + other) ** 2 / (one**2 / 4 + other**2 / 6))


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("groups", [[[0, 2], [1, 3]], [[3], [0, 1]], [[0, 1, 2, 3]]])
def test_groups(mirrored, groups):
    drawn = columns(mirrored)
    indicator = np.zeros((len(groups), BLOCKS))
    for row, group in enumerate(groups):
        indicator[row, group] = 1.0
    merged = drawn.grouped(indicator)
    assert np.allclose(merged.matrix(), indicator @ drawn.matrix() @ indicator.T)
    for g in range(len(groups)):
        for h in range(len(groups)):
            sums = np.outer(indicator[g], indicator[h])
            assert merged.spread().variance[g, h] == pytest.approx(naive_variance(drawn, sums))


def test_equal_samples_have_no_variance_at_all():
    values = np.full((3, 1), 0.1)
    drawn = ColumnSamples(values, np.full(3, 1 / 3), np.zeros(3, dtype=int), np.zeros(3, dtype=int), True)
    assert drawn.spread().variance[0, 0] == 0.0


def test_variances_of_single_samples():
    drawn = columns()
    coefficients = np.random.default_rng(2).random((BLOCKS, BLOCKS))
    sums, own = drawn.single_variances(coefficients)
    for j in range(3):
        mine = drawn.values[drawn.source == j]
        assert sums[j] == pytest.approx(np.var(mine @ (coefficients[:, j] + coefficients[j]), ddof=1))
        assert own[j] == pytest.approx(np.var(2 * mine[:, j], ddof=1))
