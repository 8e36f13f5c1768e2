"""The stability limit is where PyTorch's own SGD on a quadratic begins to diverge."""

import math

import pytest
import torch
from torch import nn

from hesscope.dynamics.optimizers import learning_rate, stability_limit
from tests.helpers import F64

ETA = 0.05
NEAR = 0.003  # so far below and above the limit

KINDS = {
    "plain": {},
    "decay": {"weight_decay": 3.0},
    "momentum": {"momentum": 0.5},
    "strong momentum": {"momentum": 0.9},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 20.0},
    "Nesterov": {"momentum": 0.5, "nesterov": True},
    "strong Nesterov": {"momentum": 0.9, "nesterov": True},
    "Nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 8.0},
}


def two_parameters():
    return [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]


@pytest.mark.parametrize("kind", KINDS)
def test_sgd_diverges_beyond_the_limit_only(kind):
    x = nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = torch.optim.SGD([x], lr=ETA, foreach=False, **KINDS[kind])
    curvatures = stability_limit(optimizer, ETA) * torch.tensor([1 - NEAR, 1 + NEAR], dtype=F64)
    for _ in range(3000):
        x.grad = curvatures * x.detach()
        optimizer.step()
    below, above = x.detach().abs().tolist()
    assert below < 1e-6
    assert above > 1e6


def test_equal_groups_count_as_one():
    first, second = two_parameters()
    groups = [{"params": [first]}, {"params": [second]}]
    assert stability_limit(torch.optim.SGD(groups, lr=ETA, momentum=0.5), ETA) == pytest.approx(3 / ETA)


UNKNOWN = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=ETA),
    "groups differ": lambda groups: torch.optim.SGD([groups[0], {**groups[1], "momentum": 0.9}], lr=ETA),
    "ascent": lambda groups: torch.optim.SGD(groups, lr=ETA, maximize=True),
    "dampening": lambda groups: torch.optim.SGD(groups, lr=ETA, momentum=0.9, dampening=0.5),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_has_no_limit(kind):
    optimizer = UNKNOWN[kind]([{"params": [parameter]} for parameter in two_parameters()])
    assert learning_rate(optimizer) == ETA
    assert math.isnan(stability_limit(optimizer, ETA))


def test_unknown_learning_rates():
    first, second = two_parameters()
    differing = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.1}], lr=ETA)
    own = torch.optim.SGD([first], lr=ETA)
    own.param_groups[0]["lr"] = None  # as of optimizers that find their own (Adafactor)
    for optimizer in (differing, own):
        assert math.isnan(learning_rate(optimizer))
        assert math.isnan(stability_limit(optimizer, learning_rate(optimizer)))
    tensor = torch.optim.SGD([first], lr=torch.tensor(0.25), foreach=False)
    assert learning_rate(tensor) == 0.25
