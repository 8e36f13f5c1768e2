"""Probed block energies: unbiased, with honest standard errors and intervals, reproducible and resumable.

Truth is the dense matrix. The rule is DESIGN.md's (see check_unbiased): replicates come from seeds 0, 1, 2, ...
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

import hesscope as hs
from hesscope.estimate.block_energies import probe_samples
from tests.helpers import build, check_stderr, check_unbiased, cut, inputs_for, randint, randn, relative_error

SIZE, BLOCKS, PROBES = 36, 3, 32
# Unequal blocks that are no intervals.
ASSIGNMENT = np.array([0, 1, 2, 1] * 9)


def partition():
    return hs.Partition.from_blocks({f"b{i}": np.flatnonzero(i == ASSIGNMENT) for i in range(BLOCKS)})


def equal_partition():
    return hs.Partition.from_blocks({f"b{i}": np.arange(SIZE) % BLOCKS == i for i in range(BLOCKS)})


def symmetric():
    M = randn(SIZE, SIZE, seed=1)
    return M + M.T


def decaying():
    """Symmetric with eigenvalues 1/k, both signs: a few directions dominate, as in a trained network."""
    Q = np.linalg.qr(randn(SIZE, SIZE, seed=2).numpy())[0]
    return Q @ np.diag((-1.0) ** np.arange(SIZE) / np.arange(1, SIZE + 1)) @ Q.T


def low_rank():
    """Rank 3, as the Gauss-Newton matrix of a few samples."""
    J = randn(SIZE, 3, seed=3).numpy()
    return J @ J.T


def weakly_coupled():
    """Off-diagonal blocks a hundred times smaller than diagonal ones."""
    scale = np.where(ASSIGNMENT[:, None] == ASSIGNMENT[None, :], 1.0, 0.01)
    return symmetric().numpy() * scale


def not_symmetric():
    return randn(SIZE, SIZE, seed=4).numpy()


MATRICES = {f.__name__: f for f in (symmetric, decaying, low_rank, weakly_coupled, not_symmetric)}


@dataclass(frozen=True)
class Replicates:
    exact: hs.BlockEnergies
    probed: list

    def of(self, quantity):
        return np.array([quantity(E) for E in self.probed])


_CACHE = {}


def replicates(name, count, cells=partition, probes=PROBES):
    key = (name, count, cells, probes)
    if key not in _CACHE:
        matrix, blocks = MATRICES[name](), cells()
        _CACHE[key] = Replicates(
            exact=hs.block_energies(matrix, blocks, method="exact"),
            probed=[hs.block_energies(matrix, blocks, "probes", probes=probes, seed=seed) for seed in range(count)],
        )
    return _CACHE[key]


@pytest.mark.parametrize("name", ["symmetric", "weakly_coupled", "not_symmetric"])
def test_energies_are_unbiased_and_standard_errors_honest(name):
    r = replicates(name, 500)
    check_unbiased(r.of(lambda E: E.values), r.of(lambda E: E.stderr), r.exact.values)


@pytest.mark.parametrize("name", ["decaying", "low_rank"])
def test_the_same_where_few_directions_dominate(name):
    """Their single samples vary more, so that more probes are needed to see a bias of 3 %."""
    r = replicates(name, 250, probes=256)
    check_unbiased(r.of(lambda E: E.values), r.of(lambda E: E.stderr), r.exact.values)


def test_a_planted_bias_of_3_percent_fails():
    r = replicates("symmetric", 500)
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(r.of(lambda E: 1.03 * E.values), r.of(lambda E: E.stderr), r.exact.values)


@pytest.mark.parametrize("name", MATRICES)
def test_intervals_cover_the_exact_energies(name):
    """Stated 95 %: every block's own coverage over 500 seeds lies between 90 and 99 %."""
    r = replicates(name, 500)
    intervals = [E.confidence_interval() for E in r.probed]
    covered = np.mean([(i.lower <= r.exact.values) & (r.exact.values <= i.upper) for i in intervals], axis=0)
    assert np.all((covered >= 0.90) & (covered <= 0.99)), covered


def test_intervals_widen_with_the_level():
    E = replicates("symmetric", 500).probed[0]
    narrow, wide = E.confidence_interval(0.5), E.confidence_interval(0.99)
    assert np.all((wide.lower > 0) & (wide.lower < narrow.lower) & (narrow.lower < E.values))
    assert np.all((E.values < narrow.upper) & (narrow.upper < wide.upper))


def test_half_of_the_50_percent_intervals_cover():
    r = replicates("symmetric", 500)
    intervals = [E.confidence_interval(0.5) for E in r.probed]
    covered = np.mean([(i.lower <= r.exact.values) & (r.exact.values <= i.upper) for i in intervals], axis=0)
    assert np.all(np.abs(covered - 0.5) < 4 * np.sqrt(0.25 / 500)), covered


