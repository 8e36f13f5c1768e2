"""Roots: S S^T is the loss's Hessian at the outputs, W^T W the Gauss-Newton matrix, and W v the transposed of W^T u."""

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import DataError, InputError
from hesscope.objective.losses import as_loss
from hesscope.operators.output_root import curvature_root
from hesscope.operators.root import root_of
from tests.helpers import F64, cut, randint, randn, randomized, relative_error, sequential_mlp
from tests.operators.zoo import NAMES, specimen, truth

N, C, T = 12, 4, 3
LABELS = randint(C, N, seed=2)
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.3], dtype=F64)
PARTLY = torch.where(torch.arange(N) % 4 == 1, -100, LABELS)
PROBABILITIES = randn(N, C, seed=3).softmax(1)

# name -> (loss, shape of the outputs, targets)
LOSSES = {
    "plain": (nn.CrossEntropyLoss(), (N, C), LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), (N, C), LABELS),
    "ignore_index": (nn.CrossEntropyLoss(), (N, C), PARTLY),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), (N, C), LABELS),
    "weights, smoothing": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2), (N, C), PARTLY),
    "probabilities": (nn.CrossEntropyLoss(weight=WEIGHTS), (N, C), PROBABILITIES),
    "probabilities, smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), (N, C), 2 * PROBABILITIES),
    "tokens [N, T, C]": (nn.CrossEntropyLoss(), (N, T, C), randint(C, N, T, seed=4)),
    "tokens [N, C, T]": (nn.CrossEntropyLoss(weight=WEIGHTS), (N, C, T), randint(C, N, T, seed=4)),
    "one sample": (nn.CrossEntropyLoss(), (C,), torch.tensor(2)),
    "two classes": (nn.CrossEntropyLoss(), (N, 2), LABELS % 2),
    "mse": (nn.MSELoss(), (N, C), randn(N, C, seed=5)),
    "mse, no classes": (nn.MSELoss(), (N,), randn(N, seed=5)),
    "huber": (nn.HuberLoss(delta=0.7), (N, C), randn(N, C, seed=5)),
    "logistic": (nn.BCEWithLogitsLoss(weight=WEIGHTS), (N, C), randn(N, C, seed=5).sigmoid()),
    "poisson": (nn.PoissonNLLLoss(), (N, C), randn(N, C, seed=5).exp()),
    "soft margin": (nn.SoftMarginLoss(), (N, C), randn(N, C, seed=5).sign()),
    "absolute": (nn.L1Loss(), (N, C), randn(N, C, seed=5)),
    "likelihood": (nn.NLLLoss(), (N, C), LABELS),
}


def dense_root(loss, outputs, targets):
    """S as [outputs, columns], the transposed map as [columns, outputs], and which columns live."""
    root = curvature_root(as_loss(loss), outputs, targets)
    count, size = root.live.numel(), outputs.numel()
    S = root.apply(torch.eye(count, dtype=outputs.dtype).view(count, *root.live.shape)).reshape(count, size).T
    St = root.transpose(torch.eye(size, dtype=outputs.dtype).view(size, *outputs.shape)).reshape(size, count).T
    return S, St, root.live.flatten()


def curvature(loss, outputs, targets):
    evaluate = as_loss(loss).evaluate
    size = outputs.numel()
    return torch.autograd.functional.hessian(lambda o: evaluate(o, targets).sum, outputs).reshape(size, size)


@pytest.mark.parametrize("name", LOSSES)
def test_the_root_of_the_curvature_at_the_outputs(name):
    loss, shape, targets = LOSSES[name]
    outputs = randn(*shape, seed=6)
    S, St, live = dense_root(loss, outputs, targets)
    A = curvature(loss, outputs, targets)
    assert float((S @ S.T - A).abs().max()) <= 1e-14 * float(A.abs().max())
    assert float((S - St.T).abs().max()) <= 1e-15 * float(S.abs().max())
    assert torch.equal(live, S.abs().amax(0) > 0)
    assert bool(live.any()) == (name not in ("absolute", "likelihood"))


