"""Strips of the closed form, and the energies from them, against the dense matrix from automatic differentiation."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import InputError, TooLargeError
from hesscope.operators import Operator
from hesscope.operators.closed_form.network import recognize
from hesscope.operators.closed_form.strips import cut_matrix
from tests.helpers import relative_error
from tests.operators.closed_form.networks import WIDTHS, objective


def scattered(size, blocks=5):
    """A partition whose blocks are no intervals, of unequal sizes."""
    assignment = np.random.default_rng(0).integers(0, blocks, size)
    assignment[:blocks] = np.arange(blocks)
    return hs.Partition.from_blocks({f"b{i}": np.flatnonzero(assignment == i) for i in range(blocks)})


def partitions(model):
    size = hs.ParameterSpace.of(model).size
    every = hs.Partition.from_blocks({str(i): [i] for i in range(size)})
    schemes = [hs.Partition.by_layer, hs.Partition.by_row, hs.Partition.by_column]
    return [*(scheme(model) for scheme in schemes), scattered(size), every]


def parts(obj):
    """The Hessian, the Gauss-Newton matrix and, unless it is zero, their difference, each with its dense twin."""
    H, G = hs.Hessian(obj), hs.GaussNewton(obj)
    found = [(H, Operator.dense(H)), (G, Operator.dense(G))]
    linear = len(obj.parameters.names) <= 2
    return found if linear else [*found, (H - G, found[0][1] - found[1][1])]


def check_energies(operator, dense, partition):
    """Compare the energies with sums of squares over all pairs of blocks; returns the number of strips."""
    seen = []
    found = hs.block_energies(operator, partition, "closed_form", progress=lambda *state: seen.append(state))
    membership = np.eye(len(partition))[partition.assignment]
    assert relative_error(found.values, membership.T @ np.square(dense.numpy()) @ membership) < 1e-12
    assert seen == sorted(set(seen))
    assert seen[-1] == (len(dense), len(dense))
    return len(seen)


def least_memory(operator):
    """The smallest memory that is not refused."""
    low, high = 1, 2**30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            operator.strip_bytes(middle)
            high = middle
        except TooLargeError:
            low = middle
    return high


def limit(monkeypatch, operator, memory):
    """Let block_energies make the operator's strips within this memory."""
    strips = type(operator).strips
    monkeypatch.setattr(type(operator), "strips", lambda self, given=None: strips(self, given or memory))


@pytest.mark.parametrize(("loss", "bias"), [("cross_entropy", True), ("cross_entropy", False), ("mse", True)])
@pytest.mark.parametrize("widths", WIDTHS)
def test_energies_are_those_of_the_dense_matrix(widths, loss, bias):
    obj = objective(WIDTHS[widths], loss, bias=bias, batches=(5, 7))
    for operator, dense in parts(obj):
        for partition in partitions(obj.model):
            assert check_energies(operator, dense, partition) == len(WIDTHS[widths]) - 1


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_energies_with_other_activations(activation):
    obj = objective(WIDTHS["two hidden"], activation=activation)
    for operator, dense in parts(obj):
        check_energies(operator, dense, hs.Partition.by_row(obj.model))


def test_a_residual_part_of_relu_networks():
    """Zero in every layer's own block: the difference of two strips is zero there but for rounding."""
    obj = objective(WIDTHS["two hidden"], activation="relu")
    H = hs.Hessian(obj)
    found = hs.block_energies(H - hs.GaussNewton(obj), hs.Partition.by_layer(obj.model), "closed_form")
    assert np.all(np.diag(found.values) < 1e-28 * found.values.max())


SMALL = {**WIDTHS, "many inputs": (30, 2, 3), "many classes": (3, 8, 14)}


@pytest.mark.parametrize("factor", [1.1, 3])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("widths", ["linear", "two hidden", "two hidden, many classes", "many inputs", "many classes"])
def test_a_small_memory_makes_more_strips(monkeypatch, widths, loss, factor):
    obj = objective(SMALL[widths], loss, batches=(5, 7))
    whole = len(SMALL[widths]) - 1
    for operator, dense in parts(obj):
        memory = int(factor * least_memory(operator))
        assert operator.strip_bytes(memory) <= memory
        limit(monkeypatch, operator, memory)
        strips = check_energies(operator, dense, scattered(len(dense)))
        assert strips > whole + 1 or factor == 3
        monkeypatch.undo()


@pytest.mark.parametrize("widths", SMALL)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_strips_hold_every_entry_or_its_mirror_image_once(widths, rows):
    network = recognize(objective(SMALL[widths]))
    size = network.starts[-1]
    count = torch.zeros(size, size)
    for strip in cut_matrix(network, 8, 2 * 8 * size * max(rows, 50)).strips:
        rows_, start, own = strip.rows(network), strip.column(network), strip.own_columns(network)
        count[rows_, start : start + own] += 1
        count[rows_, start + own :] += 1
        count[start + own :, rows_] += 1
        assert strip.area(network) == (rows_.stop - rows_.start) * (size - start)
    assert torch.all(count == 1)


def test_a_memory_too_small_for_one_row_is_refused():
    H = hs.Hessian(objective(WIDTHS["one hidden"]))
    least = least_memory(H)
    with pytest.raises(
        TooLargeError, match="is too small for the closed form of 64 parameters: one row and one sample"
    ):
        next(H.strips(least - 1))
    next(H.strips(least))


def test_strips_need_a_closed_form():
    with pytest.raises(InputError, match="strips need a closed form, which dense has not"):
        hs.operators.as_operator(torch.eye(3)).strips()


def test_sums_of_networks_that_are_cut_differently_have_no_strips():
    first, second = (hs.Hessian(objective(widths, bias=False)) for widths in ((7, 4), (4, 7)))
    assert first.shape == second.shape
    assert (first + 2 * first).has_closed_form
    assert not (first + second).has_closed_form
    with pytest.raises(InputError, match="strips need a closed form"):
        next((first + second).strips())


PEAK = """
import resource, torch, hesscope as hs
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(96, 160), torch.nn.Tanh(), torch.nn.Linear(160, 30))
operator = hs.Hessian(hs.Objective(model, "cross_entropy", (torch.randn(64, 96), torch.randint(0, 30, (64,)))))
partition, memory = hs.Partition.by_layer(model), 2**27
size = operator.shape[0]
warm = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
data = (torch.randn(8, 4), torch.randint(0, 2, (8,)))
hs.block_energies(hs.Hessian(hs.Objective(warm, "cross_entropy", data)), hs.Partition.by_layer(warm), "closed_form")
strips = type(operator).strips
type(operator).strips = lambda self: strips(self, memory)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
energies = hs.block_energies(operator, partition, "closed_form")
peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(size, peak, memory)
"""


def test_the_peak_stays_within_the_memory():
    """Where the dense matrix would take 1.5 GiB, in a fresh process."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    size, peak, memory = map(int, run.stdout.split())
    assert 4 * size**2 > 2**30
    assert peak < memory + 2**24  # and what libraries keep
