"""The residual part R = H - G by its own formula, against automatic differentiation and against MATH.md, section 2."""

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.estimate.split import split_energies
from hesscope.operators import Operator
from hesscope.operators.closed_form import mlp, strips
from tests.helpers import (
    CUT,
    F64,
    cut,
    randint,
    randn,
    reference_gauss_newton,
    reference_hessian,
    relative_error,
    residual_and_curvature,
)
from tests.operators.closed_form.networks import WIDTHS, N, objective, sequential

LAYERS = {1: (5, 4), 2: (5, 6, 4), 3: (5, 6, 3, 4), 4: (5, 3, 7, 2, 4)}
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=F64)
LOSSES = {
    "labels": nn.CrossEntropyLoss(),
    "weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=2),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "weights, smoothing": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.2),
    "probabilities": nn.CrossEntropyLoss(),
    "mse": nn.MSELoss(),
}


def targets_of(loss, classes=4):
    if loss == "mse":
        return randn(N, classes, seed=3)
    if loss == "probabilities":
        return torch.softmax(randn(N, classes, seed=3), dim=1)
    return randint(classes, N, seed=2)


def residual(obj):
    return hs.Hessian(obj) - hs.GaussNewton(obj)


def truth(model, criterion, x, y):
    """Dense Hessian minus dense Gauss-Newton matrix, both by automatic differentiation."""
    return reference_hessian(model, criterion, x, y) - reference_gauss_newton(model, criterion, x, y)


def every_sample_picked(monkeypatch):
    """Let also small products leave out the samples that do not count."""
    monkeypatch.setattr(mlp, "LARGE_PRODUCT", 1)


CASES = [(layers, loss) for layers in LAYERS for loss in LOSSES if layers == 3 or loss in ("labels", "mse")]


@pytest.mark.parametrize(("layers", "loss"), CASES)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_equals_automatic_differentiation(monkeypatch, layers, loss, activation):
    model, x, y = sequential(LAYERS[layers], activation), randn(N, 5, seed=1), targets_of(loss)
    R = residual(hs.Objective(model, LOSSES[loss], cut(x, y)))
    dense = R.dense()
    assert R.has_closed_form
    assert torch.equal(dense, dense.T)
    if layers == 1:
        assert not dense.any()
        return
    expected = truth(model, LOSSES[loss], x, y)
    assert relative_error(dense, expected) < 1e-12
    sizes = [sum(p.numel() for p in module.parameters()) for module in model if isinstance(module, nn.Linear)]
    for number, (start, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
        own = dense[start : start + size, start : start + size]
        assert bool(own.any()) == (activation != "relu" and number < layers - 1)
    every_sample_picked(monkeypatch)
    assert relative_error(R.dense(), expected) < 1e-12


@pytest.mark.parametrize("tile", [5000, 2**28])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("widths", ["linear, many classes", "two hidden", "two hidden, many classes"])
def test_all_parts_with_samples_left_out(monkeypatch, widths, activation, tile):
    every_sample_picked(monkeypatch)
    monkeypatch.setattr(strips, "TILE_BYTES", tile)
    obj = objective(WIDTHS[widths], activation=activation)
    H, G = hs.Hessian(obj), hs.GaussNewton(obj)
    for operator in (H, G) if len(WIDTHS[widths]) == 2 else (H, G, H - G):
        assert relative_error(operator.dense(), Operator.dense(operator)) < 1e-12


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_wide_layers(loss):
    """300 inputs and 70 classes: halved symmetric blocks, several pieces of classes, samples left out as it happens."""
    obj = objective((300, 4, 70), loss, "relu")
    H, G = hs.Hessian(obj), hs.GaussNewton(obj)
    for operator in (H, G, H - G):
        assert relative_error(operator.dense(), Operator.dense(operator)) < 1e-12


def test_neurons_that_no_sample_reaches(monkeypatch):
    every_sample_picked(monkeypatch)
    obj = objective((5, 3, 4), activation="relu")
    with torch.no_grad():
        obj.model[0].bias[1] = -100.0
    H, G = hs.Hessian(obj), hs.GaussNewton(obj)
    for operator in (H, G, H - G):
        dense = operator.dense()
        assert relative_error(dense, Operator.dense(operator)) < 1e-12
        assert not dense[5:10].any()


# --- one hidden layer, sample by sample -------------------------------------------------------------------------------

ACTIVATION = {
    "relu": (lambda z: (z > 0) * z, lambda z: (z > 0) * 1.0, lambda z: 0 * z),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2, lambda z: -2 * np.tanh(z) * (1 - np.tanh(z) ** 2)),
}


