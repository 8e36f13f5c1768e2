"""Eigenpairs against dense ones: with their multiplicity, at any scale, in either precision, and for few products.

Matrices are diagonal in a basis that the solver's random vectors do not know, so that the truth is what was put in.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

import hesscope as hs
from hesscope.core.errors import DataError, InputError, TooLargeError
from hesscope.core.rng import normal, stream
from hesscope.estimate import eigenpairs, krylov
from hesscope.estimate.eigenpairs import Eigenpairs, top_eigenpairs
from hesscope.estimate.krylov import KrylovSpace, overlooked
from hesscope.estimate.symmetry import require_symmetric
from hesscope.operators import Operator
from tests.helpers import build, cut, inputs_for, randint, randn, relative_error

P, K = 300, 5
F32, F64 = torch.float32, torch.float64


def gaussian(count, width=1.0, seed=0):
    return width * np.random.default_rng(seed).standard_normal(count)


def semicircle(count, width=1.0, seed=0):
    return width * (2 * np.random.default_rng(seed).beta(1.5, 1.5, count) - 1)


# Name -> all P eigenvalues.
SPECTRA = {
    "few outliers": np.r_[20, 15, 11, 8, 6, 5, 4.5, gaussian(P - 7)],
    "outliers of both signs": np.r_[-30, -20, 10, 9, 8, 7, 6, gaussian(P - 7)],
    "clustered": np.r_[5 + 1e-6 * np.arange(4), 3, 2, semicircle(P - 6)],
    "dynamic range": np.r_[1e8, 1e6, 1e4, 100, 1, gaussian(P - 5, 1e-2)],
    "negative definite": -np.r_[1, 2, 3, 3, 50, 10 + np.abs(gaussian(P - 5))],
    "triple in the middle": np.r_[7, 5, 5, 5, 4.9, 4, semicircle(P - 6)],
    "triple at the top": np.r_[5, 5, 5, 3, 2, 1.5, semicircle(P - 6)],
    "more copies than pairs": np.r_[[9] * 8, [5] * 3, semicircle(P - 11)],
    "copies near the bulk": np.r_[5, 4, 2, 2, 1.5, 1.4, semicircle(P - 6)],
    "both signs of one magnitude": np.r_[6, -6, 6, -6, 4, semicircle(P - 5)],
    "rank 3": np.r_[3, 2, 1, np.zeros(P - 3)],
    "rank 3 with copies": np.r_[3, 3, -1, np.zeros(P - 3)],
    "multiple of the identity": np.full(P, 3.0),
    "zero": np.zeros(P),
    "bulk only": gaussian(P),
    "power law": 1 / np.arange(1, P + 1) ** 1.5,
}


@dataclass(frozen=True, eq=False)
class Rotated(Operator):
    """A diagonal matrix between two Householder reflections: dense, with known eigenvalues, and cheap at any size."""

    values: torch.Tensor
    calls: list
    columns_per_pass = 8
    symmetric = True
    engine = "rotated"
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
        u = randn(len(self.values), 1, seed=9).to(self.dtype)
        u /= u.norm()
        W = V - 2 * u @ (u.T @ V)
        W = self.values[:, None] * W
        return W - 2 * u @ (u.T @ W)


def rotated(values, dtype=F64):
    return Rotated(torch.as_tensor(np.asarray(values)).to(dtype), [])


def best(values, which, k=K):
    """The k wanted ones of all eigenvalues, in the order of the contract."""
    values = np.sort(values)[::-1]
    if which == "LM":
        return values[np.argsort(-np.abs(values), kind="stable")[:k]]
    return values[:k] if which == "LA" else values[-k:]


def check(pairs, values, which, dtype, rtol=None):
    """Values with multiplicity, vectors, residuals and flags."""
    truth = best(np.asarray(values, dtype=np.float64), which, len(pairs.values))
    found = pairs.values
    if which == "LM":  # which sign comes first is open where magnitudes agree
        assert sorted(np.sign(found)) == sorted(np.sign(truth)) or len(set(np.abs(truth))) < len(truth)
        found, truth = np.abs(found), np.abs(truth)
    eps, largest = torch.finfo(dtype).eps, np.abs(values).max()
    rtol = rtol or {F64: 1e-5, F32: 1e-4}[dtype]
    bound = np.maximum(rtol * np.abs(truth), 20 * eps * largest)
    assert np.all(np.abs(found - truth) <= bound), (found, truth)
    assert np.all(np.diff(found) <= bound[1:])
    assert pairs.converged.all() and np.all(pairs.residuals <= bound + rtol * bound)
    V = pairs.vectors.double()
    assert relative_error(V.T @ V, torch.eye(V.shape[1])) < 20 * eps


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", SPECTRA)
def test_values_equal_the_dense_ones_with_their_multiplicity(name, which, dtype):
    """At a tolerance below the distances of the bulk's eigenvalues: only so are these told apart."""
    values = SPECTRA[name]
    check(top_eigenpairs(rotated(values, dtype), K, which, rtol=1e-5), values, which, dtype, rtol=1e-5)


