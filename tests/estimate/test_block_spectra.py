"""Spectra of blocks: exact through the root or the dense block, by quadrature else; distances and their mean."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import DataError, InputError, PartitionError, TooLargeError
from hesscope.estimate.block_spectra import BlockSpectra, block_spectra, spectra_distances
from tests.helpers import randint, randn, randomized, relative_error, same, sequential_mlp
from tests.operators.zoo import specimen, truth

SIZES = {"a": 40, "b": 40, "c": 25, "d": 1}


def planted(scale=1.0):
    """Eigenvalues of three kinds in three blocks, and a block of one parameter; blocks are coupled."""
    generator = np.random.default_rng(0)
    M = 0.1 * generator.standard_normal((106, 106))
    values = [np.linspace(-1, 1, 40), 20 + np.linspace(-1, 1, 40), np.r_[np.zeros(20), np.arange(1, 6)], [3.0]]
    start = 0
    for eigenvalues in values:
        size = len(eigenvalues)
        Q = np.linalg.qr(generator.standard_normal((size, size)))[0]
        M[start : start + size, start : start + size] = (Q * eigenvalues) @ Q.T
        start += size
    return scale * (M + M.T) / 2, [np.sort(v) for v in values]


def partition():
    edges = np.cumsum([0, *SIZES.values()])
    return hs.Partition.from_blocks({name: range(edges[n], edges[n + 1]) for n, name in enumerate(SIZES)})


def gauss_newton(name):
    s = specimen(name)
    return hs.GaussNewton(hs.Objective(s.model, "cross_entropy", s.batch))


# --- exact spectra ----------------------------------------------------------------------------------------------------


CASES = [("mlp", hs.Partition.by_column), ("resnet", hs.Partition.by_tensor), ("gpt2", hs.Partition.by_tensor)]


@pytest.mark.parametrize("name, scheme", [*CASES, ("llama", hs.Partition.by_layer), ("gpt2", hs.Partition.by_layer)])
def test_blocks_of_the_gauss_newton_matrix(name, scheme):
    """Blocks with more parameters than rows, too: what the rows do not reach is zero."""
    G = gauss_newton(name)
    p = scheme(G.objective.model)
    found = block_spectra(G, p)
    matrix = truth(name, "gauss_newton").numpy()
    largest = np.linalg.eigvalsh(matrix)[-1]
    for label in p.labels:
        block = p.indices(label)
        exact = np.linalg.eigvalsh(matrix[block][:, block])
        values = found.eigenvalues(label)
        assert values.shape == exact.shape
        assert np.max(np.abs(values - exact)) < 1e-12 * largest
        assert values[0] >= 0
    assert found.products == 0
    assert found.heterogeneity_stderr == 0
    assert found.message == f"{len(p)} of {len(p)} blocks exact"
    assert found.provenance.engine.startswith("block spectra: dual; gauss-newton")


@pytest.mark.parametrize("factor", [-2.0, 1e-14, 1e14])
def test_multiples(factor):
    G = gauss_newton("gpt2")
    p = hs.Partition.by_tensor(G.objective.model)
    plain, multiple = block_spectra(G, p), block_spectra(factor * G, p)
    for label in p.labels:
        exact = np.sort(factor * plain.eigenvalues(label))
        assert np.max(np.abs(multiple.eigenvalues(label) - exact)) <= 1e-13 * np.abs(exact).max()
    if factor > 0:  # the quantiles that set the bandwidth are not those of the mirror image
        assert multiple.heterogeneity == pytest.approx(plain.heterogeneity, rel=1e-6)


def test_methods_agree():
    G = gauss_newton("resnet")
    p = hs.Partition.by_layer(G.objective.model)
    dual, exact, auto = (block_spectra(G, p, method=method) for method in ("dual", "exact", "auto"))
    assert (dual.products, exact.products, auto.products) == (0, G.shape[0], 0)
    largest = max(dual.eigenvalues(label)[-1] for label in p.labels)
    for label in p.labels:
        assert np.max(np.abs(dual.eigenvalues(label) - exact.eigenvalues(label))) < 1e-11 * largest


def test_single_precision():
    s = specimen("mlp")
    x, y = s.batch
    G = hs.GaussNewton(hs.Objective(s.model.float(), "cross_entropy", (x.float(), y)))
    p = hs.Partition.by_tensor(s.model)
    found = block_spectra(G, p)
    matrix = truth("mlp", "gauss_newton").numpy()
    for label in p.labels:
        exact = np.linalg.eigvalsh(matrix[p.indices(label)][:, p.indices(label)])
        assert np.max(np.abs(found.eigenvalues(label) - exact)) < 1e-5 * exact[-1]
    assert found.provenance.dtype == "float32"


@pytest.mark.parametrize("scale", [1.0, 1e-14, 1e14])
def test_any_symmetric_matrix(scale):
    matrix, values = planted(scale)
    found = block_spectra(matrix, partition(), method="exact")
    for label, exact in zip(SIZES, values, strict=True):
        assert np.max(np.abs(found.eigenvalues(label) - scale * exact)) < 1e-12 * scale * 21
    assert found.products == sum(SIZES.values())
    assert found.provenance.seed is None


def test_small_blocks_are_exact_of_their_own_accord():
    matrix, _ = planted()
    found = block_spectra(matrix, partition(), probes=3, steps=10)  # 30 products would be spent on a block
    assert [density.exact for density in found.densities] == [False, False, True, True]
    assert found.message == "2 of 4 blocks exact, the others by quadrature, 3 probes of 10 steps"
    assert found.products == 2 * 30 + 25 + 1
    with pytest.raises(InputError, match="block 'a' is known by a quadrature only; use method='exact'"):
        found.eigenvalues("a")
    with pytest.raises(InputError, match="no block is named 'z'; the blocks are a, b, c, d"):
        found.eigenvalues("z")


def test_blocks_of_the_hessian():
    s = specimen("gpt2")
    H = hs.Hessian(hs.Objective(s.model, "cross_entropy", s.batch))
    names = ["transformer.h.0.ln_1.bias", "transformer.h.0.ln_1.weight"]
    rest = [name for name in H.objective.parameters.names if name not in names]
    p = hs.Partition.from_blocks({"one": names[0], "two": names[1], "rest": rest}, s.model)
    found = block_spectra(H, p, probes=2, steps=12)
    matrix = truth("gpt2", "hessian").numpy()
    for label in ("one", "two"):
        exact = np.linalg.eigvalsh(matrix[p.indices(label)][:, p.indices(label)])
        assert np.max(np.abs(found.eigenvalues(label) - exact)) < 1e-11 * np.abs(exact).max()
    rest = matrix[p.indices("rest")][:, p.indices("rest")]
    assert found.densities[2].eigenvalue_range[1] == pytest.approx(np.linalg.eigvalsh(rest)[-1], rel=1e-3)


# --- distances --------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_pairs():
    matrix, _ = planted()
    found = block_spectra(matrix, partition(), method="exact")
    for i, j in combinations(range(4), 2):
        distance = hs.jensen_shannon_distance(found.densities[i], found.densities[j])
        assert found.distances[i, j] == found.distances[j, i] == distance
    assert not np.diag(found.distances).any()
    assert found.heterogeneity == pytest.approx(found.distances.sum() / 12, rel=1e-14)
    assert found.distances[0, 1] > 0.99  # nowhere in common
    assert not found.distances_stderr.any()


def test_equal_blocks_are_homogeneous():
    matrix = np.kron(np.eye(3), planted()[0][:40, :40])
    p = hs.Partition.from_blocks({f"b{n}": range(40 * n, 40 * n + 40) for n in range(3)})
    exact = block_spectra(matrix, p, method="exact")
    assert exact.heterogeneity < 1e-6
    random = block_spectra(matrix, p, method="quadrature", steps=10)
    assert random.densities[0].nodes.tolist() != random.densities[1].nodes.tolist()  # probes of their own
    assert 0 < random.heterogeneity < 0.3


def test_standard_errors_of_distances():
    """Against the spread over seeds; distances that are not small, where noise has no bias."""
    generator = np.random.default_rng(1)
    Q = [np.linalg.qr(generator.standard_normal((60, 60)))[0] for _ in range(3)]
    values = [np.linspace(0, 1, 60), np.linspace(0, 1, 60) ** 3, 0.4 + 0.5 * np.linspace(0, 1, 60)]
    matrix = np.zeros((180, 180))
    for n in range(3):
        matrix[60 * n : 60 * n + 60, 60 * n : 60 * n + 60] = (Q[n] * values[n]) @ Q[n].T
    p = hs.Partition.from_blocks({f"b{n}": range(60 * n, 60 * n + 60) for n in range(3)})
    found = [block_spectra(matrix, p, "quadrature", probes=6, steps=8, seed=seed) for seed in range(50)]
    pairs = np.triu_indices(3, 1)
    distances, errors = (
        np.array([getattr(f, name)[pairs] for f in found]) for name in ("distances", "distances_stderr")
    )
    ratio = np.sqrt((errors**2).mean(axis=0)) / distances.std(axis=0, ddof=1)
    assert np.all((ratio > 0.7) & (ratio < 1.6)), ratio
    means, mean_errors = np.array([f.heterogeneity for f in found]), np.array([f.heterogeneity_stderr for f in found])
    ratio = np.sqrt((mean_errors**2).mean()) / means.std(ddof=1)
    assert 0.75 < ratio < 1.35, ratio
    # What the steps resolve is the same for any number of probes; more of them only leave less noise.
    many = block_spectra(matrix, p, "quadrature", probes=60, steps=8, seed=100)
    assert means.mean() == pytest.approx(many.heterogeneity, rel=0.05)


def test_estimates_must_have_equally_many_probes():
    matrix, _ = planted()
    densities = [hs.spectral_density(matrix, probes=probes, steps=10) for probes in (3, 4)]
    with pytest.raises(InputError, match="estimated spectra must share one number of probes, got 3, 4"):
        spectra_distances(densities)


def test_a_single_block_has_no_heterogeneity():
    matrix, _ = planted()
    found = block_spectra(matrix, hs.Partition.from_blocks({"all": range(106)}))
    assert np.isnan(found.heterogeneity)
    assert np.isnan(found.heterogeneity_stderr)


def test_zero_blocks():
    """A loss without curvature: all eigenvalues are zero, and no two blocks differ."""
    model = randomized(sequential_mlp((4, 5, 3), nn.Tanh, bias=True))
    G = hs.GaussNewton(hs.Objective(model, nn.L1Loss(), (randn(6, 4, seed=1), randn(6, 3, seed=2))))
    found = block_spectra(G, hs.Partition.by_tensor(model))
    assert not any(density.nodes.any() for density in found.densities)
    assert found.heterogeneity == 0


# --- seeds and files --------------------------------------------------------------------------------------------------


def test_seeds():
    matrix, _ = planted()
    first, again, other = (block_spectra(matrix, partition(), "quadrature", 3, 8, seed) for seed in (1, 1, 2))
    assert all(same(a.nodes, b.nodes) for a, b in zip(first.densities, again.densities, strict=True))
    assert first.heterogeneity == again.heterogeneity != other.heterogeneity
    # A block keeps its probes whatever else is measured.
    p = partition()
    alone = hs.Partition.from_blocks({"a": p.indices("a"), "others": np.setdiff1d(np.arange(106), p.indices("a"))})
    assert same(block_spectra(matrix, alone, "quadrature", 3, 8, 1).densities[0].nodes, first.densities[0].nodes)


@pytest.mark.parametrize("method", ["quadrature", "exact"])
def test_to_xarray_and_back(method, tmp_path):
    matrix, _ = planted()
    found = block_spectra(matrix, partition(), method, seed=5)
    dataset = found.to_xarray()
    assert dataset["distance"].sel(block="a", other="b") == found.distances[0, 1]
    dataset.to_netcdf(tmp_path / "spectra.nc", engine="h5netcdf")
    import xarray as xr

    with xr.open_dataset(tmp_path / "spectra.nc", engine="h5netcdf") as stored:
        again = BlockSpectra.from_xarray(stored.load())
    for name in (
        "labels",
        "sizes",
        "distances",
        "distances_stderr",
        "heterogeneity",
        "message",
        "provenance",
        "products",
    ):
        assert same(getattr(again, name), getattr(found, name)), name
    assert again.heterogeneity_stderr == found.heterogeneity_stderr
    for one, other in zip(found.densities, again.densities, strict=True):
        assert same(one.nodes, other.nodes)
        assert same(one.weights, other.weights)
        assert (one.exact, one.dimension, one.products, one.message) == (
            other.exact,
            other.dimension,
            other.products,
            other.message,
        )
        assert one.provenance.engine == other.provenance.engine
        assert one.default_bandwidth == other.default_bandwidth
    with pytest.raises(InputError, match="expected a data set of record 'BlockSpectra', got 'SpectralDensity'"):
        BlockSpectra.from_xarray(found.densities[0].to_xarray())


def test_progress_comes_to_its_end():
    for matrix, p in ((planted()[0], partition()), (gauss_newton("mlp"), hs.Partition.by_row(specimen("mlp").model))):
        calls = []
        block_spectra(matrix, p, progress=lambda done, whole: calls.append((done, whole)))  # noqa: B023
        assert calls[-1] == (p.size, p.size)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(monkeypatch):
    matrix, _ = planted()
    with pytest.raises(InputError, match="method must be one of 'auto', 'exact', 'dual', 'quadrature', got 'slq'"):
        block_spectra(matrix, partition(), "slq")
    with pytest.raises(InputError, match="probes must be at least 2"):
        block_spectra(matrix, partition(), probes=1)
    with pytest.raises(InputError, match="steps must be a positive integer, got 0"):
        block_spectra(matrix, partition(), steps=0)
    with pytest.raises(InputError, match="method 'exact' takes no probes"):
        block_spectra(matrix, partition(), "exact", probes=4)
    with pytest.raises(InputError, match="the dual form needs a root of the matrix"):
        block_spectra(matrix, partition(), "dual")
    with pytest.raises(PartitionError, match="covers 106 parameters, but the operator has 105"):
        block_spectra(matrix[:105, :105], partition())
    with pytest.raises(InputError, match="the matrix must be symmetric"):
        block_spectra(np.triu(matrix), partition())
    matrix[3, 5] = matrix[5, 3] = np.nan
    with pytest.raises(DataError, match="not finite"):
        block_spectra(torch.from_numpy(matrix), partition(), "exact")
    G = gauss_newton("mlp")
    monkeypatch.setattr("hesscope.core.memory.available_bytes", lambda device: 10)
    with pytest.raises(TooLargeError, match="the 18 rows of the root needs"):
        block_spectra(G, hs.Partition.by_row(G.objective.model), "dual")


def test_a_root_that_is_not_real_is_no_obstacle():
    """Negative class weights: no dual form, but a matrix like any other."""
    model = randomized(sequential_mlp((4, 5, 3), nn.Tanh, bias=True))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([3.0, -1.0, 1.0]).double())
    G = hs.GaussNewton(hs.Objective(model, loss, (randn(12, 4, seed=1), randint(3, 12, seed=2))))
    p = hs.Partition.by_tensor(model)
    found = block_spectra(G, p)
    assert "exact" in found.provenance.engine
    matrix = G.dense().numpy()
    for label in p.labels:
        exact = np.linalg.eigvalsh(matrix[p.indices(label)][:, p.indices(label)])
        assert relative_error(found.eigenvalues(label), exact) < 1e-12


def test_equal_eigenvalues_that_rounding_sets_apart_change_nothing():
    A = torch.diag(torch.tensor([0.0] * 6 + [1.0] * 4 + [0.0] * 4 + [1.0] * 6, dtype=torch.float64))
    halves = hs.Partition.from_blocks({"a": range(10), "b": range(10, 20)})
    plain = hs.block_spectra(A, halves, method="exact").heterogeneity
    noisy = A + 1e-15 * torch.diag(randn(20, seed=1))
    assert hs.block_spectra(noisy, halves, method="exact").heterogeneity == pytest.approx(plain, rel=1e-6)
