"""Block energies to a tolerance: unbiased, with honest errors and intervals, and the tolerance met with few products.

Truth is the dense matrix. Replicates come from seeds 0, 1, 2, ...; "relevant" energies are at least 1 % of the whole.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import DataError, InputError, TooLargeError
from hesscope.estimate.block_probes import least_budget
from tests.helpers import build, check_stderr, check_unbiased, cut, inputs_for, randint, relative_error

# Blocks that are no intervals, two of them of a single parameter.
SIZES = (100, 80, 60, 38, 20, 1, 1)
SIZE, BLOCKS, SEEDS = sum(SIZES), len(SIZES), 300
ASSIGNMENT = np.random.default_rng(5).permutation(np.repeat(np.arange(BLOCKS), SIZES))
SAME = ASSIGNMENT[:, None] == ASSIGNMENT[None, :]


def partition():
    return hs.Partition.from_blocks({f"b{i}": np.flatnonzero(i == ASSIGNMENT) for i in range(BLOCKS)})


def gaussian(seed, rows=SIZE, columns=SIZE):
    return np.random.default_rng(seed).standard_normal((rows, columns))


def symmetric(M):
    return (M + M.T) / 2


def dense():
    return symmetric(gaussian(1))


def decaying():
    """Eigenvalues 1/k of both signs: a few directions dominate all blocks."""
    Q = np.linalg.qr(gaussian(2))[0]
    return symmetric(Q @ np.diag((-1.0) ** np.arange(SIZE) / np.arange(1, SIZE + 1)) @ Q.T)


def rank_one_blocks():
    """Every block of rank one, over little noise: a plain probe of it is off by 140 %."""
    u = gaussian(3, SIZE, 1) / np.sqrt(np.array(SIZES))[ASSIGNMENT, None]
    return (u @ u.T) * np.where(SAME, 1.0, 0.3) + 0.005 * dense()


def block_diagonal():
    return np.where(SAME, dense(), 0.0)


def off_diagonal():
    """Next to nothing in the diagonal blocks: a diagonality of 0.1 %."""
    return np.where(SAME, 0.05, 1.0) * dense()


def zero_block():
    M = dense() + 3 * decaying()
    M[ASSIGNMENT == 1] = M[:, ASSIGNMENT == 1] = 0.0
    return M


def unequal():
    """Blocks of scales from 0.1 to 5."""
    scale = np.array([3, 1, 0.3, 0.1, 1, 1, 5])[ASSIGNMENT]
    return scale[:, None] * decaying() * scale[None, :]


def not_symmetric():
    return gaussian(4)


MATRICES = {
    f.__name__: f
    for f in (dense, decaying, rank_one_blocks, block_diagonal, off_diagonal, zero_block, unequal, not_symmetric)
}


@dataclass(frozen=True)
class Replicates:
    exact: hs.BlockEnergies
    probed: list

    @property
    def relevant(self):
        return self.exact.values >= 0.01 * self.exact.total

    def of(self, quantity):
        return np.array([quantity(E) for E in self.probed])

    @property
    def random(self):
        """Relevant energies that are not known exactly, up to rounding."""
        return self.relevant & (self.of(lambda E: E.stderr).max(axis=0) > 1e-6 * self.exact.values)


_CACHE = {}


def replicates(name, seeds=SEEDS):
    if name not in _CACHE:
        matrix, blocks = hs.as_operator(MATRICES[name]()), partition()
        _CACHE[name] = Replicates(
            exact=hs.block_energies(matrix, blocks, method="exact"),
            probed=[hs.block_energies(matrix, blocks, "probes", seed=seed) for seed in range(seeds)],
        )
    return _CACHE[name]


def on_diagonal(r):
    return np.diag(r.random)


@pytest.mark.parametrize("name", [name for name in MATRICES if name != "off_diagonal"])
def test_diagonal_blocks_are_unbiased(name):
    r = replicates(name)
    chosen = on_diagonal(r)
    assert chosen.any()
    values, stderr = (r.of(lambda E, f=f: np.diag(getattr(E, f)))[:, chosen] for f in ("values", "stderr"))
    check_unbiased(values, stderr, np.diag(r.exact.values)[chosen])


def test_a_planted_bias_of_3_percent_fails():
    r = replicates("dense")
    chosen = on_diagonal(r)
    values, stderr = (r.of(lambda E, f=f: np.diag(getattr(E, f)))[:, chosen] for f in ("values", "stderr"))
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(1.03 * values, stderr, np.diag(r.exact.values)[chosen])


@pytest.mark.parametrize("name", MATRICES)
def test_all_relevant_energies_lie_around_the_truth(name):
    r = replicates(name)
    values = r.of(lambda E: E.values)[:, r.random]
    error = values.std(axis=0, ddof=1) / np.sqrt(SEEDS)
    assert np.all(np.abs(values.mean(axis=0) - r.exact.values[r.random]) < 4 * error)


@pytest.mark.parametrize("name", [name for name in MATRICES if name != "block_diagonal"])
def test_diagonality_and_its_standard_error(name):
    r = replicates(name)
    values, stderr = r.of(lambda E: E.diagonality), r.of(lambda E: E.diagonality_stderr)
    check_stderr(values, stderr)
    assert np.mean(values) == pytest.approx(r.exact.diagonality, rel=0.01)


@pytest.mark.parametrize("name", MATRICES)
def test_intervals_cover_the_exact_energies(name):
    """Stated 95 %: of the relevant energies 90 to 99 %, on average and each within the error of that many seeds."""
    r = replicates(name)
    intervals = [E.confidence_interval() for E in r.probed]
    truth = r.exact.values  # where a block is taken exactly, the interval is a point, up to rounding
    covered = np.mean([(i.lower <= truth * (1 + 1e-9)) & (truth * (1 - 1e-9) <= i.upper) for i in intervals], axis=0)
    assert 0.90 <= covered[r.random].mean() <= 0.99
    assert np.all(covered[r.random] > 0.90 - 3 * np.sqrt(0.09 / SEEDS))


@pytest.mark.parametrize("name", [name for name in MATRICES if name != "block_diagonal"])
def test_intervals_cover_the_exact_diagonality(name):
    r = replicates(name)
    intervals = [E.diagonality_interval() for E in r.probed]
    covered = np.mean([i.lower <= r.exact.diagonality <= i.upper for i in intervals])
    assert 0.90 <= covered <= 0.99


@pytest.mark.parametrize("name", MATRICES)
def test_the_tolerance_is_met_and_told(name):
    r = replicates(name)
    assert np.mean([E.converged for E in r.probed]) > 0.9
    for E in r.probed:
        diagonal, errors = np.diag(E.values), np.diag(E.stderr)
        relevant = diagonal >= 0.01 * E.total
        met = E.diagonality_stderr <= 0.05 * E.diagonality and np.all(errors[relevant] <= 0.1 * diagonal[relevant])
        assert met == E.converged
        assert E.message.startswith("rtol 0.05 met" if met else "rtol 0.05 not met")
    # What is told is what is: errors of the relevant diagonal blocks, root mean square.
    deviations = r.of(lambda E: np.diag(E.values)) - np.diag(r.exact.values)
    assert np.all(
        np.sqrt(np.mean(deviations**2, axis=0))[on_diagonal(r)] < 0.1 * np.diag(r.exact.values)[on_diagonal(r)]
    )


def test_standard_errors_of_groups_and_of_the_off_diagonal_ratio():
    """Entries of one column are correlated; the standard error of their sum must know."""
    r = replicates("decaying")
    groups = {"x": ["b0", "b2"], "y": ["b1", "b3", "b5"]}
    exact = r.exact.aggregate(groups)
    values, stderr = r.of(lambda E: E.aggregate(groups).values), r.of(lambda E: E.aggregate(groups).stderr)
    check_unbiased(values, stderr, exact.values)
    halves = {"x": ["b0"], "y": ["b1", "b4"]}  # 100 parameters each
    values, stderr = (
        r.of(lambda E: E.aggregate(halves).off_diagonal_ratio()),
        r.of(lambda E: E.aggregate(halves).off_diagonal_ratio_stderr()),
    )
    check_unbiased(values, stderr, r.exact.aggregate(halves).off_diagonal_ratio())


def test_all_in_one_group_is_the_whole_energy():
    E = replicates("decaying").probed[0]
    assert E.aggregate({"all": E.labels}).total == pytest.approx(E.total, rel=1e-13)


# --- how few products -------------------------------------------------------------------------------------------------


def products_of_plain_probes(matrix, blocks, rtol=0.05):
    """Products with which plain probes, the same number for each block, would have a tolerated error on average."""
    exact, samples = (
        hs.block_energies(matrix, blocks, "exact"),
        hs.block_energies(matrix, blocks, "probes", 400).samples,
    )
    diagonal = np.diag(exact.values)
    relevant = diagonal >= 0.01 * exact.total
    own = np.diagonal(samples, axis1=1, axis2=2).std(axis=0)[relevant] / diagonal[relevant]
    parts = np.trace(samples, axis1=1, axis2=2) - exact.diagonality * samples.sum(axis=(1, 2))
    whole = parts.std() / exact.total / exact.diagonality
    return len(blocks) * max((whole / rtol) ** 2, (own.max() / (2 * rtol)) ** 2)


def large(directions):
    """4 blocks of 600 parameters; all of the matrix acts in so many directions, over little noise."""
    size = 2400
    U = gaussian(6, size, directions) / np.sqrt(size)
    M = U @ np.diag((-1.0) ** np.arange(directions)) @ U.T + 1e-3 * symmetric(gaussian(7, size, size)) / np.sqrt(size)
    return symmetric(M), hs.Partition.from_blocks({f"b{i}": range(i, size, 4) for i in range(4)})


@pytest.mark.parametrize(("directions", "factor"), [(1, 8), (4, 2)])
def test_low_rank_takes_a_fraction_of_the_products_of_plain_probes(directions, factor):
    matrix, blocks = large(directions)
    found = hs.block_energies(matrix, blocks, "probes")
    assert found.converged
    assert factor * found.products < products_of_plain_probes(matrix, blocks)


def test_products_are_counted():
    operator = hs.as_operator(decaying())
    counted, seen = [], []
    original = type(operator).products

    class Counting(type(operator)):
        def products(self, V):
            counted.append(V.shape[1])
            return original(self, V)

    E = hs.block_energies(
        Counting(operator.matrix, True), partition(), "probes", progress=lambda done, whole: seen.append((done, whole))
    )
    assert E.products == sum(counted)
    assert seen[-1][0] == E.products
    assert all(done <= whole for done, whole in seen)


def test_a_smaller_tolerance_takes_more_products():
    coarse, fine = (hs.block_energies(dense(), partition(), "probes", rtol=rtol) for rtol in (0.1, 0.03))
    assert coarse.products < fine.products
    assert coarse.converged
    assert fine.converged


def test_a_budget_is_kept_and_told():
    budget = least_budget(BLOCKS)
    E = hs.block_energies(not_symmetric(), partition(), "probes", rtol=0.01, max_products=budget)
    assert E.products <= budget
    assert not E.converged
    assert "raise max_products or rtol" in E.message


@pytest.mark.parametrize("budget", [2 * BLOCKS, 40, 100, least_budget(BLOCKS), 200, 400])
@pytest.mark.parametrize("name", ["rank_one_blocks", "not_symmetric", "dense"])
def test_no_budget_is_exceeded(name, budget):
    for seed in range(3):
        E = hs.block_energies(MATRICES[name](), partition(), "probes", rtol=0.005, max_products=budget, seed=seed)
        assert E.products <= budget


# --- invariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-14, 1e14])
@pytest.mark.parametrize("name", ["rank_one_blocks", "zero_block", "not_symmetric"])
def test_the_scale_of_the_matrix_changes_nothing(name, scale):
    plain, scaled = (hs.block_energies(MATRICES[name]() * s, partition(), "probes", seed=3) for s in (1.0, scale))
    assert plain.products == scaled.products
    assert relative_error(scaled.values / scale**2, plain.values) < 1e-10
    assert scaled.diagonality == pytest.approx(plain.diagonality, rel=1e-10)


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_in_float32(scale):
    matrix = torch.from_numpy(rank_one_blocks()).float() * scale
    exact, found = (hs.block_energies(matrix, partition(), method, seed=1) for method in ("exact", "probes"))
    assert found.converged
    relevant = exact.values >= 0.01 * exact.total
    assert np.all(np.abs(found.values - exact.values)[relevant] < 5 * found.stderr[relevant] + 1e-5 * exact.total)


def test_other_librarys_symmetric_operators_are_recognized():
    """SciPy's do not say that they are symmetric; two products tell."""
    from scipy.sparse.linalg import aslinearoperator

    ours, theirs = (hs.block_energies(m, partition(), "probes") for m in (decaying(), aslinearoperator(decaying())))
    assert theirs.products == ours.products + 2
    assert relative_error(theirs.values, ours.values) < 1e-12


