"""Spectral densities against exact eigenvalues and known laws: nodes, smoothing, moments, bands, outliers."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import DataError, InputError, TooLargeError
from hesscope.estimate import spectral_density as module
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.lanczos import lanczos
from hesscope.estimate.spectral_density import spectral_density
from hesscope.estimate.spectrum_distance import jensen_shannon_distance
from hesscope.estimate.symlog import from_symlog, to_symlog
from hesscope.operators import Operator
from tests.helpers import build, check_stderr, check_unbiased, cut, inputs_for, randint, randn

F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """Probes are isotropic, so that a diagonal matrix is as good as any; products are counted."""

    values: torch.Tensor
    calls: list
    columns_per_pass: int = 256
    symmetric = True
    engine = "diagonal"
    data_fingerprint = "abc"

    @property
    def shape(self):
        return len(self.values), len(self.values)

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def device(self):
        return self.values.device

    def products(self, V):
        assert V.shape[1] <= self.columns_per_pass
        self.calls.append(V.shape[1])
        return self.values[:, None] * V


def diagonal(values, dtype=F64, columns=256):
    return Diagonal(torch.as_tensor(np.asarray(values)).to(dtype), [], columns)


# --- known laws -------------------------------------------------------------------------------------------------------


def wigner_cdf(x):
    x = np.clip(x, -2, 2)
    return 0.5 + x * np.sqrt(4 - x * x) / (4 * np.pi) + np.arcsin(x / 2) / np.pi


def law_quantiles(cdf, count, low, high):
    """The eigenvalues of a matrix whose spectrum is the law itself."""
    x = np.linspace(low, high, 400_001)
    return np.interp((np.arange(count) + 0.5) / count, cdf(x), x)


def marchenko_pastur_cdf(x, ratio=0.5):
    low, high = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    # With x = middle - half width * cos(t) the density has no square roots at its ends.
    t = np.linspace(0, np.pi, 20_001)
    places = (low + high) / 2 - (high - low) / 2 * np.cos(t)
    slope = ((high - low) / 2 * np.sin(t)) ** 2 / (2 * np.pi * ratio * places)
    mass = np.concatenate([[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(t))])
    return np.interp(x, places, mass)


LAWS = {
    "Wigner": (wigner_cdf, -2.0, 2.0, {1: 0.0, 2: 1.0, 3: 0.0, 4: 2.0, 6: 5.0}),
    "Marchenko-Pastur": (marchenko_pastur_cdf, 0.0, 3.0, {1: 1.0, 2: 1.5, 3: 2.75, 4: 5.625}),
}


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", LAWS)
def test_known_laws(name, dtype):
    """Kolmogorov distances; of one probe's weights alone they are of the size sqrt(2 / P) = 0.01."""
    cdf, low, high, moments = LAWS[name]
    values = law_quantiles(cdf, 20_000, low, high)
    d = spectral_density(diagonal(values, dtype), probes=8, steps=30)
    x = np.linspace(low - 0.5, high + 0.5, 201)
    alike = SpectralDensity.from_eigenvalues(values).cumulative(x, d.default_bandwidth)
    assert np.abs(d.cumulative(x) - alike).max() < 0.005
    # What the smoothing itself does at the steep end of Marchenko and Pastur's law comes to this.
    assert np.abs(d.cumulative(x) - cdf(x)).max() < (0.006 if name == "Wigner" else 0.025)
    assert np.abs(d.cumulative(x, bandwidth=0) - cdf(x)).max() < 0.04  # half a node's weight
    middle = (x > low + 0.5) & (x < high - 0.5)
    slope = np.gradient(cdf(x), x)
    assert np.abs(d.density(x) - slope)[middle].max() < 0.05 * slope.max()
    for k, moment in moments.items():
        assert abs(d.moment(k) - moment) < 4 * d.moment_stderr(k) + 1e-4 * 2**k
        assert d.moment_stderr(k) < 0.02 * 2**k
    assert d.outliers().count == 0


