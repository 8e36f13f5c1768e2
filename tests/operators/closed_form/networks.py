"""Networks and data that the tests of the closed form share."""

from itertools import pairwise

import torch
from torch import nn

import hesscope as hs
from tests.helpers import F64, cut, randint, randn

N = 12
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "softplus": nn.Softplus}

# Widths by what is special about them; classes more or fewer than the inputs of their layer take different ways.
WIDTHS = {
    "linear": (5, 4),
    "linear, many classes": (3, 9),
    "one hidden": (5, 6, 4),
    "one hidden, many classes": (5, 3, 9),
    "two hidden": (5, 6, 3, 4),
    "two hidden, many classes": (5, 3, 2, 9),
    "three hidden": (5, 3, 7, 2, 4),
}


def sequential(widths, activation="tanh", bias=True):
    torch.manual_seed(0)
    layers = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias, dtype=F64), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def objective(widths, loss="cross_entropy", activation="tanh", bias=True, batches=None):
    """Objective of a network on N random samples in several batches."""
    X, labels, targets = randn(N, widths[0], seed=1), randint(widths[-1], N, seed=2), randn(N, widths[-1], seed=3)
    y = targets if loss == "mse" else labels
    data = cut(X, y) if batches is None else cut(X, y, batches)
    return hs.Objective(sequential(widths, activation, bias), loss, data)
