"""Decoupling errors of all layers of a network at once."""

import numpy as np
import pytest
from torch import nn

import hesscope as hs
from hesscope.layerwise.factors import kronecker_factors
from hesscope.layerwise.layer_map import LayerMap, layer_map
from tests.helpers import randint, randn, randomized
from tests.layerwise import networks


def test_all_layers_are_measured_as_one_by_one():
    objective = networks.objective(networks.convolutional(nn.Tanh), networks.images())
    seen = []
    found = layer_map(objective, sharing="reduce", progress=lambda done, planned: seen.append((done, planned)))
    assert found.layers == ("0", "2", "5")
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for number, name in enumerate(found.layers):
        single = kronecker_factors(objective, name, sharing="reduce")
        assert found.relative_error[number] == single.relative_error
        assert found.best_relative_error[number] == single.best_relative_error
        assert found.decouplings[number] == single.decoupling
        assert found.sharing[number] == single.sharing
        assert found.sizes[number] == np.prod(single.shape)
    again = LayerMap.from_xarray(found.to_xarray())
    assert (again.layers, again.sharing, again.decouplings) == (found.layers, found.sharing, found.decouplings)
    assert (again.left_out, again.provenance) == (found.left_out, found.provenance)
    assert np.array_equal(again.sizes, found.sizes)
    assert layer_map(objective, ["2"]).layers == ("2",)


def test_what_cannot_be_measured_is_named_with_the_reason():
    model = randomized(networks.Twice(), 5)
    objective = hs.Objective(model, "cross_entropy", (randn(8, 4, seed=1), randint(3, 8, seed=2)))
    found = layer_map(objective)
    assert found.layers == ("last",)
    assert "is used 2 times in a forward pass, which needs a convention" in found.left_out["shared"]
    assert layer_map(objective, sharing="expand").layers == ("shared", "last")
    alone = randomized(nn.Sequential(nn.LayerNorm(4)), 1)
    objective = hs.Objective(alone, "cross_entropy", (randn(8, 4, seed=1), randint(4, 8, seed=2)))
    with pytest.raises(hs.HesscopeError, match="no layer that can be measured: '0' is no layer but a LayerNorm"):
        layer_map(objective)
