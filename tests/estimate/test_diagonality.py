"""Partitions compared by what their diagonal blocks keep: exactly, and from random signs with honest errors."""

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import InputError, PartitionError
from hesscope.estimate.diagonality import FIGURES, PartitionComparison, compare_partitions, relative_bits
from hesscope.estimate.low_rank import LowRank
from hesscope.estimate.products import CountedProducts, signs
from hesscope.operators import as_operator
from tests.helpers import check_stderr, check_unbiased, randn, relative_error

SIZE = 48
SIZES = (12, 20, 16)  # of three "tensors"
UNEVEN = hs.Partition.from_blocks({"a": [0], "b": range(1, 12), "c": range(12, 32), "d": range(32, 48)})
PARTITIONS = {
    "six": hs.Partition.from_blocks({str(j): range(8 * j, 8 * j + 8) for j in range(6)}),
    "fours": hs.Partition.from_blocks({str(j): range(4 * j, 4 * j + 4) for j in range(12)}),
    "strided": hs.Partition.from_blocks({str(j): range(j, SIZE, 3) for j in range(3)}),
    "uneven": UNEVEN,
}
TENSORS = dict(zip("xyz", SIZES, strict=True))


def dense():
    M = randn(SIZE, SIZE, seed=1)
    return M + M.T


def decaying():
    """Eigenvalues 1/k of both signs, and stronger within fours."""
    Q = torch.linalg.qr(randn(SIZE, SIZE, seed=2))[0]
    H = Q @ torch.diag((-1.0) ** torch.arange(SIZE) / torch.arange(1, SIZE + 1)).double() @ Q.T
    return H * (1 + 2 * torch.block_diag(*[torch.ones(4, 4)] * 12).double())


def blocks_of_eight():
    return torch.block_diag(*[randn(8, 8, seed=10 + j) for j in range(6)]) * 1.0


MATRICES = {"dense": dense(), "decaying": decaying(), "blocks": blocks_of_eight() + blocks_of_eight().T}


def direct(H, partition, g):
    """The figures from their definitions, block by block in NumPy."""
    H, g = H.numpy(), g.numpy()
    kept = np.zeros_like(H)
    rows = []
    for block in partition.members():
        kept[np.ix_(block, block)] = H[np.ix_(block, block)]
        rows.append(np.sum(H[block] ** 2))
    D, s = np.sum(kept**2) / np.sum(H**2), sum(n**2 for n in partition.sizes) / len(H) ** 2
    chance = np.sum((np.array(rows) / np.sum(rows)) ** 2)
    bits = D * np.log2(D / s) + ((1 - D) * np.log2((1 - D) / (1 - s)) if D < 1 else 0.0)
    return {
        "energy": D,
        "chance": chance,
        "beyond_chance": (D - chance) / (1 - chance),
        "bits": bits if s <= D else -bits,
        "frobenius_error": np.linalg.norm(H - kept) / np.linalg.norm(H),
        "spectral_error": np.linalg.norm(H - kept, 2) / np.linalg.norm(H, 2),
        "curvature_kept": g @ kept @ g / (g @ H @ g),
    }, kept


@pytest.mark.parametrize("scale", [1.0, 1e-14, 1e14])
@pytest.mark.parametrize("name", MATRICES)
def test_exact_figures_are_those_of_the_definitions(name, scale):
    H, g = MATRICES[name], randn(SIZE, seed=3)
    found = compare_partitions(scale * H, PARTITIONS, g, TENSORS, method="exact")
    for label, partition in PARTITIONS.items():
        row = found.rows[label]
        expected, kept = direct(H, partition, g)
        for key, value in expected.items():
            assert getattr(row, key).value == pytest.approx(value, rel=1e-9, abs=1e-9), (label, key)
            assert getattr(row, key).stderr == 0
        assert row.freedom == sum(n * (n + 1) / 2 for n in partition.sizes)
        if label == "uneven":
            by_tensor = [float((part**2).sum()) * scale**2 for part in np.split(kept, np.cumsum(SIZES)[:-1])]
            np.testing.assert_allclose(row.tensor_energy, by_tensor, rtol=1e-9)
            np.testing.assert_allclose(row.tensor_entries, [(1 + 121) / 144, 1.0, 1.0])
    assert np.isnan(found.rows["strided"].tensor_energy).all()