@pytest.mark.parametrize("kind", ["Wigner", "Marchenko-Pastur"])
def test_random_matrices(kind):
    size = 800
    G = randn(size, 2 * size, seed=1)
    if kind == "Wigner":
        M = (G[:, :size] + G[:, :size].T) / (2 * size) ** 0.5
    else:
        M = G @ G.T / (2 * size)
        M = (M + M.T) / 2
    cdf, low, high, _ = LAWS[kind]
    d = spectral_density(M, probes=8, steps=30)
    x = np.linspace(low - 0.5, high + 0.5, 1001)
    exact = SpectralDensity.from_eigenvalues(np.linalg.eigvalsh(M.numpy()))
    # One probe's distribution function is sqrt(2 F (1 - F) / P) off, so the mean of eight 0.009 at most (3 times that).
    assert np.abs(d.cumulative(x) - cdf(x)).max() < 0.027
    assert np.abs(d.cumulative(x, 0.1) - exact.cumulative(x, 0.1)).max() < 0.027
    low, high = d.eigenvalue_range
    assert low == pytest.approx(exact.nodes.min(), abs=0.03)
    assert high == pytest.approx(exact.nodes.max(), abs=0.03)
    assert exact.nodes.min() - 1e-12 <= low and high <= exact.nodes.max() + 1e-12


# --- spikes and outliers ----------------------------------------------------------------------------------------------

BULK = law_quantiles(wigner_cdf, 495, -2.0, 2.0)
SPIKES = np.array([-4.0, 3.0, 3.5, 4.0, 5.0])
SPIKED = np.concatenate([SPIKES, BULK])
LAPLACE = np.r_[np.log((np.arange(497) + 0.5) / 497), -np.log((np.arange(497) + 0.5) / 497)]
RNG = np.random.default_rng(0)
# Name -> eigenvalues, distinct outliers.
SPECTRA = {
    "spikes": (SPIKED, SPIKES),
    "rank 5": (np.r_[3, 2, 1, 1, -5, np.zeros(495)], [-5, 1, 2, 3]),
    "copies": (np.r_[[5] * 3, [-3] * 2, 0.2 * BULK], [-3, 5]),
    "singular bulk": (np.r_[np.zeros(700), 1 + 0.3 * BULK[:290], 4, 5, 6], [4, 5, 6]),
    "heavy bulk": (np.r_[40, 33, 28, 24, 20, -15, LAPLACE], [-15, 20, 24, 28, 33, 40]),
    "bulk only": (BULK, []),
    "gaussian": (RNG.standard_normal(1000), []),
    "identity": (np.ones(300), []),
    "zero": (np.zeros(300), []),
}


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1.0, 1e-14, 1e14])
@pytest.mark.parametrize("name", SPECTRA)
def test_outliers(name, scale, dtype):
    """Equal to those of the exact spectrum, for every seed, and at any scale."""
    values, expected = SPECTRA[name]
    eps = 1e-8 if dtype == F64 else 1e-5
    exact = SpectralDensity.from_eigenvalues(values * scale).outliers()
    assert exact.values / scale == pytest.approx(expected, rel=1e-12)
    bulk = np.setdiff1d(values, expected)
    assert (exact.lower / scale, exact.upper / scale) == pytest.approx((bulk.min(), bulk.max()))
    for seed in range(5 if scale == 1.0 else 1):
        found = spectral_density(diagonal(values * scale, dtype), probes=8, steps=60, seed=seed).outliers()
        assert found.count == len(found.values) == len(expected)
        assert found.values / scale == pytest.approx(expected, rel=eps)
        assert exact.lower - 1e-5 * scale <= found.lower <= found.upper <= exact.upper + 1e-5 * scale
    assert "beyond the innermost gap of more than 0.2" in found.criterion


def test_mass_of_the_outliers():
    """Copies counted; a chi-square number of eigenvalues per probe."""
    values, _ = SPECTRA["copies"]
    found = [spectral_density(diagonal(values), probes=16, steps=15, seed=seed).outliers() for seed in range(100)]
    check_stderr([o.mass for o in found], [o.mass_stderr for o in found])
    mean = np.mean([o.mass for o in found])
    assert abs(mean - 5) < 4 * np.sqrt(2 * 5 / 16 / 100)


