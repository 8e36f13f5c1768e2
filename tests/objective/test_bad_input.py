"""Whatever cannot be measured is refused before work starts, in one line that names the argument or the batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import hesscope as hs
from hesscope.core.errors import DataError, HesscopeError, InputError, ModelError
from tests.helpers import F64, cut, randint, randn

N, C = 12, 3
X, Y, Z = randn(N, 4, seed=1), randint(C, N, seed=2), randn(N, C, seed=3)
BATCHES = cut(X, Y)


def model():
    return nn.Linear(4, C, dtype=F64)


def with_batch(number, x=None, y=None):
    """The 5 batches, one of them changed."""
    batches = list(BATCHES)
    old_x, old_y = batches[number]
    batches[number] = (old_x if x is None else x(old_x), old_y if y is None else y(old_y))
    return batches


def one_entry(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


class Changing:
    """Can be read again, but one batch then differs."""

    def __init__(self, number):
        self.number, self.passes = number, 0

    def __iter__(self):
        self.passes += 1
        changed = with_batch(self.number, x=lambda x: x + self.passes)
        return iter(changed)


class Exhausted:
    """Can be read again, but is empty then."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(BATCHES if self.passes == 1 else [])


def generator():
    yield from BATCHES


DATA = {
    "label too large": (with_batch(2, y=one_entry(7)), DataError, r"batch 2: targets must lie in \[0, 3\), found 7"),
    "label negative": (with_batch(3, y=one_entry(-1)), DataError, r"batch 3: targets must lie in \[0, 3\), found -1"),
    "nan": (with_batch(3, x=one_entry(torch.nan)), DataError, "the loss is nan on batch 3; it must be finite"),
    "nan in the first": (with_batch(0, x=one_entry(torch.nan)), DataError, "the loss is nan on batch 0"),
    "inf": (with_batch(1, x=one_entry(torch.inf)), DataError, "the loss is (nan|inf) on batch 1"),
    "nothing": ([], DataError, "data is empty: it gave no batch"),
    "empty loader": (DataLoader(TensorDataset(X[:0], Y[:0])), DataError, "data is empty: it gave no batch"),
    "no samples": ([(X[:0], Y[:0])], DataError, "data has no loss terms: all 1 batches are empty, ignored"),
    "all ignored": ((X, torch.full_like(Y, -100)), DataError, "data has no loss terms"),
    "iterator": (iter(BATCHES), InputError, "an iterator that can be read only once; pass list"),
    "generator": (generator(), InputError, "an iterator that can be read only once"),
    "list of tensors": (
        [X, Y],
        InputError,
        r"entry 0 is a Tensor; one batch of inputs and targets is a tuple \(x, y\)",
    ),
    "batch of text": ([BATCHES[0], "xy"], InputError, "entry 1 is a str"),
    "tensor": (X, InputError, r"data must be \(x, y\) tensors, a list of batches or a DataLoader, got Tensor"),
    "number": (3, InputError, "got int"),
    "data set": (TensorDataset(X, Y), InputError, "got TensorDataset; wrap the data set in a DataLoader"),
    "inputs only": ((X,), DataError, r"batch 0 must be \(inputs, targets\) or a dict, got tuple of length 1"),
    "loader of inputs only": (DataLoader(X), DataError, r"batch 0 must be \(inputs, targets\) or a dict, got Tensor"),
    "dict without targets": ({"input": X, "z": Y}, DataError, "one of the keys labels, .* its keys are input, z"),
    "dict with two targets": ({"input": X, "y": Y, "labels": Y}, DataError, "its keys are input, y, labels"),
    "targets no tensor": ((X, Y.tolist()), DataError, "the targets of batch 0 must be a tensor, got list"),
    "labels of wrong length": (
        with_batch(1, y=lambda y: y[:2]),
        DataError,
        r"batch 1: class labels must have shape \(4,\)",
    ),
    "labels as column": (
        (X, Y[:, None]),
        DataError,
        r"must have shape \(12,\) to fit logits of shape \(12, 3\), got \(12, 1\)",
    ),
    "labels as floats": (
        (X, Y.double()),
        DataError,
        r"must be integer class labels of shape \(12,\) or probabilities of",
    ),
    "inputs of wrong width": (with_batch(4, x=lambda x: x[:, :2]), ModelError, "failed on batch 4: mat1 and mat2"),
    "inputs of wrong dtype": ((X.float(), Y), ModelError, "the model or its loss failed on batch 0: .*dtype"),
    "other data": (Changing(2), DataError, "different data on a second pass, first in batch 2; use shuffle=False"),
    "exhausted": (Exhausted(), DataError, "the loader gave 5 batches on the first pass and 0 on the second"),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data(name):
    data, error, message = DATA[name]
    with pytest.raises(error, match=message) as caught:
        hs.Objective(model(), "cross_entropy", data)
    assert "\n" not in str(caught.value)


def test_a_shuffling_loader():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match=r"different data on a second pass, first in batch 0; use shuffle=False"):
        hs.Objective(model(), "cross_entropy", loader)