@pytest.mark.parametrize("block", [2, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_same_with_blocks(name, block):
    values = SPECTRA[name]
    check(top_eigenpairs(rotated(values), K, block=block), values, "LA", F64)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-14, 1e14])
@pytest.mark.parametrize("name", ["few outliers", "triple in the middle", "rank 3", "multiple of the identity"])
def test_nothing_depends_on_the_scale(name, scale, dtype):
    values = SPECTRA[name]
    plain, scaled = (top_eigenpairs(rotated(values * s, dtype), K) for s in (1.0, scale))
    check(scaled, values * scale, "LA", dtype)
    # In other roundings, so the last step may differ.
    assert abs(plain.products - scaled.products) <= 4


def test_scaling_by_a_power_of_two_changes_no_bit():
    """Not even where the squares of all products vanish."""
    values = SPECTRA["few outliers"]
    for dtype, scale in ((F64, 2.0**-600), (F64, 2.0**600), (F32, 2.0**-90), (F32, 2.0**90)):
        plain, scaled = (top_eigenpairs(rotated(values * s, dtype), K) for s in (1.0, scale))
        assert np.array_equal(plain.values * scale, scaled.values)
        assert torch.equal(plain.vectors, scaled.vectors)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_restarts(which, monkeypatch):
    """With a basis of 24 vectors instead of 300; the true residuals show that what survives a restart is right."""
    monkeypatch.setattr(eigenpairs, "CAPACITY", 24)
    monkeypatch.setattr(eigenpairs, "LARGE_CAPACITY", 24)
    for name in ("few outliers", "outliers of both signs", "triple in the middle", "bulk only"):
        for dtype in (F64, F32):
            operator = rotated(SPECTRA[name], dtype)
            check(top_eigenpairs(operator, K, which), SPECTRA[name], which, dtype)


@pytest.mark.parametrize("name", ["triple in the middle", "copies near the bulk", "rank 3 with copies"])
def test_no_copy_is_overlooked_for_any_seed(name):
    """Bound on the probability: 1e-3 for each search."""
    for seed in range(30):
        pairs = top_eigenpairs(rotated(SPECTRA[name]), K, seed=seed)
        check(pairs, SPECTRA[name], "LA", F64)
        assert pairs.overlooked <= 1e-3


def test_without_the_search_copies_are_overlooked(monkeypatch):
    """The tests above would see it."""
    monkeypatch.setattr(eigenpairs._Search, "search_copies", lambda self, wanted: (False, 0.0))
    pairs = top_eigenpairs(rotated(SPECTRA["triple in the middle"]), K)
    assert pairs.values[-1] < 4.89


def test_true_residuals():
    """Also of pairs that have not converged, and in a precision in which the estimated ones would be far too small."""
    values = SPECTRA["few outliers"]
    for dtype, budget in ((F64, 16), (F64, None), (F32, None)):
        operator = rotated(values, dtype)
        pairs = top_eigenpairs(operator, K, max_products=budget, rtol=1e-7)
        R = (operator @ pairs.vectors).double() - pairs.vectors.double() * torch.from_numpy(pairs.values)
        rounding = 5 * torch.finfo(dtype).eps * 20
        assert R.norm(dim=0).numpy() == pytest.approx(pairs.residuals, rel=1e-3, abs=rounding)


def residuals_without_noise(operator, pairs):
    """||A v - lambda v|| in float64."""
    A = rotated(operator.values.double())
    V = pairs.vectors.double()
    return (
        (torch.cat([A @ v for v in V.split(8, dim=1)], dim=1) - V * torch.from_numpy(pairs.values)).norm(dim=0).numpy()
    )


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_residuals_from_one_product(dtype):
    """The recurrence knows them, but for rounding, which is added."""
    for seed in range(20):
        operator = rotated(SPECTRA["few outliers"], dtype)
        pairs = top_eigenpairs(operator, K, rtol=1e-3, seed=seed)
        assert pairs.message.endswith("; residuals from the recurrence, checked with one product")
        assert pairs.converged.all() and np.all(pairs.residuals <= 1e-3 * pairs.values)
        truth = residuals_without_noise(operator, pairs)
        eps = torch.finfo(dtype).eps * 20
        assert np.all(truth < pairs.residuals + eps) and np.all(pairs.residuals < truth + 20 * eps)
        assert relative_error(pairs.vectors.double().norm(dim=0), torch.ones(K)) < eps


