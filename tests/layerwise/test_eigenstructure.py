"""Eigenstructure of layers: planted Kronecker Hessians give back what was planted, others agree with dense algebra."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.estimate.eigenpairs import top_eigenpairs
from hesscope.layerwise import eigenstructure as module
from hesscope.layerwise.eigenstructure import Eigenstructure, eigenstructure, layer_eigenstructure, usual_pairs
from hesscope.layerwise.factors import kronecker_factors
from hesscope.layerwise.kronecker_pairs import KroneckerPairs
from hesscope.layerwise.layers import find_layer
from hesscope.layerwise.rank_one import rank_one_energy
from hesscope.operators import as_operator
from tests.helpers import build, inputs_for, randint, randn, randomized, relative_error
from tests.layerwise.planted import mixed_objective, planted_factor, rotation

# All products differ, so that every eigenvector is one u_a (x) v_b.
MU, NU = np.array([10.0, 3, 1, 0.41]), np.array([7.0, 2.5, 1.1, 0.3, 0.05])
K = 10


@pytest.fixture(scope="module")
def factors():
    return planted_factor(MU, 0), planted_factor(NU, 1)


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_a_planted_product_is_found(factors, scale):
    A, B = factors
    found = eigenstructure(scale * np.kron(A, B), A * scale, B, K)
    assert np.allclose(found.values, scale * np.sort(np.outer(MU, NU).ravel())[::-1][:K], rtol=1e-9)
    assert np.allclose(found.correspondence, np.eye(K), atol=1e-8)
    assert np.array_equal(found.partner, np.arange(K))
    assert np.allclose(found.overlap, 1, atol=1e-8)
    assert np.allclose(found.matched, 1, atol=1e-8)
    assert max(np.abs(found.sorted_errors).max(), np.abs(found.matched_errors).max()) < 1e-9
    for row, (a, b) in enumerate(zip(found.pairs.output_index, found.pairs.input_index, strict=True)):
        assert abs(MU[a] * NU[b] * scale / found.values[row] - 1) < 1e-9
        assert abs(found.output_correspondence[row, a] - 1) < 1e-8
        assert abs(found.input_correspondence[row, b] - 1) < 1e-8
    assert all(abs(rank_one_energy(h, (4, 5)) - 1) < 1e-8 for h in found.basis.T)
    assert abs(found.trace / (scale * MU.sum() * NU.sum()) - 1) < 1e-10
    assert abs(found.energy / (scale**2 * (MU**2).sum() * (NU**2).sum()) - 1) < 1e-10


def test_eigenvectors_that_are_mixed():
    """Eigenvectors turned by 30 degrees between two products: squared inner products of 3/4 and 1/4."""
    A, B = np.diag(MU), np.diag(NU)
    values, vectors = np.outer(MU, NU).ravel(), np.eye(20)
    i, j = np.argsort(-values)[[1, 4]]
    turned = vectors.copy()
    turned[:, i], turned[:, j] = (
        0.75**0.5 * vectors[:, i] + 0.5 * vectors[:, j],
        -0.5 * vectors[:, i] + 0.75**0.5 * vectors[:, j],
    )
    found = eigenstructure((turned * values) @ turned.T, A, B, K)
    truth = np.eye(K)
    truth[np.ix_([1, 4], [1, 4])] = [[0.75, 0.25], [0.25, 0.75]]
    assert np.allclose(found.correspondence, truth, atol=1e-8)
    assert np.allclose(found.overlap[:6], [1, 1.75 / 2, 2.75 / 3, 3.75 / 4, 1, 1], atol=1e-8)


def test_matching_is_one_to_one_where_the_order_differs():
    """The product's second and third eigenvalue the other way round: partners cross, their values agree."""
    A, B = np.diag(MU), np.diag(NU)
    values = np.outer(MU, NU).ravel()
    order = np.argsort(-values)
    values[order[1]], values[order[2]] = values[order[2]], values[order[1]]
    found = eigenstructure(np.diag(values), A, B, K)
    assert found.partner[:4].tolist() == [0, 2, 1, 3]
    assert np.allclose(found.matched, 1, atol=1e-9)
    assert np.allclose(found.sorted_errors, 0, atol=1e-9)
    ratio = values[order[1]] / values[order[2]]
    assert np.allclose(found.matched_errors[1:3], [ratio - 1, 1 / ratio - 1])


