"""Tracking changes nothing: with and without a tracker the same seeds give bit for bit the same training."""

import contextlib
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesscope as hs
from hesscope.core.errors import DataError
from hesscope.dynamics import Adaptive, Eigenvalues, Tracker
from hesscope.dynamics.adapters import hugging_face_callback, lightning_callback
from hesscope.dynamics.measures import MEASURES, measure
from tests.dynamics.trainers import (
    TOKENS,
    batches_of,
    hugging_face_trainer,
    lightning_trainer,
    lightning_warns,
    tiny_gpt2,
    wrapped_in_lightning,
)
from tests.helpers import randint, randn, same, snapshot

UPDATES = 6
CHEAP = (Eigenvalues(k=1, rtol=0.1),)
X, Y = randn(24, 4, seed=1).float(), randint(3, 24, seed=2)
HELD_OUT = (randn(20, 4, seed=3).float(), randint(3, 20, seed=4))


class Net(nn.Module):
    """Batch norm and dropout, one of each in eval mode; a buffer that forwards count in; frozen and unused tensors."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm, self.still = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        self.drop, self.off = nn.Dropout(0.3), nn.Dropout(0.3)
        self.last, self.unused = nn.Linear(5, 3), nn.Linear(2, 2)
        self.first.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        h = self.still(self.drop(torch.tanh(self.norm(self.first(x)))))
        return self.last(self.off(h))


def train_mode(model):
    model.train()
    model.still.eval(), model.off.eval()


def objective_of(model):
    """On a loader, each pass over which draws from PyTorch's generator."""
    return hs.Objective(model, "cross_entropy", DataLoader(TensorDataset(*HELD_OUT), batch_size=10))


def tracker_of(model, optimizer, **options):
    options = {"at": 1, "measures": CHEAP, **options}
    return Tracker(objective_of(model), hs.Partition.by_tensor(model), optimizer=optimizer, **options)


def seeded():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


def state_of(model, optimizer):
    """Everything that training goes on with, in a form that two runs can be compared by."""
    found = snapshot(model)
    found["parameters"] = {name: (value, grad) for name, (_, value, grad) in found["parameters"].items()}
    found["buffers"] = {name: value for name, (_, value) in found["buffers"].items()}
    moments = {f"{n} {key}": value for n, own in optimizer.state_dict()["state"].items() for key, value in own.items()}
    return {**found, "moments": {k: v.clone() if torch.is_tensor(v) else v for k, v in moments.items()}}


PLACES = ("before", "without gradients", "half precision", "graph held", "gradients held")
# Where there has been no forward yet, which moves the running statistics.
BEFORE = ("before", "without gradients")


def train(place="before", **options):
    """States after every backward of a loop that draws from all generators and at its end, and the tracker.

    place: where in the loop the tracker is called; options: of the tracker, none without a tracker.
    """
    seeded()
    model = Net()
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=0.05)
    tracker = tracker_of(model, optimizer, **options) if options else None
    train_mode(model)
    states, steps = {}, itertools.count()
    loader = batches_of(X, Y)

    def call(here, step):
        if tracker is not None and place == here:
            with contextlib.suppress(DataError):
                tracker(step)

    for _ in range(2):
        for x, y in loader:
            step = next(steps)
            call("before", step)
            with torch.no_grad():
                call("without gradients", step)
            x = x + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.1 * torch.randn(x.shape)
            with torch.autocast("cpu", torch.bfloat16):
                call("half precision", step)
                loss = nn.functional.cross_entropy(model(x), y)
                call("graph held", step)
            loss.backward()
            call("gradients held", step)
            states[step] = state_of(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    states[UPDATES] = state_of(model, optimizer)
    return states, tracker


AT = (0, 1, 3)


@pytest.fixture(scope="module")
def untracked():
    return train()[0]


@pytest.fixture
def late(monkeypatch):
    """A budget that is enough at every third step only: what waits is measured there, at other parameters."""
    monkeypatch.setattr(Tracker, "_affordable", lambda self, reserve: self._called % 3 == 2)


def measured_of(tracker):
    found = tracker.trajectory.snapshots
    return {s.step: (s.value, s.gradient_norm, s.mean_squared_residual, s.accuracy, s.sharpness) for s in found}


@pytest.fixture(scope="module")
def measured():
    return measured_of(train(at=AT)[1])


def test_the_loop_is_one_that_a_tracker_could_disturb(untracked):
    """Else the tests below would say nothing."""
    first, last = untracked[0], untracked[UPDATES]
    assert len(untracked) == UPDATES + 1
    assert first["gradients"]["first.weight"].abs().max() > 0
    assert first["gradients"]["first.bias"] is None and first["gradients"]["unused.weight"] is None
    assert not any(same(first[generator], last[generator]) for generator in ("python", "numpy", "torch"))
    assert not torch.equal(first["buffers"]["norm.running_mean"], last["buffers"]["norm.running_mean"])
    assert not torch.equal(untracked[1]["moments"]["0 exp_avg"], last["moments"]["0 exp_avg"])
    assert last["modes"]["norm"] and not last["modes"]["still"]


@pytest.mark.parametrize("place", PLACES)
def test_a_plain_loop(place, untracked, measured):
    states, tracker = train(place, at=AT)
    assert same(states, untracked)
    assert tuple(tracker.trajectory.steps) == AT
    if place in BEFORE:
        assert same(measured_of(tracker), measured)


@pytest.mark.parametrize(
    ("place", "folder"), [*((place, False) for place in PLACES), ("before", True), ("graph held", True)]
)
def test_a_budget_and_steps_that_wait(place, folder, untracked, measured, late, tmp_path):
    states, tracker = train(place, at=AT, budget=0.5, folder=tmp_path / "run" if folder else None)
    assert same(states, untracked)
    assert tuple(tracker.trajectory.steps) == AT
    if place in BEFORE:
        assert same(measured_of(tracker), measured)  # each at its own parameters, though at a later step's time


@pytest.mark.parametrize("place", ["before", "graph held"])
def test_adaptive_steps(place, untracked):
    states, tracker = train(place, at=Adaptive(0.05))
    assert same(states, untracked)
    assert 2 <= len(tracker.trajectory) <= UPDATES


@pytest.mark.parametrize("place", ["half precision", "gradients held"])
def test_all_measures(place, untracked):
    states, tracker = train(place, at=[4], measures=list(MEASURES))
    assert same(states, untracked)
    (found,) = tracker.trajectory.snapshots
    assert all(getattr(found, name) is not None for name in MEASURES)


@pytest.mark.parametrize("budget", [None, 0.5])
def test_measuring_that_fails(budget, untracked, monkeypatch, late):
    def failing(*given):
        measure(*given)
        raise DataError("told to fail")

    monkeypatch.setattr("hesscope.dynamics.tracker.measure", failing)
    states, tracker = train("gradients held", at=[0, 1, 4], budget=budget)
    assert same(states, untracked)
    assert len(tracker.trajectory) == 0


def test_what_is_around_the_call_does_not_reach_the_measures():
    """In bfloat16 matrix products have three digits."""
    seeded()
    model = Net()
    found = []
    for half in (False, True):
        tracker = tracker_of(model, None, measures=list(MEASURES))
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.set_grad_enabled(not half):
            s = tracker(0)
        values = {"energies": s.block_energies().values, "top": s.sharpness, "trace": s.trace.value}
        values |= {"residuals": s.eigenvalues.largest_residuals, "nodes": s.density.nodes, "pixels": s.heatmap.values}
        found.append({**values, "heterogeneity": s.heterogeneity.value, "gradient": s.gradient_norm})
    assert same(found[0], found[1])


# --- trainers ---------------------------------------------------------------------------------------------------------


def fit_with_lightning(**options):
    """State at the end of a training by Lightning; with the options of a tracker, tracked."""
    seeded()
    model = Net()
    optimizer = torch.optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=0.05)
    tracker = tracker_of(model, optimizer, **options) if options else None
    wrapped = wrapped_in_lightning(model, optimizer)
    train_mode(model)
    callbacks = [lightning_callback(tracker)] if options else []
    lightning_trainer(callbacks, UPDATES, accumulate_grad_batches=2).fit(wrapped, batches_of(X, Y, 4))
    return {**state_of(model, optimizer), "losses": tuple(wrapped.losses)}, tracker


