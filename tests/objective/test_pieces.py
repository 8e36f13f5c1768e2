"""Batches cut by their samples: the pieces add up to the whole, or there are none."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import hesscope as hs
from hesscope.objective.batches import tensors_in
from hesscope.objective.pieces import cut
from hesscope.operators import Operator
from tests.helpers import F64, build, inputs_for, randint, randn, randomized, relative_error
from tests.operators import zoo

CLASSES = 3


def plain(samples):
    return build("tanh"), (inputs_for("tanh", samples), randint(CLASSES, samples, seed=2))


class Named(nn.Linear):
    """Takes inputs by name, one of them shared by all samples."""

    def forward(self, x, shift, scale):
        return super().forward(x * scale + shift)


def by_name(samples):
    batch = {
        "x": randn(samples, 4, seed=1),
        "shift": randn(1, 4, seed=2),
        "scale": torch.tensor(0.7, dtype=torch.float64),
        "labels": randint(CLASSES, samples, seed=3),
    }
    return randomized(Named(4, CLASSES)), batch


class Flat(nn.Linear):
    """Sequences [N, T, 4] -> logits [N * T, C]."""

    def forward(self, x):
        return torch.tanh(super().forward(x)).flatten(0, 1)


def flattened(samples):
    return randomized(Flat(4, CLASSES)), (randn(samples, 5, 4, seed=1), randint(CLASSES, samples * 5, seed=2))


def language_model(samples):
    found = zoo.specimen("gpt2")
    ids = randint(zoo.VOCABULARY, samples, zoo.CONTEXT, seed=4)
    labels = torch.where(randint(4, samples, zoo.CONTEXT, seed=5) == 0, -100, ids)
    return found.model, {"input_ids": ids, "labels": labels}


INDEPENDENT = {"tuple": plain, "dict": by_name, "flattened labels": flattened, "tokens": language_model}


@pytest.mark.parametrize("count", [2, 4, 100])
@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("case", INDEPENDENT)
def test_pieces_add_up(case, samples, count):
    model, batch = INDEPENDENT[case](samples)
    objective = hs.Objective(model, "cross_entropy", batch)
    with objective.evaluating() as (theta, batches):
        (index, moved), *_ = batches
        pieces = objective.pieces(theta, moved, index, count)
        assert len(pieces) == min(count, samples)
        results = [objective.evaluate(theta, piece, index) for piece in pieces]
        whole = objective.evaluate(theta, moved, index)
        assert sum(float(result.sum.detach()) for result in results) == pytest.approx(float(whole.sum.detach()))
        assert sum(result.terms for result in results) == whole.terms
        lengths = [min(t.shape[0] for t in tensors_in(piece) if t.ndim and t.shape[0] > 0) for piece in pieces]
    if case != "dict":  # where one entry is shared by all
        assert max(lengths) - min(lengths) <= 1


class Centred(nn.Module):
    """Mixes samples: in groups of so many, or all."""

    def __init__(self, group):
        super().__init__()
        self.first, self.last, self.group = nn.Linear(4, 5), nn.Linear(5, CLASSES), group

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(torch.cat([part - part.mean(0) for part in h.split(self.group)]))


class Graph(nn.Linear):
    """Sums over the edges [2, E] of a graph."""

    def forward(self, x, edges):
        source, target = edges
        return torch.tanh(super().forward(x + torch.zeros_like(x).index_add(0, target, x[source])))


class Fixed(nn.Linear):
    """Knows how many samples there are."""

    def forward(self, x):
        return torch.tanh(super().forward(x.view(8, 4)))


class Bag(nn.Linear):
    """Adds a context of five vectors, which are no samples, to each."""

    def forward(self, x, context):
        return torch.tanh(super().forward(x + context.sum(0)))


X, Y = randn(8, 4, seed=1), randint(CLASSES, 8, seed=2)
DEPENDENT = {
    "mean over the batch": (lambda: Centred(8), (X, Y)),
    "groups of four": (lambda: Centred(4), (X, Y)),
    "pairs": (lambda: Centred(2), (X[:4], Y[:4])),
    "graph": (lambda: Graph(4, CLASSES), (X, randint(8, 2, 20, seed=3), Y)),
    "fixed size": (lambda: Fixed(4, CLASSES), (X, Y)),
    "context": (lambda: Bag(4, CLASSES), (X, randn(5, 4, seed=4), Y)),
    "context of a divisor": (lambda: Bag(4, CLASSES), (X, randn(2, 4, seed=4), Y)),
}


@pytest.mark.parametrize("case", DEPENDENT)
def test_samples_that_are_not_independent_are_not_cut(case):
    make, batch = DEPENDENT[case]
    objective = hs.Objective(randomized(make()), "cross_entropy", batch)
    with objective.evaluating() as (theta, batches):
        (index, moved), *_ = batches
        assert objective.pieces(theta, moved, index, 4) == [moved]


@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
@pytest.mark.parametrize("engine", ["auto", "linearize", "forward_over_reverse"])
@pytest.mark.parametrize("case", DEPENDENT)
def test_streamed_products_of_such_models_are_right(case, engine, matrix):
    make, batch = DEPENDENT[case]
    objective = hs.Objective(randomized(make()), "cross_entropy", batch)
    truth = Operator.dense(matrix(objective, "double_backward"))
    V = randn(len(truth), 2, seed=5)
    for memory in (0, 10_000):
        assert relative_error(matrix(objective, engine, memory=memory) @ V, truth @ V) < 1e-10


def test_callables_are_not_cut():
    """What they do with a batch is not known."""

    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    objective = hs.Objective(randomized(nn.Linear(4, CLASSES)), loss, (X, Y))
    with objective.evaluating() as (theta, batches):
        (index, moved), *_ = batches
        assert objective.pieces(theta, moved, index, 2) == [moved]


def test_groups_that_fit_the_cut_are_cut():
    """Two halves of four are independent; quarters of two are not. Each cut is tested by itself."""
    objective = hs.Objective(randomized(Centred(4)), "cross_entropy", (X, Y))
    with objective.evaluating() as (theta, batches):
        (index, moved), *_ = batches
        assert [len(objective.pieces(theta, moved, index, count)) for count in (2, 4, 2)] == [2, 1, 2]


@pytest.mark.parametrize(("samples", "count", "sizes"), [(5, 2, [2, 3]), (7, 4, [2, 2, 1, 2]), (3, 9, [1, 1, 1])])
def test_odd_numbers(samples, count, sizes):
    x, y = torch.arange(samples), torch.arange(2 * samples)
    pieces = cut((x, y), count)
    assert [len(piece[0]) for piece in pieces] == sizes
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), x)
    assert torch.equal(torch.cat([piece[1] for piece in pieces]), y)


class CentredInside(torch.nn.Module):
    """Its samples depend on each other, which a batch of one sample does not show."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, 5, dtype=F64), torch.nn.Linear(5, 3, dtype=F64)

    def forward(self, x):
        z = torch.tanh(self.inner(x))
        return self.outer(z - z.mean(0, keepdim=True))


@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
def test_a_first_batch_of_one_sample_proves_nothing_about_the_others(matrix):
    batches = [(randn(n, 4, seed=n), randint(3, n, seed=n + 1)) for n in (1, 60)]
    objective = hs.Objective(randomized(CentredInside()), "cross_entropy", batches)
    v = randn(objective.parameters.size, seed=3)
    truth = matrix(objective) @ v
    assert relative_error(matrix(objective, memory=0) @ v, truth) < 1e-10
    assert relative_error(matrix(objective, memory=2000) @ v, truth) < 1e-10
