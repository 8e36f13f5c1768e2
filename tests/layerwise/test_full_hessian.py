"""The whole matrix's top eigenspace inside layers, against dense algebra and planted subspaces."""

from dataclasses import fields

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.layerwise.full_hessian import FullHessianOverlap, full_hessian_overlap, restricted_overlap
from tests.helpers import build, inputs_for, randint, randn

K = 4


@pytest.fixture(scope="module")
def objective():
    name = "relu, bias"
    return hs.Objective(build(name), "cross_entropy", (inputs_for(name, 40), randint(3, 40, seed=3)))


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_against_dense_algebra(objective, curvature):
    found = full_hessian_overlap(objective, K, curvature=curvature)
    H = {"hessian": hs.Hessian, "gauss_newton": hs.GaussNewton}[curvature](objective).dense().numpy()
    values, vectors = (part[..., ::-1] for part in np.linalg.eigh(H))
    space = objective.parameters
    assert found.layers == ("0", "2", "4")
    assert np.allclose(found.values, values[:K], rtol=1e-9)
    for number, layer in enumerate(found.layers):
        place = slice(space.slice(f"{layer}.weight").start, space.slice(f"{layer}.bias").stop)
        rows = vectors[place, :K]
        own_values, own = (part[..., ::-1] for part in np.linalg.eigh(H[place, place]))
        assert found.sizes[number] == place.stop - place.start
        assert np.allclose(found.own_values[number], own_values[:K], rtol=1e-9)
        assert np.allclose(found.shares[number], (rows**2).sum(axis=0), atol=1e-6)
        assert found.dimensions[number] == K
        Q = np.linalg.qr(rows)[0]
        assert abs(found.overlap[number] - ((Q.T @ own[:, :K]) ** 2).sum() / K) < 1e-5
        assert abs(found.captured[number] - ((own[:, :K].T @ rows) ** 2).sum() / (rows**2).sum()) < 1e-5
    assert np.allclose(found.shares.sum(axis=0), 1)
    assert np.allclose(found.chance, K / found.sizes) and found.converged
    assert found.overlap.max() < 0.999


def test_some_layers_and_their_order(objective):
    every, some = full_hessian_overlap(objective, K), full_hessian_overlap(objective, K, layers=["4", "0"])
    assert some.layers == ("4", "0")
    assert np.allclose(some.overlap, every.overlap[[2, 0]]) and np.allclose(some.shares, every.shares[[2, 0]])


def test_more_pairs_than_a_layer_has(objective):
    """Adding one vector to all rows of the last layer changes no loss: the rest, (C - 1) x inputs, is all of it."""
    found = full_hessian_overlap(objective, 30, layers=["4"])
    assert (found.sizes[0], found.dimensions[0]) == (15, 10)
    assert np.isnan(found.own_values[0, 15:]).all() and np.isfinite(found.own_values[0, :15]).all()
    assert abs(found.overlap[0] - 1) < 1e-9 and abs(found.captured[0] - 1) < 1e-9 and found.chance[0] == 10 / 15


Q = torch.linalg.qr(randn(30, 6, seed=1)).Q


def test_directions_that_are_hardly_there_are_dropped():
    """Three directions, one of size 1e-9: two are compared, with the first two of the layer's own."""
    restricted = Q[:, :3] * torch.tensor([0.5, 0.2, 1e-9], dtype=Q.dtype)
    found = restricted_overlap(restricted, Q[:, [0, 3, 1]], rounding=1e-6)
    assert (found.dimension, found.overlap) == (2, pytest.approx(0.5))
    assert found.captured == pytest.approx(0.25 / 0.29)
    assert restricted_overlap(restricted, Q[:, [0, 3, 1]], rounding=1e-12).dimension == 3
    assert restricted_overlap(restricted, Q[:, [0, 3, 1]], rounding=1e-12).overlap == pytest.approx(2 / 3)


def test_dependent_directions_count_once():
    restricted = torch.stack([0.3 * Q[:, 0], 0.2 * Q[:, 0], 0.1 * Q[:, 1]], dim=1)
    found = restricted_overlap(restricted, Q[:, :3], rounding=1e-6)
    assert (found.dimension, found.overlap, found.captured) == (2, pytest.approx(1), pytest.approx(1))


def test_nothing_in_the_layer():
    found = restricted_overlap(torch.zeros(30, 2), Q[:, :2], rounding=1e-6)
    assert found.dimension == 0 and np.isnan(found.overlap) and np.isnan(found.captured)


def test_progress(objective):
    seen = []
    full_hessian_overlap(objective, 2, progress=lambda done, planned: seen.append((done, planned)))
    assert seen and all(0 <= done <= planned == 1000 for done, planned in seen)
    assert seen[-1][0] == 1000


def test_there_and_back(objective, tmp_path):
    import xarray as xr

    found = full_hessian_overlap(objective, 3)
    found.to_xarray().to_netcdf(tmp_path / "full.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "full.nc", engine="h5netcdf") as dataset:
        again = FullHessianOverlap.from_xarray(dataset.load())
    for part in fields(found):
        one, other = getattr(again, part.name), getattr(found, part.name)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other, part.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 65}, "k must be at most the number of parameters P = 64, got 65"),
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"k": 2, "layers": []}, "layers must be different names, at least one"),
        ({"k": 2, "layers": ["0", "0"]}, "layers must be different names"),
        ({"k": 2, "layers": ["fc"]}, "there is no layer 'fc'"),
        ({"k": 2, "curvature": "fisher"}, "curvature must be one of"),
    ],
)
def test_bad_input(objective, arguments, message):
    with pytest.raises(InputError, match=message):
        full_hessian_overlap(objective, **arguments)