def test_a_sketch_is_a_matrix_of_low_rank_with_its_blocks():
    H, partition = MATRICES["decaying"], PARTITIONS["uneven"]
    low_rank = LowRank.of(as_operator(H), 5, 0, CountedProducts(as_operator(H), None))
    A = low_rank.U @ torch.diag(low_rank.values) @ low_rank.U.T
    assert relative_error(low_rank.U.T @ low_rank.U, torch.eye(10, dtype=H.dtype)) < 1e-12
    Q = torch.linalg.qr(H @ signs(as_operator(H), 0, "low rank", "sketch", range(5)))[0]
    assert relative_error(A @ Q, H @ Q) < 1e-12
    v = randn(SIZE, seed=4)
    assert relative_error(low_rank @ v, A @ v) < 1e-12
    np.testing.assert_allclose(low_rank.row_energies(), A.square().sum(1))
    energies = [float(A[np.ix_(block, block)].square().sum()) for block in partition.members()]
    np.testing.assert_allclose(low_rank.block_energies(partition), energies)
    assignment = torch.tensor(partition.assignment.tolist())
    expected = (A * (assignment[:, None] == assignment)) @ v
    assert relative_error(low_rank.pinched(assignment, len(partition), v), expected) < 1e-12


REPLICATES = 200


@pytest.fixture(scope="module")
def replicates():
    """Name of a matrix -> comparisons from seeds 0, 1, 2, ..., and what is exact."""
    g = randn(SIZE, seed=3)
    found = {}
    for name, H in MATRICES.items():
        several = [
            compare_partitions(H, PARTITIONS, g, TENSORS, method="probes", probes=32, seed=seed)
            for seed in range(REPLICATES)
        ]
        found[name] = several, compare_partitions(H, PARTITIONS, g, TENSORS, method="exact")
    return found


@pytest.mark.parametrize("name", ["dense", "decaying"])
@pytest.mark.parametrize("label", PARTITIONS)
def test_estimates_are_unbiased_with_honest_errors(name, label, replicates):
    several, exact = replicates[name]
    figures = [each.rows[label].energy for each in several]
    values, errors, truth = [f.value for f in figures], [f.stderr for f in figures], exact.rows[label].energy.value
    if name == "decaying":
        check_unbiased(values, errors, truth)
    else:  # so noisy that a bias of 3 % would take thousands of replicates to be seen
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / REPLICATES**0.5
        check_stderr(values, errors)
    figures = [each.rows[label].curvature_kept for each in several]
    values, truth = np.array([f.value for f in figures]), exact.rows[label].curvature_kept.value
    assert abs(values.mean() - truth) < 4 * values.std() / REPLICATES**0.5
    check_stderr(values, [f.stderr for f in figures])
    figures = [each.rows[label].chance for each in several]
    values = np.array([f.value for f in figures])
    # A ratio of random numbers is biased by a share of its error.
    assert abs(values.mean() - exact.rows[label].chance.value) < 0.2 * values.std() + 4 * values.std() / REPLICATES**0.5
    if label == "uneven":
        values = np.array([each.rows[label].tensor_energy for each in several])
        z = (values.mean(axis=0) - exact.rows[label].tensor_energy) / (values.std(axis=0) / REPLICATES**0.5)
        assert np.abs(z).max() < 4


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("key", ["energy", "beyond_chance", "curvature_kept"])
def test_intervals_cover(name, key, replicates):
    several, exact = replicates[name]
    covered = []
    for label in PARTITIONS:
        truth = getattr(exact.rows[label], key).value
        intervals = [getattr(each.rows[label], key).interval() for each in several]
        covered.append(np.mean([i.lower - 1e-12 <= truth <= i.upper + 1e-12 for i in intervals]))
    assert 0.90 <= np.mean(covered) <= 0.995, covered
    assert min(covered) >= 0.87, covered


def test_the_spectral_error_is_a_lower_bound_and_near(replicates):
    """Where a few eigenvectors carry most; in a dense matrix the sketch's leading vector is not the best one."""
    for name, nearness in {"decaying": 0.97, "dense": 0.75}.items():
        several, exact = replicates[name]
        for label in PARTITIONS:
            truth = exact.rows[label].spectral_error.value
            values = np.array([each.rows[label].spectral_error.value for each in several])
            assert nearness * truth < values.mean() < 1.01 * truth, (name, label)


