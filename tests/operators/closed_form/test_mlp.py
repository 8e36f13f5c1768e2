"""Closed forms of fully connected networks against products through automatic differentiation."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.operators import Operator
from hesscope.operators.closed_form import mlp
from tests.helpers import F64, cut, randint, randn, relative_error

N, C = 12, 4
X, LABELS, TARGETS = randn(N, 5, seed=1), randint(C, N, seed=2), randn(N, C, seed=3)
WIDTHS = [(5, C), (5, 6, C), (5, 6, 3, C), (5, 3, 7, 2, C)]
ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus]


def sequential(widths, activation=nn.Tanh, bias=True):
    torch.manual_seed(0)
    layers = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias, dtype=F64), activation()]
    return nn.Sequential(*layers[:-1])


def operators(model, loss, data):
    objective = hs.Objective(model, loss, data)
    return hs.Hessian(objective), hs.GaussNewton(objective)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("loss", "y"), [("cross_entropy", LABELS), ("mse", TARGETS)])
def test_equals_automatic_differentiation(widths, activation, bias, loss, y):
    for matrix in operators(sequential(widths, activation, bias), loss, cut(X, y)):
        assert matrix.has_closed_form
        assert relative_error(matrix.dense(), Operator.dense(matrix)) < 1e-13


@pytest.mark.parametrize("tile", [1, 700, 2**26])
def test_tiles_of_samples_change_nothing(monkeypatch, tile):
    monkeypatch.setattr(mlp, "TILE_BYTES", tile)
    for matrix in operators(hs.models.mlp((5, 6, 3, C), "gelu", dtype=F64), "cross_entropy", (X, LABELS)):
        assert relative_error(matrix.dense(), Operator.dense(matrix)) < 1e-13


def test_residual_part_is_the_difference_of_the_closed_forms():
    H, G = operators(sequential((5, 6, 3, C)), "cross_entropy", (X, LABELS))
    R = H - G
    assert R.has_closed_form
    assert relative_error(R.dense(), Operator.dense(R)) < 1e-12


def test_the_output_layer_s_strips_cover_it():
    """512 rows: more than one strip of the symmetric product."""
    labels = randint(64, N, seed=5)
    for matrix in operators(hs.models.one_hidden(5, 8, 64, dtype=F64), "cross_entropy", (X, labels)):
        dense = matrix.dense()
        assert torch.equal(dense, dense.T)
        assert relative_error(dense, Operator.dense(matrix)) < 1e-13


def test_float32_keeps_five_digits():
    data = hs.data.gaussian(300, 40, 20, dtype=F64)
    model, inputs = hs.models.one_hidden(40, 8, 20), data.inputs.float()
    single = hs.Hessian(hs.Objective(model, "cross_entropy", (inputs, data.labels))).dense()
    double = hs.Hessian(hs.Objective(model.double(), "cross_entropy", (inputs.double(), data.labels))).dense()
    assert relative_error(single.double(), double) < 1e-5


def hooked():
    model = sequential((5, 6, C))
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def frozen():
    model = sequential((5, 6, C))
    model[0].bias.requires_grad_(False)
    return model


def tied():
    model = sequential((5, 5, 5, C))
    model[2].weight = model[0].weight
    return model


def dropped():
    model = sequential((5, 6, C))
    return nn.Sequential(model[0], nn.Dropout(), model[2])


@pytest.mark.parametrize("build", [hooked, frozen, tied, dropped], ids=lambda build: build.__name__)
def test_other_networks_are_left_to_automatic_differentiation(build):
    model = build()
    matrix, _ = operators(model, "cross_entropy", (X, LABELS))
    assert not matrix.has_closed_form
    assert relative_error(matrix.dense(), Operator.dense(matrix)) == 0


def test_other_losses_and_batches_too():
    model = sequential((5, 6, C))
    assert not hs.Hessian(hs.Objective(model, nn.SmoothL1Loss(), (X, TARGETS))).has_closed_form
    assert not hs.Hessian(hs.Objective(model, "mse", (X[:, None], TARGETS[:, None]))).has_closed_form
    assert not hs.Hessian(hs.Objective(model, lambda m, b: (m(b[0]).sum(), N), (X, TARGETS))).has_closed_form


def test_block_energies_use_it():
    H, _ = operators(sequential((5, 6, C)), "cross_entropy", (X, LABELS))
    partition = hs.Partition.by_row(H.objective.model)
    auto = hs.block_energies(H, partition)
    assert auto.provenance.engine.startswith("block energies: closed_form")
    exact = hs.block_energies(H, partition, method="exact")
    assert relative_error(torch.from_numpy(auto.values), torch.from_numpy(exact.values)) < 1e-12
    with pytest.raises(hs.HesscopeError, match="needs a fully connected network"):
        hs.block_energies(torch.eye(H.shape[0]), partition, method="closed_form")
