"""L, its gradient and its number of terms: PyTorch's own mean loss, however the data is cut and handed over."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import hesscope as hs
from hesscope.core.errors import InputError
from tests.helpers import (
    CUT,
    F64,
    IGNORED,
    build,
    call_flat,
    cut,
    flat_parameters,
    inputs_for,
    randint,
    randn,
    relative_error,
    same,
    snapshot,
)

N, C = 12, 3
X, LABELS = inputs_for("gelu, bias", N), randint(C, N, seed=2)
WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=F64)
SOME_IGNORED = LABELS.clone().index_fill(0, torch.arange(N)[IGNORED], -100)


def reference(model, criterion, y):
    """Value and gradient of the criterion on all samples at once."""
    theta = flat_parameters(model).requires_grad_()
    loss = criterion(call_flat(model, theta, X), y)
    return loss.item(), torch.autograd.grad(loss, theta)[0]


# loss argument, PyTorch's criterion, targets, number of terms
LOSSES = {
    "cross_entropy": ("cross_entropy", nn.CrossEntropyLoss(), LABELS, N),
    "mse": ("mse", nn.MSELoss(), randn(N, C, seed=3), N),
    "module": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), LABELS, N),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(), LABELS, N),
    "ignore_index": ("cross_entropy", nn.CrossEntropyLoss(), SOME_IGNORED, N - 2),
    "class weights": (
        nn.CrossEntropyLoss(weight=WEIGHTS),
        nn.CrossEntropyLoss(weight=WEIGHTS),
        LABELS,
        pytest.approx(float(WEIGHTS[LABELS].sum())),
    ),
    "label smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        SOME_IGNORED,
        N - 2,
    ),
    "probabilities": ("cross_entropy", nn.CrossEntropyLoss(), randn(N, C, seed=4).softmax(1), N),
    "one-hot": ("mse", nn.MSELoss(), functional.one_hot(LABELS, C).to(F64), N),
    "L1": (nn.L1Loss(), nn.L1Loss(), randn(N, C, seed=3), N),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("arrange", [lambda x, y: (x, y), cut], ids=["one batch", "5 batches"])
def test_value_gradient_and_terms_are_those_of_the_mean(name, arrange):
    loss, criterion, y, terms = LOSSES[name]
    model = build("gelu, bias")
    obj = hs.Objective(model, loss, arrange(X, y))
    value, gradient = reference(model, criterion, y)
    assert obj.num_terms == terms
    assert obj.value() == pytest.approx(value, rel=1e-13)
    assert relative_error(obj.gradient(), gradient) < 1e-12


def test_nll_takes_log_probabilities():
    model = nn.Sequential(build("gelu, bias"), nn.LogSoftmax(dim=1))
    nll = hs.Objective(model, nn.NLLLoss(weight=WEIGHTS), cut(X, LABELS))
    cross_entropy = hs.Objective(model[0], nn.CrossEntropyLoss(weight=WEIGHTS), (X, LABELS))
    assert nll.num_terms == cross_entropy.num_terms
    assert nll.value() == pytest.approx(cross_entropy.value(), rel=1e-13)


class NamedInputs(nn.Module):
    """The same network for batches that name their inputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, scale=None):
        return self.model(features if scale is None else features * scale)


def loader(batch_size):
    return DataLoader(TensorDataset(X, LABELS), batch_size=batch_size, shuffle=False)


