"""Squared Frobenius norms: unbiased, with honest errors, at a fixed number of probes and to a tolerance."""

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.estimate.frobenius import frobenius_norm_squared
from tests.estimate.spectra import MATRICES, SIZE, matrix, replicates
from tests.helpers import check_unbiased, randn

METHODS = ["hutchinson", "hutch++"]
SPECTRA = ["outliers", "flat", "power_law", "not_symmetric"]


def truth(name):
    return float(np.sum(matrix(name) ** 2))


def adaptive(name, method):
    """To 4 %: often enough to see a bias of 3 %, and few enough probes for a short test."""
    return replicates(frobenius_norm_squared, name, 160, method=method, rtol=0.04, max_products=4000)


@pytest.mark.parametrize("name", MATRICES)
def test_exact(name):
    E = frobenius_norm_squared(matrix(name), method="exact")
    assert E.value == pytest.approx(truth(name), rel=1e-13)
    assert (E.stderr, E.products) == (0.0, SIZE)


@pytest.mark.parametrize(
    ("method", "name", "count", "probes"),
    [("hutchinson", "outliers", 260, 96)]  # the others take fewer to see a bias of 3 %
    + [(method, name, 150, 32) for method in METHODS for name in ("flat", "not_symmetric")]
    + [("hutch++", "outliers", 150, 32)],
)
def test_unbiased_and_honest_with_fixed_probes(method, name, count, probes):
    r = replicates(frobenius_norm_squared, name, count, method=method, probes=probes)
    check_unbiased(r.of("value"), r.of("stderr"), truth(name))


@pytest.mark.parametrize(("method", "name"), [*[("auto", name) for name in SPECTRA], ("hutch++", "flat")])
def test_unbiased_honest_and_covering_to_a_tolerance(method, name):
    r = adaptive(name, method)
    check_unbiased(r.of("value"), r.of("stderr"), truth(name))
    assert np.mean(r.of("converged")) >= 0.95
    assert 0.90 <= r.coverage(truth(name)) <= 0.99


@pytest.mark.parametrize("name", SPECTRA)
def test_auto_is_near_the_best_method(name):
    cost = {
        method: np.mean(
            [frobenius_norm_squared(matrix(name), method, max_products=4000, seed=s).products for s in range(5)]
        )
        for method in ("auto", *METHODS)
    }
    assert cost["auto"] <= 1.25 * min(cost[method] for method in METHODS), cost


def test_low_rank_is_exact_up_to_rounding():
    E = frobenius_norm_squared(matrix("low_rank"))
    assert E.value == pytest.approx(truth("low_rank"), rel=1e-12)
    assert E.products < 110


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_the_unit_does_not_matter(dtype, scale):
    """In float32, too, where the squares of 1e14 times the entries come near the largest number."""
    A = torch.from_numpy(matrix("outliers")).to(dtype)
    E, scaled = frobenius_norm_squared(A), frobenius_norm_squared(scale * A)
    assert scaled.products == E.products
    assert scaled.value == pytest.approx(scale**2 * E.value, rel=1e-9 if dtype == torch.float64 else 1e-3)


def test_squares_beyond_float32_are_no_obstacle():
    A = torch.full((4, 4), 1e30, dtype=torch.float32)
    assert frobenius_norm_squared(A, "exact").value == pytest.approx(16e60, rel=1e-6)
    assert frobenius_norm_squared(A * 1e-60, "exact").value == 0.0


def test_agrees_with_block_energies():
    A = randn(40, 40, seed=3)
    p = hs.Partition.from_blocks({"a": range(15), "b": range(15, 40)})
    assert frobenius_norm_squared(A).value == pytest.approx(hs.block_energies(A, p, "exact").total, rel=1e-13)


def test_seeds():
    first, again, other = (frobenius_norm_squared(matrix("outliers"), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.samples, again.samples)
    assert not np.any(np.isin(first.samples, other.samples))
    assert first.provenance.engine.startswith("squared Frobenius norm: hutch++, sketch of ")


def test_bad_arguments():
    with pytest.raises(hs.HesscopeError, match="method must be one of 'auto', 'exact', 'hutchinson', 'hutch\\+\\+'"):
        frobenius_norm_squared(matrix("flat"), method="xtrace")
    with pytest.raises(hs.HesscopeError, match="not finite"):
        frobenius_norm_squared(np.full((SIZE, SIZE), np.nan))
