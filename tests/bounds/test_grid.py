"""Grids of prior variances: what they contain, what they cost, what is nearest, and that the cost is what is needed."""

from math import log

import numpy as np
import pytest

from hesscope.bounds import DEFAULT_GRID, VarianceGrid, diagonal_gaussian_kl
from hesscope.core.errors import InputError


def test_geometric():
    grid = VarianceGrid.geometric(1e-4, 1.0, 5)
    np.testing.assert_allclose(grid.values, [1e-4, 1e-3, 1e-2, 1e-1, 1.0], rtol=1e-14)
    assert len(grid) == 5
    assert grid == VarianceGrid(np.array(grid.values))  # any sequence, and equal grids are equal


def test_default():
    assert (len(DEFAULT_GRID), DEFAULT_GRID.values[0], DEFAULT_GRID.values[-1]) == (2315, 1e-8, 1e2)
    np.testing.assert_allclose(np.diff(np.log(DEFAULT_GRID.values)), np.log(1.01), rtol=2e-4)


def test_default_is_fine_enough():
    """With the best variance halfway between two of the grid: 6e-6 nats a parameter, as its comment says."""
    best = float(np.sqrt(DEFAULT_GRID.values[1200] * DEFAULT_GRID.values[1201]))
    v = best * np.array([1e-3, 0.1, 0.9])
    shift = np.sqrt(best - v)  # the best variance is the mean of v + shift^2
    lost = [diagonal_gaussian_kl(shift, v, prior).total for prior in (DEFAULT_GRID.values[1200], best)]
    assert (lost[0] - lost[1]) / 3 == pytest.approx(6.2e-6, rel=0.05)


@pytest.mark.parametrize("groups", [1, 3, 20])
def test_cost_is_the_logarithm_of_the_number_of_priors(groups):
    assert VarianceGrid.geometric(0.1, 1.0, 7).cost(groups) == pytest.approx(log(7**groups), rel=1e-14)


def test_one_variance_costs_nothing():
    assert VarianceGrid([0.5]).cost(3) == 0


def test_nearest_in_log_distance():
    grid = VarianceGrid([0.01, 1.0, 100.0])
    assert [grid.nearest(value) for value in (1e-9, 0.09, 0.11, 1.0, 9.0, 11.0, 1e9)] == [0, 0, 1, 1, 1, 2, 2]
    values = DEFAULT_GRID.values
    assert [DEFAULT_GRID.nearest(value) for value in values] == list(range(len(values)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VarianceGrid([]), r"values must be a non-empty one-dimensional sequence, got shape \(0,\)"),
        (lambda: VarianceGrid([[1.0]]), r"values must be a non-empty one-dimensional sequence, got shape \(1, 1\)"),
        (lambda: VarianceGrid([0.0, 1.0]), "values must be positive, ascending and distinct"),
        (lambda: VarianceGrid([1.0, 1.0]), "values must be positive, ascending and distinct"),
        (lambda: VarianceGrid([2.0, 1.0]), "values must be positive, ascending and distinct"),
        (lambda: VarianceGrid([1.0, np.inf]), "values must be finite, got inf"),
        (lambda: VarianceGrid.geometric(0.0, 1.0, 5), "low must be a positive, finite number, got 0.0"),
        (lambda: VarianceGrid.geometric(1.0, np.inf, 5), "high must be a positive, finite number, got inf"),
        (
            lambda: VarianceGrid.geometric(1.0, 0.1, 5),
            "a geometric grid needs low < high and a number of at least 2, got 1.0",
        ),
        (lambda: VarianceGrid.geometric(0.1, 1.0, 1), "a geometric grid needs low < high and a number of at least 2"),
        (lambda: VarianceGrid.geometric(0.1, 1.0, 2.5), "number must be a positive integer, got 2.5"),
        (lambda: DEFAULT_GRID.cost(0), "groups must be a positive integer, got 0"),
        (lambda: DEFAULT_GRID.nearest(0.0), "value must be a positive, finite number, got 0.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
