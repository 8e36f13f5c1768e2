"""Dual block energies: exact from all rows of the root, unbiased with honest standard errors from random ones.

Truth is the dense Gauss-Newton matrix, made by PyTorch alone for the networks of the zoo.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import DataError, InputError, PartitionError, TooLargeError
from hesscope.estimate import block_grams, dual
from hesscope.estimate.dual import dual_energies, orthonormal
from tests.helpers import check_stderr, check_unbiased, cut, randint, randn, randomized, relative_error, sequential_mlp
from tests.operators.zoo import NAMES, specimen, truth


def gauss_newton(name):
    s = specimen(name)
    return hs.GaussNewton(hs.Objective(s.model, "cross_entropy", s.batch))


def scattered(size):
    """Blocks that are no intervals, of different sizes, one of a single parameter."""
    assignment = np.arange(size) * 7 % 5
    assignment[assignment == 3] = 2
    assignment[assignment == 4] = 3
    assignment[size // 2] = 4
    return hs.Partition(("a", "b", "c", "d", "e"), assignment.astype(np.int32))


PARTITIONS = {
    "tensor": hs.Partition.by_tensor,
    "layer": hs.Partition.by_layer,
    "row": hs.Partition.by_row,
    "column": hs.Partition.by_column,
    "head": hs.Partition.by_head,
    "scattered": lambda model: scattered(sum(p.numel() for p in model.parameters())),
}


def blocks_of(matrix, partition):
    """Energies of all blocks of a dense matrix, block by block."""
    members = [torch.from_numpy(block) for block in partition.members()]
    return np.array([[float(matrix[a][:, b].square().sum()) for b in members] for a in members])


# --- exact ------------------------------------------------------------------------------------------------------------


CASES = [(name, scheme) for name in NAMES for scheme in PARTITIONS if scheme != "head" or name not in ("mlp", "resnet")]


@pytest.mark.parametrize("name, scheme", CASES)
def test_all_rows_give_the_exact_energies(name, scheme):
    G = gauss_newton(name)
    partition = PARTITIONS[scheme](G.objective.model)
    found = dual_energies(G, partition)
    exact = blocks_of(truth(name, "gauss_newton"), partition)
    assert relative_error(found.values, exact) < 1e-12
    # Small blocks, too, each relative to those that it lies between; what is zero but for rounding (attention does not
    # depend on the bias of its keys) has no digits.
    diagonal = np.sqrt(np.diag(exact))
    some = diagonal > 1e-12 * diagonal.max()
    gap = np.abs(found.values - exact) / np.outer(diagonal, diagonal).clip(min=1e-300)
    assert np.max(gap[some][:, some]) < 1e-9
    assert found.samples is None
    assert not found.stderr.any()
    assert found.labels == partition.labels
    assert "dual, all" in found.provenance.engine


LOSSES = {
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.3]).double()), randint(3, 12, seed=2)),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), randint(3, 12, seed=2)),
    "ignored": (nn.CrossEntropyLoss(ignore_index=1), randint(3, 12, seed=2)),
    "mse": (nn.MSELoss(), randn(12, 3, seed=3)),
    "logistic": (nn.BCEWithLogitsLoss(), randn(12, 3, seed=3).sigmoid()),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_batches(case):
    loss, targets = LOSSES[case]
    model, x = randomized(sequential_mlp((4, 5, 3), nn.Tanh, bias=True)), randn(12, 4, seed=1)
    whole, batched = (hs.GaussNewton(hs.Objective(model, loss, data)) for data in ((x, targets), cut(x, targets)))
    partition = hs.Partition.by_row(model)
    exact = blocks_of(whole.dense(), partition)
    for G in (whole, batched):
        assert relative_error(dual_energies(G, partition).values, exact) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
@pytest.mark.parametrize("rows, pairs", [(50, 2**27), (2**20, 5), (70, 3)])
def test_tiles_of_rows_and_of_pairs(name, rows, pairs, monkeypatch):
    G = gauss_newton(name)
    partition = hs.Partition.by_tensor(G.objective.model)
    monkeypatch.setattr(dual, "ROWS_BYTES", rows * 8 * G.shape[0])
    monkeypatch.setattr(dual, "GRAM_BYTES", pairs**2 * 8 * len(partition))
    found = dual_energies(G, partition)
    assert relative_error(found.values, blocks_of(truth(name, "gauss_newton"), partition)) < 1e-12


def test_the_fisher_matrix():
    s = specimen("llama")
    F = hs.EmpiricalFisher(hs.Objective(s.model, "cross_entropy", s.batch))
    partition = hs.Partition.by_tensor(s.model)
    assert relative_error(dual_energies(F, partition).values, blocks_of(truth("llama", "fisher"), partition)) < 1e-12


@pytest.mark.parametrize("factor", [-1e-14, 1e14])
@pytest.mark.parametrize("probes", [None, 128])
def test_multiples(factor, probes):
    G = gauss_newton("gpt2")
    partition = hs.Partition.by_tensor(G.objective.model)
    plain, multiple = (dual_energies(matrix, partition, probes=probes) for matrix in (G, factor * G))
    assert relative_error(multiple.values / factor**2, plain.values) < 1e-14
    assert multiple.diagonality_stderr == pytest.approx(plain.diagonality_stderr, rel=1e-10)


@pytest.mark.parametrize("scale", [1e-14, 1e14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probes", [None, 64])
def test_losses_of_any_scale(scale, dtype, probes):
    """Not only the factor of an operator: the rows themselves are small or large."""
    model, x, y = randomized(sequential_mlp((4, 5, 3), nn.Tanh, bias=True)), randn(12, 4, seed=1), randn(12, 3, seed=3)
    data = (x.to(dtype), y.sigmoid().to(dtype))
    partition = hs.Partition.by_row(model)
    values = []
    for weight in (1.0, scale):
        loss = nn.BCEWithLogitsLoss(weight=torch.tensor([weight], dtype=dtype))
        G = hs.GaussNewton(hs.Objective(model.to(dtype), loss, data))
        values.append(dual_energies(G, partition, probes=probes).values)
    assert relative_error(values[1] / scale**2, values[0]) < 1e4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["resnet", "gpt2"])
def test_single_precision(name):
    s = specimen(name)
    double = hs.GaussNewton(hs.Objective(s.model, "cross_entropy", s.batch))
    partition = hs.Partition.by_tensor(s.model)
    exact = dual_energies(double, partition, probes=256).values
    cast = tuple(t.float() if t.is_floating_point() else t for t in s.batch) if isinstance(s.batch, tuple) else s.batch
    G = hs.GaussNewton(hs.Objective(specimen(name).model.float(), "cross_entropy", cast))
    found = dual_energies(G, partition, probes=256)
    assert G.dtype == torch.float32
    assert found.values.dtype == np.float64
    assert relative_error(found.values, exact) < 1e-4  # the same signs and directions
    assert relative_error(dual_energies(G, partition).values, blocks_of(truth(name, "gauss_newton"), partition)) < 1e-5


def test_a_matrix_that_is_zero():
    model, x = randomized(sequential_mlp((4, 5, 3), nn.Tanh, bias=True)), randn(6, 4, seed=1)
    G = hs.GaussNewton(hs.Objective(model, nn.L1Loss(), (x, randn(6, 3, seed=2))))
    for probes in (None, 32):
        assert not dual_energies(G, hs.Partition.by_tensor(model), probes=probes).values.any()


# --- sampled ----------------------------------------------------------------------------------------------------------


def subject():
    """200 rows of 65 parameters in 4 blocks of size 24, 6, 30 and 5."""
    model = randomized(sequential_mlp((4, 6, 5), nn.Tanh, bias=True))
    G = hs.GaussNewton(hs.Objective(model, "cross_entropy", (randn(40, 4, seed=1), randint(5, 40, seed=2))))
    return G, hs.Partition.by_tensor(model)


@dataclass(frozen=True)
class Replicates:
    exact: hs.BlockEnergies
    sampled: list

    def of(self, quantity):
        return np.array([quantity(E) for E in self.sampled])


@cache
def replicates(leading):
    """Eight leading rows and 256 random ones in groups of 16, or none and 1024 in groups of 32; 2 strata."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dual, "STRATA", 2)
        patch.setattr(dual, "GROUP_ROWS", 16 if leading else 32)
        patch.setattr(dual, "LEADING_ROWS", leading)
        G, partition = subject()
        rows, seeds = (256, 220) if leading else (1024, 320)
        sampled = [dual_energies(G, partition, probes=rows, seed=seed) for seed in range(seeds)]
    return Replicates(hs.block_energies(G.dense(), partition, method="exact"), sampled)