def one_hidden(W, V, X, e, A, activation):
    """G and R of o = V s(W x), block by block as MATH.md, section 2 writes them, summed over the samples."""
    (m, d), C = W.shape, len(V)
    s, slope, bend = ACTIVATION[activation]
    parts = np.zeros((2, m * d + C * m, m * d + C * m))
    G, R = parts
    w = [slice(i * d, (i + 1) * d) for i in range(m)]
    v = [slice(m * d + a * m, m * d + (a + 1) * m) for a in range(C)]
    for n, x in enumerate(X):
        z = W @ x
        h = s(z)
        middle, AV = V.T @ A[n] @ V, A[n] @ V
        for i in range(m):
            for j in range(m):
                G[w[i], w[j]] += middle[i, j] * slope(z[i]) * slope(z[j]) * np.outer(x, x)
            R[w[i], w[i]] += (V.T @ e[n])[i] * bend(z[i]) * np.outer(x, x)
            unit = np.eye(m)[i]
            for a in range(C):
                G[w[i], v[a]] += slope(z[i]) * AV[a, i] * np.outer(x, h)
                R[w[i], v[a]] += slope(z[i]) * e[n, a] * np.outer(x, unit)
        for a in range(C):
            for b in range(C):
                G[v[a], v[b]] += A[n, a, b] * np.outer(h, h)
    for part in parts:
        part[m * d :, : m * d] = part[: m * d, m * d :].T
    return parts / len(X)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", ACTIVATION)
def test_one_hidden_layer_as_in_the_paper(activation, loss):
    obj = objective((5, 3, 4), loss, activation, bias=False)
    x, y = samples(loss)
    W, V = (layer.weight.detach().numpy() for layer in (obj.model[0], obj.model[2]))
    e, A = residual_and_curvature(loss, obj.model(torch.from_numpy(x)).detach().numpy(), y)
    G, R = one_hidden(W, V, x, e, A, activation)
    assert relative_error(hs.GaussNewton(obj).dense(), G) < 1e-12
    assert relative_error(residual(obj).dense(), R) < 1e-12


def samples(loss):
    """What `objective` draws."""
    x = randn(N, 5, seed=1)
    return x.numpy(), (randn(N, 4, seed=3) if loss == "mse" else randint(4, N, seed=2)).numpy()


# --- small residuals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATION)
def test_a_residual_of_1e_6(activation):
    """Mean squared error, targets 1e-6 from the outputs."""
    model, x = sequential((5, 3, 4), activation, bias=False), randn(N, 5, seed=1)
    y = model(x).detach() + 1e-6 * randn(N, 4, seed=3)
    e, A = residual_and_curvature("mse", model(x).detach().numpy(), y.numpy())
    W, V = (layer.weight.detach().numpy() for layer in (model[0], model[2]))
    _, R = one_hidden(W, V, x.numpy(), e, A, activation)
    assert np.abs(R).max() < 1e-5
    assert relative_error(residual(hs.Objective(model, "mse", (x, y))).dense(), R) < 1e-9