@dataclass(frozen=True, eq=False)
class Noisy(Rotated):
    """Never the same product twice: noise of a given length, relative to the vector's."""

    noise: float = 0.0

    def products(self, V):
        errors = randn(*V.shape, seed=sum(self.calls)) / len(V) ** 0.5
        return super().products(V) + self.noise * V.norm(dim=0) * errors


@pytest.mark.parametrize("noise", [3e-4, 1e-3, 3e-3])
def test_noise_is_seen_by_one_product(noise):
    """Of the size of a twentieth to half of the largest residual that is allowed: recorded, and not taken for less."""
    values = torch.from_numpy(SPECTRA["few outliers"])
    for seed in range(10):
        operator = Noisy(values, [], noise)
        pairs = top_eigenpairs(operator, K, rtol=1e-3, seed=seed, max_products=60)
        truth = residuals_without_noise(operator, pairs)
        assert np.all(truth < pairs.residuals + 0.3 * noise) and np.all(pairs.residuals < truth + 4 * noise)
        assert np.all(truth[pairs.converged] <= 1e-3 * pairs.values[pairs.converged])


def test_a_tolerance_that_rounding_does_not_allow_is_not_chased():
    """A residual is at best some roundings of the largest eigenvalue: more products would not help."""
    M = np.linalg.qr(randn(P, P, seed=5).numpy())[0]
    M = torch.from_numpy(M * SPECTRA["few outliers"] @ M.T)
    for dtype in (F64, F32):
        pairs = top_eigenpairs(((M + M.T) / 2).to(dtype), K, rtol=1e-30)
        assert pairs.converged.all() and pairs.products < 100
        assert np.all(pairs.residuals < 20 * torch.finfo(dtype).eps * 20)


@pytest.mark.parametrize("k", [1, 2, 12, 16, 24])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_small_matrices_and_all_pairs(k, which):
    values = gaussian(24)
    pairs = top_eigenpairs(rotated(values), k, which)
    check(pairs, values, which, F64)
    assert pairs.residuals.max() < 1e-13 and pairs.products == 24
    assert pairs.message == f"{k} of {k} pairs converged; from the whole matrix"


