"""Overlaps between models: planted subspaces, the decoupling's prediction, chance, and errors over models."""

from dataclasses import fields
from itertools import combinations

import numpy as np
import pytest

from hesscope.core.errors import InputError
from hesscope.layerwise.eigenstructure import eigenstructure
from hesscope.layerwise.overlap import overlap_curve
from hesscope.layerwise.shared_eigenspaces import SharedEigenspaces, shared_eigenspaces
from tests.layerwise.planted import planted_factor, rotation

MU, NU = np.array([10.0, 3, 1, 0.41]), np.array([7.0, 2.5, 1.1, 0.3, 0.05])
P, K = 20, 8


def product(output_seed, input_seed, k=K, name="fc"):
    A, B = planted_factor(MU, output_seed), planted_factor(NU, input_seed)
    return eigenstructure(np.kron(A, B), A, B, k, name=name)


def general(seed, k=K):
    """A matrix that is no product, beside random factors."""
    matrix = planted_factor(np.linspace(1, 9, P) ** 2, seed)
    return eigenstructure(matrix, planted_factor(MU, seed + 50), planted_factor(NU, seed + 90), k)


def test_equal_models_share_everything():
    found = shared_eigenspaces([product(0, 1), product(0, 1)])
    assert np.allclose(found.curves, 1, atol=1e-9) and np.allclose(found.predicted, 1, atol=1e-9)


def test_models_that_share_the_input_share_as_predicted():
    """Exact products with one input factor and different output factors: the prediction is the truth."""
    structures = [product(seed, 7) for seed in range(4)]
    found = shared_eigenspaces(structures, labels=["a", "b", "c", "d"])
    assert np.allclose(found.curves, found.predicted, atol=1e-8)
    inner = (rotation(4, 0).T @ rotation(4, 1)) ** 2
    a, b = structures[0].pairs.output_index, structures[0].pairs.input_index
    for k in (1, 3, 6):
        truth = sum(inner[a[i], a[j]] for i in range(k) for j in range(k) if b[i] == b[j]) / k
        assert abs(found.curves[0, k - 1] - truth) < 1e-8


def test_the_prediction_is_that_of_the_products():
    """Of matrices that are none, it is the overlap of the products' eigenspaces, from vectors of P entries here."""
    structures = [general(seed) for seed in range(3)]
    found = shared_eigenspaces(structures)
    for row, (i, j) in enumerate(combinations(range(3), 2)):
        tops = []
        for structure in (structures[i], structures[j]):
            seed = (i, j)[len(tops)]
            dense = np.kron(planted_factor(MU, seed + 50), planted_factor(NU, seed + 90))
            tops.append(np.linalg.eigh(dense)[1][:, ::-1][:, :K])
            assert structure.k == K
        assert np.allclose(found.predicted[row], overlap_curve(*tops), atol=1e-10)
        own = [np.linalg.eigh(planted_factor(np.linspace(1, 9, P) ** 2, seed))[1][:, ::-1][:, :K] for seed in (i, j)]
        assert np.allclose(found.curves[row], overlap_curve(*own), atol=1e-8)
    assert np.abs(found.predicted - found.curves).max() > 0.1


def test_independent_models_share_by_chance():
    structures = [general(seed, k=3) for seed in range(40)]
    found = shared_eigenspaces(structures)
    assert np.allclose(found.chance, np.arange(1, 4) / P)
    z = (found.mean - found.chance) / found.stderr
    assert np.all(np.abs(z) < 4)
    assert np.all(found.stderr < 0.1 * found.chance)


def test_the_standard_error_is_over_models():
    """One model that shares nothing, three that share all: by hand; and honest where models are drawn at random."""
    structures = [product(0, 1), product(0, 1), product(0, 1), product(4, 5)]
    found = shared_eigenspaces(structures)
    odd = found.curves[2, 0]  # of the first and the last
    without = np.array([(1 + 2 * odd) / 3] * 3 + [1.0])
    truth = np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    assert abs(found.stderr[0] - truth) < 1e-9
    assert abs(found.mean[0] - (3 + 3 * odd) / 6) < 1e-9
    assert abs(found.std[0] - np.std([1, 1, 1, odd, odd, odd], ddof=1)) < 1e-9
    # Models near one of two directions: pairs that share a model are dependent, so that 10 pairs are worth less.
    means, errors = [], []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        A = [planted_factor(MU, int(generator.integers(2))) for _ in range(5)]
        one = shared_eigenspaces([eigenstructure(np.kron(a, np.diag(NU)), a, np.diag(NU), 1) for a in A])
        means.append(one.mean[0])
        errors.append(one.stderr[0])
    ratio = np.sqrt(np.mean(np.square(errors))) / np.std(means, ddof=1)
    assert 0.75 < ratio < 1.6  # a jackknife errs on the large side with five models


