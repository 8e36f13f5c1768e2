"""Priors: every form of the network before training, and what would make a prior depend on the data."""

import copy

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.layerwise.prior import prior_vector
from tests.helpers import F64, randint, randn, randomized


def net(seed=0):
    return randomized(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), seed)


def normalized(seed=0):
    return randomized(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)), seed)


def objective(model):
    return hs.Objective(model, "cross_entropy", (randn(30, 4, seed=1), randint(2, 30, seed=2)))


def vector_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def refused(model, prior, message):
    """By the public function, in one line, before any work."""
    calls = []
    with pytest.raises(InputError, match=message) as error:
        hs.pac_bayes_bound(objective(model), prior, progress=lambda *given: calls.append(given))
    assert "\n" not in str(error.value)
    assert not calls


@pytest.mark.parametrize(
    "form",
    [
        lambda model: model,
        lambda model: model.state_dict(),
        lambda model: dict(reversed(list(model.named_parameters()))),
        lambda model: {name: tensor.float().double() for name, tensor in model.state_dict().items()},
        vector_of,
    ],
    ids=["module", "state dict", "parameters in another order", "copies", "vector"],
)
def test_forms(form):
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.float())  # so that the copies by way of float32 are exact
    found = prior_vector(objective(net(1)), form(model))
    assert torch.equal(found, vector_of(model))
    assert not found.requires_grad


def test_other_dtypes_are_cast():
    model = net()
    found = prior_vector(objective(net(1)), copy.deepcopy(model).float())
    assert found.dtype == F64
    assert torch.equal(found, vector_of(model).float().double())


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (lambda model: model, "its '0.weight' is the trained network's own tensor .* pass a copy made before training"),
        (lambda model: model.state_dict(), "state_dict.. shares memory with the network"),
        (lambda model: {**net(1).state_dict(), "2.bias": model[2].bias}, "its '2.bias' is the trained network's own"),
        (lambda model: {**net(1).state_dict(), "2.bias": model[2].bias[:]}, "its '2.bias' is the trained network's"),
        (copy.deepcopy, "it equals the trained network; pass the network as it was before training"),
        (lambda model: copy.deepcopy(model.state_dict()), "it equals the trained network"),
        (vector_of, "it equals the trained network"),
    ],
    ids=["itself", "state dict", "one tensor", "a view", "deep copy", "copied state dict", "copied vector"],
)
def test_the_trained_network_is_no_prior(prior, message):
    model = net()
    refused(model, prior(model), "prior depends on the data: .*" + message)


def test_a_half_precision_copy_of_the_trained_network_is_no_prior():
    """Rounded to fewer digits it is as dependent as before."""
    model = net()
    for dtype in (torch.float32, torch.bfloat16):
        refused(model, copy.deepcopy(model).to(dtype), "prior depends on the data: it equals the trained network")


def without(name):
    return {key: value for key, value in net(1).state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (without("2.weight"), r"prior lacks the parameter '2.weight'; it has 0.weight, 0.bias, 2.bias"),
        ({}, "prior lacks the parameter '0.weight'; it has none"),
        ({**without(""), "3.weight": torch.zeros(2)}, "prior has '3.weight', which the network has not"),
        (nn.Sequential(*net(1), nn.Linear(2, 2)), "prior has '3.bias', which the network has not"),
        ({**without(""), "0.bias": torch.zeros(4)}, r"prior has '0.bias' of shape \[4\], the network of \[3\]"),
        ({**without(""), "0.bias": torch.zeros(1)}, r"prior has '0.bias' of shape \[1\], the network of \[3\]"),
        (torch.zeros(22), r"prior has shape \[22\], the network has 23 trainable parameters"),
        (torch.zeros(23, 1), r"prior has shape \[23, 1\], the network has 23"),
        (torch.zeros(23, dtype=torch.int64), "prior must be of floating-point numbers, got torch.int64"),
        (torch.full((23,), torch.nan), "prior has entries that are not finite"),
        ({**without(""), "0.bias": torch.full((3,), torch.inf)}, "prior has entries that are not finite"),
        (
            {**without(""), "0.bias": torch.zeros(3, dtype=torch.int64)},
            "prior's '0.bias' must be of floating-point numbers, got torch.int64",
        ),
        (None, "prior must be the network at initialization, its state dict or a vector .*, got NoneType"),
        ([0.0] * 23, "prior must be the network at initialization, .* got list"),
        ({"0.weight": 1.0}, "prior must be the network at initialization, .* got dict"),
    ],
)
def test_what_does_not_fit(prior, message):
    refused(net(), prior, message)


def test_running_statistics_that_have_seen_the_data():
    before = normalized()
    model = copy.deepcopy(before)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(prior_vector(objective(model), before), vector_of(before))
    assert torch.equal(prior_vector(objective(model), before.state_dict()), vector_of(before))
    model.train()(randn(30, 4, seed=1))
    for prior in (before, before.state_dict()):
        refused(model, prior, "'1.running_mean' has changed since the prior, .*running statistics of a batch norm")


def test_running_statistics_must_be_given():
    model, before = normalized(), normalized(1)
    for prior in (dict(before.named_parameters()), vector_of(before)):
        refused(
            model,
            prior,
            "prior does not say what '1.running_mean', which is not among the trained parameters, was before the data",
        )


def test_frozen_parameters():
    before = net()
    model = copy.deepcopy(before)
    with torch.no_grad():
        model[2].weight.add_(1)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    kept = torch.cat([p.detach().flatten() for p in before[2].parameters()])
    assert torch.equal(prior_vector(objective(model), before), kept)
    given = {name: p for name, p in before.named_parameters() if name.startswith("2.")}
    for prior in (kept, given):  # what was frozen may have been trained before
        refused(model, prior, "prior does not say what '0.weight', which is not among the trained parameters, was")
    with torch.no_grad():
        model[0].weight.add_(1)
    refused(model, before, "'0.weight' has changed since the prior, but is not among the trained parameters")


def test_tied_parameters():
    """They count once, and the prior may name them once or twice."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model, before = randomized(Tied(), 1), randomized(Tied(), 2)
    for prior in (before, before.state_dict(), dict(before.named_parameters())):
        assert torch.equal(prior_vector(objective(model), prior), vector_of(before))
    refused(model, model, "its 'a.weight' is the trained network's own tensor")


def test_the_trained_network_up_to_rounding():
    model = net()
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter))
    for prior in (copy.deepcopy(trained).bfloat16().to(torch.float64), vector_of(trained) * (1 + 1e-6)):
        refused(trained, prior, "prior depends on the data: it equals the trained network")
    further = vector_of(trained) * 1.02
    assert torch.equal(prior_vector(objective(trained), further), further)