def test_copies_of_an_eigenvalue_are_a_subspace():
    """Within copies the eigenvectors are arbitrary; the overlap is whole wherever the group is."""
    A, B = planted_factor(np.array([2.0, 2, 2]), 2), planted_factor(np.array([5.0, 1, 0.5, 0.1]), 3)
    found = eigenstructure(np.kron(A, B), A, B, 6)
    assert np.allclose(found.overlap[[2, 5]], 1, atol=1e-8)
    assert np.allclose(found.input_correspondence[:, :2], np.repeat(np.eye(2), 3, axis=0), atol=1e-8)


def test_a_layer_whose_hessian_is_a_product():
    """With a bias: the columns of the matrix are the features and the 1, whatever the order of the parameters."""
    objective, A, B = mixed_objective()
    found = layer_eigenstructure(objective, "fc", k=K)
    assert np.allclose(found.values, np.sort(np.linalg.eigvalsh(np.kron(A, B)))[::-1][:K], rtol=1e-9)
    assert np.allclose(found.correspondence, np.eye(K), atol=1e-7)
    assert np.allclose(np.kron(A, B) @ found.basis, found.basis * found.values, atol=1e-8 * found.values[0])
    assert found.bias and found.shape == (3, 5) and found.classes is None and found.expected_outliers is None


@pytest.fixture(scope="module")
def objective():
    name = "tanh"
    return hs.Objective(build(name), "cross_entropy", (inputs_for(name, 40), randint(3, 40, seed=3)))


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_a_network_against_dense_algebra(objective, layer, curvature):
    k, factors = 6, kronecker_factors(objective, layer, errors=False)
    found = layer_eigenstructure(objective, layer, k=k, curvature=curvature)
    whole = {"hessian": hs.Hessian, "gauss_newton": hs.GaussNewton}[curvature](objective).dense()
    place = objective.parameters.slice(f"{layer}.weight")
    H = whole[place, place].numpy()
    values, vectors = np.linalg.eigh(H)
    product_values, product_vectors = np.linalg.eigh(np.kron(factors.output, factors.input))
    truth = (vectors[:, ::-1][:, :k].T @ product_vectors[:, ::-1][:, :k]) ** 2
    assert np.allclose(found.values, values[::-1][:k], rtol=1e-9)
    assert np.allclose(found.pairs.values, product_values[::-1][:k], rtol=1e-9)
    assert np.allclose(found.correspondence, truth, atol=1e-6)
    assert np.allclose(found.overlap, [truth[:n, :n].sum() / n for n in range(1, k + 1)], atol=1e-6)
    assert np.allclose([found.trace, found.energy], [np.trace(H), (H**2).sum()], rtol=1e-9)
    assert found.trace_stderr == found.energy_stderr == 0
    assert abs(found.trace_share - values[-k:].sum() / np.trace(H)) < 1e-9
    assert abs(found.energy_share - (values[-k:] ** 2).sum() / (H**2).sum()) < 1e-9
    assert np.allclose(found.output_correspondence.sum(axis=1), 1) and found.expected_outliers == 2
    assert np.allclose(found.input_correspondence.sum(axis=1), 1)


