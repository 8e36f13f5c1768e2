"""Which modules are layers, and their parameters as matrices."""

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.layerwise.layers import find_layer, layers_of, left_out
from tests.helpers import randint, randn, randomized
from tests.layerwise import networks


def test_layers_are_found_in_order_with_their_shapes():
    found = layers_of(networks.objective(networks.convolutional(), networks.images()))
    assert [(layer.name, layer.kind, layer.shape, layer.bias) for layer in found] == [
        ("0", "convolution", (4, 19), True),
        ("2", "convolution", (3, 24), False),
        ("5", "linear", (3, 13), True),
    ]
    assert found[0].parameters == ("0.weight", "0.bias")


@pytest.mark.parametrize("module", ["linear", "convolution", "embedding", "conv1d"])
def test_matricized_vectors_act_as_the_layer_does(module):
    """W x with the matricized parameters is the layer's own output."""
    if module == "conv1d":
        pytest.importorskip("transformers")
        from transformers.pytorch_utils import Conv1D

        net, x = nn.Sequential(Conv1D(3, 5)), randn(4, 5, seed=0)
    elif module == "linear":
        net, x = nn.Sequential(nn.Linear(5, 3)), randn(4, 5, seed=0)
    elif module == "embedding":
        net, x = nn.Sequential(nn.Embedding(5, 3)), randint(5, 4, seed=0)
    else:
        net, x = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten()), randn(4, 2, 2, 2, seed=0)
    net = randomized(net)
    objective = hs.Objective(net, "mse", (x, torch.zeros(4, 3, dtype=torch.float64)))
    layer = find_layer(objective, "0")
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    W = layer.matricized(theta)
    inputs = nn.functional.one_hot(x, 5).double() if module == "embedding" else x.flatten(1)
    if layer.bias:
        inputs = torch.cat([inputs, torch.ones(4, 1, dtype=torch.float64)], 1)
    assert torch.allclose(inputs @ W.T, net(x), rtol=1e-14, atol=1e-14)
    assert torch.equal(layer.flattened(W), theta)
    several = torch.stack([theta, 2 * theta], 1)
    assert torch.equal(layer.flattened(layer.matricized(several)), several)
    assert torch.equal(layer.matricized(several)[1], 2 * W)


def test_vectors_of_another_size_are_refused():
    layer = layers_of(networks.objective(networks.mlp(), networks.vectors()))[0]
    with pytest.raises(hs.HesscopeError, match="layer '0' has 48 parameters, got vectors of shape \\[47\\]"):
        layer.matricized(torch.zeros(47))
    with pytest.raises(hs.HesscopeError, match="is a matrix of 6 x 8, got shape \\[8, 6\\]"):
        layer.flattened(torch.zeros(8, 6))


def test_an_unknown_layer_is_answered_by_the_nearest():
    objective = hs.Objective(hs.models.mlp((7, 6, 4)).double(), "cross_entropy", networks.vectors())
    with pytest.raises(hs.HesscopeError, match="there is no layer 'fc3'; the layers are 'fc1', 'fc2', did you mean"):
        find_layer(objective, "fc3")


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (lambda net: net[0].weight.requires_grad_(False), "0", "has no trainable weight"),
        (lambda net: setattr(net[4], "bias", net[3].bias), "4", "shares its weight with '3'"),
        (lambda net: None, "1", "is no layer but a ReLU; layers are nn.Linear"),
        (lambda net: None, "3", "is no layer but a LayerNorm"),
    ],
)
def test_what_is_no_layer_is_refused_and_listed(change, name, reason):
    net = nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).double()
    change(net)
    objective = hs.Objective(net, "cross_entropy", networks.vectors())
    with pytest.raises(hs.HesscopeError, match=f"'{name}' {reason}"):
        find_layer(objective, name)
    listed = left_out(objective)
    if name != "1" and name != "0":
        assert reason in listed[name]
    assert name not in [layer.name for layer in layers_of(objective)]


def test_a_frozen_bias_is_no_column():
    net = nn.Sequential(nn.Linear(7, 4)).double()
    net[0].bias.requires_grad_(False)
    layer = layers_of(networks.objective(net, networks.vectors()))[0]
    assert layer.shape == (4, 7)
    assert layer.parameters == ("0.weight",)


def test_grouped_convolutions_are_no_layers():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 3)).double()
    assert [layer.name for layer in layers_of(networks.objective(net, networks.images()))] == ["2"]
