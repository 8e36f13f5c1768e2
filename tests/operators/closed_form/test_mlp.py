"""Closed forms of fully connected networks against products through automatic differentiation."""

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import DataError, TooLargeError
from hesscope.operators import Operator
from hesscope.operators.closed_form import mlp, strips
from hesscope.operators.closed_form.network import recognize
from tests.helpers import F64, randint, randn, relative_error
from tests.operators.closed_form.networks import ACTIVATIONS, WIDTHS, N, objective, sequential

C = 4
X, LABELS, TARGETS = randn(N, 5, seed=1), randint(C, N, seed=2), randn(N, C, seed=3)


def both(obj):
    return hs.Hessian(obj), hs.GaussNewton(obj)


def operators(model, loss, data):
    return both(hs.Objective(model, loss, data))


def check(matrix):
    dense = matrix.dense()
    assert torch.equal(dense, dense.T)
    assert relative_error(dense, Operator.dense(matrix)) < 1e-13


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_equals_automatic_differentiation(widths, loss, bias):
    for matrix in both(objective(WIDTHS[widths], loss, bias=bias)):
        assert matrix.has_closed_form
        check(matrix)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    for matrix in both(objective(WIDTHS["two hidden"], activation=activation)):
        check(matrix)


@pytest.mark.parametrize("tile", [2**10, 2**13, 2**26])
def test_wide_layers_are_halved(monkeypatch, tile):
    """300 inputs, so that only half of a symmetric block is multiplied; 70 classes, more than one piece."""
    monkeypatch.setattr(strips, "TILE_BYTES", tile)
    for matrix in both(objective((300, 2, 70))):
        check(matrix)


@pytest.mark.parametrize("widths", ["two hidden", "two hidden, many classes"])
@pytest.mark.parametrize("tile", [1, 5000, 12000])
def test_tiles_of_samples_change_nothing(monkeypatch, tile, widths):
    monkeypatch.setattr(strips, "TILE_BYTES", tile)
    for matrix in both(objective(WIDTHS[widths], activation="gelu")):
        check(matrix)


def test_empty_batches_change_nothing():
    for matrix in both(objective(WIDTHS["one hidden"], batches=(0, 7, 0, 5))):
        check(matrix)


def test_a_memory_too_small_for_one_sample_is_refused():
    obj = objective(WIDTHS["one hidden"])
    network = recognize(obj)
    with pytest.raises(TooLargeError, match=r"memory = 1.0 KiB is too small .* one sample take at least (\d.\d) KiB"):
        mlp.dense(obj, network, memory=1024)
    least = next(memory for memory in range(1024, 10**5) if fits(network, memory))
    assert relative_error(mlp.dense(obj, network, memory=least), hs.Hessian(obj).dense()) < 1e-13


def fits(network, memory):
    try:
        return strips.cut_samples(network, 8, memory).bytes <= memory
    except TooLargeError:
        return False


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_matrix_that_is_not_finite_is_refused(loss):
    """Inputs of 1e20: the loss is finite, their squares are not."""
    model = sequential((5, 6, C), bias=False).float()
    with torch.no_grad():
        model[0].weight *= 1e-20
    H, _ = operators(model, loss, (1e20 * X.float(), LABELS if loss == "cross_entropy" else TARGETS.float()))
    for compute in (H.dense, lambda: hs.block_energies(H, hs.Partition.by_layer(model))):
        with pytest.raises(DataError, match="not finite"):
            compute()


def test_residual_part_is_the_difference_of_the_closed_forms():
    H, G = operators(sequential((5, 6, 3, C), bias=True), "cross_entropy", (X, LABELS))
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


def test_modules_that_occur_twice():
    """`named_children` leaves the second occurrence out: another network, with another Hessian."""
    act, layer = nn.Tanh(), nn.Linear(5, 5)
    shared = nn.Sequential(nn.Linear(5, 6), act, nn.Linear(6, 6), act, nn.Linear(6, C)).to(F64)
    for matrix in operators(shared, "cross_entropy", (X, LABELS)):
        assert matrix.has_closed_form
        check(matrix)
    others = [
        nn.Sequential(nn.Linear(5, 6), act, nn.Linear(6, C), act),
        nn.Sequential(nn.Linear(5, 6), act, act, nn.Linear(6, C)),
        nn.Sequential(layer, act, layer, act, nn.Linear(5, C)),
    ]
    for model in others:
        matrix, _ = operators(model.to(F64), "cross_entropy", (X, LABELS))
        assert not matrix.has_closed_form


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.LeakyReLU(0.1, inplace=True)])
def test_activations_that_work_in_place(activation):
    model = nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, C)).to(F64)
    plain = nn.Sequential(model[0], type(activation)(*((0.1,) if type(activation) is nn.LeakyReLU else ())), model[2])
    for matrix, reference in zip(
        operators(model, "cross_entropy", (X, LABELS)), operators(plain, "cross_entropy", (X, LABELS)), strict=True
    ):
        assert matrix.has_closed_form
        assert relative_error(matrix.dense(), Operator.dense(reference)) < 1e-13


def test_subclasses_of_activations_are_left_to_automatic_differentiation():
    class Twice(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    matrix, _ = operators(nn.Sequential(nn.Linear(5, 6), Twice(), nn.Linear(6, C)).to(F64), "mse", (X, TARGETS))
    assert not matrix.has_closed_form
