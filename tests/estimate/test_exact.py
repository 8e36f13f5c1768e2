"""Exact block energies against a naive double loop; the record's arithmetic against its definitions."""

import math

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import InputError, PartitionError, TooLargeError
from hesscope.core.records import Provenance
from hesscope.estimate.block_energies import (
    CLOSED_FORM_SIZE,
    EXACT_SIZE,
    Method,
    choose_method,
    energies_of_columns,
)
from tests.helpers import F64, build, cut, inputs_for, randint, randn, relative_error


def naive_energies(matrix, partition):
    """Sum of squares over every pair of entries, one by one."""
    total = np.zeros((len(partition), len(partition)))
    for i, a in enumerate(partition.assignment):
        for j, b in enumerate(partition.assignment):
            total[a, b] += float(matrix[i, j]) ** 2
    return total


def scattered(size, blocks, seed=0):
    """A partition whose blocks are no intervals, of unequal sizes."""
    assignment = np.random.default_rng(seed).integers(0, blocks, size)
    assignment[:blocks] = np.arange(blocks)
    return hs.Partition.from_blocks({f"b{i}": np.flatnonzero(assignment == i) for i in range(blocks)})


@pytest.fixture(scope="module")
def objective():
    return hs.Objective(build("gelu, bias"), "cross_entropy", cut(inputs_for("gelu, bias", 12), randint(3, 12, seed=2)))