def test_spikes_stand_where_they_are_with_their_weight():
    d = spectral_density(diagonal(SPIKED), probes=64, steps=60)
    for spike in SPIKES:
        near = np.abs(d.nodes - spike) < 1e-8
        assert np.all(near.sum(axis=1) <= 1) and near.sum() >= 62  # one a probe: no ghost copies
        weight = (d.weights * near).sum(axis=1) * 500
        assert abs(weight.mean() - 1) < 4 * np.sqrt(2 / 64)


def test_a_gap_and_a_share_of_ones_own():
    d = SpectralDensity.from_eigenvalues(np.r_[4, 1.6, 1.2, BULK / 2])
    assert [d.outliers(gap=gap).count for gap in (0.15, 0.22, 0.5, 0.7)] == [3, 2, 1, 0]
    assert d.outliers(share=0.001).count == 0
    for arguments, message in (({"gap": 1.0}, "gap must lie between 0 and 1"), ({"share": 0.0}, "share must lie")):
        with pytest.raises(InputError, match=message):
            d.outliers(**arguments)


# --- statistics -------------------------------------------------------------------------------------------------------

MATRIX = np.r_[12.0, 9.0, -6.0, 2 + np.random.default_rng(3).standard_normal(97)]
_CACHE = {}


def replicates(probes, steps=6, count=800):
    key = probes, steps, count
    if key not in _CACHE:
        operator = diagonal(MATRIX)
        _CACHE[key] = [spectral_density(operator, probes, steps, seed=seed) for seed in range(count)]
    return _CACHE[key]


@pytest.mark.parametrize("k", [1, 2])
def test_moments_are_unbiased_and_their_standard_errors_honest(k):
    densities = replicates(8)
    exact = np.mean(MATRIX**k)
    check_unbiased([d.moment(k) for d in densities], [d.moment_stderr(k) for d in densities], exact)


def test_a_planted_bias_of_3_percent_fails():
    densities = replicates(8)
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(
            [1.03 * d.moment(2) for d in densities], [d.moment_stderr(2) for d in densities], np.mean(MATRIX**2)
        )


def test_moments_are_exact_per_probe_up_to_degree_2_steps_minus_1():
    operator = diagonal(MATRIX)
    d = spectral_density(operator, probes=3, steps=6)
    q = module._unit_probes(operator, 0, range(3)).numpy()
    for k in range(12):
        assert d._moments(k) == pytest.approx((q**2 * MATRIX**k).sum(axis=1), rel=1e-10)
    with pytest.raises(InputError, match=r"k must be at most 2 \* steps - 1 = 11.* got 12"):
        d.moment(12)


COVERED = np.array([-6.0, 0.0, 1.5, 4.0, 9.0, 11.5])


@pytest.mark.parametrize("quantity", ["density", "cumulative"])
@pytest.mark.parametrize("probes", [4, 8])
def test_bands_cover_the_exact_curves(probes, quantity):
    """Stated 95 %: between 90 and 99 % at each place over 500 seeds, in the bulk and at single eigenvalues."""
    exact = getattr(SpectralDensity.from_eigenvalues(MATRIX), quantity)(COVERED, 0.5)
    covered = 0
    for d in replicates(8, steps=25, count=500):
        d = replace(d, nodes=d.nodes[:probes], weights=d.weights[:probes])
        band = d.confidence_band(COVERED, 0.5, quantity=quantity)
        value = getattr(d, quantity)(COVERED, 0.5)
        assert np.all((band.lower <= value) & (value <= band.upper))
        covered = covered + ((band.lower <= exact) & (exact <= band.upper))
    assert np.all((covered / 500 >= 0.90) & (covered / 500 <= 0.99)), covered / 500


