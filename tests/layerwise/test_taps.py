"""What a layer's matrix is multiplied with: unfolded patches times the matrix are the layer's outputs."""

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.layerwise.layers import layers_of
from hesscope.layerwise.taps import pieces
from tests.helpers import randint, randn, randomized

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 2},
    "stride and dilation": {"kernel_size": (2, 3), "stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (0, 1), "padding_mode": "replicate", "bias": False},
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_patches_times_the_matrix_are_the_outputs(case):
    x, convolution = randn(5, 2, 7, 6, seed=1), nn.Conv2d(2, 3, **CONVOLUTIONS[case])
    features = convolution.double()(x)[0].numel()
    model = randomized(nn.Sequential(convolution, nn.Flatten(), nn.Linear(features, 4)), 2)
    objective = hs.Objective(model, "cross_entropy", (x, randint(4, 5, seed=2)))
    layer, _ = layers_of(objective)
    W = layer.matricized(torch.cat([p.detach().flatten() for p in model[0].parameters()]))
    seen = 0
    for piece in pieces(objective, [layer]):
        patches = piece.inputs(layer)
        if layer.bias:
            patches = torch.cat([patches, torch.ones_like(patches[..., :1])], 2)
        made = model[0](x[seen : seen + piece.samples]).flatten(2).mT
        assert torch.allclose(patches @ W.T, made, rtol=1e-12, atol=1e-13)
        seen += piece.samples
    assert seen == len(x)


def test_images_laid_out_channels_last_are_read_alike():
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 4)))
    x, y = randn(5, 2, 4, 4, seed=1), randint(4, 5, seed=2)
    plain = hs.layerwise.kronecker_factors(hs.Objective(model, "cross_entropy", (x, y)), "0")
    last = x.to(memory_format=torch.channels_last)
    other = hs.layerwise.kronecker_factors(hs.Objective(model, "cross_entropy", (last, y)), "0")
    assert other.input == pytest.approx(plain.input, rel=1e-12)
    assert other.output == pytest.approx(plain.output, rel=1e-12, abs=1e-15)