def fit_with_hugging_face(folder, **options):
    """State at the end of a training of a small GPT-2 by the Trainer; with the options of a tracker, tracked."""
    model = tiny_gpt2()
    seeded()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if options:
        objective = hs.Objective(model, "cross_entropy", {"input_ids": TOKENS[:4], "labels": TOKENS[:4]})
        options = {"measures": CHEAP, **options}
        tracker = Tracker(objective, hs.Partition.by_layer(model), **options)
    callbacks = [hugging_face_callback(tracker)] if options else []
    trainer = hugging_face_trainer(model, callbacks, UPDATES, folder, optimizer, gradient_accumulation_steps=2)
    loss = trainer.train().training_loss
    return {**state_of(model, optimizer), "loss": loss}, tracker if options else None


@pytest.fixture(scope="module")
def lightning_untracked():
    fit_with_lightning()  # what Lightning loads the first time draws from Python's generator
    return fit_with_lightning()[0]


@pytest.fixture(scope="module")
def hugging_face_untracked(tmp_path_factory):
    return fit_with_hugging_face(tmp_path_factory.mktemp("untracked"))[0]


@lightning_warns
@pytest.mark.parametrize("budget", [None, 0.5])
def test_lightning(budget, lightning_untracked, late):
    state, tracker = fit_with_lightning(at=AT, budget=budget)
    assert same(state, lightning_untracked)
    assert len(set(state["losses"])) > 6
    assert set(tracker.trajectory.steps) >= set(AT)


@pytest.mark.parametrize("budget", [None, 0.5])
def test_hugging_face(budget, hugging_face_untracked, late, tmp_path):
    state, tracker = fit_with_hugging_face(tmp_path, at=AT, budget=budget)
    assert same(state, hugging_face_untracked)
    assert set(tracker.trajectory.steps) >= set(AT)


# --- the tests, tested ------------------------------------------------------------------------------------------------

PLANTED = {
    "a random number": lambda model: torch.rand(1),
    "a random number of NumPy": lambda model: np.random.rand(),
    "a random number of Python": lambda model: random.random(),
    "no gradients": lambda model: model.zero_grad(),
    "zero gradients": lambda model: model.unused.weight.grad is None and set_gradient(model.unused.weight),
    "a buffer": lambda model: model.norm.running_mean.mul_(1 + 1e-6),
    "eval mode": lambda model: model.norm.eval(),
    "train mode": lambda model: model.still.train(),
    "trainable": lambda model: model.first.bias.requires_grad_(),
    "a parameter": lambda model: model.last.bias.data.mul_(1 + 1e-6),
}


def set_gradient(parameter):
    parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("trace", PLANTED)
def test_the_comparison_sees_traces(trace, untracked, monkeypatch):
    """What a tracker could leave behind, left behind on purpose."""

    def leaving(tracker, step):
        if step == 3:
            PLANTED[trace](tracker.objective.model)

    monkeypatch.setattr(Tracker, "__call__", leaving)
    states, _ = train("gradients held", at=1)
    assert all(same(states[step], untracked[step]) for step in range(3))
    assert not same(states[3], untracked[3])
