"""curvlinops' operators through every estimator, and ours through SciPy's eigensolver, against dense matrices."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

import hesscope as hs
from tests.helpers import F64, randint, randn, randomized, reference_gauss_newton, reference_hessian, relative_error

# What curvlinops imports is deprecated in part.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

X, Y = randn(20, 4, seed=1), randint(3, 20, seed=2)
TRUTHS = {"HessianLinearOperator": reference_hessian, "GGNLinearOperator": reference_gauss_newton}


def network():
    return randomized(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


@pytest.fixture(scope="module", params=TRUTHS)
def case(request):
    """Our view of curvlinops' operator of a network with 51 parameters, and the dense matrix."""
    curvlinops, model = pytest.importorskip("curvlinops"), network()
    data = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    kind, parameters = getattr(curvlinops, request.param), dict(model.named_parameters())
    try:
        operator = kind(model, nn.CrossEntropyLoss(), list(parameters.values()), data)
    except (TypeError, AttributeError, ValueError):  # after version 3.0: by their names
        operator = kind(model, nn.CrossEntropyLoss(), parameters, data)
    return hs.as_operator(operator), TRUTHS[request.param](model, nn.CrossEntropyLoss(), X, Y), model


def within(E, truth):
    """Within five standard errors, which are small enough to tell anything, and not so small as to be rounding."""
    assert np.all(np.abs(E.value - truth) <= 5 * E.stderr + 1e-12 * np.abs(truth))
    assert 1e-6 * np.linalg.norm(truth) < np.linalg.norm(E.stderr) <= 0.25 * np.linalg.norm(truth)


def test_it_is_another_library_s(case):
    A, truth, _ = case
    assert A.engine.startswith("curvlinops.")
    assert A.dtype == F64
    assert relative_error(A.dense(), truth) < 1e-10


@pytest.mark.parametrize(("method", "probes"), [("hutchinson", 1600), ("hutch++", 48)])
def test_sampled(case, method, probes):
    A, truth, _ = case
    within(hs.trace(A, method, probes), float(truth.trace()))
    within(hs.frobenius_norm_squared(A, method, probes), float(truth.square().sum()))
    within(hs.diagonal(A, method, probes), truth.diagonal().numpy())


def test_exact(case):
    A, truth, model = case
    p = hs.Partition.by_tensor(model)
    D = truth.diagonal().numpy()
    assert hs.trace(A).value == pytest.approx(float(truth.trace()), rel=1e-10)
    assert hs.frobenius_norm_squared(A, "exact").value == pytest.approx(float(truth.square().sum()), rel=1e-10)
    assert relative_error(hs.diagonal(A, "exact").value, D) < 1e-10
    assert relative_error(hs.block_traces(A, p).value, [D[p.indices(label)].sum() for label in p.labels]) < 1e-10


@pytest.mark.parametrize("method", ["full", "confined"])
def test_block_traces(case, method):
    A, truth, model = case
    p = hs.Partition.by_tensor(model)
    expected = np.array([float(truth.diagonal()[torch.as_tensor(p.indices(label))].sum()) for label in p.labels])
    within(hs.block_traces(A, p, method=method, probes=300), expected)


def test_block_energies(case):
    A, truth, model = case
    p = hs.Partition.by_tensor(model)
    parts = [torch.as_tensor(p.indices(label)) for label in p.labels]
    expected = np.array([[float(truth[i][:, j].square().sum()) for j in parts] for i in parts])
    exact = hs.block_energies(A, p, "exact")
    assert relative_error(exact.values, expected) < 1e-9
    sampled = hs.block_energies(A, p, "probes", probes=300)
    assert np.all(np.abs(sampled.values - expected) <= 5 * sampled.stderr + 1e-12 * expected.max())
    assert sampled.total == pytest.approx(expected.sum(), rel=0.2)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigenpairs(case, which):
    A, truth, _ = case
    values = torch.linalg.eigvalsh(truth).flip(0).numpy()
    expected = {"LA": values[:3], "SA": values[-3:], "LM": values[np.argsort(-np.abs(values))][:3]}[which]
    pairs = hs.top_eigenpairs(A, 3, which, rtol=1e-8)
    assert pairs.converged.all()
    assert pairs.values == pytest.approx(expected, abs=1e-8 * np.abs(values).max())


def test_spectral_density(case):
    A, truth, _ = case
    density = hs.spectral_density(A, probes=20, steps=10)
    values = torch.linalg.eigvalsh(truth).numpy()
    for k in (1, 2, 3):
        assert abs(density.moment(k) - np.mean(values**k)) < 5 * density.moment_stderr(k)
    low, high = density.eigenvalue_range
    assert values.min() - 1e-12 <= low
    assert high == pytest.approx(values.max(), rel=1e-3)


@pytest.mark.parametrize("kind", [hs.Hessian, hs.GaussNewton])
def test_ours_through_scipy(kind):
    model = network()
    operator = kind(hs.Objective(model, "cross_entropy", (X, Y)))
    truth = {hs.Hessian: reference_hessian, hs.GaussNewton: reference_gauss_newton}[kind]
    values, vectors = eigsh(operator.to_scipy(), k=4, which="LA")
    M = truth(model, nn.CrossEntropyLoss(), X, Y).numpy()
    assert values == pytest.approx(np.linalg.eigvalsh(M)[-4:], rel=1e-10)
    assert np.abs(M @ vectors - vectors * values).max() < 1e-10 * values.max()
