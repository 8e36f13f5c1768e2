"""The papers' networks: what they compute, how they are initialized."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from hesscope import models
from hesscope.core.errors import InputError
from hesscope.models import MLP
from tests.helpers import ACTIVATION_DERIVATIVES, F64, randn

ACTIVATIONS = {"relu": functional.relu, "tanh": torch.tanh, "gelu": functional.gelu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_forward(activation, bias):
    model = MLP((4, 6, 5, 3), activation, bias=bias, seed=1, dtype=F64)
    if bias:
        torch.nn.init.constant_(model.fc2.bias, 0.3)
    x = randn(7, 4, seed=2)
    h = ACTIVATIONS[activation](functional.linear(x, model.fc1.weight, model.fc1.bias))
    h = ACTIVATIONS[activation](functional.linear(h, model.fc2.weight, model.fc2.bias))
    assert torch.equal(model(x), functional.linear(h, model.fc3.weight, model.fc3.bias))


def test_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in MLP((4, 6, 3), bias=True).named_parameters()}
    assert shapes == {"fc1.weight": (6, 4), "fc1.bias": (6,), "fc2.weight": (3, 6), "fc2.bias": (3,)}
    assert [name for name, _ in models.linear(4, 3).named_parameters()] == ["fc1.weight"]
    assert [name for name, _ in models.one_hidden(4, 6, 3).named_parameters()] == ["fc1.weight", "fc2.weight"]
    assert models.mlp((4, 6, 5, 3)).widths == (4, 6, 5, 3)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_one_hidden_is_that_of_the_closed_forms(name):
    model, x = models.one_hidden(4, 6, 3, activation=name, dtype=F64), randn(7, 4, seed=2)
    W, V = model.fc1.weight.detach().numpy(), model.fc2.weight.detach().numpy()
    truth = ACTIVATION_DERIVATIVES[name][0](x.numpy() @ W.T) @ V.T
    np.testing.assert_allclose(model(x).detach().numpy(), truth, rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_initialization_is_lecun_normal(seed):
    """Entries N(0, 1/in): mean, variance and kurtosis of n entries have known standard errors."""
    model = MLP((100, 200, 80), bias=True, seed=seed, dtype=F64)
    for layer, fan_in in ((model.fc1, 100), (model.fc2, 200)):
        w = layer.weight.detach().flatten() * fan_in**0.5
        n = len(w)
        assert abs(w.mean()) < 4 / n**0.5
        assert abs(w.var() - 1) < 4 * (2 / n) ** 0.5
        assert abs((w**4).mean() - 3) < 4 * (96 / n) ** 0.5
        assert torch.all(layer.bias == 0)
        assert abs(np.corrcoef(w[:-1], w[1:])[0, 1]) < 4 / n**0.5


def test_seeds_and_layers_have_their_own_numbers():
    a, again, b = (MLP((50, 50, 50), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), again.parameters(), strict=True))
    weights = torch.stack([p.detach().flatten() for model in (a, b) for p in model.parameters()])
    correlation = torch.corrcoef(weights) - torch.eye(4)
    assert correlation.abs().max() < 4 / 50


def test_dtypes_hold_the_same_numbers():
    single, double = MLP((4, 3), seed=5, dtype=torch.float32), MLP((4, 3), seed=5, dtype=F64)
    assert single.fc1.weight.dtype == torch.float32
    assert torch.equal(double.fc1.weight.float(), single.fc1.weight)


def test_no_global_randomness_is_used():
    before = torch.get_rng_state()
    MLP((4, 6, 3), bias=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (4,)}, r"widths must name at least the inputs and the outputs, got \[4\]"),
        ({"widths": (4, 0, 3)}, "each width must be a positive integer, got 0"),
        ({"widths": (4, 2.5)}, "each width must be a positive integer, got 2.5"),
        (
            {"widths": (4, 3), "activation": "rele"},
            "activation must be one of 'relu', 'tanh', 'gelu', got 'rele', did you mean 'relu'",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        MLP(**arguments)
