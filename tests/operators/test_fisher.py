"""The empirical Fisher matrix: the mean of outer products of per-term gradients, and what it is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.operators import Operator
from tests.helpers import F64, cut, randint, randn, randomized, relative_error, sequential_mlp

N, C, T = 12, 3, 4
X, LABELS = randn(N, 4, seed=1), randint(C, N, seed=2)
WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=F64)
PARTLY = torch.where(torch.arange(N) % 4 == 1, -100, LABELS)
ENGINES = ["auto", "double_backward", "linearize", "forward_over_reverse"]


def network(outputs=C):
    return randomized(sequential_mlp((4, 5, outputs), nn.Tanh, bias=True))


def term_gradients(model, losses):
    """[terms, P] gradients, one backward pass for each loss term."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def outer(model, losses, terms):
    gradients = term_gradients(model, losses)
    return gradients.T @ gradients / terms


# name -> (loss, targets, total of the terms); the terms are torch's own with reduction="none".
CLASSES = {
    "plain": (nn.CrossEntropyLoss(), LABELS, N),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS, float(WEIGHTS[LABELS].sum())),
    "ignore_index": (nn.CrossEntropyLoss(), PARTLY, int((PARTLY >= 0).sum())),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), LABELS, N),
    "weights and smoothing": (
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
        LABELS,
        float(WEIGHTS[LABELS].sum()),
    ),
    "probabilities": (nn.CrossEntropyLoss(), randn(N, C, seed=3).softmax(1), N),
}


def unreduced(loss):
    return nn.CrossEntropyLoss(
        weight=loss.weight, ignore_index=loss.ignore_index, label_smoothing=loss.label_smoothing, reduction="none"
    )


@pytest.mark.parametrize("case", CLASSES)
@pytest.mark.parametrize("batches", ["one batch", "unequal batches"])
def test_cross_entropy(case, batches):
    loss, targets, terms = CLASSES[case]
    model = network()
    truth = outer(model, unreduced(loss)(model(X), targets), terms)
    data = (X, targets) if batches == "one batch" else cut(X, targets)
    objective = hs.Objective(model, loss, data)
    assert objective.num_terms == pytest.approx(terms)
    F = hs.EmpiricalFisher(objective)
    assert relative_error(F.dense(), truth) < 1e-12
    assert torch.linalg.eigvalsh(F.dense()).min() > -1e-14 * truth.norm()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("memory", [None, 0])
def test_every_engine(engine, memory):
    model = network()
    truth = outer(model, functional.cross_entropy(model(X), LABELS, reduction="none"), N)
    F = hs.EmpiricalFisher(hs.Objective(model, "cross_entropy", cut(X, LABELS)), engine, memory=memory)
    V = randn(len(truth), 8, seed=4)
    for columns in (1, 8):
        assert relative_error(F @ V[:, :columns], truth @ V[:, :columns]) < 1e-11


@pytest.mark.parametrize("layout", ["[N, T, C]", "[N, C, T]"])
def test_tokens(layout):
    """A term is a token, wherever the classes are."""
    x, y = randn(N, T, 4, seed=5), randint(C, N, T, seed=6)
    y[2, 1:] = -100

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = sequential_mlp((4, 5, C), nn.Tanh, bias=True)

        def forward(self, x):
            return self.inner(x) if layout == "[N, T, C]" else self.inner(x).transpose(1, 2)

    model = randomized(Tokens())
    losses = functional.cross_entropy(model.inner(x).flatten(0, 1), y.flatten(), reduction="none")
    truth = outer(model, losses, int((y >= 0).sum()))
    F = hs.EmpiricalFisher(hs.Objective(model, "cross_entropy", (x, y)))
    assert relative_error(F.dense(), truth) < 1e-12
    by_sample = outer(model, losses.view(N, T).sum(1), int((y >= 0).sum()))
    assert relative_error(by_sample, truth) > 0.1  # another matrix altogether


@pytest.mark.parametrize("shape", [(N, C), (N,), (N, 2, C)])
def test_squared_error(shape):
    """A term is a sample, its loss the mean over the sample's entries."""

    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = sequential_mlp((4, 5, max(1, torch.Size(shape[1:]).numel())), nn.Tanh, bias=True)

        def forward(self, x):
            return self.inner(x).view(len(x), *shape[1:])

    model, y = randomized(Shaped()), randn(*shape, seed=7)
    losses = ((model(X) - y) ** 2).reshape(N, -1).mean(1)
    F = hs.EmpiricalFisher(hs.Objective(model, "mse", (X, y)))
    assert relative_error(F.dense(), outer(model, losses, N)) < 1e-12


def test_it_is_the_gauss_newton_matrix_only_over_the_model_s_own_labels():
    """The mean over labels drawn from the model is the Fisher information, which is G; with the data's it is not."""
    model = network()
    probabilities = model(X).softmax(1).detach()
    G = hs.GaussNewton(hs.Objective(model, "cross_entropy", (X, LABELS))).dense()
    expected = torch.zeros_like(G)
    for n in range(N):
        for c in range(C):
            label = torch.tensor([c])
            F = hs.EmpiricalFisher(hs.Objective(model, "cross_entropy", (X[n : n + 1], label)))
            expected += probabilities[n, c] * Operator.dense(F) / N
    assert relative_error(expected, G) < 1e-11
    F = hs.EmpiricalFisher(hs.Objective(model, "cross_entropy", (X, LABELS))).dense()
    assert relative_error(F, G) > 0.3


def test_it_has_no_closed_form_of_another_matrix():
    """Fully connected networks have formulas for H and G, not for this one."""
    model = network()
    F = hs.EmpiricalFisher(hs.Objective(model, "cross_entropy", (X, LABELS)))
    truth = outer(model, functional.cross_entropy(model(X), LABELS, reduction="none"), N)
    assert relative_error(F.dense(), truth) < 1e-12
    energies = hs.block_energies(F, hs.Partition.by_tensor(model))
    positions = [slice(0, 20), slice(20, 25), slice(25, 40), slice(40, 43)]
    exact = torch.tensor([[float(truth[a, b].square().sum()) for b in positions] for a in positions], dtype=F64)
    assert relative_error(energies.values, exact) < 1e-10


def test_a_loss_callable_has_no_terms_to_be_seen():
    def summed(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    with pytest.raises(InputError, match="the empirical Fisher matrix needs the loss as a function of the model's out"):
        hs.EmpiricalFisher(hs.Objective(network(), summed, (X, LABELS)))