LOSSES = {
    "unknown name": (
        "crossentropy",
        InputError,
        "loss must be one of 'cross_entropy', 'mse', got 'crossentropy', did you mean 'cross_e",
    ),
    "far name": ("zzz", InputError, "got 'zzz'$"),
    "number": (3, InputError, "loss must be 'cross_entropy', 'mse', a torch loss module or a callable.*, got int"),
    "unknown module": (
        nn.KLDivLoss(reduction="sum"),
        InputError,
        "loss module KLDivLoss is not known to be a mean over samples",
    ),
    "module that is no loss": (nn.ReLU(), InputError, "ReLU is not known to be a mean over samples; pass a callable"),
    "no reduction": (
        nn.CrossEntropyLoss(reduction="none"),
        InputError,
        "must have reduction 'mean' or 'sum', got 'none'",
    ),
    "labels for mse": (
        "mse",
        DataError,
        r"batch 0: MSELoss compares .* \(12, 3\) and the targets \(12,\); class labels must be one-hot",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_bad_losses(name):
    loss, error, message = LOSSES[name]
    with pytest.raises(error, match=message):
        hs.Objective(model(), loss, (X, Y))


def test_mse_does_not_broadcast():
    batches = cut(X, Z)
    batches[2] = (batches[2][0], batches[2][1][:, :1])
    with pytest.raises(
        DataError, match=r"batch 2: MSELoss compares entry by entry, but .* \(2, 3\) and the targets \(2, 1\)$"
    ):
        hs.Objective(model(), "mse", batches)


def test_nll_takes_no_probabilities():
    with pytest.raises(DataError, match=r"targets must be integer class labels"):
        hs.Objective(model(), nn.NLLLoss(), (X, Z.softmax(dim=1)))


def summed(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


RETURNS = {
    "no tuple": (
        lambda m, b: summed(m, b),
        InputError,
        r"must return \(sum of the loss terms, number of terms\), got Tensor",
    ),
    "three": (lambda m, b: (summed(m, b), 1, 2), InputError, "got tuple of length 3"),
    "no tensor": (lambda m, b: (summed(m, b).item(), 4), InputError, "the loss sum must be a tensor.* got float"),
    "vector": (lambda m, b: (m(b[0]).sum(dim=1), 4), DataError, r"must be a scalar.*; got a tensor of shape \(12,\)"),
    "negative number": (lambda m, b: (summed(m, b), -1), InputError, "must be finite and not negative, got -1.0"),
    "nan number": (lambda m, b: (summed(m, b), float("nan")), InputError, "must be finite and not negative, got nan"),
    "no terms": (lambda m, b: (summed(m, b), 0), DataError, "data has no loss terms"),
    "constant": (lambda m, b: (torch.tensor(1.0), 4), ModelError, "does not depend on any trainable parameter"),
    "infinite": (lambda m, b: (summed(m, b) / 0, 4), DataError, "the loss is inf on batch 0"),
    "exception": (lambda m, b: ({}["key"], 4), ModelError, "the model or its loss failed on batch 0: 'key'"),
}


@pytest.mark.parametrize("name", RETURNS)
def test_bad_loss_callables(name):
    loss, error, message = RETURNS[name]
    with pytest.raises(error, match=message):
        hs.Objective(model(), loss, (X, Y))


class AlwaysDropping(nn.Linear):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5, training=True)


class Tuples(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Failing(nn.Linear):
    def forward(self, x):
        raise ValueError("two\nlines")


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


MODELS = {
    "random": (AlwaysDropping, "the model is random in eval mode: two forward passes on batch 0 differ"),
    "tuple": (Tuples, "must return a tensor or an object with .logits, got tuple"),
    "failing": (Failing, "the model or its loss failed on batch 0: two lines$"),
    "detached": (Detached, "the loss does not depend on any trainable parameter"),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(name):
    kind, message = MODELS[name]
    with pytest.raises(ModelError, match=message):
        hs.Objective(kind(4, C, dtype=F64), "cross_entropy", (X, Y))


def test_a_random_loss_callable():
    with pytest.raises(ModelError, match=r"random in eval mode"):
        hs.Objective(model(), lambda m, batch: (summed(m, batch) * torch.rand(()), N), (X, Y))


def test_no_trainable_parameter():
    for nothing in (model().requires_grad_(False), nn.ReLU()):
        with pytest.raises(ModelError, match=r"has no trainable parameter"):
            hs.Objective(nothing, "cross_entropy", (X, Y))


def test_no_module():
    with pytest.raises(InputError, match=r"model must be a torch.nn.Module, got function"):
        hs.Objective(lambda x: x, "cross_entropy", (X, Y))


def test_every_refusal_is_a_hesscope_error():
    assert all(issubclass(error, HesscopeError) for error in (DataError, InputError, ModelError))
