"""A measurement leaves the model and the world exactly as they were, also when it fails."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import ModelError
from tests.helpers import F64, cut, randint, randn, same, snapshot

N = 12
X, Y = randn(N, 4, seed=1), randint(3, N, seed=2)


class Untidy(nn.Module):
    """Draws random numbers, counts its calls in buffers (in place and anew) and fails when told to."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(4, 5),
            nn.BatchNorm1d(5),
            nn.Dropout(0.5),
            nn.Linear(5, 3),
        )
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("history", torch.zeros(2))
        self.failing = False

    def forward(self, x):
        self.calls += 1
        self.history = self.history + 1
        random.random(), np.random.rand(), torch.rand(1)
        if self.failing:
            raise RuntimeError("told to fail")
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def untidy():
    """In training mode but for two submodules, with some gradients set."""
    model = Untidy().double().train()
    model.norm.eval()
    model.drop.eval()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    return model


def probe(obj):
    return randn(obj.parameters.size, 2, seed=3)


MEASUREMENTS = {
    "value": lambda obj: obj.value(),
    "gradient": lambda obj: obj.gradient(),
    "Hessian": lambda obj: hs.Hessian(obj) @ probe(obj),
    "Gauss-Newton": lambda obj: hs.GaussNewton(obj) @ probe(obj),
    "dense": lambda obj: hs.Hessian(obj).dense(),
    "energies": lambda obj: hs.block_energies(hs.Hessian(obj), hs.Partition.by_tensor(obj.model), "probes", probes=2),
}


def test_construction_leaves_no_trace():
    model = untidy()
    before = snapshot(model)
    hs.Objective(model, "cross_entropy", cut(X, Y))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_leave_no_trace(name):
    model = untidy()
    obj = hs.Objective(model, "cross_entropy", cut(X, Y))
    before = snapshot(model)
    MEASUREMENTS[name](obj)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_failing_measurements_leave_no_trace(name):
    model = untidy()
    obj = hs.Objective(model, "cross_entropy", cut(X, Y))
    model.failing = True
    before = snapshot(model)
    with pytest.raises((RuntimeError, hs.HesscopeError), match="told to fail"):
        MEASUREMENTS[name](obj)
    assert same(before, snapshot(model))


def test_failing_construction_leaves_no_trace():
    model = untidy()
    model.failing = True
    before = snapshot(model)
    with pytest.raises(ModelError, match="the model or its loss failed on batch 0: told to fail"):
        hs.Objective(model, "cross_entropy", cut(X, Y))
    assert same(before, snapshot(model))


def test_a_loop_left_early_leaves_no_trace():
    model = untidy()
    obj = hs.Objective(model, "cross_entropy", cut(X, Y))
    before = snapshot(model)
    with contextlib.suppress(KeyError), obj.evaluating() as (theta, batches):
        obj.evaluate(theta, next(batches)[1], 0)
        raise KeyError
    assert same(before, snapshot(model))


def test_the_snapshot_sees_changes():
    """The measuring instrument itself: each kind of trace is found."""
    changes = {
        "modes": lambda m: m.norm.train(),
        "parameters": lambda m: m.last.bias.data.add_(1e-12),
        "gradients": lambda m: m.first.weight.grad.add_(1e-12),
        "buffers": lambda m: m.norm.running_mean.add_(1e-12),
        "python": lambda m: random.random(),
        "numpy": lambda m: np.random.rand(),
        "torch": lambda m: torch.rand(1),
    }
    for kind, change in changes.items():
        model = untidy()
        before = snapshot(model)
        change(model)
        after = snapshot(model)
        assert not same(before[kind], after[kind]), kind


def test_a_custom_train_method_is_respected():
    """Models that keep their batch norm frozen override train(); their modes, too, come back."""

    class Frozen(Untidy):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    model = Frozen().double().train()
    before = snapshot(model)
    hs.Objective(model, "cross_entropy", (X, Y)).value()
    assert model.training and not model.norm.training
    assert same(before, snapshot(model))


def test_objective_does_not_depend_on_the_mode_it_finds():
    model = untidy()
    in_training = hs.Objective(model, "cross_entropy", (X, Y)).value()
    assert hs.Objective(model.eval(), "cross_entropy", (X, Y)).value() == in_training


def test_inputs_that_require_grad_get_none():
    x = X.clone().requires_grad_()
    obj = hs.Objective(nn.Linear(4, 3, dtype=F64), "cross_entropy", (x, Y))
    obj.gradient()
    assert x.grad is None
