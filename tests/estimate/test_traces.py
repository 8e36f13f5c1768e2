"""Traces: unbiased, with honest errors, at a fixed number of probes and to a tolerance. Truth is the dense diagonal."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

import hesscope as hs
from hesscope.estimate.estimate import Estimate
from hesscope.estimate.products import CountedProducts, normals, signs
from hesscope.estimate.quantities import DIAGONAL, NORM_SQUARED, TRACE
from hesscope.estimate.sketch import Sketch
from hesscope.estimate.trace import trace
from hesscope.operators.bridges import Dense
from tests.estimate.spectra import SIZE, matrix, replicates
from tests.helpers import build, check_stderr, check_unbiased, cut, inputs_for, randint, randn, relative_error

METHODS = ["hutchinson", "hutch++", "xtrace"]
SPECTRA = ["outliers", "indefinite", "flat", "power_law"]
ESTIMATES = ["auto", *METHODS]
# Where few probes do not suffice, one spectrum is enough to judge the rule by.
CASES = [("auto", name) for name in SPECTRA]
CASES += [(method, "outliers") for method in METHODS] + [("hutch++", "flat"), ("xtrace", "flat")]


def truth(name):
    return float(np.trace(matrix(name)))


def adaptive(name, method):
    """To 4 %: often enough to see a bias of 3 %, and few enough probes for a short test."""
    return replicates(trace, name, 160, method=method, rtol=0.04, max_products=3000)


class Narrow(Dense):
    """A dense matrix that takes few vectors at once."""

    columns_per_pass = 7


def dense(array):
    return hs.as_operator(np.asarray(array))


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [np.asarray, torch.from_numpy, aslinearoperator, dense], ids=["array", "tensor", "scipy", "operator"]
)
def test_exact_in_every_form(form):
    E = trace(form(matrix("not_symmetric")), method="exact")
    assert E.value == pytest.approx(truth("not_symmetric"), rel=1e-13)
    assert (E.stderr, E.samples, E.degrees, E.probes, E.products, E.converged) == (0.0, None, 0, 0, SIZE, True)
    assert E.message == "exact"


def test_auto_is_exact_where_that_is_cheaper():
    small = randn(60, 60, seed=1)
    E = trace(small)
    assert E.message == "exact"
    assert E.value == pytest.approx(float(small.trace()), rel=1e-13)
    # No estimate could meet a tolerance here: auto notices after the pilot and takes all columns.
    E = trace(matrix("traceless"))
    assert E.message == "exact"
    assert abs(E.value) < 1e-12
    assert E.products < 1.7 * SIZE


@pytest.mark.parametrize("method", [*ESTIMATES, "exact"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 17])
def test_tiny_matrices(method, size):
    A = np.diag(np.arange(1.0, size + 1))
    assert trace(A, method=method).value == pytest.approx(np.trace(A), rel=0.2)


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["outliers", "power_law", "not_symmetric"])
@pytest.mark.parametrize(("method", "probes"), [("hutchinson", 72), ("hutch++", 32), ("xtrace", 64)])
def test_unbiased_and_honest_with_fixed_probes(method, probes, name):
    r = replicates(trace, name, 150, method=method, probes=probes)
    check_unbiased(r.of("value"), r.of("stderr"), truth(name))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_unbiased_and_honest_to_a_tolerance(method, name):
    """The stopping rule may not select the samples that look good."""
    r = adaptive(name, method)
    check_unbiased(r.of("value"), r.of("stderr"), truth(name))
    met = r.of("stderr") <= 0.04 * np.abs(r.of("value"))
    assert np.array_equal(met, r.of("converged"))
    assert np.mean(met) >= (0.9 if method == "xtrace" else 0.95)  # a plan from eight groups is off more often


@pytest.mark.parametrize(("method", "name"), CASES)
def test_intervals_cover_to_a_tolerance(method, name):
    assert 0.90 <= adaptive(name, method).coverage(truth(name)) <= 0.99


def test_a_planted_bias_of_3_percent_fails():
    r = adaptive("outliers", "auto")
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(1.03 * r.of("value"), r.of("stderr"), truth("outliers"))


@pytest.mark.parametrize("name", SPECTRA)
def test_auto_is_near_the_best_method(name):
    """Mean products for 4 %."""
    found = {
        method: [trace(matrix(name), method, seed=s, rtol=0.04, max_products=3000) for s in range(8)]
        for method in ESTIMATES
    }
    cost = {method: np.mean([E.products for E in estimates]) for method, estimates in found.items()}
    assert cost["auto"] <= 1.25 * min(cost[method] for method in METHODS), cost


@pytest.mark.parametrize("method", ["auto", "hutch++", "xtrace"])
def test_low_rank_is_exact_up_to_rounding(method):
    """Rank 20 is asked for by a tolerance that samples of what a sketch of 16 leaves cannot meet."""
    for seed in range(10):
        E = trace(matrix("low_rank"), method=method, seed=seed, rtol=1e-4)
        assert E.value == pytest.approx(truth("low_rank"), rel=1e-12)
        assert E.stderr < 1e-12 * E.value


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_of_nearly_zero_ends_at_the_budget(method):
    E = trace(matrix("traceless"), method=method, max_products=400)
    assert not E.converged
    assert 380 <= E.products <= 400
    assert E.message.startswith("rtol 0.02 not met within max_products=400: ")
    if method != "xtrace":  # whose error has few degrees of freedom
        assert E.message.endswith("the value is zero within twice its error")
    r = replicates(trace, "traceless", 100, method=method, max_products=120)
    check_stderr(r.of("value"), r.of("stderr"))
    assert not r.of("converged").any()


# --- leave one out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", [TRACE, NORM_SQUARED, DIAGONAL], ids=lambda quantity: quantity.stream)
@pytest.mark.parametrize("name", ["indefinite", "not_symmetric"])
@pytest.mark.parametrize("grown", [False, True])
def test_leaving_one_out_is_making_the_sketch_without_it(quantity, name, grown):
    A = torch.from_numpy(matrix(name))
    operator, width = hs.as_operator(A), 6
    W = normals(operator, 0, "test", "vectors", 0, width)
    products = CountedProducts(operator, None)
    sketch = Sketch.of(W[:, :4], A @ W[:, :4], products).grown(W[:, 4:], products) if grown else None
    sketch = sketch or Sketch.of(W, A @ W, products)
    assert products.done == (8 if grown else 6)
    found = sketch.leave_one_out(quantity)
    for out in range(width):
        others = [i for i in range(width) if i != out]
        Q = torch.linalg.qr(A @ W[:, others])[0]
        w = W[:, [out]]
        u = w - Q @ (Q.T @ w)
        expected = {
            TRACE: lambda Q=Q, u=u: (torch.trace(Q.T @ A @ Q) + (u.T @ A @ u).sum()).reshape(1),
            NORM_SQUARED: lambda Q=Q, u=u: ((A @ Q).square().sum() + (A @ u).square().sum()).reshape(1),
            DIAGONAL: lambda Q=Q, u=u, w=w: torch.diagonal(A @ Q @ Q.T) + (w * (A @ u))[:, 0],
        }[quantity]()
        assert relative_error(found[:, out], expected) < 1e-11
    assert relative_error(sketch.Q.T @ sketch.Q, torch.eye(width)) < 1e-13


def test_a_sketch_wider_than_the_rank_stays_orthonormal():
    A = torch.from_numpy(matrix("low_rank"))
    operator = hs.as_operator(A)
    products = CountedProducts(operator, None)
    W = signs(operator, 0, "test", "vectors", range(60))
    sketch = Sketch.of(W[:, :30], A @ W[:, :30], products).grown(W[:, 30:], products)
    assert relative_error(sketch.Q.T @ sketch.Q, torch.eye(60)) < 1e-12
    assert relative_error(sketch.leave_one_out(TRACE), np.full((1, 60), truth("low_rank"))) < 1e-10


# --- scale, precision, operators --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-14, 1e14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ESTIMATES)
def test_the_unit_does_not_matter(method, dtype, scale):
    A = torch.from_numpy(matrix("outliers")).to(dtype)
    E, scaled = trace(A, method=method), trace(scale * A, method=method)
    assert (E.products, E.converged) == (scaled.products, scaled.converged)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    assert scaled.value == pytest.approx(scale * E.value, rel=tolerance)
    assert scaled.stderr == pytest.approx(scale * E.stderr, rel=20 * tolerance)
    assert E.value == pytest.approx(truth("outliers"), abs=5 * E.stderr)


@pytest.mark.parametrize("method", ESTIMATES)
def test_the_zero_matrix(method):
    E = trace(np.zeros((SIZE, SIZE)), method=method)
    assert (E.value, E.stderr, E.converged, E.relative_error) == (0.0, 0.0, True, 0.0)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_few_vectors_at_once_give_the_same(method):
    A = torch.from_numpy(matrix("indefinite"))
    wide, narrow = (trace(operator, method, probes=60) for operator in (hs.as_operator(A), Narrow(A, symmetric=True)))
    assert narrow.value == pytest.approx(wide.value, rel=1e-12)
    assert narrow.products == wide.products


def test_operator_and_dense_matrix_see_the_same_probes():
    obj = hs.Objective(build("tanh"), "cross_entropy", cut(inputs_for("tanh", 12), randint(3, 12, seed=2)))
    H = hs.Hessian(obj)
    D = H.dense()
    for method, probes in (("hutchinson", 20), ("hutch++", 20), ("xtrace", 20), ("exact", None)):
        assert trace(H, method, probes).value == pytest.approx(trace(D, method, probes).value, rel=1e-10)
    assert trace(H, "exact").value == pytest.approx(float(D.trace()), rel=1e-12)


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ESTIMATES)
def test_same_seed_same_numbers(method):
    first, again, other = (trace(matrix("outliers"), method=method, seed=seed) for seed in (7, 7, 8))
    assert (first.value, first.products) == (again.value, again.products)
    assert np.array_equal(first.samples, again.samples)
    assert not np.any(np.isin(first.samples, other.samples))


def test_more_probes_begin_with_the_same_ones():
    few, many = (trace(matrix("flat"), "hutchinson", probes=count).samples for count in (8, 32))
    assert relative_error(many[:8], few) < 1e-13


def test_the_adaptive_samples_are_those_of_fixed_probes():
    adaptive = trace(matrix("flat"), "hutchinson", seed=3)
    fixed = trace(matrix("flat"), "hutchinson", seed=3, probes=adaptive.probes)
    assert relative_error(fixed.samples, adaptive.samples) < 1e-13
    assert fixed.products == adaptive.products - 16


@pytest.mark.parametrize("method", METHODS)
def test_value_and_error_are_those_of_the_samples(method):
    E = trace(matrix("outliers"), method, probes=64)
    assert E.value == pytest.approx(E.samples.mean(), rel=1e-13)
    assert E.stderr == pytest.approx(E.samples.std(ddof=1) / np.sqrt(len(E.samples)), rel=1e-13)
    assert E.degrees == len(E.samples) - 1
    assert (E.probes, E.products) == (64, {"hutchinson": 64, "hutch++": 96, "xtrace": 128}[method])


# --- budget and progress ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ESTIMATES)
@pytest.mark.parametrize("budget", [8, 9, 20, 63, 64, 65, 100, 250])
def test_the_budget_is_never_exceeded(method, budget):
    for name in ("indefinite", "traceless", "power_law"):
        E = trace(matrix(name), method, max_products=budget, rtol=1e-5)
        assert E.products <= budget
        assert E.degrees >= 1
        assert not E.converged


@pytest.mark.parametrize("method", [*ESTIMATES, "exact"])
def test_progress_ends_at_the_number_of_products(method):
    seen = []
    E = trace(Narrow(torch.from_numpy(matrix("indefinite")), True), method, progress=lambda *step: seen.append(step))
    assert seen[-1][0] == E.products
    assert all(done <= whole for done, whole in seen)
    assert all(later[0] > earlier[0] for earlier, later in pairwise(seen))


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_round_trip_through_xarray(method):
    E = trace(matrix("outliers"), method)
    back = Estimate.from_xarray(E.to_xarray())
    assert (back.value, back.stderr, back.products, back.probes) == (E.value, E.stderr, E.products, E.probes)
    assert (back.degrees, back.converged, back.message, back.provenance) == (
        E.degrees,
        E.converged,
        E.message,
        E.provenance,
    )
    assert back.samples is None if E.samples is None else np.array_equal(back.samples, E.samples)
    assert isinstance(back.value, float)
    assert back.labels is None


def test_the_words():
    E = trace(matrix("outliers"))
    assert str(E).endswith(f"{E.products} products, rtol 0.02 met")
    assert " ± " in str(E)
    assert repr(E) == f"Estimate({E})"
    assert E.provenance.engine == "trace: hutch++, sketch of 16 columns; dense"
    assert E.provenance.seed == 0
    assert trace(matrix("outliers"), "exact").provenance.seed is None
    E = trace(matrix("indefinite"), "hutchinson", max_products=100)
    assert "not met within max_products=100: 0." in E.message
    assert "with 10 probes" in trace(matrix("indefinite"), "hutchinson", probes=10).message


def test_intervals_widen_with_the_level():
    E = trace(matrix("outliers"), "hutchinson", probes=20)
    narrow, wide = E.confidence_interval(0.5), E.confidence_interval(0.99)
    assert wide.lower < narrow.lower < E.value < narrow.upper < wide.upper
    assert (narrow.upper - E.value) / E.stderr == pytest.approx(0.68762, rel=1e-4)  # Student, 19 degrees of freedom
    point = trace(matrix("outliers"), "exact").confidence_interval()
    assert point.lower == point.upper


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    ({"method": "hutch"}, "method must be one of .* did you mean"),
    ({"probes": 1}, "probes must be at least 2"),
    ({"probes": 3, "method": "hutch\\+\\+"}, "probes must be at least 4 for method 'hutch\\+\\+', got 3"),
    ({"probes": 2.5}, "probes must be a positive integer, got 2.5"),
    ({"probes": 8, "method": "exact"}, "'exact' takes no probes"),
    ({"probes": 8, "max_products": 8}, "not both"),
    ({"max_products": 0}, "max_products must be a positive integer"),
    ({"max_products": 5, "method": "xtrace"}, "max_products must be at least 8 for method 'xtrace', got 5"),
    ({"max_products": 5, "method": "exact"}, "max_products must be at least 300 for method 'exact', got 5"),
    ({"rtol": 0}, "rtol must be a positive number, such as 0.02 for 2 %, got 0"),
    ({"rtol": "2%"}, "rtol must be a positive number"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments(options, message):
    options = {key: value.replace("\\", "") if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(hs.HesscopeError, match=message):
        trace(matrix("flat"), **options)


def test_a_level_that_is_none():
    with pytest.raises(hs.HesscopeError, match=r"level must lie between 0 and 1, got 1\.5"):
        trace(matrix("flat"), probes=4).confidence_interval(1.5)


@pytest.mark.parametrize("method", [*ESTIMATES, "exact"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite(method, bad):
    A = matrix("flat").copy()
    A[3, 5] = bad
    with pytest.raises(hs.HesscopeError, match="not finite"):
        trace(A, method=method)


def test_a_sketch_too_large_for_memory(monkeypatch):
    from hesscope.estimate import sampling

    monkeypatch.setattr(sampling, "available_bytes", lambda _: 2 * 10 * 6 * SIZE * 8)
    with pytest.raises(hs.HesscopeError, match=r"a sketch of 16 columns needs .* method='hutchinson' instead"):
        trace(matrix("indefinite"), "hutch++")
    assert "hutchinson" in trace(matrix("outliers"), rtol=0.2).provenance.engine