class Tokens(torch.nn.Module):
    """An embedding, whose weight tensor is the transposed matrix, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.fc = torch.nn.Linear(3, 4)

    def forward(self, tokens):
        return self.fc(torch.tanh(self.embedding(tokens)))


@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_other_kinds_of_layers(kind):
    """Matricized eigenvectors are eigenvectors of the Hessian in the order of its parameters."""
    if kind == "conv":
        name = "conv, batch norm"
        model, data = build(name), (inputs_for(name, 20), randint(3, 20, seed=3))
    else:
        model, data = randomized(Tokens()), (randint(5, 20, seed=4), randint(4, 20, seed=5))
    objective = hs.Objective(model, "cross_entropy", data)
    found, layer = layer_eigenstructure(objective, kind, k=4), find_layer(objective, kind)
    place = [objective.parameters.slice(name) for name in layer.parameters]
    H = hs.Hessian(objective).dense()[place[0].start : place[-1].stop, place[0].start : place[-1].stop]
    vectors = layer.flattened(torch.from_numpy(found.vectors))
    assert found.kind == layer.kind and found.shape == layer.shape
    assert relative_error(H @ vectors, vectors * torch.from_numpy(found.values)) < 1e-6


def test_the_curvatures_differ(objective):
    H, G = (layer_eigenstructure(objective, "0", k=3, curvature=name) for name in ("hessian", "gauss_newton"))
    assert (H.curvature, G.curvature) == ("hessian", "gauss_newton")
    assert np.abs(H.values / G.values - 1).max() > 0.01


def test_how_many_pairs_unless_told(objective):
    """Twice the outputs, three times the classes, and no more than there are."""
    assert layer_eigenstructure(objective, "0").k == 10
    assert layer_eigenstructure(objective, "4").k == 9
    assert layer_eigenstructure(mixed_objective(inputs=1, outputs=1, classes=2)[0], "fc").k == 2
    layer = find_layer(objective, "0")
    wide = replace(layer, outputs=300, inputs=20)
    assert [usual_pairs(wide, classes) for classes in (None, 10, 256, 257, 50_000)] == [256, 256, 256, 32, 32]


def test_a_bulk_by_probes():
    """Beyond 512 parameters the sums over the bulk are estimates: unbiased, with honest standard errors."""
    size, k, replicates = 600, 4, 150
    values = np.r_[50.0, 40, 30, 20, np.random.default_rng(0).exponential(0.5, size - k)]
    Q = rotation(size, 1)
    operator = as_operator(torch.from_numpy((Q * values) @ Q.T))
    pairs = top_eigenpairs(operator, k, rtol=1e-10)
    found = [module._rest(operator, pairs, exact=False, seed=seed) for seed in range(replicates)]
    sums, errors = (np.array([each[part] for each in found]) for part in (0, 1))
    truth = np.array([(values[k:] ** order).sum() for order in (1, 2, 3)])
    spread = sums.std(axis=0, ddof=1)
    assert np.all(np.abs(sums.mean(axis=0) - truth) < 4 * spread / replicates**0.5)
    assert np.all(4 * spread / replicates**0.5 < 0.03 * truth)  # a bias of 3 % would be seen
    assert np.all(np.abs((errors**2).mean(axis=0) ** 0.5 / spread - 1) < 0.25)
    exact = module._rest(operator, pairs, exact=True, seed=0)
    assert np.allclose(exact[0], truth, rtol=1e-9) and not exact[1].any()


def test_outliers_of_a_planted_spectrum():
    """A bulk of the law itself and eight eigenvalues beyond it; the same from probes and at any scale."""
    outputs, inputs, outliers = 12, 60, 8
    X = np.random.default_rng(2).standard_normal((outputs * inputs, 2000))
    Q = rotation(outputs * inputs, 3)[:, :outliers]
    H = X @ X.T / 2000 + (Q * np.linspace(10, 40, outliers)) @ Q.T
    for scale in (1e-14, 1.0):
        found = eigenstructure(H * scale, np.eye(outputs), np.eye(inputs), 24, classes=outliers + 1)
        assert (found.gap.count, found.edge.count, found.expected_outliers) == (outliers,) * 3
        assert abs(found.edge.edge / scale / (1 + 0.36**0.5) ** 2 - 1) < 0.05
        assert 0 < found.trace_stderr < 0.01 * found.trace


def test_outliers_that_the_decoupling_predicts():
    """Of a product with exact copies in the bulk, the gap after its leading pairs is that of the matrix itself."""
    A, B = planted_factor(np.r_[30.0, 25, 20, np.linspace(0.5, 1.5, 9)], 5), planted_factor(np.r_[9, np.ones(7)], 6)
    found = eigenstructure(np.kron(A, B), A, B, 24)
    assert found.predicted_gap.count == found.gap.count == 3
    assert found.predicted_edge.count == found.edge.count
    assert found.predicted_edge.edge == pytest.approx(found.edge.edge, rel=1e-6, nan_ok=True)


def test_a_wide_layer_in_single_precision():
    """By products in float32, beyond the size of the dense path: as in float64, up to its rounding."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=number))
    data = (randn(100, 40, seed=8) * torch.linspace(0.2, 2, 40) + 0.5, randint(4, 100, seed=9))
    model = model.double()
    double = layer_eigenstructure(hs.Objective(model, "cross_entropy", data), "0", k=5)
    single = layer_eigenstructure(
        hs.Objective(model.float(), "cross_entropy", (data[0].float(), data[1])), "0", k=5, seed=1
    )
    assert single.vectors.dtype == np.float32 and double.vectors.dtype == np.float64
    assert np.allclose(single.values, double.values, rtol=1e-4)
    assert np.allclose(single.overlap, double.overlap, atol=1e-3)
    assert abs(single.trace - double.trace) < 4 * np.hypot(single.trace_stderr, double.trace_stderr)
    assert double.provenance.seed == 0 and "Krylov" in double.provenance.engine