def test_bands_widen_with_the_level_and_keep_to_what_is_possible():
    d = spectral_density(diagonal(MATRIX), 4, 25)
    x = np.linspace(-20, 20, 201)
    narrow, wide = (d.confidence_band(x, level=level, quantity="cumulative") for level in (0.5, 0.99))
    assert np.all((wide.lower >= 0) & (wide.lower <= narrow.lower) & (narrow.upper <= wide.upper) & (wide.upper <= 1))
    assert np.all(d.confidence_band(x).lower >= 0)
    assert not np.isnan(spectral_density(diagonal(MATRIX), 2, 20).confidence_band(x).upper).any()


# --- the quadrature ---------------------------------------------------------------------------------------------------


def test_lanczos_against_its_definition():
    """Tridiagonal of the projected matrix, from bases that stay orthonormal for 50 steps."""
    starts = randn(3, 100, seed=1)
    starts /= starts.norm(dim=1, keepdim=True)
    r = lanczos(diagonal(MATRIX), starts, 50)
    for probe in range(3):
        Q = np.linalg.qr(np.array([starts[probe].numpy() * (MATRIX / 12) ** k for k in range(8)]).T)[0]
        T = Q.T @ (MATRIX[:, None] * Q)
        assert r.diagonals[probe, :8] == pytest.approx(np.diag(T), rel=1e-6)
        assert r.off_diagonals[probe, :7] == pytest.approx(np.abs(np.diag(T, 1)), rel=1e-6)
    nodes, weights = r.quadratures()
    assert np.all((np.abs(nodes - 12) < 1e-6).sum(axis=1) == 1)
    assert weights.sum(axis=1) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_partial_orthogonalization_is_as_good_as_full(dtype):
    """Bases orthogonal to the root of the rounding unit, and tridiagonals those of exact orthogonality to rounding.

    For a spectrum over ten orders of magnitude, where one pass fails: the vectors that the operator is given, made
    exactly orthonormal, have the tridiagonal as their projected matrix.
    """
    seen = []

    @dataclass(frozen=True, eq=False)
    class Watched(Diagonal):
        def products(self, V):
            seen.append(V.clone())
            return super().products(V)

    values = torch.arange(1, 301, dtype=F64) ** -4
    r = lanczos(Watched(values.to(dtype), []), module._unit_probes(diagonal(values, dtype), 0, range(1)), 60)
    Q, eps = torch.cat(seen, dim=1).double(), torch.finfo(dtype).eps
    length = int(r.lengths[0])
    assert Q.shape[1] == length >= 20
    assert (Q.T @ Q - torch.eye(length, dtype=F64)).abs().max() < 3 * eps**0.5
    N, R = torch.linalg.qr(Q)
    N = N * R.diagonal().sign()
    T = np.diag(r.diagonals[0]) + np.diag(r.off_diagonals[0, :-1], 1) + np.diag(r.off_diagonals[0, :-1], -1)
    assert (N.T @ (values[:, None] * N) - torch.from_numpy(T)[:length, :length]).abs().max() < 20 * eps


@pytest.mark.parametrize("scale", [1.0, 1e-14, 1e14])
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_a_krylov_space_that_is_exhausted(dtype, scale):
    """Four distinct eigenvalues: four nodes, then zero weights; and no products that nobody needs."""
    operator = diagonal(scale * np.repeat([5.0, 1.0, 0.0, -2.0], [1, 100, 150, 49]), dtype)
    d = spectral_density(operator, probes=3, steps=20)
    assert d.nodes.shape == d.weights.shape == (3, 20)
    assert np.all(d.weights[:, 4:] == 0) and np.all(d.nodes[:, 4:] == 0)
    expected = np.tile([-2, 0, 1, 5.0], (3, 1))
    assert d.nodes[:, :4] / scale == pytest.approx(expected, abs=1e-13 if dtype == F64 else 1e-5)
    assert d.products == sum(operator.calls) == 12
    assert d.message == "3 probes of 20 steps; a Krylov space was exhausted after 4 steps"