def test_two_models_have_no_standard_error():
    found = shared_eigenspaces([general(0), general(1)])
    assert np.isnan(found.stderr).all() and np.isnan(found.std).all()


def test_at_one_dimension():
    found = shared_eigenspaces([general(seed) for seed in range(3)], k=6)
    assert found.curves.shape == (3, 6) and found.width == 4
    at = found.at(4)
    assert (at.k, at.mean, at.stderr) == (4, found.mean[3], found.stderr[3])
    assert (at.predicted, at.chance) == (found.predicted_mean[3], 4 / P)
    assert at.ratio == found.mean[3] / 0.2
    assert found.at_width == at
    assert found.peak.mean == found.mean.max()
    assert shared_eigenspaces([general(0), general(1)], k=3).at_width is None


def test_the_pair_matrix():
    structures = [general(seed) for seed in range(4)]
    found = shared_eigenspaces(structures, labels=["0", "1", "2", "3"])
    matrix = found.matrix(5)
    assert np.array_equal(matrix, matrix.T) and np.array_equal(np.diag(matrix), np.ones(4))
    for i, j in combinations(range(4), 2):
        truth = overlap_curve(structures[i].basis[:, :5], structures[j].basis[:, :5])[-1]
        assert abs(matrix[i, j] - truth) < 1e-12
        assert (
            abs(
                found.matrix(5, predicted=True)[i, j]
                - shared_eigenspaces([structures[i], structures[j]], k=5).predicted[0, -1]
            )
            < 1e-12
        )


def test_layers_with_other_names_and_numbers_of_pairs():
    found = shared_eigenspaces([product(0, 1, k=5), product(0, 2, k=7, name="conv")])
    assert found.layers == ("fc", "conv") and found.curves.shape == (1, 5)


def test_there_and_back(tmp_path):
    import xarray as xr

    found = shared_eigenspaces([general(seed) for seed in range(3)], labels=["x", "y", "z"])
    found.to_xarray().to_netcdf(tmp_path / "shared.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "shared.nc", engine="h5netcdf") as dataset:
        again = SharedEigenspaces.from_xarray(dataset.load())
    for part in fields(found):
        one, other = getattr(again, part.name), getattr(found, part.name)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other, part.name


A, B = np.eye(4), np.eye(5)


@pytest.mark.parametrize(
    ("structures", "arguments", "message"),
    [
        ([(4, 5)], {}, "shared eigenspaces need at least two models, got 1"),
        ([(4, 5), (5, 4)], {}, r"only layers of one shape .* 'fc' of '0' has shape \(4, 5\), 'fc' of '1' has \(5, 4\)"),
        ([(4, 5), (4, 5)], {"k": 4}, "k must be at most 3, since '0' has 3 eigenpairs, got 4"),
        ([(1, 3), (1, 3)], {"k": 4}, "k must be at most 3, since the layer has 3 parameters, got 4"),
        ([(4, 5), (4, 5)], {"k": 0}, "k must be a positive integer, got 0"),
        ([(4, 5), (4, 5)], {"labels": ["a"]}, "labels must be 2 different names, got 'a'"),
        ([(4, 5), (4, 5)], {"labels": ["a", "a"]}, "labels must be 2 different names"),
    ],
)
def test_bad_input(structures, arguments, message):
    made = [
        eigenstructure(np.diag(np.arange(1.0, 1 + out * inputs)), np.eye(out), np.eye(inputs), 3, name="fc")
        for out, inputs in structures
    ]
    with pytest.raises(InputError, match=message):
        shared_eigenspaces(made, **arguments)


def test_a_dimension_that_was_not_compared():
    found = shared_eigenspaces([general(0), general(1)], k=3)
    with pytest.raises(InputError, match="k must be at most the 3 dimensions that were compared, got 4"):
        found.at(4)