def shares(E):
    """Diagonal entries, and the whole."""
    return np.append(np.diag(E.values), E.total)


def shares_stderr(E):
    whole = E.samples.sum(axis=(1, 2)).std(ddof=1) / np.sqrt(len(E.samples))
    return np.append(np.diag(E.stderr), whole)


def test_energies_are_unbiased_and_standard_errors_honest():
    r = replicates(8)
    assert "256 random and 8 leading rows of 2 strata" in r.sampled[0].provenance.engine
    check_unbiased(r.of(lambda E: E.values), r.of(lambda E: E.stderr), r.exact.values)


def test_the_same_without_leading_rows():
    r = replicates(0)
    assert "1024 random and 0 leading rows" in r.sampled[0].provenance.engine
    check_unbiased(r.of(shares), r.of(shares_stderr), shares(r.exact))
    values, errors = r.of(lambda E: E.values), r.of(lambda E: E.stderr)
    assert np.max(np.abs(values.mean(0) - r.exact.values) / values.std(0, ddof=1)) < 4 / np.sqrt(len(values))
    check_stderr(values, errors)


@pytest.mark.parametrize("leading", [0, 8])
def test_a_planted_bias_of_3_percent_fails(leading):
    r = replicates(leading)
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(r.of(lambda E: 1.03 * shares(E)), r.of(shares_stderr), shares(r.exact))