ARRANGEMENTS = {
    "tuple": lambda: (X, LABELS),
    "list of one": lambda: [(X, LABELS)],
    "list of lists": lambda: [[X[:7], LABELS[:7]], [X[7:], LABELS[7:]]],
    "5 unequal batches": lambda: cut(X, LABELS),
    "with an empty batch": lambda: [(X[:0], LABELS[:0]), (X, LABELS)],
    "loader": lambda: loader(12),
    "loader with a smaller last batch": lambda: loader(5),
    "dict": lambda: {"features": X, "labels": LABELS},
    "list of dicts": lambda: [{"features": x, "targets": y} for x, y in cut(X, LABELS)],
    "dict of inputs, then labels": lambda: [({"features": x}, y) for x, y in cut(X, LABELS)],
    "two inputs": lambda: [(x / 2, 2 * torch.ones(1, dtype=F64), y) for x, y in cut(X, LABELS)],
    "int32 labels": lambda: (X, LABELS.int()),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_how_the_data_is_handed_over_changes_nothing(name):
    model = NamedInputs(build("gelu, bias"))
    value, gradient = reference(model, nn.CrossEntropyLoss(), LABELS)
    obj = hs.Objective(model, "cross_entropy", ARRANGEMENTS[name]())
    assert obj.num_terms == N
    assert obj.value() == pytest.approx(value, rel=1e-13)
    assert relative_error(obj.gradient(), gradient) < 1e-12


def test_number_of_batches():
    assert hs.Objective(build("linear"), "cross_entropy", cut(X, LABELS)).num_batches == len(CUT)


def test_fingerprint_tells_data_apart():
    def fingerprint(x, y):
        return hs.Objective(build("linear"), "cross_entropy", (x, y)).data_fingerprint

    moved = X.clone()
    moved[3, 1] += 1e-12
    assert fingerprint(X, LABELS) == fingerprint(X.clone(), LABELS.clone())
    assert len({fingerprint(X, LABELS), fingerprint(moved, LABELS), fingerprint(X, (LABELS + 1) % C)}) == 3


def test_value_follows_the_current_parameters():
    model = build("gelu, bias")
    obj = hs.Objective(model, "cross_entropy", cut(X, LABELS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert obj.value() == pytest.approx(reference(model, nn.CrossEntropyLoss(), LABELS)[0], rel=1e-13)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_switched_off(mode):
    model = build("gelu, bias")
    value, gradient = reference(model, nn.CrossEntropyLoss(), LABELS)
    with mode():
        obj = hs.Objective(model, "cross_entropy", cut(X, LABELS))
        assert obj.value() == pytest.approx(value, rel=1e-13)
        assert relative_error(obj.gradient().clone(), gradient) < 1e-12


def test_loss_callable():
    def weighted(model, batch):
        x, y = batch
        return (functional.cross_entropy(model(x), y, reduction="none") * x[:, 0].abs()).sum(), float(
            x[:, 0].abs().sum()
        )

    model = build("gelu, bias")
    theta = flat_parameters(model).requires_grad_()
    terms = functional.cross_entropy(call_flat(model, theta, X), LABELS, reduction="none")
    truth = (terms * X[:, 0].abs()).sum() / X[:, 0].abs().sum()
    obj = hs.Objective(model, weighted, cut(X, LABELS))
    assert obj.num_terms == pytest.approx(float(X[:, 0].abs().sum()))
    assert obj.value() == pytest.approx(truth.item(), rel=1e-13)
    assert relative_error(obj.gradient(), torch.autograd.grad(truth, theta)[0]) < 1e-12


def test_loss_callable_sees_the_batch_as_it_came():
    def of_dict(model, batch):
        return functional.cross_entropy(model(batch["features"]), batch["anything"], reduction="sum"), len(
            batch["anything"]
        )

    model = NamedInputs(build("gelu, bias"))
    obj = hs.Objective(model, of_dict, [{"features": x, "anything": y} for x, y in cut(X, LABELS)])
    assert obj.value() == pytest.approx(reference(model, nn.CrossEntropyLoss(), LABELS)[0], rel=1e-13)


# --- classes on an inner axis -----------------------------------------------------------------------------------------


def test_dense_prediction_has_classes_on_axis_1():
    """Segmentation: logits [N, C, H, W], labels [N, H, W]; one term per pixel."""
    model = build_pixelwise()
    images, labels = randn(4, 1, 3, 5, seed=6), randint(C, 4, 3, 5, seed=7)
    labels[0, 0, :2] = -100
    obj = hs.Objective(model, "cross_entropy", [(images[:1], labels[:1]), (images[1:], labels[1:])])
    assert obj.num_terms == 4 * 15 - 2
    assert obj.value() == pytest.approx(functional.cross_entropy(model(images), labels).item(), rel=1e-13)


def build_pixelwise():
    return nn.Conv2d(1, C, 1).double()


def test_token_logits_have_classes_on_the_last_axis():
    model, x, labels = nn.Linear(4, C).double(), randn(4, 5, 4, seed=6), randint(C, 4, 5, seed=7)
    obj = hs.Objective(model, "cross_entropy", [(x[:1], labels[:1]), (x[1:], labels[1:])])
    assert obj.num_terms == 20
    assert obj.value() == pytest.approx(
        functional.cross_entropy(model(x).flatten(0, 1), labels.flatten()).item(), rel=1e-13
    )


# --- the same function elsewhere --------------------------------------------------------------------------------------


def test_at_other_parameters_it_is_the_same_function():
    model = build("gelu, bias")
    obj = hs.Objective(model, nn.CrossEntropyLoss(weight=WEIGHTS), cut(X, LABELS))
    before, value = snapshot(model), obj.value()
    theta = flat_parameters(model) + 0.3 * randn(obj.parameters.size, seed=9)
    moved = obj.at(theta)
    loss = nn.CrossEntropyLoss(weight=WEIGHTS)(call_flat(model, theta, X), LABELS)
    gradient = torch.autograd.grad(
        nn.CrossEntropyLoss(weight=WEIGHTS)(call_flat(model, theta.requires_grad_(), X), LABELS), theta
    )[0]
    assert moved.value() == pytest.approx(loss.item(), rel=1e-13)
    assert relative_error(moved.gradient(), gradient) < 1e-12
    assert torch.equal(flat_parameters(moved.model), theta)
    assert same(snapshot(model), before) and obj.value() == value
    assert moved.model is not model and moved.parameters == obj.parameters
    assert (moved.num_terms, moved.data_fingerprint) == (obj.num_terms, obj.data_fingerprint)


def test_at_is_a_copy_of_its_own():
    """Neither follows the other, nor the vector; what has been found out about one is not told to the other."""
    model = build("gelu, bias")
    obj = hs.Objective(model, "cross_entropy", (X, LABELS))
    theta = flat_parameters(model) * 1.5
    moved = obj.at(theta)
    value = moved.value()
    theta.zero_()
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    assert moved.value() == value
    with moved.evaluating() as (point, batches):
        index, batch = next(iter(batches))
        moved.pieces(point, batch, index, 2)
    moved.symmetric.add("anything")
    assert not obj._independent and "anything" not in obj.symmetric
    assert obj.value() != value


def test_at_of_a_restriction_keeps_the_other_parameters():
    model = build("gelu, bias")
    view = hs.Objective(model, "cross_entropy", (X, LABELS)).restricted(["2.weight"])
    moved = view.at(torch.zeros(view.parameters.size, dtype=F64))
    truth = dict(model.named_parameters()) | {"2.weight": torch.zeros_like(model[2].weight)}
    outputs = torch.func.functional_call(model, truth, (X,))
    assert moved.value() == pytest.approx(functional.cross_entropy(outputs, LABELS).item(), rel=1e-13)
    assert moved.gradient().shape == (view.parameters.size,)


def test_at_keeps_parameters_tied():
    model = Tied().double()
    obj = hs.Objective(model, "cross_entropy", (X, LABELS % 2))
    theta = randn(obj.parameters.size, seed=4)
    moved = obj.at(theta)
    assert moved.model.second.weight is moved.model.first.weight
    assert moved.value() == pytest.approx(
        functional.cross_entropy(call_flat(model, theta, X), LABELS % 2).item(), rel=1e-13
    )


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))[:, :2]


def test_at_refuses_vectors_of_another_length():
    obj = hs.Objective(build("linear"), "cross_entropy", (X, LABELS))
    with pytest.raises(InputError, match=r"unflatten needs a vector of shape \(12,\), got \(11,\)"):
        obj.at(torch.zeros(11, dtype=F64))
