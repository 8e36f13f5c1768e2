"""Diagonals and traces of blocks: unbiased entry by entry, honest errors, O(P) memory."""

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.estimate.diagonal import diagonal
from hesscope.estimate.estimate import Estimate
from tests.estimate.spectra import SIZE, matrix, replicates
from tests.helpers import check_unbiased, relative_error

METHODS = ["hutchinson", "hutch++"]


def truth(name):
    return np.diagonal(matrix(name)).copy()


@pytest.mark.parametrize("name", ["outliers", "not_symmetric"])
def test_exact(name):
    E = diagonal(matrix(name), method="exact")
    assert relative_error(E.value, truth(name)) < 1e-13
    assert E.value.shape == E.stderr.shape == (SIZE,)
    assert not E.stderr.any()
    assert E.products == SIZE


@pytest.mark.parametrize(("method", "name", "probes"), [("hutchinson", "flat", 40), ("hutch++", "not_symmetric", 128)])
def test_every_entry_is_unbiased_and_honest(method, name, probes):
    r = replicates(diagonal, name, 270, method=method, probes=probes)
    check_unbiased(r.of("value"), r.of("stderr"), truth(name))


def test_the_same_where_few_directions_dominate():
    """The plain estimator would take thirty times as many probes to be judged here."""
    r = replicates(diagonal, "outliers", 120, method="hutch++", probes=128)
    large = truth("outliers") > np.median(truth("outliers"))
    check_unbiased(r.of("value")[:, large], r.of("stderr")[:, large], truth("outliers")[large])


@pytest.mark.parametrize("name", ["flat", "outliers"])
def test_unbiased_and_honest_to_a_tolerance(name):
    count, method = (140, "hutch++") if name == "outliers" else (400, "auto")
    r = replicates(diagonal, name, count, method=method, max_products=3000)
    check_unbiased(r.of("value"), r.of("stderr"), truth(name))
    covered = r.coverage(truth(name))
    assert 0.94 <= covered.mean() <= 0.96
    if count == 400:  # fewer do not tell a single entry's coverage well enough
        assert np.all((covered >= 0.90) & (covered <= 0.99))
    met = np.linalg.norm(r.of("stderr"), axis=1) <= 0.02 * np.linalg.norm(r.of("value"), axis=1)
    assert np.mean(met) >= 0.98
    assert np.mean(r.of("converged")) >= 0.98


def test_a_planted_bias_of_3_percent_fails():
    r = replicates(diagonal, "flat", 270, method="hutchinson", probes=40)
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(1.03 * r.of("value"), r.of("stderr"), truth("flat"))


def test_auto_takes_all_columns_where_probes_would_be_more():
    E = diagonal(matrix("traceless"))
    assert E.message == "exact"
    assert E.products < 1.7 * SIZE
    assert relative_error(E.value, truth("traceless")) < 1e-12


def test_a_diagonal_matrix_takes_the_least_sample():
    """Random signs see it without any variance."""
    E = diagonal(np.diag(np.linspace(-1, 2, SIZE)))
    assert relative_error(E.value, np.linspace(-1, 2, SIZE)) < 1e-13
    assert E.products == 48
    assert not E.stderr.any()


def test_what_a_budget_reaches_is_said():
    E = diagonal(matrix("traceless"), "hutchinson", max_products=100)
    assert not E.converged
    assert E.products == 100
    assert E.message.startswith("rtol 0.02 not met within max_products=100: ")
    assert "of the norm was reached; raise max_products or rtol" in E.message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-14, 1e14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_unit_does_not_matter(method, scale, dtype):
    A = torch.from_numpy(matrix("outliers")).to(dtype)
    E, scaled = (diagonal(factor * A, method, max_products=300) for factor in (1.0, scale))
    assert scaled.products == E.products
    assert relative_error(scaled.value / scale, E.value) < (1e-9 if dtype == torch.float64 else 1e-3)


def test_same_seed_same_numbers():
    first, again, other = (diagonal(matrix("outliers"), "hutch++", probes=20, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.value, again.value)
    assert not np.any(np.isin(first.value, other.value))
    assert first.samples is None
    assert first.degrees == 9


def test_the_sum_is_the_trace():
    """Probes are their own streams': only their means agree."""
    E = diagonal(matrix("flat"), probes=64)
    assert E.value.sum() == pytest.approx(np.trace(matrix("flat")), rel=0.01)


def test_round_trip_through_xarray():
    E = diagonal(matrix("outliers"), "hutchinson", probes=8)
    back = Estimate.from_xarray(E.to_xarray())
    assert np.array_equal(back.value, E.value)
    assert np.array_equal(back.stderr, E.stderr)
    assert back.samples is None
    assert back.provenance == E.provenance
    assert str(E).startswith("300 values, error ")


def test_a_matrix_that_is_not_finite():
    with pytest.raises(hs.HesscopeError, match="not finite"):
        diagonal(np.full((SIZE, SIZE), np.inf))