@pytest.mark.parametrize("leading", [0, 8])
def test_intervals_cover_the_exact_energies(leading):
    """Stated 95 %: coverage over 220 or 320 seeds between 90 and 99 %, for every block on the diagonal."""
    r = replicates(leading)
    intervals = [E.confidence_interval() for E in r.sampled]
    covered = np.mean([(i.lower <= r.exact.values) & (r.exact.values <= i.upper) for i in intervals], axis=0)
    assert np.all((np.diag(covered) >= 0.90) & (np.diag(covered) <= 0.99)), covered


@pytest.mark.parametrize("leading", [0, 8])
def test_standard_errors_of_diagonality_and_of_groups(leading):
    r = replicates(leading)
    found, errors = r.of(lambda E: E.diagonality), r.of(lambda E: E.diagonality_stderr)
    check_unbiased(found, errors, r.exact.diagonality)
    from scipy.special import stdtrit

    quantile = stdtrit(len(r.sampled[0].samples) - 1, 0.975)
    covered = np.mean(np.abs(found - r.exact.diagonality) <= quantile * errors)
    assert 0.90 <= covered <= 0.99, covered
    groups = {"first": ["0.weight", "0.bias"], "last": ["2.weight", "2.bias"]}
    check_stderr(r.of(lambda E: E.aggregate(groups).values), r.of(lambda E: E.aggregate(groups).stderr))