def test_same_seed_same_numbers():
    first, again, other = (hs.block_energies(decaying(), partition(), "probes", seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(first.values, again.values)
    assert not np.any(first.values[:3, :3] == other.values[:3, :3])  # the smallest blocks are exact


def test_passes_of_any_width_give_the_same():
    operator = hs.as_operator(decaying())

    class Narrow(type(operator)):
        columns_per_pass = 3

    narrow = hs.block_energies(Narrow(operator.matrix, True), partition(), "probes")
    assert relative_error(narrow.values, hs.block_energies(operator, partition(), "probes").values) < 1e-12


def test_intervals_of_parameters_and_scattered_ones_are_summed_alike(monkeypatch):
    order = np.argsort(ASSIGNMENT, kind="stable")
    sorted_blocks = hs.Partition.from_blocks({f"b{i}": np.flatnonzero(ASSIGNMENT[order] == i) for i in range(BLOCKS)})
    matrix = decaying()[order][:, order]
    one = hs.block_energies(matrix, sorted_blocks, "probes")
    monkeypatch.setattr("hesscope.estimate.block_probes.FEW_BLOCKS", 1)
    other = hs.block_energies(matrix, sorted_blocks, "probes")
    assert relative_error(other.values, one.values) < 1e-13


# --- special matrices and bad input -----------------------------------------------------------------------------------


def test_a_zero_matrix_is_known_exactly():
    E = hs.block_energies(np.zeros((SIZE, SIZE)), partition(), "probes")
    assert np.all(E.values == 0)
    assert np.all(E.stderr == 0)
    assert E.converged
    assert np.isnan(E.diagonality)
    assert np.isnan(E.diagonality_interval().lower)


def test_one_block():
    E = hs.block_energies(dense(), hs.Partition.from_blocks({"all": range(SIZE)}), "probes")
    assert E.diagonality == 1.0
    assert E.diagonality_stderr < 1e-12
    assert abs(E.total - np.sum(dense() ** 2)) < 4 * E.stderr[0, 0]


def test_blocks_of_one_parameter_are_exact():
    p = hs.Partition.from_blocks({str(i): [i] for i in range(6)})
    M = dense()[:6, :6]
    E = hs.block_energies(M, p, "probes")
    assert relative_error(E.values, M**2) < 1e-14
    assert np.all(E.stderr == 0)


@pytest.mark.parametrize("loss", ["cross_entropy"])
def test_hessian_of_a_small_network(loss):
    obj = hs.Objective(build("tanh"), loss, cut(inputs_for("tanh", 12), randint(3, 12, seed=2)))
    H, p = hs.Hessian(obj), hs.Partition.by_tensor(obj.model)
    exact = hs.block_energies(H, p, "exact")
    for seed in range(5):
        E = hs.block_energies(H, p, "probes", seed=seed)
        assert np.all(np.abs(E.values - exact.values) <= 6 * E.stderr + 1e-10 * exact.values)
        assert E.diagonality == pytest.approx(exact.diagonality, abs=5 * E.diagonality_stderr + 1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("arguments", [{}, {"probes": 4}])
def test_products_that_are_not_finite(bad, arguments):
    M = dense()
    M[3, 3] = bad
    with pytest.raises(DataError, match="not finite"):
        hs.block_energies(M, partition(), "probes", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": 0.0}, "rtol must be a positive number"),
        ({"rtol": "small"}, "rtol must be a positive number"),
        ({"max_products": 0}, "max_products must be a positive integer, got 0"),
        ({"max_products": 13}, "max_products must be at least 14 for 7 blocks, got 13"),
        ({"max_products": 50, "probes": 4}, "give probes .* or max_products .*, not both"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        hs.block_energies(dense(), partition(), "probes", **arguments)


def test_samples_that_do_not_fit_in_memory(monkeypatch):
    monkeypatch.setattr("hesscope.core.memory.available_bytes", lambda device="cpu": 1024)
    with pytest.raises(TooLargeError, match="a coarser partition"):
        hs.block_energies(dense(), partition(), "probes")


def test_a_sketch_that_does_not_fit_in_memory_is_done_without(monkeypatch):
    monkeypatch.setattr("hesscope.estimate.block_probes.available_bytes", lambda device="cpu": 1024)
    E, exact = hs.block_energies(dense(), partition(), "probes"), replicates("dense").exact
    assert np.all(np.abs(E.values - exact.values)[exact.values > 0.01 * exact.total] < 0.5 * exact.values.max())
    assert np.array_equal(E.values, E.values.T)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_file", [False, True], ids=["memory", "netCDF"])
def test_round_trip(through_file, tmp_path):
    import xarray as xr

    E = hs.block_energies(decaying(), partition(), "probes")
    dataset = E.to_xarray()
    if through_file:
        dataset.to_netcdf(tmp_path / "energies.nc", engine="h5netcdf")
        dataset = xr.load_dataset(tmp_path / "energies.nc", engine="h5netcdf")
    found = hs.BlockEnergies.from_xarray(dataset)
    assert np.array_equal(found.values, E.values)
    assert found.diagonality_stderr == E.diagonality_stderr
    assert np.array_equal(found.confidence_interval().upper, E.confidence_interval().upper)
    assert (found.products, found.converged, found.message) == (E.products, E.converged, E.message)


def test_parts_of_unequal_numbers_side_by_side():
    parts = {
        name: hs.block_energies(matrix(), partition(), "probes") for name, matrix in (("H", dense), ("G", decaying))
    }
    found = hs.SplitEnergies.from_xarray(hs.SplitEnergies(parts).to_xarray())
    for name, E in parts.items():
        assert np.array_equal(found.parts[name].stderr, E.stderr)
        assert found.parts[name].diagonality_stderr == pytest.approx(E.diagonality_stderr, rel=1e-14)