def test_products_are_few_however_many_blocks():
    H = randn(300, 300, seed=5) + 30 * torch.diag(randn(300, seed=6))
    H = H + H.T
    found = compare_partitions(
        H, {"all": hs.Partition.from_blocks({str(j): [j] for j in range(300)})}, method="probes", probes=64
    )
    assert 2 * 16 + 64 + 8 + 1 < found.products < 2 * 16 + 64 + 8 + 1 + 61
    truth = float(H.diagonal().square().sum() / H.square().sum())
    assert abs(found.rows["all"].energy.value - truth) < 5 * found.rows["all"].energy.stderr < truth


def test_float32_and_scales():
    H, g = MATRICES["decaying"], randn(SIZE, seed=3)
    truth = compare_partitions(H, PARTITIONS, g, method="probes", seed=4)
    for scale, dtype, tolerance in (
        (1e-14, torch.float64, 1e-9),
        (1e14, torch.float64, 1e-9),
        (1.0, torch.float32, 3e-5),
    ):
        found = compare_partitions((scale * H).to(dtype), PARTITIONS, g.to(dtype), method="probes", seed=4)
        for label in PARTITIONS:
            for key in FIGURES:
                one, other = getattr(found.rows[label], key), getattr(truth.rows[label], key)
                slack = 0.01 if key == "spectral_error" else tolerance
                assert one.value == pytest.approx(other.value, rel=slack, abs=slack), (label, key)


def test_comparisons_are_files():
    g = randn(SIZE, seed=3)
    for method in ("exact", "probes"):
        found = compare_partitions(MATRICES["dense"], PARTITIONS, g, TENSORS, method=method)
        again = PartitionComparison.from_xarray(found.to_xarray())
        assert again.provenance == found.provenance and again.tensors == found.tensors
        assert again.products == found.products
        for label, row in found.rows.items():
            for key in FIGURES:
                assert getattr(again.rows[label], key) == getattr(row, key), (label, key)
            np.testing.assert_array_equal(again.rows[label].tensor_energy, row.tensor_energy)
            np.testing.assert_array_equal(again.rows[label].replicates[1], row.replicates[1])


def test_equal_seeds_give_equal_numbers_and_a_partition_does_not_depend_on_the_others():
    H = MATRICES["dense"]
    alone = compare_partitions(H, {"six": PARTITIONS["six"]}, method="probes", seed=7)
    among = compare_partitions(H, PARTITIONS, method="probes", seed=7)
    other = compare_partitions(H, PARTITIONS, method="probes", seed=8)
    assert alone.rows["six"].energy == among.rows["six"].energy != other.rows["six"].energy


def test_bits():
    assert relative_bits(1.0, 1 / 8) == pytest.approx(3.0)
    assert relative_bits(0.25, 0.25) == 0
    assert relative_bits(0.0, 0.5) == pytest.approx(-1.0)
    assert relative_bits(1.2, 1 / 8) == relative_bits(1.0, 1 / 8)


