"""Hessians that need no autodiff (MATH.md, section 2), written out in NumPy, against the operators."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import hesscope as hs
from tests.helpers import cut, linear_hessian, one_hidden_blocks, randint, randn, relative_error

N, d, m, C = 12, 4, 5, 3
X = randn(N, d, seed=1)
TARGETS = {"cross_entropy": randint(C, N, seed=2), "mse": randn(N, C, seed=3)}


@pytest.fixture(params=["cross_entropy", "mse"])
def loss(request):
    return request.param


@pytest.fixture(params=["relu", "tanh"])
def activation(request):
    return request.param


def linear_objective(loss):
    return hs.Objective(hs.models.linear(d, C, seed=5, dtype=torch.float64), loss, cut(X, TARGETS[loss]))


def test_linear_regression_and_softmax_regression(loss):
    obj = linear_objective(loss)
    truth = linear_hessian(obj.model.fc1.weight.detach().numpy(), X.numpy(), TARGETS[loss].numpy(), loss)
    assert relative_error(hs.Hessian(obj).dense(), truth) < 1e-12
    assert relative_error(hs.GaussNewton(obj).dense(), truth) < 1e-12


def off_diagonal_classes(H, width):
    """The entries of H that couple different classes."""
    classes = np.arange(H.shape[0]) // width
    return H[classes[:, None] != classes[None, :]]


def test_squared_error_of_a_linear_model_is_exactly_block_diagonal():
    H = hs.Hessian(linear_objective("mse")).dense().numpy()
    assert np.all(off_diagonal_classes(H, d) == 0.0)
    assert np.any(off_diagonal_classes(hs.Hessian(linear_objective("cross_entropy")).dense().numpy(), d) != 0.0)


@dataclass(frozen=True)
class Measured:
    H: np.ndarray
    G: np.ndarray
    R: np.ndarray


def measure(activation, loss):
    model = hs.models.one_hidden(d, m, C, activation=activation, seed=7, dtype=torch.float64)
    obj = hs.Objective(model, loss, cut(X, TARGETS[loss]))
    H, G = hs.Hessian(obj), hs.GaussNewton(obj)
    found = Measured(*(matrix.dense().numpy() for matrix in (H, G, H - G)))
    W, V = model.fc1.weight.detach().numpy(), model.fc2.weight.detach().numpy()
    return found, one_hidden_blocks(W, V, X.numpy(), TARGETS[loss].numpy(), activation, loss)


w, v = slice(0, m * d), slice(m * d, m * d + C * m)


def test_one_hidden_layer_gauss_newton(activation, loss):
    found, truth = measure(activation, loss)
    assert relative_error(found.G[w, w], truth.G_ww) < 1e-12
    assert relative_error(found.G[v, v], truth.G_vv) < 1e-12
    assert relative_error(found.G[w, v], truth.G_wv) < 1e-12


def test_one_hidden_layer_residual_part(activation, loss):
    """The stripes of [D]: one column per block of R_wv, which training erases."""
    found, truth = measure(activation, loss)
    assert relative_error(found.R[w, v], truth.R_wv) < 1e-12
    scale = np.abs(truth.R_wv).max()
    assert np.abs(found.R[w, w] - truth.R_ww).max() < 1e-12 * scale
    assert np.abs(found.R[v, v] - truth.R_vv).max() < 1e-12 * scale
    stripes = found.R[w, v].reshape(m, d, C, m)
    outside = stripes[np.broadcast_to(~np.eye(m, dtype=bool)[:, None, None, :], stripes.shape)]
    assert np.abs(outside).max() < 1e-12 * scale


def test_one_hidden_layer_hessian(activation, loss):
    found, truth = measure(activation, loss)
    assert relative_error(found.H[w, w], truth.G_ww + truth.R_ww) < 1e-12
    assert relative_error(found.H[w, v], truth.G_wv + truth.R_wv) < 1e-12
    assert relative_error(found.H[v, v], truth.G_vv) < 1e-12


def test_squared_error_makes_the_output_layer_exactly_block_diagonal(activation):
    found, _ = measure(activation, "mse")
    assert np.all(off_diagonal_classes(found.H[v, v], m) == 0.0)
    assert np.all(off_diagonal_classes(found.G[v, v], m) == 0.0)