@pytest.mark.parametrize("size", [34, 40, 60])
def test_a_space_that_fills_up(size):
    """A basis as large as the matrix, of which rounding leaves nothing beyond."""
    values = np.r_[np.ones(size // 2), 1 + 1e-9 * np.arange(size - size // 2)]
    for dtype in (F64, F32):
        check(top_eigenpairs(rotated(values, dtype), 15, rtol=1e-12), values, "LA", dtype, rtol=1e-12)


def test_one_parameter():
    pairs = top_eigenpairs(torch.tensor([[-4.0]], dtype=F64), 1, "LM")
    assert pairs.values == [-4.0] and abs(pairs.vectors.item()) == 1


# --- the number of products -------------------------------------------------------------------------------------------

# As in trained networks: classes - 1 outliers, few negative ones, and a bulk near zero.
TYPICAL = {
    "gaussian bulk": lambda size: np.r_[np.geomspace(50, 5, 10), -3, gaussian(size - 11, 0.3)],
    "heavy bulk": lambda size: np.r_[
        np.geomspace(50, 5, 10), -3, 0.3 * np.random.default_rng(0).laplace(size=size - 11)
    ],
    "power law": lambda size: np.r_[np.geomspace(50, 5, 10), -3, 2 / np.arange(1, size - 10)],
}


def eigsh_products(values, ncv, seed):
    """Products of ARPACK for 5 pairs at tolerance 1e-3, checked to be as accurate."""
    count = [0]

    def product(x):
        count[0] += 1
        return values * x.ravel()

    operator = LinearOperator((len(values), len(values)), matvec=product, dtype=float)
    start = np.random.default_rng(seed).standard_normal(len(values))
    found, V = eigsh(operator, K, which="LA", tol=1e-3, ncv=ncv, v0=start)
    assert np.all(np.linalg.norm(values[:, None] * V - V * found, axis=0) <= 1e-3 * np.abs(found))
    assert np.sort(found)[::-1] == pytest.approx(best(values, "LA"), rel=1e-3)
    return count[0]


@pytest.mark.parametrize("size", [1000, 5000])
@pytest.mark.parametrize("name", TYPICAL)
def test_no_more_products_than_arpack(name, size):
    """With the residuals checked and copies looked for, which ARPACK does not."""
    values = TYPICAL[name](size)
    for seed in range(3):
        operator = rotated(values)
        pairs = top_eigenpairs(operator, K, rtol=1e-3, seed=seed)
        check(pairs, values, "LA", F64, rtol=1e-3)
        assert sum(operator.calls) == pairs.products
        for ncv in (None, 40):
            assert pairs.products <= eigsh_products(values, ncv, seed)


@pytest.mark.parametrize("size", [1000, 5000])
@pytest.mark.parametrize("name", TYPICAL)
def test_the_search_for_copies_is_cheap(name, size, monkeypatch):
    """At most a fifth of the products, at the default tolerance."""
    values = TYPICAL[name](size)
    whole = top_eigenpairs(rotated(values), K).products
    monkeypatch.setattr(eigenpairs._Search, "search_copies", lambda self, wanted: (False, 0.0))
    assert whole - top_eigenpairs(rotated(values), K).products <= 0.2 * whole


def test_the_largest_eigenvalue_needs_no_search(monkeypatch):
    monkeypatch.setattr(
        KrylovSpace, "draw", lambda *arguments, draw=KrylovSpace.draw: drawn.append(1) or draw(*arguments)
    )
    drawn = []
    assert top_eigenpairs(rotated(SPECTRA["few outliers"]), 1).values == pytest.approx([20])
    assert len(drawn) == 1


def test_blocks_take_fewer_passes():
    operators = [rotated(SPECTRA["triple in the middle"]) for _ in range(2)]
    for operator, block in zip(operators, (1, 4), strict=True):
        top_eigenpairs(operator, K, block=block)
    assert len(operators[1].calls) < 0.7 * len(operators[0].calls)


def test_a_budget_that_is_too_small():
    operator = rotated(SPECTRA["few outliers"])
    pairs = top_eigenpairs(operator, K, max_products=16)
    assert pairs.products == sum(operator.calls) == 16
    assert pairs.converged[0] and not pairs.converged[-1]
    assert np.array_equal(pairs.converged, pairs.residuals <= 1e-5 * pairs.values)
    assert "raise max_products" in pairs.message and pairs.overlooked == 1.0


def test_a_search_that_is_cut_short_says_so():
    values = SPECTRA["bulk only"]
    enough = top_eigenpairs(rotated(values), K)
    cut_short = top_eigenpairs(rotated(values), K, max_products=enough.products - 8)
    assert cut_short.converged.all() and cut_short.overlooked > 1e-3
    assert "search for further copies" in cut_short.message
    check(cut_short, values, "LA", F64)


def test_progress_counts_products_and_foresees_the_end():
    calls = []
    pairs = top_eigenpairs(rotated(SPECTRA["bulk only"]), K, progress=lambda *call: calls.append(call))
    done, whole = zip(*calls, strict=True)
    assert list(done) == sorted(done) and all(d <= w for d, w in calls)
    assert calls[-1] == (pairs.products, pairs.products)
    assert whole[len(whole) // 2] < 4 * pairs.products


# --- warm starts ------------------------------------------------------------------------------------------------------


def eigenvectors(values, numbers):
    """Those of Rotated's values with these numbers."""
    u = randn(len(values), 1, seed=9).to(values.dtype)
    u /= u.norm()
    E = torch.zeros(len(values), len(numbers), dtype=values.dtype)
    E[list(numbers), range(len(numbers))] = 1
    return E - 2 * u @ (u.T @ E)


def turned(values, angle):
    """A dense matrix: that of the values after the eigenvectors of the first 16 have turned by `angle` into others."""
    Q = eigenvectors(torch.from_numpy(values), range(len(values)))
    G = torch.linalg.qr(randn(len(values) - 16, 16, seed=8))[0]
    turning = Q[:, 16:] @ G
    now = Q.clone()
    now[:, :16] = np.cos(angle) * Q[:, :16] + np.sin(angle) * turning
    now[:, 16:] += (turning * (np.cos(angle) - 1) - np.sin(angle) * Q[:, :16]) @ G.T
    M = now * torch.from_numpy(values) @ now.T
    return (M + M.T) / 2


def places(values, which, k=K):
    """Numbers of the k wanted eigenvalues, best first."""
    return np.argsort({"LA": -values, "SA": values, "LM": -np.abs(values)}[which], kind="stable")[:k]


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_from_step_to_step_as_eigenvalues_cross(which, dtype):
    """One comes out of the bulk and passes all others; its eigenvector, which does not turn, is in no start until it
    is wanted."""
    sign = -1 if which == "SA" else 1
    vectors = None
    for rising in (0.5, 4.4, 4.7, 5.5, 7, 12, 25):
        values = SPECTRA["few outliers"].copy()
        values[20] = rising
        values *= sign
        pairs = top_eigenpairs(rotated(values, dtype), K, which, rtol=1e-5, start=vectors)
        check(pairs, values, which, dtype, rtol=1e-5)
        vectors = pairs.vectors


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_from_step_to_step_of_random_matrices(which):
    """All eigenvectors turn, in the bulk's edge, at a tolerance below the eigenvalues' distances."""
    A, B = (randn(P, P, seed=seed) for seed in (1, 2))
    vectors = None
    for angle in (0.0, 0.01, 0.05, 0.2, 1.0):
        M = np.cos(angle) * A + np.sin(angle) * B
        pairs = top_eigenpairs(M + M.T, K, which, start=vectors)
        check(pairs, np.linalg.eigvalsh((M + M.T).numpy()), which, F64)
        vectors = pairs.vectors


@pytest.mark.parametrize("name", ["triple in the middle", "copies near the bulk", "rank 3 with copies"])
@pytest.mark.parametrize("missing", [0, 2, 4])
def test_nothing_that_a_start_does_not_hold_is_overlooked(name, missing):
    """The start spans all but one of what is wanted, exactly, and the next best."""
    values = SPECTRA[name]
    held = np.delete(places(values, "LA", K + 1), missing)
    for seed in range(6):
        pairs = top_eigenpairs(rotated(values), K, seed=seed, start=eigenvectors(torch.from_numpy(values), held))
        check(pairs, values, "LA", F64)
        assert pairs.overlooked <= 1e-3


@pytest.mark.parametrize("missing", [0, 4])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_the_same_at_a_loose_tolerance_in_many_dimensions(which, missing):
    """Where what the start holds converges long before the random part of the first vector shows anything else; and
    where the last one wanted is so near to the bulk that a search for copies of the others does not show it."""
    values = np.r_[50, 40, 30, 20, 1.9, 1.5, semicircle(9994)] * (-1 if which == "SA" else 1)
    held = np.delete(np.arange(6), missing)
    for seed in range(3):
        start = eigenvectors(torch.from_numpy(values), held)
        pairs = top_eigenpairs(rotated(values), K, which, rtol=0.1, seed=seed, start=start)
        check(pairs, values, which, F64, rtol=0.1)
        assert pairs.overlooked <= 1e-3


@pytest.mark.parametrize("angle", [1e-3, 0.3])
@pytest.mark.parametrize("name", TYPICAL)
def test_a_near_start_takes_fewer_products(name, angle):
    """By 6 to 10 %, as measured: not by more, since the k products that k pairs take and the search remain."""
    values = TYPICAL[name](1000)
    before, now = turned(values, 0.0), turned(values, angle)
    cold, warm = 0, 0
    for rtol in (1e-3, None):
        for seed in range(3):
            start = top_eigenpairs(before, K, rtol=rtol, seed=seed).vectors
            cold += top_eigenpairs(now, K, rtol=rtol, seed=seed).products
            pairs = top_eigenpairs(now, K, rtol=rtol, seed=seed, start=start)
            check(pairs, values, "LA", F64, rtol=rtol)
            warm += pairs.products
    assert warm <= 0.97 * cold


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_bad_starts_give_the_same_answer_for_a_few_products_more(which):
    for name in ("few outliers", "bulk only"):
        values = SPECTRA[name]
        cold = top_eigenpairs(rotated(values), K, which)
        unwanted = places(values, which, P)[K:]
        starts = {
            "orthogonal to all that is wanted": eigenvectors(torch.from_numpy(values), unwanted[:K]),
            "the other end": eigenvectors(torch.from_numpy(values), unwanted[-K:]),
            "random": randn(P, K, seed=1),
            "equal columns": randn(P, 1, seed=1).expand(P, K),
            "opposite columns": randn(P, 1, seed=1) * torch.tensor([1.0, -1.0]),
            "more columns than rows": randn(P, P + 50, seed=1),
            "tiny and huge columns": randn(P, 2, seed=1) * torch.tensor([1e-300, 1e300], dtype=F64),
            "one entry": torch.eye(P, dtype=F64)[:, :1] * 5e-324,
        }
        for label, start in starts.items():
            pairs = top_eigenpairs(rotated(values), K, which, start=start)
            check(pairs, values, which, F64)
            assert pairs.products <= cold.products + 6, label  # measured: 4


def same(one, other):
    return np.array_equal(one.values, other.values) and torch.equal(one.vectors, other.vectors)


def test_a_start_of_nothing_is_no_start():
    operator = rotated(SPECTRA["few outliers"])
    near = eigenvectors(operator.values, range(K)) + 0.01 * randn(P, K, seed=1)
    assert same(top_eigenpairs(operator, K), top_eigenpairs(operator, K, start=torch.zeros(P, 2, dtype=F64)))
    with_zeros = torch.cat([torch.zeros(P, 1, dtype=F64), near], dim=1)
    assert same(top_eigenpairs(operator, K, start=near), top_eigenpairs(operator, K, start=with_zeros))


def test_a_single_pair_takes_no_notice_of_a_start():
    operator = rotated(SPECTRA["few outliers"])
    wrong = eigenvectors(operator.values, [1])
    assert same(top_eigenpairs(operator, 1), top_eigenpairs(operator, 1, start=wrong))


def test_equal_start_and_seed_give_equal_numbers():
    """Whatever the start's scale, precision and memory layout; and another seed gives others."""
    operator = rotated(SPECTRA["few outliers"])
    near = (eigenvectors(operator.values, range(K)) + 0.01 * randn(P, K, seed=1)).float()
    first, again = (top_eigenpairs(operator, K, start=near) for _ in range(2))
    assert same(first, again)
    for start in (near * 2.0**60, near.double(), near.T.contiguous().T, near.requires_grad_()):
        pairs = top_eigenpairs(operator, K, start=start)
        assert pairs.values == pytest.approx(first.values, rel=1e-9) and pairs.products == first.products
    assert not same(first, top_eigenpairs(operator, K, seed=1, start=near))
    assert not same(first, top_eigenpairs(operator, K))


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_nothing_depends_on_the_scale_with_a_start(scale):
    values = SPECTRA["triple in the middle"]
    near = eigenvectors(torch.from_numpy(values), range(K)) + 0.01 * randn(P, K, seed=1)
    plain, scaled = (top_eigenpairs(rotated(values * s), K, start=near) for s in (1.0, scale))
    check(scaled, values * scale, "LA", F64)
    assert abs(plain.products - scaled.products) <= 2


def test_starts_with_blocks_restarts_and_budgets(monkeypatch):
    values = SPECTRA["triple in the middle"]
    near = eigenvectors(torch.from_numpy(values), range(K)) + 0.01 * randn(P, K, seed=1)
    for block in (2, 5, 12):
        check(top_eigenpairs(rotated(values), K, block=block, start=near), values, "LA", F64)
        check(top_eigenpairs(rotated(values), K, block=block, start=near[:, :1]), values, "LA", F64)
    short = top_eigenpairs(rotated(values), K, max_products=12, start=near)
    assert short.products == 12 and not short.converged.all() and short.overlooked == 1.0
    monkeypatch.setattr(eigenpairs, "CAPACITY", 24)
    monkeypatch.setattr(eigenpairs, "LARGE_CAPACITY", 24)
    check(top_eigenpairs(rotated(values), K, start=near), values, "LA", F64)


def test_residuals_near_a_start_are_true():
    """A start is where the search begins, not an answer."""
    operator = rotated(SPECTRA["few outliers"])
    near = eigenvectors(operator.values, range(K)) + 0.003 * randn(P, K, seed=1)
    for budget in (12, None):
        pairs = top_eigenpairs(operator, K, rtol=1e-7, max_products=budget, start=near)
        truth = residuals_without_noise(operator, pairs)
        assert truth == pytest.approx(pairs.residuals, rel=1e-3, abs=1e-13)
        assert np.array_equal(pairs.converged, pairs.residuals <= 1e-7 * np.abs(pairs.values))


def test_a_start_for_a_small_matrix():
    values = gaussian(24)
    check(top_eigenpairs(rotated(values), 3, start=randn(24, 3, seed=1)), values, "LA", F64)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (np.ones((P, 2)), r"start must be a torch\.Tensor of shape \[300, j\], got ndarray"),
        (torch.ones(P), r"start must have shape \[300, j\], a column or more, got \[300\]"),
        (torch.ones(2, P), r"start must have shape \[300, j\], a column or more, got \[2, 300\]"),
        (torch.ones(P, 0), r"start must have shape \[300, j\], a column or more, got \[300, 0\]"),
        (torch.ones(P, 2, dtype=torch.int64), r"start must be floating-point numbers, got torch\.int64"),
        (torch.full((P, 2), float("nan")), "start must be finite, got a column with nan or inf"),
        (torch.full((P, 2), float("inf")), "start must be finite, got a column with nan or inf"),
    ],
)
def test_bad_starts_are_refused(start, message):
    with pytest.raises(InputError, match=message):
        top_eigenpairs(rotated(SPECTRA["few outliers"]), K, start=start)


# --- reproducible, on any operator ------------------------------------------------------------------------------------


def test_same_seed_same_numbers():
    operator = rotated(SPECTRA["few outliers"])
    first, again, other = (top_eigenpairs(operator, K, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.values, again.values) and torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)


def test_any_form_of_the_matrix():
    M = rotated(SPECTRA["few outliers"])
    dense = torch.cat([M @ part for part in torch.eye(P, dtype=F64).split(8, dim=1)], dim=1)
    dense = (dense + dense.T) / 2
    reference = top_eigenpairs(dense, K)
    for form in (dense.numpy(), hs.as_operator(dense).to_scipy(), np.asfortranarray(dense.numpy())):
        pairs = top_eigenpairs(form, K)
        assert pairs.values == pytest.approx(reference.values, rel=1e-12)
    assert pairs.products == reference.products
    assert top_eigenpairs(hs.as_operator(dense).to_scipy(), K).products == reference.products + 2  # asked for symmetry


def test_of_a_network():
    obj = hs.Objective(build("tanh"), "cross_entropy", cut(inputs_for("tanh", 12), randint(3, 12, seed=2)))
    H = hs.Hessian(obj)
    for which in ("LA", "SA", "LM"):
        pairs = top_eigenpairs(H, 3, which)
        check(pairs, np.linalg.eigvalsh(H.dense().numpy()), which, F64)
    assert pairs.provenance.data_fingerprint == H.data_fingerprint
    assert H.engine in pairs.provenance.engine


def test_a_basis_on_another_device():
    pairs = top_eigenpairs(rotated(SPECTRA["few outliers"]), K, basis_device="cpu")
    check(pairs, SPECTRA["few outliers"], "LA", F64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("basis_device", [None, "cpu"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_on_a_gpu(basis_device, dtype):
    Q = np.linalg.qr(randn(P, P, seed=5).numpy())[0]
    for name in ("triple in the middle", "rank 3", "bulk only"):
        M = torch.from_numpy(Q * SPECTRA[name] @ Q.T)
        pairs = top_eigenpairs(((M + M.T) / 2).to("cuda", dtype), K, basis_device=basis_device)
        check(pairs, SPECTRA[name], "LA", dtype)
        assert pairs.vectors.is_cuda


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["pos"]
    top_eigenpairs(rotated(SPECTRA["few outliers"]), K)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state(legacy=False)["state"]["pos"] == before[1]


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_to_xarray_and_back(which):
    pairs = top_eigenpairs(rotated(SPECTRA["outliers of both signs"], F32), K, which)
    back = Eigenpairs.from_xarray(pairs.to_xarray())
    assert torch.equal(back.vectors, pairs.vectors) and back.vectors.dtype == F32
    for name in ("values", "residuals", "converged"):
        assert np.array_equal(getattr(back, name), getattr(pairs, name))
    for name in ("which", "tolerance", "products", "overlooked", "provenance", "message"):
        assert getattr(back, name) == getattr(pairs, name)
    with pytest.raises(InputError, match="expected a data set of record 'Eigenpairs'"):
        Eigenpairs.from_xarray(pairs.to_xarray().assign_attrs(record="Other"))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"k": 301}, "k must be at most the matrix's size 300, got 301"),
        ({"which": "LR"}, "which must be one of 'LA', 'SA', 'LM', got 'LR'"),
        ({"rtol": 0.0}, "rtol must lie between 0 and 1, got 0.0"),
        ({"rtol": float("nan")}, "rtol must lie between 0 and 1, got nan"),
        ({"block": 0}, "block must be a positive integer, got 0"),
        ({"block": 301}, "block must be at most the matrix's size 300, got 301"),
        ({"max_products": 11}, "max_products must be at least 2 \\* k \\+ 2 = 12.*got 11"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        top_eigenpairs(rotated(SPECTRA["few outliers"]), **{"k": K, **arguments})


def test_half_precision_is_refused():
    with pytest.raises(InputError, match=r"must be float32 or float64, got torch\.float16"):
        top_eigenpairs(torch.eye(40, dtype=torch.float16), 2)


@pytest.mark.parametrize("size", [10, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_products_that_are_not_finite(value, size):
    M = torch.eye(size, dtype=F64)
    M[3, 3] = value
    with pytest.raises(DataError, match="product of the operator is not finite"):
        top_eigenpairs(M, 2)


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(eigenpairs, "available_bytes", lambda device: 2 * 30 * P * 8)
    with pytest.raises(TooLargeError, match=r"5 eigenpairs need .* on cpu hold 30; .*basis_device='cpu'"):
        top_eigenpairs(rotated(SPECTRA["few outliers"]), K)
    monkeypatch.setattr(eigenpairs, "available_bytes", lambda device: 2 * 60 * P * 8)
    check(top_eigenpairs(rotated(SPECTRA["bulk only"]), K), SPECTRA["bulk only"], "LA", F64)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_symmetry_is_asked_for(dtype, scale):
    M = scale * randn(P, P, seed=3)
    symmetric = ((M + M.T) / 2).to(dtype)
    # Symmetric up to rounding only, as products of batches added up in another order would be.
    rounded = symmetric * (1 + torch.finfo(dtype).eps * randn(P, P, seed=4).sign()).to(dtype)
    assert not torch.equal(rounded, rounded.T)
    assert require_symmetric(hs.as_operator(symmetric)) == 0
    assert require_symmetric(hs.as_operator(rounded)) == 2
    slightly = symmetric + {F64: 1e-6, F32: 1e-2}[dtype] * M.to(dtype)
    for wrong in (M.to(dtype), slightly):
        with pytest.raises(InputError, match="the matrix must be symmetric"):
            top_eigenpairs(wrong, K)


# --- the Krylov space -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_state_of_a_krylov_space(sign):
    """A Q = Q T + W C^T, [Q W] orthonormal and T = Q^T A Q, whatever was done; 40 rows make two chunks."""
    operator = rotated(SPECTRA["few outliers"])
    space = KrylovSpace(operator, torch.device("cpu"), seed=0, sign=sign)
    space.draw(2)
    for number in range(30):
        space.expand(1 + number % 2)
        if number in (5, 20):
            space.draw(1)
        if number in (10, 25):
            values, Y = space.ritz()
            space.focus(Y[:, -3:])
        if number == 18:
            values, Y = space.ritz()
            space.restart(values[-12:], Y[:, -12:])
    assert space.length > krylov.ROWS_PER_CHUNK // 2 and len(space.frontier) == 4
    Q = space.basis.combine(np.eye(space.length)).T
    W = space.frontier.T
    A = torch.cat([operator @ part for part in torch.eye(P, dtype=F64).split(8, dim=1)], dim=1) * (sign / space.scale)
    T, C = torch.from_numpy(space.T), torch.from_numpy(space.C)
    together = torch.cat([Q, W], dim=1)
    assert relative_error(together.T @ together, torch.eye(together.shape[1])) < 1e-14
    assert relative_error(Q @ T + W @ C.T, A @ Q) < 1e-14
    assert relative_error(T, Q.T @ A @ Q) < 1e-14


def test_what_may_be_overlooked():
    """The recurrence gives a vector's overlaps with the run's vectors, and the bound is kept: 500 starts, in 40
    dimensions, that show nothing beyond 3 after 4 steps; an eigenvalue there would escape as often as stated."""
    values = np.r_[3.0, semicircle(39)]
    hidden, bounds = 0, []
    for seed in range(500):
        w = normal((40,), stream(seed, "test")).numpy()
        w /= np.linalg.norm(w)
        # Without the eigenvector: what a run that shows nothing has seen.
        blind = np.r_[0.0, w[1:]] / np.linalg.norm(w[1:])
        q, before, beta, diagonal, off_diagonal = blind, np.zeros(40), 0.0, [], []
        for _ in range(4):
            r = values * q - beta * before
            diagonal.append(float(q @ r))
            r -= diagonal[-1] * q
            beta = float(np.linalg.norm(r))
            off_diagonal.append(beta)
            before, q = q, r / beta
        bounds.append(overlooked(40, diagonal, off_diagonal, 3.0))
        # Chebyshev: p_j by its determinant.
        polynomials = [1.0]
        for j in range(1, 5):
            T = np.diag(diagonal[:j]) + np.diag(off_diagonal[: j - 1], 1) + np.diag(off_diagonal[: j - 1], -1)
            polynomials.append(np.linalg.det(3.0 * np.eye(j) - T) / np.prod(off_diagonal[:j]))
        total = sum(p**2 for p in polynomials)
        assert bounds[-1] == pytest.approx(np.sqrt(80 / (np.pi * total)), rel=1e-9)
        hidden += w[0] ** 2 <= 1 / total
    assert 0.3 * np.mean(bounds) < hidden / 500 + 3 / 500 and hidden / 500 < 1.5 * np.mean(bounds)