@pytest.mark.parametrize("name", ["symmetric", "decaying", "not_symmetric"])
def test_standard_error_of_diagonality(name):
    r = replicates(name, 500)
    check_stderr(r.of(lambda E: E.diagonality), r.of(lambda E: E.diagonality_stderr))
    assert np.mean(r.of(lambda E: E.diagonality)) == pytest.approx(r.exact.diagonality, rel=0.03)


@pytest.mark.parametrize("name", ["symmetric", "decaying", "not_symmetric"])
@pytest.mark.parametrize("labels", [None, ["b2", "b0"]])
def test_standard_error_of_the_off_diagonal_ratio(name, labels):
    r = replicates(name, 500, cells=equal_partition)
    check_stderr(r.of(lambda E: E.off_diagonal_ratio(labels)), r.of(lambda E: E.off_diagonal_ratio_stderr(labels)))
    assert np.mean(r.of(lambda E: E.off_diagonal_ratio(labels))) == pytest.approx(
        r.exact.off_diagonal_ratio(labels), rel=0.03
    )


def test_standard_errors_of_groups():
    """Blocks of one probe are correlated; the standard error of their sum must know."""
    r = replicates("low_rank", 500)
    groups = {"x": ["b0", "b1"], "y": ["b2"]}
    check_stderr(r.of(lambda E: E.aggregate(groups).values), r.of(lambda E: E.aggregate(groups).stderr))


def test_averaging_the_two_halves_of_a_symmetric_matrix_keeps_it_symmetric():
    E = hs.block_energies(symmetric(), partition(), "probes", probes=PROBES)
    assert np.array_equal(E.values, E.values.T)
    assert np.array_equal(E.stderr, E.stderr.T)
    E = hs.block_energies(not_symmetric(), partition(), "probes", probes=PROBES)
    assert not np.array_equal(E.values, E.values.T)


def test_a_block_of_one_parameter_is_seen_exactly():
    M = symmetric()
    p = hs.Partition.from_blocks({"one": [5], "rest": np.setdiff1d(np.arange(SIZE), [5])})
    E = hs.block_energies(M, p, "probes", probes=4)
    assert E.values[0, 0] == pytest.approx(float(M[5, 5]) ** 2, rel=1e-14)
    assert E.stderr[0, 0] < 1e-14 * E.values[0, 0]


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_same_seed_same_numbers():
    M, p = symmetric(), partition()
    first, again, other = (hs.block_energies(M, p, "probes", PROBES, seed=seed).samples for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.any(np.isin(first.sum(axis=(1, 2)), other.sum(axis=(1, 2))))


def test_no_two_probes_share_their_signs():
    """Neither within a seed nor between neighbouring seeds, as `seed + i` would."""
    samples = [hs.block_energies(symmetric(), partition(), "probes", probes=16, seed=seed).samples for seed in range(4)]
    together = np.concatenate(samples)[:, 0, 1]
    assert len(np.unique(together)) == 64


@pytest.mark.parametrize("cuts", [[0, 10, 32], [0, 1, 2, 31, 32], list(range(33))])
def test_a_run_can_be_cut_anywhere(cuts):
    operator, p = hs.as_operator(symmetric()), partition()
    (whole,) = probe_samples((operator,), p, seed=3, probes=range(32))
    pieces = [probe_samples((operator,), p, 3, range(start, stop))[0] for start, stop in pairwise(cuts)]
    # Products with another number of columns may differ in the last bits, the probes may not.
    assert relative_error(np.concatenate(pieces), whole) < 1e-14
    assert np.array_equal(hs.block_energies(operator, p, "probes", probes=32, seed=3).samples, whole)


def test_more_probes_begin_with_the_same_ones():
    M, p = symmetric(), partition()
    few, many = (hs.block_energies(M, p, "probes", probes=count).samples for count in (8, 32))
    assert relative_error(many[:8], few) < 1e-14


def test_operator_and_dense_matrix_see_the_same_probes():
    obj = hs.Objective(build("tanh"), "cross_entropy", cut(inputs_for("tanh", 12), randint(3, 12, seed=2)))
    H, p = hs.Hessian(obj), hs.Partition.by_layer(obj.model)
    assert (
        relative_error(
            hs.block_energies(H, p, "probes", PROBES, seed=1).samples,
            hs.block_energies(H.dense(), p, "probes", PROBES, seed=1).samples,
        )
        < 1e-12
    )


# --- two matrices and their difference --------------------------------------------------------------------------------


def test_two_matrices_share_their_probes_and_bring_their_difference():
    A, B, p = hs.as_operator(symmetric()), hs.as_operator(low_rank()), partition()
    together = probe_samples((A, B), p, seed=2, probes=range(5, 12))
    apart = [probe_samples((operator,), p, seed=2, probes=range(5, 12))[0] for operator in (A, B, A - B)]
    assert len(together) == 3
    for found, truth in zip(together, apart, strict=True):
        assert relative_error(found, truth) < 1e-12
