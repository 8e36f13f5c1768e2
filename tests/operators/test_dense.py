"""Hessian and Gauss-Newton matrix against PyTorch's own derivatives of an independently written loss."""

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.operators import Operator, operator
from tests.helpers import (
    F64,
    IGNORED,
    MODELS,
    build,
    cut,
    inputs_for,
    randint,
    randn,
    reference_gauss_newton,
    reference_hessian,
    relative_error,
)

N, C = 12, 3
LABELS = randint(C, N, seed=2)
WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=F64)


def partly_ignored():
    """Labels of which one batch is ignored as a whole, and one sample of another."""
    labels = LABELS.clone()
    labels[IGNORED] = -100
    labels[8] = -100
    return labels


# name -> (torch criterion, targets)
LOSSES = {
    "plain": (nn.CrossEntropyLoss(), LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS),
    "ignore_index": (nn.CrossEntropyLoss(), partly_ignored()),
    "weights and ignore_index 1": (nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1), LABELS),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), LABELS),
    "weights and smoothing": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2), LABELS),
    "probabilities": (nn.CrossEntropyLoss(), randn(N, C, seed=3).softmax(dim=1)),
    "squared error": (nn.MSELoss(), randn(N, C, seed=4)),
    "smooth L1": (nn.SmoothL1Loss(beta=0.7), randn(N, C, seed=4)),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), randn(N, C, seed=4).sigmoid()),
}

CASES = [(model, loss) for model in MODELS for loss in ("plain", "squared error")]
CASES += [("tanh", loss) for loss in LOSSES if loss not in ("plain", "squared error")]


@pytest.fixture(params=["one batch", "5 unequal batches"])
def arrange(request):
    return (lambda x, y: (x, y)) if request.param == "one batch" else cut


@pytest.mark.parametrize(("model_name", "loss_name"), CASES)
def test_hessian_is_that_of_the_mean_loss(model_name, loss_name, arrange):
    model, x = build(model_name), inputs_for(model_name, N)
    criterion, y = LOSSES[loss_name]
    hessian = hs.Hessian(hs.Objective(model, criterion, arrange(x, y)))
    for H in (hessian.dense(), Operator.dense(hessian)):  # in closed form where there is one, and by products
        assert relative_error(H, reference_hessian(model, criterion, x, y)) < 1e-10
        assert torch.equal(H, H.T)


@pytest.mark.parametrize(("model_name", "loss_name"), CASES)
def test_gauss_newton_is_jacobian_curvature_jacobian(model_name, loss_name, arrange):
    model, x = build(model_name), inputs_for(model_name, N)
    criterion, y = LOSSES[loss_name]
    gauss_newton = hs.GaussNewton(hs.Objective(model, criterion, arrange(x, y)))
    for G in (gauss_newton.dense(), Operator.dense(gauss_newton)):
        assert relative_error(G, reference_gauss_newton(model, criterion, x, y)) < 1e-10
        assert torch.equal(G, G.T)
        eigenvalues = torch.linalg.eigvalsh(G)
        assert eigenvalues.min() > -1e-12 * eigenvalues.max()


def test_a_batch_may_be_ignored_as_a_whole():
    assert (partly_ignored()[IGNORED] == -100).all()
    x = inputs_for("tanh", N)
    assert hs.Objective(build("tanh"), "cross_entropy", cut(x, partly_ignored())).num_terms == N - 3


def test_a_sum_is_studied_through_its_mean():
    model, x = build("tanh"), inputs_for("tanh", N)
    H = hs.Hessian(hs.Objective(model, nn.CrossEntropyLoss(reduction="sum"), cut(x, LABELS))).dense()
    assert relative_error(H, reference_hessian(model, nn.CrossEntropyLoss(), x, LABELS)) < 1e-10


@pytest.mark.parametrize("loss", ["plain", "squared error"])
def test_hessian_of_a_linear_model_is_its_gauss_newton_matrix(loss):
    criterion, y = LOSSES[loss]
    obj = hs.Objective(build("linear"), criterion, cut(inputs_for("linear", N), y))
    assert relative_error(hs.Hessian(obj).dense(), hs.GaussNewton(obj).dense()) < 1e-14


def test_a_model_in_training_mode_is_measured_with_its_running_statistics():
    model, x = build("conv, batch norm"), inputs_for("conv, batch norm", N)
    truth = reference_hessian(model, nn.CrossEntropyLoss(), x, LABELS)
    H = hs.Hessian(hs.Objective(model.train(), "cross_entropy", (x, LABELS))).dense()
    assert relative_error(H, truth) < 1e-10


def test_float32_keeps_its_dtype_and_is_close():
    model, x = build("tanh"), inputs_for("tanh", N)
    truth = reference_hessian(model, nn.CrossEntropyLoss(), x, LABELS)
    H = hs.Hessian(hs.Objective(model.float(), "cross_entropy", (x.float(), LABELS))).dense()
    assert H.dtype == torch.float32
    assert relative_error(H, truth) < 1e-5


@pytest.mark.parametrize("size", [3, 4, 5, 13])
def test_symmetrizing_tile_by_tile_is_the_mean_with_the_transpose(size, monkeypatch):
    monkeypatch.setattr(operator, "SYMMETRIZE_TILE", 4)
    M = randn(size, size, seed=size)
    truth = (M + M.T) / 2
    assert torch.equal(operator.symmetrize_(M), truth)