@pytest.mark.parametrize("name", ["plain", "class weights", "smoothing", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_the_model_is_sure_of(name, dtype):
    """Where p is nearly one the weight of a term cannot be read off its curvature, which cancels."""
    loss, shape, targets = LOSSES[name]
    outputs = (12 * randn(*shape, seed=6)).to(dtype)
    S, _, _ = dense_root(loss, outputs, targets)
    A = curvature(loss, outputs.double(), targets)
    assert relative_error(S.double() @ S.double().T, A) < 100 * torch.finfo(dtype).eps


def test_the_root_grows_with_the_root_of_the_loss():
    outputs, y = randn(N, C, seed=6), randn(N, C, seed=5)
    S, _, _ = dense_root(nn.BCEWithLogitsLoss(weight=1e-14 * WEIGHTS), outputs, y.sigmoid())
    truth, _, _ = dense_root(nn.BCEWithLogitsLoss(weight=WEIGHTS), outputs, y.sigmoid())
    assert relative_error(S * 1e7, truth) < 1e-14


# --- rows of a model's root -------------------------------------------------------------------------------------------


def dense_rows(G, pieces):
    """W from pull, and from push, part by part."""
    root = root_of(G, pieces)
    pulled, pushed = [], []
    for _, part in root.parts():
        pulled.append(part.pull(torch.eye(part.rows.size, dtype=G.dtype)))
        pushed.append(part.push(torch.eye(G.shape[0], dtype=G.dtype)).T)
    return torch.cat(pulled), torch.cat(pushed), len(pulled)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [1, 3])
def test_rows_of_networks(name, pieces):
    s = specimen(name)
    W, pushed, parts = dense_rows(hs.GaussNewton(hs.Objective(s.model, "cross_entropy", s.batch)), pieces)
    assert parts == pieces
    assert relative_error(W.T @ W, truth(name, "gauss_newton")) < 1e-11
    assert relative_error(pushed, W) < 1e-11


@pytest.mark.parametrize(
    "name", ["class weights", "ignore_index", "weights, smoothing", "probabilities", "mse", "huber"]
)
@pytest.mark.parametrize("batches", ["one batch", "unequal batches"])
def test_rows_for_losses(name, batches):
    loss, _, targets = LOSSES[name]
    model, x = randomized(sequential_mlp((4, 5, C), nn.Tanh, bias=True)), randn(N, 4, seed=1)
    G = hs.GaussNewton(hs.Objective(model, loss, (x, targets) if batches == "one batch" else cut(x, targets)))
    W, pushed, _ = dense_rows(G, 2)
    assert relative_error(W.T @ W, G.dense()) < 1e-12
    assert relative_error(pushed, W) < 1e-12


def test_the_fisher_matrix_has_a_row_for_every_term():
    s = specimen("gpt2")
    W, pushed, _ = dense_rows(hs.EmpiricalFisher(hs.Objective(s.model, "cross_entropy", s.batch)), 1)
    assert len(W) == 20  # 4 sequences of 6 tokens; of each the first has no predecessor
    assert relative_error(W.T @ W, truth("gpt2", "fisher")) < 1e-11
    assert relative_error(pushed, W) < 1e-11


def test_rows_that_are_zero_are_not_counted():
    s = specimen("gpt2")
    root = root_of(hs.GaussNewton(hs.Objective(s.model, "cross_entropy", s.batch)), 2)
    survey = root.survey()
    assert sum(part.live for part in survey) == 11 * len(s.targets)
    assert sum(part.size for part in survey) == 11 * 20
    for _, part in root.parts():
        rows = part.pull(torch.eye(part.rows.size, dtype=F64))
        assert torch.equal(part.live, rows.abs().amax(1).nonzero().squeeze(1))


def test_some_parts_only():
    s = specimen("mlp")
    root = root_of(hs.GaussNewton(hs.Objective(s.model, "cross_entropy", s.batch)), 3)
    every = {number: part.pull(torch.eye(part.rows.size, dtype=F64)) for number, part in root.parts()}
    some = {number: part.pull(torch.eye(part.rows.size, dtype=F64)) for number, part in root.parts([2, 0])}
    assert list(every) == [0, 1, 2]
    assert list(some) == [0, 2]
    assert all(torch.equal(some[number], every[number]) for number in some)


def test_a_multiple_has_the_same_root():
    G = hs.GaussNewton(hs.Objective(*(lambda s: (s.model, "cross_entropy", s.batch))(specimen("mlp"))))
    root = root_of(-3.0 * G)
    assert root.operator is G
    assert root.factor == -3.0


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_matrices_without_a_root_are_refused():
    s = specimen("mlp")
    objective = hs.Objective(s.model, "cross_entropy", s.batch)
    for matrix in (
        hs.Hessian(objective),
        hs.as_operator(torch.eye(3)),
        hs.Hessian(objective) - hs.GaussNewton(objective),
    ):
        with pytest.raises(InputError, match=r"needs a root of the matrix, which a hesscope\.GaussNewton has, got"):
            root_of(matrix)


def test_negative_curvature_is_refused():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=F64))
    with pytest.raises(InputError, match=r"CrossEntropyLoss at the outputs is negative \(smallest -1\)"):
        curvature_root(as_loss(loss), randn(N, C, seed=6), LABELS)


def test_curvature_that_is_not_finite_is_refused():
    with pytest.raises(DataError, match="PoissonNLLLoss at the outputs is not finite"):
        curvature_root(as_loss(nn.PoissonNLLLoss()), torch.full((N, C), 1e4, dtype=F64), randn(N, C, seed=5).exp())