def test_standard_error_of_the_off_diagonal_ratio():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dual, "STRATA", 2)
        patch.setattr(dual, "LEADING_ROWS", 8)
        G, _ = subject()
        rows = hs.Partition.by_row(G.objective.model)
        labels = [f"0.weight[{i}]" for i in range(6)]
        exact = dual_energies(G, rows).off_diagonal_ratio(labels)
        found = [dual_energies(G, rows, probes=128, seed=seed) for seed in range(64)]
    ratios = np.array([E.off_diagonal_ratio(labels) for E in found])
    assert abs(ratios.mean() - exact) < 4 * ratios.std(ddof=1) / 8 + 0.01 * exact
    check_stderr(ratios, [E.off_diagonal_ratio_stderr(labels) for E in found])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_with_all_defaults(name):
    """The default plan: the whole energy within four standard errors, and these are small."""
    G = gauss_newton(name)
    partition = hs.Partition.by_tensor(G.objective.model)
    E = dual_energies(G, partition, probes=256)
    exact = dual_energies(G, partition)
    assert E.samples.shape == (16, len(partition), len(partition))
    assert abs(E.diagonality - exact.diagonality) < 4 * E.diagonality_stderr
    assert E.diagonality_stderr < 0.02 * exact.diagonality
    assert np.array_equal(E.values, E.values.T)


def test_leading_rows_take_all_that_they_span():
    """A matrix of rank 18 leaves nothing to chance."""
    G = gauss_newton("mlp")
    partition = hs.Partition.by_row(G.objective.model)
    E = dual_energies(G, partition, probes=64)
    assert relative_error(E.values, blocks_of(truth("mlp", "gauss_newton"), partition)) < 1e-12
    assert np.max(E.stderr) < 1e-12 * np.max(E.values)


def test_leading_rows_reduce_the_error(monkeypatch):
    G, partition = subject()
    errors = []
    for leading in (0, 4, 16):
        monkeypatch.setattr(dual, "LEADING_ROWS", leading)
        found = [dual_energies(G, partition, probes=64, seed=seed).total for seed in range(8)]
        errors.append(np.std(found))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