def test_progress(objective):
    seen = []
    layer_eigenstructure(objective, "0", k=3, progress=lambda done, planned: seen.append((done, planned)))
    assert seen and seen[-1][0] == seen[-1][1] and all(done <= planned for done, planned in seen)


def test_equal_seeds_equal_numbers(objective):
    first, second = (layer_eigenstructure(objective, "2", k=4, seed=3) for _ in range(2))
    assert np.array_equal(first.values, second.values) and np.array_equal(first.vectors, second.vectors)


@pytest.mark.parametrize("layer", ["0", "4"])
def test_there_and_back(objective, layer, tmp_path):
    import xarray as xr

    found = layer_eigenstructure(objective, layer, k=6)
    found.to_xarray().to_netcdf(tmp_path / "structure.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "structure.nc", engine="h5netcdf") as dataset:
        again = Eigenstructure.from_xarray(dataset.load())
    assert_equal_records(again, found)


def assert_equal_records(first, second):
    for part in fields(first):
        one, other = getattr(first, part.name), getattr(second, part.name)
        if isinstance(one, KroneckerPairs):
            assert_equal_records(one, other)
        elif isinstance(one, np.ndarray):
            assert np.array_equal(one, other) and one.dtype == other.dtype, part.name
        else:
            assert one == other or str(one) == str(other), part.name


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        ("00", {}, "there is no layer '00'"),
        ("1", {}, "'1' is no layer but a Tanh"),
        ("0", {"k": 21}, "k must be at most the number of parameters P = 20, got 21"),
        ("0", {"k": 0}, "k must be a positive integer, got 0"),
        ("0", {"k": 2.5}, "k must be a positive integer, got 2.5"),
        ("0", {"curvature": "fisher"}, "curvature must be one of 'hessian', 'gauss_newton', got 'fisher'"),
    ],
)
def test_bad_input(objective, layer, arguments, message):
    with pytest.raises(InputError, match=message):
        layer_eigenstructure(objective, layer, **arguments)


def test_factors_of_another_layer(objective):
    factors = kronecker_factors(objective, "2", errors=False)
    with pytest.raises(InputError, match=r"factors must be those of layer '0' with shape \(5, 4\), got '2'"):
        layer_eigenstructure(objective, "0", factors=factors)


def test_a_matrix_that_does_not_fit():
    with pytest.raises(InputError, match="the matrix has 6 rows, but the factors are of 2 and 2"):
        eigenstructure(np.eye(6), np.eye(2), np.eye(2), 1)
    with pytest.raises(InputError, match="k must be at most the number of parameters P = 4, got 5"):
        eigenstructure(np.eye(4), np.eye(2), np.eye(2), 5)