@pytest.mark.parametrize("size", [1, 7, 30])
def test_small_matrices_are_exact(size):
    M = randn(size, size, seed=2)
    M = M + M.T
    d = spectral_density(M, probes=4, steps=30)
    values = np.linalg.eigvalsh(M.numpy())
    assert d.exact and d.products == size and d.nodes.shape == d.weights.shape == (4, 30)
    assert d.nodes[2, :size] == pytest.approx(values, abs=1e-13)
    twin = SpectralDensity.from_eigenvalues(values)
    assert d.moment(2) == pytest.approx(twin.moment(2)) and d.moment_stderr(2) == 0
    assert d.moment(200) > 0
    x = np.linspace(-9, 9, 50)
    assert d.density(x, 0.3) == pytest.approx(twin.density(x, 0.3), rel=1e-9, abs=1e-12)
    assert d.default_bandwidth == pytest.approx(twin.default_bandwidth)
    band = d.confidence_band(x, 0.3)
    assert np.array_equal(band.lower, band.upper)


def test_nothing_depends_on_the_scale():
    x = np.linspace(-8, 14, 100)
    plain = spectral_density(diagonal(MATRIX), 4, 20)
    for scale in (1e-14, 1e14):
        scaled = spectral_density(diagonal(MATRIX * scale), 4, 20)
        assert scaled.nodes / scale == pytest.approx(plain.nodes, rel=1e-9, abs=1e-9)
        assert scaled.default_bandwidth == pytest.approx(scale * plain.default_bandwidth, rel=1e-9)
        assert scaled.density(x * scale) * scale == pytest.approx(plain.density(x), rel=1e-6, abs=1e-12)
        assert scaled.symlog_density(x * scale) == pytest.approx(plain.symlog_density(x), rel=1e-6, abs=1e-12)


def test_scaling_by_a_power_of_two_changes_no_bit():
    """Not even where the squares of all products vanish."""
    for dtype, scale in ((F64, 2.0**-600), (F64, 2.0**600), (F32, 2.0**-90), (F32, 2.0**90)):
        plain, scaled = (spectral_density(diagonal(MATRIX * s, dtype), 2, 12) for s in (1.0, scale))
        assert np.array_equal(plain.nodes, scaled.nodes / scale)
        assert np.array_equal(plain.weights, scaled.weights)


def test_float32_sees_the_same():
    double, single = (spectral_density(diagonal(MATRIX, dtype), 4, 12) for dtype in (F64, F32))
    assert single.nodes == pytest.approx(double.nodes, abs=1e-3)
    assert single.provenance.dtype == "float32"


def test_probes_in_groups(monkeypatch):
    """As many at once as the operator takes, or as memory holds: the same numbers, and passes as wide as may be."""
    whole = spectral_density(diagonal(MATRIX), 8, 20)
    operator = diagonal(MATRIX, columns=3)
    assert spectral_density(operator, 8, 20).nodes == pytest.approx(whole.nodes, rel=1e-10, abs=1e-10)
    assert operator.calls == [3] * 40 + [2] * 20
    monkeypatch.setattr(module, "available_bytes", lambda device: 2 * 5 * 26 * 100 * 8)
    operator = diagonal(MATRIX)
    assert spectral_density(operator, 8, 20).nodes == pytest.approx(whole.nodes, rel=1e-10, abs=1e-10)
    assert operator.calls == [5] * 20 + [3] * 20
    monkeypatch.setattr(module, "available_bytes", lambda device: 26 * 100 * 8)
    with pytest.raises(TooLargeError, match=r"a probe of 20 steps needs .* take fewer steps"):
        spectral_density(operator, 8, 20)