SCHEMES = {
    "tensors": lambda model: hs.Partition.by_tensor(model),
    "layers": lambda model: hs.Partition.by_layer(model),
    "rows": lambda model: hs.Partition.by_row(model),
    "columns": lambda model: hs.Partition.by_column(model),
    "scattered": lambda model: scattered(hs.ParameterSpace.of(model).size, 4),
    "one": lambda model: hs.Partition.from_blocks({"all": range(hs.ParameterSpace.of(model).size)}),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
def test_exact_energies_of_an_operator_and_of_its_dense_matrix(objective, matrix, scheme):
    operator, partition = matrix(objective), SCHEMES[scheme](objective.model)
    truth = naive_energies(operator.dense(), partition)
    for form in (operator, operator.dense(), operator.dense().numpy()):
        E = hs.block_energies(form, partition, method="exact")
        assert E.labels == partition.labels
        assert E.sizes == partition.sizes
        assert E.values.dtype == E.stderr.dtype == np.float64
        assert relative_error(E.values, truth) < 1e-12
        assert np.all(E.stderr == 0)
        assert E.samples is None


def test_energies_of_a_difference_of_operators(objective):
    R, partition = hs.Hessian(objective) - hs.GaussNewton(objective), hs.Partition.by_layer(objective.model)
    assert relative_error(hs.block_energies(R, partition).values, naive_energies(R.dense(), partition)) < 1e-12


def test_a_matrix_that_is_not_symmetric_has_rows_and_columns():
    M, partition = randn(9, 9, seed=1), scattered(9, 3)
    assert relative_error(hs.block_energies(M, partition).values, naive_energies(M, partition)) < 1e-13


def test_float32_matrices_are_summed_in_float64():
    M, partition = randn(9, 9, seed=1).float(), scattered(9, 3)
    assert relative_error(hs.block_energies(M, partition).values, naive_energies(M, partition)) < 1e-14


def test_columns_in_any_chunks_sum_to_the_whole(objective):
    H, partition = hs.Hessian(objective), hs.Partition.by_row(objective.model)
    chunks = [slice(0, 5), slice(5, 6), slice(6, H.shape[1])]
    total = sum(energies_of_columns(H.columns(chunk), partition, chunk) for chunk in chunks)
    assert relative_error(total, hs.block_energies(H, partition).values) < 1e-13


@pytest.mark.parametrize("method", ["exact", "probes"])
@pytest.mark.parametrize("form", [torch.Tensor.clone, lambda M: M.numpy().copy()], ids=["tensor", "array"])
def test_the_matrix_is_not_changed(method, form):
    M = randn(9, 9, seed=1)
    given = form(M)
    hs.block_energies(given, scattered(9, 3), method=method)
    assert torch.equal(torch.as_tensor(given), M)


def test_progress_counts_every_product():
    M, partition = randn(600, 600, seed=1), scattered(600, 3)
    seen = []
    hs.block_energies(M, partition, method="exact", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (600, 600)
    assert seen == sorted(set(seen))
    seen.clear()
    hs.block_energies(
        M, partition, method="probes", probes=100, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (300, 300)
    assert len(seen) > 1


# --- the choice of a method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "blocks", "probes", "chosen"),
    [
        (EXACT_SIZE, 1, None, "exact"),
        (EXACT_SIZE + 1, 2, None, "probes"),
        (EXACT_SIZE + 1, 2, EXACT_SIZE, "exact"),  # 2 blocks x 2048 probes are more products than columns
        (10**6, 10**6 // 32, None, "exact"),
        (10**6, 10**6 // 32 - 1, None, "probes"),
    ],
)
def test_auto_takes_whichever_needs_fewer_products(parameters, blocks, probes, chosen):
    exact, probed = Method("exact", 0, products=parameters), Method("probes", 32, products=32 * blocks)
    assert choose_method(parameters, blocks, "auto", probes) == (exact if chosen == "exact" else probed)


@pytest.mark.parametrize(
    ("parameters", "blocks", "chosen"),
    [
        (CLOSED_FORM_SIZE, 1, "closed_form"),
        (CLOSED_FORM_SIZE + 1, 1, "probes"),
        (14 * 32 * 200, 200, "closed_form"),  # P^2 N / 2 multiply-adds are P / 14 products
        (14 * 32 * 200 + 1, 200, "probes"),
    ],
)
def test_auto_takes_the_closed_form_unless_probes_are_less_work(parameters, blocks, chosen):
    assert choose_method(parameters, blocks, "auto", None, closed_form=True).name == chosen


def test_auto_leaves_a_closed_form_that_does_not_fit(objective, monkeypatch):
    H, partition = hs.Hessian(objective), hs.Partition.by_layer(objective.model)
    assert hs.block_energies(H, partition).provenance.engine.startswith("block energies: closed_form")
    monkeypatch.setattr("hesscope.estimate.block_energies.available_bytes", lambda device: 2 * H.strip_bytes())
    assert hs.block_energies(H, partition).provenance.engine.startswith("block energies: exact")


def test_auto_is_told_in_the_provenance():
    M, partition = randn(9, 9, seed=1), scattered(9, 3)
    assert hs.block_energies(M, partition).provenance.engine == "block energies: exact; dense"
    assert hs.block_energies(M, partition).provenance.seed is None
    probed = hs.block_energies(M, partition, method="probes", seed=5).provenance
    assert (probed.engine, probed.seed, probed.dtype, probed.device) == (
        "block energies: probes; dense",
        5,
        "float64",
        "cpu",
    )


def test_provenance_names_the_engine_and_the_data(objective):
    found = hs.block_energies(hs.Hessian(objective), hs.Partition.by_layer(objective.model)).provenance
    assert found.engine == "block energies: closed_form; hessian: closed form"
    assert found.data_fingerprint == objective.data_fingerprint


BAD = {
    "method": ({"method": "probe"}, InputError, "method must be one of 'auto', .*got 'probe', did you mean 'probes'"),
    "one probe": ({"method": "probes", "probes": 1}, InputError, "probes must be at least 2"),
    "no probe": ({"method": "probes", "probes": 0}, InputError, "probes must be a positive integer, got 0"),
    "half a probe": ({"method": "probes", "probes": 2.5}, InputError, "probes must be a positive integer, got 2.5"),
    "true": ({"method": "probes", "probes": True}, InputError, "probes must be a positive integer, got True"),
    "exact probes": ({"method": "exact", "probes": 8}, InputError, "method 'exact' takes no probes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        hs.block_energies(randn(9, 9, seed=1), scattered(9, 3), **arguments)


def test_a_partition_of_another_size():
    with pytest.raises(PartitionError, match="the partition covers 8 parameters, but the operator has 9"):
        hs.block_energies(randn(9, 9, seed=1), scattered(8, 3))


def test_samples_that_do_not_fit_in_memory(monkeypatch):
    monkeypatch.setattr("hesscope.core.memory.available_bytes", lambda device="cpu": 1024)
    with pytest.raises(
        TooLargeError, match=r"100 samples of 3 x 3 blocks needs 14.1 KiB, but 1.0 KiB.* a coarser partition"
    ):
        hs.block_energies(randn(9, 9, seed=1), scattered(9, 3), method="probes", probes=100)


# --- the record -------------------------------------------------------------------------------------------------------

PROVENANCE = Provenance(engine="by hand", dtype="float64", device="cpu")


def record(values, sizes=None):
    values = np.asarray(values, dtype=float)
    labels = tuple("abcdefgh"[: len(values)])
    return hs.BlockEnergies.exact(labels, sizes or (4,) * len(labels), values, PROVENANCE)


def test_diagonality_and_total():
    E = record([[3.0, 1.0], [2.0, 4.0]])
    assert E.total == 10.0
    assert E.diagonality == 0.7
    assert E.diagonality_stderr == 0.0


def test_off_diagonal_ratio_is_mean_off_over_mean_on():
    values = np.random.default_rng(0).random((4, 4))
    off = np.mean([values[i, j] for i in range(4) for j in range(4) if i != j])
    assert record(values).off_diagonal_ratio() == pytest.approx(off / np.mean(np.diag(values)), rel=1e-14)
    chosen = [3, 1, 2]
    off = np.mean([values[i, j] for i in chosen for j in chosen if i != j])
    expected = off / np.mean([values[i, i] for i in chosen])
    assert record(values).off_diagonal_ratio(["d", "b", "c"]) == pytest.approx(expected, rel=1e-14)
    assert record(values).off_diagonal_ratio_stderr() == 0.0


def test_a_tiny_ratio_does_not_cancel():
    """Off-diagonal energy 1e-20 beside 1: total minus diagonal would be 0 or noise."""
    values = np.full((3, 3), 1e-20) + np.diag([1.0, 2.0, 3.0])
    assert record(values).off_diagonal_ratio() == pytest.approx(1e-20 / 2.0, rel=1e-12, abs=0)


def test_zero_matrices_have_no_ratio():
    E = record(np.zeros((2, 2)))
    assert math.isnan(E.diagonality)
    assert math.isnan(E.off_diagonal_ratio())


def test_the_ratio_compares_blocks_of_one_size():
    E = record(np.ones((3, 3)), sizes=(4, 4, 5))
    with pytest.raises(
        InputError, match=r"blocks of one shape, but the chosen blocks have sizes 4, 5; choose some with labels"
    ):
        E.off_diagonal_ratio()
    assert E.off_diagonal_ratio(["a", "b"]) == 1.0


@pytest.mark.parametrize("labels", [["a"], ["a", "a"]])
def test_the_ratio_needs_two_blocks(labels):
    with pytest.raises(InputError, match="at least two blocks, each named once"):
        record(np.ones((3, 3))).off_diagonal_ratio(labels)


def test_the_ratio_of_unknown_blocks():
    with pytest.raises(InputError, match="no block is named 'z'"):
        record(np.ones((3, 3))).off_diagonal_ratio(["a", "z"])


def test_classes_of_a_linear_model_with_two_classes_are_fully_coupled():
    """p_1 = 1 - p_2, so all four blocks are equal: r = 1 exactly (MATH.md, section 4.3) and diagonality 1/2."""
    model = hs.models.linear(4, 2, seed=3, dtype=F64)
    obj = hs.Objective(model, "cross_entropy", (randn(20, 4, seed=1), randint(2, 20, seed=2)))
    E = hs.block_energies(hs.Hessian(obj), hs.Partition.by_row(model))
    assert E.off_diagonal_ratio() == pytest.approx(1.0, rel=1e-12)
    assert E.diagonality == pytest.approx(0.5, rel=1e-12)


def test_exact_intervals_are_points():
    E = record([[3.0, 1.0], [2.0, 4.0]])
    interval = E.confidence_interval()
    assert np.array_equal(interval.lower, E.values)
    assert np.array_equal(interval.upper, E.values)


@pytest.mark.parametrize("level", [0, 1, 95, -0.1])
def test_bad_levels(level):
    with pytest.raises(InputError, match="level must lie between 0 and 1, got"):
        record([[1.0]]).confidence_interval(level)


@pytest.mark.parametrize("method", ["exact", "probes"])
def test_energies_of_groups_are_those_of_the_coarser_partition(method):
    M, fine = randn(12, 12, seed=1), scattered(12, 4)
    E = hs.block_energies(M, fine, method=method, probes=None if method == "exact" else 32)
    groups = {"x": ["b2", "b0"], "y": ["b1", "b3"]}
    coarse = hs.Partition.from_blocks(
        {key: np.concatenate([fine.indices(b) for b in group]) for key, group in groups.items()}
    )
    found = E.aggregate(groups)
    assert found.labels == ("x", "y")
    assert found.sizes == coarse.sizes
    if method == "exact":
        assert relative_error(found.values, naive_energies(M, coarse)) < 1e-13
        assert np.all(found.stderr == 0)
    else:
        by_hand = np.array(
            [[E.samples[:, [[2], [0]], [2, 0]].sum((1, 2)), E.samples[:, [[2], [0]], [1, 3]].sum((1, 2))]]
        )[0]
        assert relative_error(found.values[0], by_hand.mean(axis=1)) < 1e-13
        assert relative_error(found.stderr[0], by_hand.std(axis=1, ddof=1) / np.sqrt(32)) < 1e-12


def test_groups_may_leave_blocks_out():
    assert record(np.arange(9.0).reshape(3, 3)).aggregate({"x": ["c"]}).values == [[8.0]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"x": ["a", "b"], "y": ["b"]}, "a block is in more than one"),
        ({"x": ["a"], "y": ["z"]}, "no block is named 'z'"),
        ({"x": []}, "choose at least one block"),
    ],
)
def test_bad_groups(groups, message):
    with pytest.raises(InputError, match=message):
        record(np.ones((3, 3))).aggregate(groups)
