"""Singular-value shares of vectors that are made of known matrices."""

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import DataError, InputError
from hesscope.layerwise.eigenstructure import layer_eigenstructure
from hesscope.layerwise.factors import kronecker_factors
from hesscope.layerwise.rank_one import LayerLowRank, layer_low_rank, rank_one_energy
from tests.helpers import build, inputs_for, randint, randn
from tests.layerwise.planted import mixed_objective, rotation


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1)])
def test_known_singular_values(shape, scale):
    sigma = np.array([3.0, 2, 1, 0.5])[: min(shape)]
    matrix = rotation(shape[0], 1)[:, : len(sigma)] * sigma @ rotation(shape[1], 2)[: len(sigma)]
    truth = sigma[0] ** 2 / (sigma**2).sum()
    assert abs(rank_one_energy(scale * matrix.ravel(), shape) - truth) < 1e-14
    assert abs(rank_one_energy(torch.from_numpy(scale * matrix.ravel()), shape) - truth) < 1e-14


def test_the_entries_are_row_by_row():
    u, v = randn(3, seed=1), randn(5, seed=2)
    assert abs(rank_one_energy(torch.outer(u, v).ravel(), (3, 5)) - 1) < 1e-14
    assert rank_one_energy(torch.outer(u, v).T.ravel(), (3, 5)) < 0.9


@pytest.mark.parametrize(
    ("v", "shape", "error", "message"),
    [
        (np.ones(6), (2, 4), InputError, r"v has 6 entries, which do not fill the shape \(2, 4\)"),
        (np.ones(6), (6,), InputError, "do not fill the shape"),
        (np.zeros(6), (2, 3), InputError, "v is zero"),
        (np.array([1.0, np.inf]), (1, 2), DataError, "v is not finite"),
    ],
)
def test_bad_vectors(v, shape, error, message):
    with pytest.raises(error, match=message):
        rank_one_energy(v, shape)


def test_an_exact_kronecker_hessian_has_rank_one_eigenvectors():
    objective, _, moment = mixed_objective()
    found = layer_low_rank(layer_eigenstructure(objective, "fc", k=8), kronecker_factors(objective, "fc", errors=False))
    assert np.allclose(found.shares[:, 0], 1, atol=1e-10)
    values, vectors = np.linalg.eigh(moment)
    mean = moment[-1]  # the last input is 1
    assert abs(found.input_ratio - values[-1] / values[-2]) < 1e-10 * found.input_ratio
    assert abs(found.input_alignment - (vectors[:, -1] @ mean) ** 2 / (mean @ mean)) < 1e-12
    assert abs(found.mean_share - mean @ mean / np.trace(moment)) < 1e-12
    cosines = (vectors.T @ mean) ** 2 / (mean @ mean)
    assert all(np.abs(cosines - alignment).min() < 1e-8 for alignment in found.right_alignment)
    assert abs(found.right_alignment[0] - found.input_alignment) < 1e-8


@pytest.fixture(scope="module")
def objective():
    return hs.Objective(build("relu, bias"), "cross_entropy", (inputs_for("relu, bias", 40), randint(3, 40, seed=3)))


@pytest.mark.parametrize("layer", ["0", "2"])
def test_shares_and_alignment_against_a_dense_truth(objective, layer):
    factors = kronecker_factors(objective, layer, errors=False)
    found = layer_low_rank(layer_eigenstructure(objective, layer, k=6), factors)
    space, module = objective.parameters, dict(objective.model.named_modules())[layer]
    H = hs.Hessian(objective).dense()[space.slice(f"{layer}.weight").start : space.slice(f"{layer}.bias").stop]
    vectors = torch.linalg.eigh(H[:, space.slice(f"{layer}.weight").start : space.slice(f"{layer}.bias").stop])[1]
    for number, v in enumerate(vectors.flip(1).T[:6]):
        weight, bias = v[: module.weight.numel()].view_as(module.weight), v[module.weight.numel() :]
        _, sigma, right = torch.linalg.svd(torch.cat([weight, bias[:, None]], dim=1), full_matrices=False)
        assert np.allclose(found.shares[number], sigma**2, atol=1e-8)
        mean = torch.from_numpy(factors.input_mean)
        assert abs(found.right_alignment[number] - float((right[0] @ mean) ** 2 / (mean @ mean))) < 1e-7
    assert found.shares[:, 0].min() < 0.99


def test_there_and_back(objective, tmp_path):
    import xarray as xr

    structure = layer_eigenstructure(objective, "0", k=6)
    found = layer_low_rank(structure, kronecker_factors(objective, "0", errors=False))
    found.to_xarray().to_netcdf(tmp_path / "low.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "low.nc", engine="h5netcdf") as dataset:
        again = LayerLowRank.from_xarray(dataset.load())
    for name in ("values", "shares", "right_alignment"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    for name in ("layer", "shape", "input_alignment", "input_ratio", "mean_share", "provenance"):
        assert getattr(again, name) == getattr(found, name)


def test_factors_of_another_layer(objective):
    with pytest.raises(InputError, match="factors must be those of layer '0' with shape"):
        layer_low_rank(layer_eigenstructure(objective, "0", k=2), kronecker_factors(objective, "2", errors=False))