BAD = {
    "probes": ({"probes": 12}, "probes must be a multiple of 8, at least 16, got 12"),
    "few": ({"probes": 8}, "probes must be a multiple of 8, at least 16, got 8"),
    "method": ({"method": "probe"}, "did you mean 'probes'"),
    "vector": ({"vector": torch.ones(3)}, r"vector must be torch.float64 of shape \[48\], got torch.float32 \[3\]"),
    "tensors": ({"tensors": {"x": 12}}, "tensors must cover the 48 parameters, got 12"),
    "no tensor": ({"vector": [1.0] * SIZE}, "vector must be .*, got list"),
    "not finite": ({"vector": torch.full((SIZE,), torch.nan, dtype=torch.float64)}, "not finite"),
    "negative": ({"tensors": {"x": -1, "y": 49}}, "tensors must be a dict"),
    "a list": ({"tensors": [24, 24]}, "tensors must be a dict"),
    "no partition": ({"partitions": {}}, "partitions must be a non-empty dict"),
    "no dict": ({"partitions": PARTITIONS["six"]}, "partitions must be a non-empty dict"),
    "other": ({"partitions": {"six": 6}}, r"partitions\['six'\] must be a hesscope.Partition, got int"),
    "asymmetric": ({"matrix": randn(SIZE, SIZE, seed=1)}, "must be symmetric"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    change, words = BAD[case]
    arguments = {"matrix": MATRICES["dense"], "partitions": PARTITIONS, **change}
    with pytest.raises(InputError, match=words):
        compare_partitions(**arguments)


def test_a_partition_of_another_matrix_is_refused():
    with pytest.raises(PartitionError, match="covers 48 parameters, but the operator has 40"):
        compare_partitions(torch.eye(40, dtype=torch.float64), PARTITIONS)


def test_a_zero_matrix_has_no_figures():
    found = compare_partitions(torch.zeros(SIZE, SIZE, dtype=torch.float64), PARTITIONS)
    assert np.isnan(found.rows["six"].energy.value)
    found = compare_partitions(torch.zeros(SIZE, SIZE, dtype=torch.float64), PARTITIONS, method="probes")
    assert np.isnan(found.rows["six"].energy.value)


def test_mostly_block_diagonal_matrices_have_honest_small_errors():
    """What lies off the diagonal is estimated directly where it is little: no error of 0 where there is one."""
    G = randn(80, 80, seed=7)
    H = torch.block_diag(*[randn(20, 20, seed=20 + j) for j in range(4)])
    H = H + H.T + 0.03 * (G + G.T)
    parts = {
        str(n): hs.Partition.from_blocks({str(j): range(n * j, n * j + n) for j in range(80 // n)}) for n in (20, 40)
    }
    exact = compare_partitions(H, parts, method="exact")
    several = [compare_partitions(H, parts, method="probes", probes=32, seed=seed) for seed in range(150)]
    for label in parts:
        for key in ("energy", "frobenius_error", "bits"):
            truth = getattr(exact.rows[label], key).value
            figures = [getattr(each.rows[label], key) for each in several]
            intervals = [figure.interval() for figure in figures]
            covered = np.mean([i.lower <= truth <= i.upper for i in intervals])
            assert 0.88 <= covered <= 1, (label, key, covered)
            assert abs(np.mean([f.value for f in figures]) / truth - 1) < 0.03, (label, key)
    exactly = torch.block_diag(*[randn(20, 20, seed=20 + j) for j in range(4)])
    row = compare_partitions(exactly + exactly.T, parts, method="probes", probes=16).rows["20"]
    assert row.energy.value == pytest.approx(1, abs=1e-12) and row.frobenius_error.value < 1e-6


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-25, "float32"), (1e18, "float32"), (1e-100, "float64"), (1e150, "float64")]
)
def test_extreme_scales(scale, dtype):
    H = MATRICES["decaying"]
    truth = compare_partitions(H, PARTITIONS, method="probes").rows["fours"]
    kind = getattr(torch, dtype)
    found = compare_partitions((scale * H).to(kind), PARTITIONS, method="probes").rows["fours"]
    for key in ("energy", "chance", "bits"):
        assert getattr(found, key).value == pytest.approx(getattr(truth, key).value, rel=1e-3)


@pytest.mark.parametrize("method", ["exact", "probes"])
def test_chance_within_a_tensor_is_that_of_its_own_block(method):
    """A block of rank one has no structure, however strongly some of its rows are coupled to other tensors."""
    a = torch.ones(20, dtype=torch.float64)
    a[:2] = 8.0
    H = torch.zeros(40, 40, dtype=torch.float64)
    H[:20, :20] = torch.outer(a, a)
    energies = H[:20, :20].square().sum(1)
    coupling = torch.sqrt((energies.max() - energies) / 20)[:, None] * torch.ones(20, dtype=torch.float64)
    H[:20, 20:], H[20:, :20], H[20:, 20:] = coupling, coupling.T, torch.eye(20, dtype=torch.float64)
    single = {"r": hs.Partition.from_blocks({str(j): [j] for j in range(40)})}
    found = compare_partitions(H, single, tensors={"a": 20, "b": 20}, method=method)
    shares = energies / energies.sum()
    assert found.rows["r"].tensor_chance[0] == pytest.approx(
        float(shares.square().sum()), rel=1e-9 if method == "exact" else 0.1
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_matrices_by_probes(size):
    parts = {"single": hs.Partition.from_blocks({str(j): [j] for j in range(size)})}
    found = compare_partitions(torch.eye(size, dtype=torch.float64), parts, method="probes", probes=16)
    assert found.rows["single"].energy.value == pytest.approx(1)


def test_a_zero_gradient_keeps_no_share_of_its_curvature():
    for method in ("exact", "probes"):
        found = compare_partitions(MATRICES["dense"], PARTITIONS, torch.zeros(SIZE, dtype=torch.float64), method=method)
        assert np.isnan(found.rows["six"].curvature_kept.value)


def test_files_without_tensors():
    found = compare_partitions(MATRICES["dense"], PARTITIONS, method="probes")
    assert PartitionComparison.from_xarray(found.to_xarray()).rows["six"].energy == found.rows["six"].energy
