"""Traces of blocks, from full products and from confined ones; truth is the dense diagonal, block by block."""

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.estimate.block_traces import block_traces
from hesscope.estimate.estimate import Estimate
from hesscope.estimate.trace import trace
from hesscope.operators.bridges import Dense
from tests.estimate.spectra import SIZE, matrix, replicates
from tests.helpers import build, check_unbiased, cut, inputs_for, randint, relative_error

BLOCKS = 3
# Unequal blocks that are no intervals.
ASSIGNMENT = np.array([0, 1, 2, 1] * (SIZE // 4))
METHODS = ["full", "confined", "hutch++"]


def partition():
    return hs.Partition.from_blocks({f"b{i}": np.flatnonzero(i == ASSIGNMENT) for i in range(BLOCKS)})


def truth(name):
    return np.array([np.diagonal(matrix(name))[i == ASSIGNMENT].sum() for i in range(BLOCKS)])


def traces(array, **options):
    return block_traces(array, partition(), **options)


class Narrow(Dense):
    """A dense matrix that takes two vectors at once, fewer than there are blocks."""

    columns_per_pass = 2


@pytest.mark.parametrize("name", ["outliers", "not_symmetric"])
def test_exact(name):
    E = traces(matrix(name), method="exact")
    assert relative_error(E.value, truth(name)) < 1e-13
    assert E.labels == ("b0", "b1", "b2")
    assert not E.stderr.any()


@pytest.mark.parametrize(
    ("method", "name", "probes"),
    [
        ("full", "outliers", 96),
        ("confined", "outliers", 48),
        ("hutch++", "outliers", 32),
        ("full", "not_symmetric", 32),
    ],
)
def test_unbiased_and_honest_with_fixed_probes(method, name, probes):
    r = replicates(traces, name, 200, method=method, probes=probes)
    check_unbiased(r.of("value"), r.of("stderr"), truth(name))


@pytest.mark.parametrize(("method", "name"), [("auto", "outliers"), ("full", "flat"), ("confined", "flat")])
def test_unbiased_honest_and_covering_to_a_tolerance(method, name):
    r = replicates(traces, name, 160, method=method, rtol=0.04, max_products=10_000)
    check_unbiased(r.of("value"), r.of("stderr"), truth(name))
    covered = r.coverage(truth(name))
    assert np.all((covered >= 0.90) & (covered <= 0.99)), covered
    assert np.mean(r.of("converged")) >= 0.95
    met = np.all(r.of("stderr") <= 0.04 * r.of("value"), axis=1)
    assert np.array_equal(met, r.of("converged"))


def test_full_products_add_up_to_the_trace():
    for seed in range(5):
        E = traces(matrix("outliers"), method="full", probes=40, seed=seed)
        whole = trace(matrix("outliers"), "hutchinson", probes=40, seed=seed)
        assert E.value.sum() == pytest.approx(whole.value, rel=1e-12)
        assert relative_error(E.samples.sum(axis=1), whole.samples) < 1e-12


def test_confined_probes_see_no_other_block():
    """With other blocks a thousand times larger, the small block's error stays that of its own matrix."""
    A = matrix("outliers").copy()
    A[np.ix_(ASSIGNMENT != 0, ASSIGNMENT != 0)] *= 1000
    own = ASSIGNMENT == 0
    E = traces(A, method="confined", probes=50)
    alone = traces(A * np.outer(own, own), method="confined", probes=50)
    assert E.value[0] == pytest.approx(alone.value[0], rel=1e-12)
    assert E.stderr[0] == pytest.approx(alone.stderr[0], rel=1e-10)
    assert E.products == 50 * BLOCKS


def test_confined_probes_vary_less():
    full, confined = (traces(matrix("outliers"), method=method, probes=400) for method in ("full", "confined"))
    assert np.all(full.stderr > 1.2 * confined.stderr)


@pytest.mark.parametrize("method", METHODS)
def test_few_vectors_at_once_give_the_same(method):
    A = torch.from_numpy(matrix("outliers"))
    wide, narrow = (traces(operator, method=method, probes=10) for operator in (A, Narrow(A, True)))
    assert relative_error(narrow.samples, wide.samples) < 1e-12
    assert narrow.products == wide.products


def test_what_a_budget_reaches_is_said():
    A = matrix("outliers").copy()
    A[np.ix_(ASSIGNMENT == 1, ASSIGNMENT == 1)] = 0
    E = traces(A, method="full", max_products=400, rtol=0.2)
    assert not E.converged
    assert E.products == 400
    assert E.message == (
        "rtol 0.2 not met within max_products=400: 2 of 3 blocks met it; raise max_products or rtol, or give probes"
    )
    E = traces(A, method="confined", max_products=400, rtol=0.2)
    assert E.converged  # the zero block is seen to be zero
    assert (E.value[1], E.stderr[1]) == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_numbers(method):
    first, again, other = (traces(matrix("outliers"), method=method, seed=s, probes=20).samples for s in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.any(np.isin(first, other))


def test_layers_of_a_network():
    obj = hs.Objective(build("tanh"), "cross_entropy", cut(inputs_for("tanh", 12), randint(3, 12, seed=2)))
    H, p = hs.Hessian(obj), hs.Partition.by_layer(obj.model)
    E, D = block_traces(H, p), np.diagonal(H.dense().numpy())
    expected = [D[p.indices(label)].sum() for label in p.labels]
    assert E.labels == p.labels
    assert E.message == "exact"
    assert relative_error(E.value, expected) < 1e-10


def test_round_trip_through_xarray():
    E = traces(matrix("outliers"), method="full", probes=8)
    back = Estimate.from_xarray(E.to_xarray())
    assert back.labels == E.labels
    assert np.array_equal(back.samples, E.samples)
    assert float(E.to_xarray()["value"].sel(entry="b1")) == E.value[1]


BAD = [
    ({"method": "hutchinson"}, "method must be one of 'auto', 'exact', 'full', 'confined', 'hutch\\+\\+'"),
    ({"method": "confined", "max_products": 5}, "max_products must be at least 6 for method 'confined' and 3 blocks"),
    ({"probes": 1}, "probes must be at least 2"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments(options, message):
    with pytest.raises(hs.HesscopeError, match=message):
        traces(matrix("flat"), **options)


def test_a_partition_that_does_not_fit():
    with pytest.raises(hs.HesscopeError, match="the partition covers 300 parameters, but the operator has 10"):
        traces(np.eye(10))