def test_seeds():
    operator = diagonal(MATRIX)
    first, again, other = (spectral_density(operator, 4, 20, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(first.nodes, again.nodes) and np.array_equal(first.weights, again.weights)
    more = spectral_density(operator, 6, 20, seed=7)
    assert more.nodes[:4] == pytest.approx(first.nodes, rel=1e-10, abs=1e-10)
    assert len(np.unique(np.concatenate([more.weights[:, 0], other.weights[:, 0]]))) == 10


def test_of_a_network_and_of_other_forms():
    obj = hs.Objective(build("tanh"), "cross_entropy", cut(inputs_for("tanh", 12), randint(3, 12, seed=2)))
    H = hs.Hessian(obj)
    found = spectral_density(H, 4, 10)
    assert H.engine in found.provenance.engine and found.provenance.data_fingerprint == H.data_fingerprint
    dense = H.dense()
    for form in (dense, dense.numpy(), hs.as_operator(dense).to_scipy()):
        assert spectral_density(form, 4, 10).nodes == pytest.approx(found.nodes, abs=1e-9)


def test_progress():
    calls = []
    d = spectral_density(diagonal(MATRIX, columns=3), 8, 20, progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (d.products, d.products) == (160, 160)
    assert {whole for _, whole in calls} == {160}


# --- smoothing --------------------------------------------------------------------------------------------------------


def test_densities_integrate_to_one():
    d = spectral_density(diagonal(MATRIX), 4, 20)
    x = d.grid(20_000)
    assert np.trapezoid(d.density(x), x) == pytest.approx(1, abs=1e-4)
    assert d.density(x[5]).shape == () and d.density(x[:6].reshape(2, 3)).shape == (2, 3)
    assert d.cumulative(x[0]) < 1e-4 and d.cumulative(x[-1]) > 1 - 1e-4
    steps = np.diff(d.cumulative(x)) / np.diff(x)
    assert steps == pytest.approx((d.density(x)[1:] + d.density(x)[:-1]) / 2, abs=1e-5)
    y = d.symlog_grid(20_000, threshold=0.01)
    u = to_symlog(y, 0.01)
    assert np.diff(u) == pytest.approx(np.diff(u).mean(), rel=1e-6)
    assert np.trapezoid(d.symlog_density(y, 0.01), u) == pytest.approx(1, abs=1e-4)


def test_the_symmetric_log_axis():
    assert to_symlog([-99, 0, 9, 0.001], 1.0) == pytest.approx([-2, 0, 1, np.log10(1.001)])
    x = np.array([-1e9, -3.0, 0.0, 1e-9, 5.0])
    assert from_symlog(to_symlog(x, 0.1), 0.1) == pytest.approx(x, rel=1e-9)
    single = SpectralDensity.from_eigenvalues([9.0])
    peak = single.symlog_density(9.0, threshold=1.0, bandwidth=0.1)
    assert peak == pytest.approx(1 / (0.1 * np.sqrt(2 * np.pi)))
    # One bandwidth to the right in u is 10^(1 + 0.1) - 1.
    assert single.symlog_density(10**1.1 - 1, 1.0, 0.1) == pytest.approx(peak * np.exp(-0.5))


def test_default_bandwidth_merges_the_nodes_of_the_bulk():
    """No ripples: the density of the semicircle has one maximum; and an outlier does not blur it."""
    for spikes in ([], [50.0]):
        d = spectral_density(diagonal(np.r_[BULK, spikes]), 8, 30)
        assert 0.05 < d.default_bandwidth < 0.2
    zeros = SpectralDensity.from_eigenvalues(np.zeros(5))
    with pytest.raises(InputError, match="all eigenvalues are zero, so that there is no default bandwidth"):
        zeros.density(0.0)
    assert zeros.density(0.0, 1.0) == pytest.approx(1 / np.sqrt(2 * np.pi))


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_bandwidths(bandwidth):
    d = SpectralDensity.from_eigenvalues(MATRIX)
    with pytest.raises(InputError, match="bandwidth must be positive"):
        d.density(0.0, bandwidth)
    with pytest.raises(InputError, match="bandwidth must be positive"):
        jensen_shannon_distance(d, d, bandwidth)
    with pytest.raises(InputError, match="threshold must be positive"):
        d.symlog_density(0.0, threshold=bandwidth)


# --- distance ---------------------------------------------------------------------------------------------------------


def test_distance_between_equal_and_disjoint_spectra():
    a, b = (SpectralDensity.from_eigenvalues(np.sort(MATRIX) + shift) for shift in (0.0, 100.0))
    assert jensen_shannon_distance(a, a) == 0
    assert jensen_shannon_distance(a, b) == pytest.approx(1, abs=1e-12)
    assert jensen_shannon_distance(a, b) == jensen_shannon_distance(b, a)
    zeros = SpectralDensity.from_eigenvalues(np.zeros(4))
    assert jensen_shannon_distance(zeros, zeros) == 0
    assert 0.9 < jensen_shannon_distance(zeros, b) <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-14, 1e14])
@pytest.mark.parametrize("shift", [0.1, 1.0, 2.5])
def test_distance_between_two_gaussians(shift, scale):
    """One node each, so that the densities are Gaussians of unit width; truth by quadrature of the definition."""
    x = np.linspace(-15, 20, 200_001)
    p, q = (np.exp(-0.5 * (x - m) ** 2) / np.sqrt(2 * np.pi) for m in (0.0, shift))
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        integrand = np.nan_to_num(p * np.log2(p / m)) + np.nan_to_num(q * np.log2(q / m))
    truth = np.sqrt(np.trapezoid(integrand, x) / 2)
    a, b = (SpectralDensity.from_eigenvalues([place * scale]) for place in (0.3, 0.3 + shift))
    assert jensen_shannon_distance(a, b, scale) == pytest.approx(truth, rel=5e-3)


def test_distance_of_estimated_and_exact_spectra():
    """The same matrix: near zero; another one: what the exact spectra say."""
    values, others = BULK, np.concatenate([BULK[:400] * 0.5, SPIKES])
    estimated, exact = spectral_density(diagonal(values), 32, 30), SpectralDensity.from_eigenvalues(values)
    assert jensen_shannon_distance(estimated, exact) < 0.03
    other, other_exact = spectral_density(diagonal(others), 32, 30), SpectralDensity.from_eigenvalues(others)
    truth = jensen_shannon_distance(exact, other_exact, 0.15)
    assert truth > 0.2
    assert jensen_shannon_distance(estimated, other, 0.15) == pytest.approx(truth, rel=0.05)


# --- storage and bad input --------------------------------------------------------------------------------------------


def test_to_xarray_and_back():
    for d in (spectral_density(diagonal(MATRIX, F32), 3, 9), SpectralDensity.from_eigenvalues(MATRIX)):
        back = SpectralDensity.from_xarray(d.to_xarray())
        assert np.array_equal(back.nodes, d.nodes) and np.array_equal(back.weights, d.weights)
        for name in ("dimension", "exact", "products", "provenance", "message"):
            assert getattr(back, name) == getattr(d, name)
    with pytest.raises(InputError, match="expected a data set of record 'SpectralDensity'"):
        SpectralDensity.from_xarray(d.to_xarray().assign_attrs(record="Other"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes must be a positive integer, got 0"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 2.5}, "steps must be a positive integer, got 2.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        spectral_density(diagonal(MATRIX), **arguments)


def test_more_bad_input():
    d = spectral_density(diagonal(MATRIX), 1, 9)
    assert np.isnan(d.moment_stderr(1))
    with pytest.raises(InputError, match="a confidence band needs at least two probes"):
        d.confidence_band(0.0)
    with pytest.raises(InputError, match="level must lie between 0 and 1, got 1"):
        d.confidence_band(0.0, level=1)
    with pytest.raises(InputError, match="quantity must be one of 'density', 'cumulative'"):
        d.confidence_band(0.0, quantity="pdf")
    with pytest.raises(InputError, match="x must be finite"):
        d.density([0.0, np.nan])
    with pytest.raises(InputError, match="k must be a positive integer, got -1"):
        d.moment(-1)
    with pytest.raises(InputError, match="eigenvalues must be a non-empty array of finite numbers"):
        SpectralDensity.from_eigenvalues([1.0, np.nan])
    with pytest.raises(InputError, match="the matrix must be symmetric"):
        spectral_density(randn(50, 50, seed=1))
    for size in (10, 50):
        M = torch.eye(size, dtype=F64)
        M[1, 1] = float("inf")
        with pytest.raises(DataError, match="product of the operator is not finite"):
            spectral_density(M)
    with pytest.raises(InputError, match=r"must be float32 or float64, got torch\.bfloat16"):
        spectral_density(torch.eye(50, dtype=torch.bfloat16))
