"""A layer's weights against blocks of the dense matrix from automatic differentiation."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import InputError, TooLargeError
from hesscope.operators import Operator
from hesscope.operators.closed_form import layer_weights
from tests.helpers import F64, cut, randint, randn, relative_error
from tests.operators.closed_form.networks import N, sequential

C = 4
X, LABELS, TARGETS = randn(N, 5, seed=1), randint(C, N, seed=2), randn(N, C, seed=3)


def dense_blocks(objective, layer, gauss_newton):
    """[m, m, d, d] blocks between the layer's neurons; a neuron's bias comes behind its weights."""
    operator = (hs.GaussNewton if gauss_newton else hs.Hessian)(objective)
    matrix, space = Operator.dense(operator), objective.parameters
    weight = objective.model.get_submodule(layer).weight
    index = torch.arange(weight.numel()).view(weight.shape) + space.slice(f"{layer}.weight").start
    if f"{layer}.bias" in space.names:
        index = torch.cat([index, torch.arange(len(weight))[:, None] + space.slice(f"{layer}.bias").start], dim=1)
    return matrix[index[:, None, :, None], index[None, :, None, :]]


LOSSES = {
    "labels": ("cross_entropy", LABELS),
    "targets": ("mse", TARGETS),
    "probabilities": ("cross_entropy", torch.softmax(TARGETS, dim=1)),
    "weights, ignored labels": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.0, 0.1], dtype=F64), ignore_index=1, label_smoothing=0.1),
        LABELS,
    ),
}


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_blocks_are_those_of_the_dense_matrix(layer, loss, bias, gauss_newton):
    module, y = LOSSES[loss]
    objective = hs.Objective(sequential((5, 6, 3, C), bias=bias), module, cut(X, y))
    truth = dense_blocks(objective, layer, gauss_newton)
    found = layer_weights(objective, layer, gauss_newton=gauss_newton)
    assert found.weights.shape == (N, *truth.shape[:2])
    assert found.inputs.shape == (N, truth.shape[2])
    blocks = torch.einsum("nij,na,nb->ijab", found.weights, found.inputs, found.inputs) / N
    assert relative_error(blocks, truth) < 1e-13
    assert relative_error(found.block(2, 2), truth[2, 2]) < 1e-13
    assert relative_error(found.energies(), truth.square().sum((2, 3))) < 1e-12
    assert found.energies().dtype == np.float64


def plain(widths=(5, 6, 3, C), loss="cross_entropy", y=LABELS):
    return hs.Objective(sequential(widths), loss, (X, y))


@pytest.mark.parametrize(("layer", "neurons"), [("0", [4, 1, 5]), ("2", [2]), ("4", [3, 0])])
def test_chosen_neurons(layer, neurons):
    objective = plain()
    truth, found = dense_blocks(objective, layer, False), layer_weights(objective, layer, neurons)
    assert (found.layer, found.neurons) == (layer, tuple(neurons))
    assert relative_error(found.energies(), truth[neurons][:, neurons].square().sum((2, 3))) < 1e-12
    for i, neuron in enumerate(neurons):
        assert relative_error(found.block(i, 0), truth[neuron, neurons[0]]) < 1e-13
        assert torch.equal(found.block(i, 0), found.block(i, 0).T)


@pytest.mark.parametrize("size", [8, 3000, 20000])
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_tiles_change_nothing(monkeypatch, layer, size):
    objective = plain()
    whole = layer_weights(objective, layer)
    energies = whole.energies()
    monkeypatch.setattr(sys.modules[layer_weights.__module__], "TILE_BYTES", size)
    tiled = layer_weights(objective, layer)
    assert relative_error(tiled.weights, whole.weights) < 1e-14
    assert relative_error(tiled.inputs, whole.inputs) < 1e-14
    assert relative_error(tiled.energies(), energies) < 1e-13


def test_energies_of_float32_weights_are_summed_in_float64():
    model = sequential((5, 6, C), bias=False).float()
    found = layer_weights(hs.Objective(model, "cross_entropy", (X.float(), LABELS)), "0")
    assert found.weights.dtype == found.inputs.dtype == found.block(0, 0).dtype == torch.float32
    blocks = torch.einsum("nij,na,nb->ijab", found.weights.double(), found.inputs.double(), found.inputs.double()) / N
    assert relative_error(found.energies(), blocks.square().sum((2, 3))) < 1e-13


def test_provenance():
    objective = plain()
    found = layer_weights(objective, "0", gauss_newton=True).provenance
    assert found.engine == "closed form: gauss-newton weights of 0"
    assert found.data_fingerprint == objective.data_fingerprint


BAD = {
    "layer": (("fc1",), "no layer is named 'fc1'; the layers are 0, 2, 4"),
    "near": (("2.",), "the layers are 0, 2, 4, did you mean '2'"),
    "activation": (("1",), "no layer is named '1'"),
    "negative": (("0", [-1]), r"whole numbers in \[0, 6\), the neurons of 0; got -1"),
    "too large": (("0", [0, 6]), r"whole numbers in \[0, 6\), the neurons of 0; got 6"),
    "half": (("0", [0.5]), "got 0.5"),
    "truth": (("0", [True]), "got True"),
    "none": (("0", []), "at least one neuron, and each only once"),
    "twice": (("0", [1, 1]), "at least one neuron, and each only once"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message):
        layer_weights(plain(), *arguments)


@pytest.mark.parametrize("number", [(0, 6), (-7, 0)])
def test_bad_numbers_of_a_block(number):
    with pytest.raises(InputError, match=r"needs numbers in \[0, 6\) of the chosen neurons"):
        layer_weights(plain(), "0").block(*number)


def test_networks_without_a_closed_form():
    model = nn.Sequential(sequential((5, 6, C)), nn.Dropout())
    with pytest.raises(InputError, match=r"need a fully connected network .* got Sequential with cross_entropy"):
        layer_weights(hs.Objective(model, "cross_entropy", (X, LABELS)), "0")


def test_weights_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("hesscope.core.memory.available_bytes", lambda device: 2**20)
    with pytest.raises(TooLargeError, match=r"the weights of 12 x 6 x 6 numbers needs .*; use fewer neurons instead"):
        layer_weights(plain(), "0")