def test_orthonormal_pieces():
    rows = randn(5, 30, seed=1)
    rows[3] = rows[0] - 2 * rows[1]  # rank 4
    rows *= 1e-12
    pieces = orthonormal(list(torch.split(rows, [4, 20, 6], dim=1)))
    Q = torch.cat(pieces, dim=1)
    gram = Q @ Q.T
    values = torch.linalg.eigvalsh(gram)
    assert torch.allclose(values, torch.tensor([0.0, 1, 1, 1, 1]).double(), atol=1e-14)
    assert relative_error(rows @ Q.T @ Q, rows) < 1e-10


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_same_seed_same_numbers():
    G, partition = subject()
    first, again, other = (dual_energies(G, partition, probes=64, seed=seed).samples for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.any(np.isin(first.sum(axis=(1, 2)), other.sum(axis=(1, 2))))


def test_more_rows_begin_with_the_same_ones():
    G, partition = subject()
    few, many = (dual_energies(G, partition, probes=count).samples for count in (64, 128))
    assert relative_error(many[: len(few)], few) < 1e-10


@pytest.mark.parametrize("rows", [16, 48])
def test_memory_changes_no_number(rows, monkeypatch):
    """Groups go together as memory allows."""
    G, partition = subject()
    whole = dual_energies(G, partition, probes=64).samples
    monkeypatch.setattr(dual, "ROWS_BYTES", rows * 8 * G.shape[0])
    assert relative_error(dual_energies(G, partition, probes=64).samples, whole) < 1e-10


def test_many_blocks_have_fewer_samples(monkeypatch):
    G, partition = subject()
    whole = dual_energies(G, partition, probes=1024)
    monkeypatch.setattr(dual, "SAMPLES_BYTES", 8 * len(partition) ** 2)
    few = dual_energies(G, partition, probes=1024)
    assert whole.samples.shape[0] == 64
    assert few.samples.shape[0] == 16
    assert relative_error(few.samples, whole.samples.reshape(16, 4, 4, 4).mean(axis=1)) < 1e-13


def test_batches_are_dealt_out_to_strata():
    """More batches than strata: each stratum is several of them."""
    model = randomized(sequential_mlp((4, 6, 5), nn.Tanh, bias=True))
    x, y = randn(40, 4, seed=1), randint(5, 40, seed=2)
    G = hs.GaussNewton(hs.Objective(model, "cross_entropy", cut(x, y, (2,) * 20)))
    partition = hs.Partition.by_tensor(model)
    E = dual_energies(G, partition, probes=512)
    assert "of 8 strata" in E.provenance.engine
    exact = dual_energies(G, partition)
    assert abs(E.total - exact.total) < 4 * E.samples.sum(axis=(1, 2)).std(ddof=1) / np.sqrt(len(E.samples))
    assert E.total == pytest.approx(exact.total, rel=0.05)


def test_progress_comes_to_its_end():
    G, partition = subject()
    for probes in (None, 64):
        calls = []
        dual_energies(G, partition, probes=probes, progress=lambda done, whole: calls.append((done, whole)))  # noqa: B023
        assert calls[-1][0] == calls[-1][1] > 0


def test_the_model_is_left_alone():
    from tests.helpers import same, snapshot

    G, partition = subject()
    G.objective.model.train()
    before = snapshot(G.objective.model)
    for probes in (None, 32):
        dual_energies(G, partition, probes=probes)
    assert same(snapshot(G.objective.model), before)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(monkeypatch):
    G, partition = subject()
    with pytest.raises(InputError, match=r"the dual form needs a root of the matrix, which a hesscope\.GaussNewton"):
        dual_energies(hs.Hessian(G.objective), partition)
    with pytest.raises(InputError, match="probes must be at least 4 rows for method 'dual', got 3"):
        dual_energies(G, partition, probes=3)
    with pytest.raises(InputError, match=r"probes must be a positive integer, got 2\.5"):
        dual_energies(G, partition, probes=2.5)
    with pytest.raises(PartitionError, match="covers 3 parameters, but the operator has 65"):
        dual_energies(G, hs.Partition.from_blocks({"a": [0, 1, 2]}))
    assert dual_energies(G, partition, probes=4).samples.shape == (2, 4, 4)
    monkeypatch.setattr("hesscope.core.memory.available_bytes", lambda device: 10)
    with pytest.raises(TooLargeError, match="samples of 4 x 4 blocks needs"):
        dual_energies(G, partition, probes=64)
    with pytest.raises(TooLargeError, match="rows of the root needs"):
        dual_energies(G, partition)


def test_rows_that_are_not_finite_are_refused():
    class Root(nn.Module):
        """The square root has no derivative at zero."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            return (x * self.w).abs().sqrt()

    model = Root()
    with pytest.raises(DataError, match="the Gauss-Newton matrix is not finite on batch 0"):
        G = hs.GaussNewton(hs.Objective(model, "mse", (randn(4, 3, seed=1), randn(4, 3, seed=2))))
        dual_energies(G, hs.Partition.by_tensor(model))


def test_gram_matrices_of_blocks():
    """Side by side or scattered, equal sizes or not."""
    A, B = randn(4, 20, seed=1), randn(6, 20, seed=2)
    blocks = {"x": range(3), "y": range(3, 6), "z": range(6, 10), "u": [10, 12], "v": [11, 13], "w": range(14, 20)}
    partition = hs.Partition.from_blocks(blocks)
    columns = block_grams.BlockColumns.of(partition, torch.device("cpu"))
    grams = columns.split(A).grams(columns.split(B).some(slice(1, 5)))
    assert len(columns.groups) == 4
    for number, block in enumerate(blocks.values()):
        index = torch.tensor(list(block))
        assert relative_error(grams[number], A[:, index] @ B[1:5, index].T) < 1e-14