def test_a_residual_of_1e_9_that_is_known_exactly():
    """Whole numbers, so that outputs have no rounding: also the closed forms' difference loses what R itself keeps."""
    model, x = sequential((5, 3, 4), "relu", bias=False), torch.round(2 * randn(N, 5, seed=1))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.round(5 * layer.weight))
    outputs, e = model(x).detach(), 2.0**-30 * torch.round(3 * randn(N, 4, seed=3))
    assert torch.equal(outputs, outputs.round())
    W, V = (layer.weight.detach().numpy() for layer in (model[0], model[2]))
    _, R = one_hidden(W, V, x.numpy(), e.numpy() / 2, np.zeros((N, 4, 4)), "relu")
    obj = hs.Objective(model, "mse", (x, outputs - e))
    operator, partition = residual(obj), hs.Partition.by_layer(model)
    assert relative_error(operator.dense(), R) < 1e-14
    expected = np.sum(R[:15, 15:] ** 2) * (1 - np.eye(2))
    assert relative_error(hs.block_energies(operator, partition).values, expected) < 1e-14
    assert relative_error(split_energies(obj, partition).parts["R"].values, expected) < 1e-14
    assert relative_error(hs.Hessian(obj).dense() - hs.GaussNewton(obj).dense(), R) > 1e-9


def test_a_residual_of_1e_12():
    """Cross-entropy, certain and right: p - 1 at the label has lost digits that the other classes' p still have."""
    model, x = sequential((5, 3, 4), "relu", bias=False), randn(N, 5, seed=1)
    with torch.no_grad():
        model[2].weight *= 200
    outputs = model(x).detach().numpy()
    y = outputs.argmax(axis=1)
    p = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    certain = np.sort(outputs, axis=1)[:, -1] - np.sort(outputs, axis=1)[:, -2] > 25
    x, y, p = x[torch.from_numpy(certain)], y[certain], p[certain]
    e = p / p.sum(axis=1, keepdims=True)
    e[np.arange(len(y)), y] = 0
    e[np.arange(len(y)), y] = -e.sum(axis=1)
    assert len(y) >= 3
    assert 0 < np.abs(e).max() < 1e-10
    W, V = (layer.weight.detach().numpy() for layer in (model[0], model[2]))
    _, R = one_hidden(W, V, x.numpy(), e, np.zeros((len(y), 4, 4)), "relu")
    obj = hs.Objective(model, "cross_entropy", (x, torch.from_numpy(y)))
    assert relative_error(residual(obj).dense(), R) < 1e-9
    assert relative_error(truth(model, nn.CrossEntropyLoss(), x, torch.from_numpy(y)), R) > 1e-9


# --- the operator -----------------------------------------------------------------------------------------------------


def test_products_and_multiples():
    obj = objective((5, 6, 4))
    H, G = hs.Hessian(obj), hs.GaussNewton(obj)
    R, v = H - G, randn(H.shape[0], seed=7)
    dense = R.dense()
    assert R.dense_engine == "residual part: closed form"
    assert R.data_fingerprint == obj.data_fingerprint
    assert relative_error(R @ v, dense @ v) < 1e-12
    for combined, factor in ((2 * R, 2), (-R, -1), (G - H, -1), (R + G - H + R, 1)):
        assert relative_error(combined.dense(), factor * dense) < 1e-12


def test_matrices_of_two_objectives_are_subtracted():
    first, second = objective((5, 6, 4)), objective((5, 6, 4), activation="relu")
    difference = hs.Hessian(first) - hs.GaussNewton(second)
    expected = hs.Hessian(first).dense() - hs.GaussNewton(second).dense()
    assert relative_error(difference.dense(), expected) < 1e-13


def test_networks_without_a_closed_form():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = randn(N, 5, seed=1), randint(4, N, seed=2)
    R = residual(hs.Objective(model, "cross_entropy", cut(x, y, CUT)))
    assert not R.has_closed_form
    assert relative_error(R.dense(), truth(model, nn.CrossEntropyLoss(), x, y)) < 1e-12
    with pytest.raises(hs.HesscopeError, match="strips need a closed form"):
        next(R.strips())
