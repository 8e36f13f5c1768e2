"""Optimized posteriors: better than where they start, interrupted and taken up again, valid at any moment."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.bounds import kl_inverse
from hesscope.core.errors import InputError
from hesscope.core.rng import stream
from hesscope.layerwise import laplace, pac_bayes, variational
from hesscope.layerwise.axes import groups_of
from hesscope.layerwise.gaussians import generator_of
from hesscope.layerwise.laplace import laplace_posterior
from hesscope.layerwise.risk import require_risk
from tests.helpers import randint, randn, same
from tests.layerwise.test_pac_bayes import GRID, bounded, by_hand, clusters, descended, network, numbers, task

OPTIMIZED = pac_bayes.OPTIMIZED


@pytest.fixture(autouse=True)
def little_to_choose(monkeypatch):
    """Draws that only choose among posteriors, and posteriors to choose from: the bound is valid with any of them."""
    monkeypatch.setattr(pac_bayes, "CHOOSING_DRAWS", {True: 300, False: 4})
    monkeypatch.setattr(laplace, "STRENGTHS", (1.0, 8.0))
    monkeypatch.setattr(laplace, "FINER", ())
    monkeypatch.setattr(laplace, "SOUNDINGS", 1)


class StopError(Exception):
    pass


def stopping_after(rounds):
    """An on_round that raises at the given round, and the list of what it was given."""
    seen = []

    def on_round(found):
        seen.append(found)
        if len(seen) == rounds:
            raise StopError

    return on_round, seen


# --- what it gains ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """A network of 16 hidden units that tells 0-4 from 5-9, in float32, and the one before."""
    data = hs.data.binary(hs.data.digits(standardize=False))
    x, y = data.inputs.float(), data.labels
    model, before = hs.models.mlp((64, 16, 2), bias=True), hs.models.mlp((64, 16, 2), bias=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(300):
        rows = torch.arange(100 * step, 100 * (step + 1)) % len(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return hs.Objective(model, "cross_entropy", (x, y)), before


@pytest.mark.parametrize("posterior", OPTIMIZED)
def test_optimization_lowers_the_bound(digits, posterior, monkeypatch):
    monkeypatch.setattr(pac_bayes, "CHOOSING_DRAWS", {True: 1000, False: 4})
    monkeypatch.setattr(laplace, "STRENGTHS", tuple(4.0**power for power in range(4)))
    objective, before = digits
    rounds = []
    options = {"grid": pac_bayes.DEFAULT_GRID, "draws": 10_000}
    closed = bounded(objective, before, posterior.partition("_")[0], **options)
    found = bounded(objective, before, posterior, steps=200, on_round=rounds.append, **options)
    error = math.hypot(closed.certificate.bound_stderr, found.certificate.bound_stderr)
    assert found.bound < closed.bound - max(0.01, 4 * error)
    assert found.bound < rounds[0].bound
    assert found.bound == pytest.approx(by_hand(found, pac_bayes.DEFAULT_GRID), rel=1e-12)


def test_only_refreshed_axes_change():
    objective, before = task()
    start = bounded(objective, before)
    kept, refreshed = (
        bounded(objective, before, f"kronecker_{kind}", steps=30).distribution for kind in ("optimized", "refreshed")
    )
    changes = []
    for old, same_axes, new in zip(start.distribution.groups, kept.groups, refreshed.groups, strict=True):
        for side in ("left", "right"):
            was, now = getattr(old.axes, side), getattr(new.axes, side)
            assert torch.equal(was, getattr(same_axes.axes, side))
            assert torch.allclose(now.T @ now, torch.eye(len(now), dtype=now.dtype), atol=1e-12)
            turned = (was.T @ now).abs()
            changes.append(float((turned - torch.eye(len(turned), dtype=turned.dtype)).abs().max()))
    hidden, inputs, outputs, activations = changes
    assert max(inputs, outputs) < 1e-10  # whatever the network: the inputs' second moment, and (1, -1) of two classes
    assert min(hidden, activations) > 0.01


def test_axes_are_refreshed_at_the_present_mean(monkeypatch):
    """Three times, and of the network at the posterior's mean, not of the trained one."""
    seen = []
    real = pac_bayes.kronecker_axes

    def spied(objective, groups):
        seen.append(torch.cat([p.detach().flatten() for p in objective.model.parameters()]))
        return real(objective, groups)

    monkeypatch.setattr(pac_bayes, "kronecker_axes", spied)
    objective, before = task()
    bounded(objective, before, "kronecker_refreshed", steps=20)
    assert len(seen) == 4
    assert not any(torch.equal(one, other) for one, other in pairwise(seen))


# --- rounds, time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", OPTIMIZED)
def test_every_round_is_a_bound(posterior):
    objective, before = task()
    rounds = []
    found = bounded(objective, before, posterior, steps=35, on_round=rounds.append)
    assert [each.steps for each in rounds] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert found.steps == 35
    for each in (*rounds, found):
        assert each.planned_steps == 35
        assert each.bound == pytest.approx(by_hand(each), rel=1e-12)
        assert each.certificate.delta == 0.05
        assert not each.finished or each is found
    means = [each.distribution.mean() for each in (*rounds, found)]
    assert not any(torch.equal(one, other) for one, other in pairwise(means))


def test_what_is_certified_is_what_is_returned():
    """The divergence is that of the distribution, and so is the risk."""
    objective, before = task()
    found = bounded(objective, before, "diagonal_optimized", steps=60, draws=30_000)
    assert found.certificate.kl_by_group == found.distribution.divergences()
    again = hs.layerwise.stochastic_risk(objective, found.distribution, 30_000, seed=8)
    assert abs(again.value - found.empirical_risk) < 4 * math.hypot(again.stderr, found.certificate.risk_stderr)


@pytest.mark.parametrize("posterior", OPTIMIZED)
def test_little_time(posterior):
    objective, before = task()
    found = bounded(objective, before, posterior, steps=10**6, seconds=1e-9)
    assert found.steps == 1
    assert not found.finished
    assert found.bound == pytest.approx(by_hand(found), rel=1e-12)
    assert bounded(objective, before, posterior, steps=10, seconds=1000).finished


def test_few_steps():
    objective, before = task()
    rounds = []
    found = bounded(objective, before, "kronecker_refreshed", steps=1, on_round=rounds.append)
    assert (found.steps, rounds) == (1, [])


# --- interrupted and taken up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", OPTIMIZED)
@pytest.mark.parametrize("rounds", [1, 5])
def test_taken_up_where_it_was_interrupted(posterior, rounds, tmp_path):
    """Bit for bit the certificate of a run without interruption, over batches of several epochs."""
    objective, before = task()
    undisturbed = bounded(objective, before, posterior, steps=30)
    stop, seen = stopping_after(rounds)
    state = tmp_path / "deeper" / "state.pt"
    with pytest.raises(StopError):
        bounded(objective, before, posterior, steps=30, state=state, on_round=stop)
    later, steps = [], []
    found = bounded(
        objective, before, posterior, steps=30, state=str(state), on_round=later.append,
        progress=lambda done, *_: steps.append(done),
    )  # fmt: skip
    assert numbers(found) == numbers(undisturbed)
    assert [each.steps for each in (*seen, *later)] == list(range(3, 30, 3))
    assert steps == sorted(steps)
    again = bounded(objective, before, posterior, steps=30, state=state, on_round=later.append)
    assert numbers(again) == numbers(undisturbed)  # nothing is left to do
    assert len(later) == 9 - rounds


def test_taken_up_after_the_time_was_over(tmp_path):
    """Also in the middle of a round and of an epoch, several times."""
    objective, before = task()
    undisturbed = bounded(objective, before, "kronecker_refreshed", steps=12)
    state, steps = tmp_path / "state.pt", []
    while not steps or steps[-1] < 12:
        found = bounded(objective, before, "kronecker_refreshed", steps=12, state=state, seconds=1e-9)
        steps.append(found.steps)
    assert steps == list(range(1, 13))
    assert numbers(found) == numbers(undisturbed)


def test_an_interruption_between_rounds_loses_the_steps_since(tmp_path):
    objective, before = task()
    undisturbed, state = bounded(objective, before, "kronecker_optimized", steps=50), tmp_path / "state.pt"

    def stop(done, planned, bound):
        if planned - done == 50 - 23:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bounded(objective, before, "kronecker_optimized", steps=50, state=state, progress=stop)
    assert torch.load(state, weights_only=True)["step"] == 20
    assert numbers(bounded(objective, before, "kronecker_optimized", steps=50, state=state)) == numbers(undisturbed)


@pytest.mark.parametrize(
    "change",
    [{"delta": 0.1}, {"seed": 1}, {"steps": 30}, {"posterior": "diagonal_optimized"}, {"prior": network(seed=5)},
     {"grid": hs.bounds.VarianceGrid.geometric(1e-3, 10, 14)}, {"objective": None}, {"weights": True}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_state_of_other_settings_is_not_taken_up(change, tmp_path):
    objective, before = task()
    settings = {"objective": objective, "prior": before, "posterior": "kronecker_optimized", "steps": 20}
    stop, _ = stopping_after(2)
    with pytest.raises(StopError):
        bounded(**settings, state=tmp_path / "state.pt", on_round=stop)
    if "weights" in change:
        loss = nn.CrossEntropyLoss(torch.tensor([1.0, 4.0], dtype=torch.float64))
        change = {"objective": hs.Objective(objective.model, loss, clusters(noise=0.05))}
        plain = hs.Objective(objective.model, nn.CrossEntropyLoss(), clusters(noise=0.05))
        stop, _ = stopping_after(2)
        with pytest.raises(StopError):
            bounded(**{**settings, "objective": plain}, state=tmp_path / "state.pt", on_round=stop)
    elif "objective" in change:
        change = {"objective": hs.Objective(objective.model, "cross_entropy", clusters(noise=0.0))}
    anew = {**settings, **change}
    assert numbers(bounded(**anew, state=tmp_path / "state.pt")) == numbers(bounded(**anew))


@pytest.mark.parametrize("content", [b"", b"no state", b"half", {"settings": "other"}, [1, 2]])
def test_a_file_that_is_no_state_is_not_overwritten(content, tmp_path):
    objective, before = task()
    state = tmp_path / "state.pt"
    if content == b"half":
        bounded(objective, before, "kronecker_optimized", state=state)
        content = state.read_bytes()[: state.stat().st_size // 2]
    if isinstance(content, bytes):
        state.write_bytes(content)
    else:
        torch.save(content, state)
    kept = state.read_bytes()
    with pytest.raises(InputError, match=r"state = .*state\.pt is not the state of an optimization: delete it or name"):
        bounded(objective, before, "kronecker_optimized", state=state)
    assert state.read_bytes() == kept


# --- what the steps follow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("risk", [1e-3, 0.05, 0.3, 0.7])
@pytest.mark.parametrize("cost", [1e-4, 0.02, 0.5])
def test_slopes(risk, cost):
    step = 1e-6
    by_risk, by_cost = variational.bound_slopes(risk, cost, 10_000)
    assert by_risk == pytest.approx(
        (kl_inverse(risk + step * risk, cost) - kl_inverse(risk - step * risk, cost)) / (2 * step * risk), rel=1e-5
    )
    assert by_cost == pytest.approx(
        (kl_inverse(risk, cost * (1 + step)) - kl_inverse(risk, cost * (1 - step))) / (2 * step * cost), rel=1e-5
    )


@pytest.mark.parametrize("risk", [0.0, 1.0])
def test_slopes_at_the_ends_are_finite(risk):
    assert np.isfinite(variational.bound_slopes(risk, 0.05, 1000)).all()


def run_of(objective, before, **changes):
    """An optimization that has not begun, from a posterior in the axes of the parameters."""
    groups, _ = groups_of(objective)
    axes = {group.name: hs.layerwise.Axes() for group in groups}
    space = objective.parameters
    means = tuple(torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (before, objective.model))
    curvature = {group.name: torch.full(group.shape, 0.1, dtype=torch.float64) for group in groups}
    start = laplace_posterior("diagonal_optimized", space, groups, axes, means, curvature, 300.0, GRID)
    options = {"local": True, "nats": 10.0, "steps": 100, "seed": 0, "refresh": None, "settings": "", **changes}
    asked = variational.Optimization(objective, require_risk(objective, None), 300, grid=GRID, **options)
    return variational._Run(asked, start, 0.3)


def test_every_sample_once_an_epoch():
    """Of batches of unequal size, in an order of the seed's and the epoch's own."""
    model, x = network(), torch.arange(1800.0, dtype=torch.float64).view(300, 6)
    y = randint(2, 300, seed=1)
    objective = hs.Objective(model, "cross_entropy", [(x[:200], y[:200]), (x[200:], y[200:])])
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        run = run_of(objective, network(seed=1), seed=seed)
        assert run.parts == [4, 2]
        run.step = 6 * epoch
        parts = [(index, batch[0][:, 0]) for index, batch in run.batches()]
        assert [index for index, _ in parts] == [0] * 4 + [1] * 2
        assert [len(rows) for _, rows in parts] == [50] * 6
        orders.append(torch.cat([rows for _, rows in parts]))
        assert torch.equal(orders[-1].sort().values, x[:, 0])
        run.step = 6 * epoch + 5
        (last,) = run.batches()
        assert torch.equal(last[1][0][:, 0], parts[5][1])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_divergence_is_up_to_the_grid_that_of_the_certificate():
    """With the best variances of all: the constant it leaves out is 1/2 for each axis."""
    objective, before = task()
    run = run_of(objective, before)
    exact = sum(
        each.shift.numel() / 2 * math.log(float((each.shift.square() + each.variance).mean()))
        - float(each.variance.log().sum()) / 2
        for each in run.start.groups
    )
    assert float(run._divergence().detach()) == pytest.approx(exact, rel=1e-12)
    certified = sum(kl.total for kl in run.posterior().divergences().values())
    assert exact <= certified + 1e-9
    assert certified == pytest.approx(exact, rel=0.05)  # 13 variances, a factor of 2 apart


def test_a_step_follows_the_bound():
    """Its gradient is n / slope times that of the bound itself, as finite differences at equal noise have it."""
    objective, before = task()
    run = run_of(objective, before)
    parameters = [parameter for options in run.adam.param_groups for parameter in options["params"]]
    with objective.evaluating() as (_, batches):
        index, batch = next(iter(batches))

        def terms():
            noise = generator_of(stream(0, "bound", "step", 0), torch.device("cpu"))
            risk = float(run._loss(index, batch, noise).detach())
            return risk, (float(run._divergence().detach()) + run.asked.nats) / run.asked.n

        wanted = []
        directions = [randn(*parameter.shape, seed=7) for parameter in parameters]
        for parameter, direction in zip(parameters, directions, strict=True):
            bounds = []
            for step in (1e-5, -2e-5):
                with torch.no_grad():
                    parameter += step * direction
                bounds.append(kl_inverse(*terms()))
            with torch.no_grad():
                parameter += 1e-5 * direction
            wanted.append((bounds[0] - bounds[1]) / 2e-5)
        run.risk, cost = terms()
        unit = variational.bound_slopes(run.risk, cost, run.asked.n)[1] / run.asked.n
        start = [parameter.detach().clone() for parameter in parameters]
        run.advance(index, batch)
    found = [unit * float((p.grad * direction).sum()) for p, direction in zip(parameters, directions, strict=True)]
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert run.step == 1
    for parameter, was, scale in zip(parameters, start, run._scales, strict=True):  # Adam's first step: its length
        moved = (parameter.detach() - was)[parameter.grad.abs() > 1e-4]
        assert torch.allclose(moved.abs(), torch.full_like(moved, variational.RATE * scale), rtol=1e-3)


@pytest.mark.parametrize("posterior", OPTIMIZED)
def test_prior_variances_are_the_best_in_the_end(posterior):
    objective, before = task()
    grid = hs.bounds.VarianceGrid.geometric(1e-3, 10, 400)
    start = bounded(objective, before, posterior, grid=grid, steps=1).certificate.prior_variances
    found = bounded(objective, before, posterior, grid=grid, steps=60)
    for each in found.distribution.groups:
        best = float((each.shift.square() + each.variance).mean())
        assert each.prior_variance == pytest.approx(best, rel=0.013)  # half a step of the grid
    assert found.certificate.prior_variances != start


def test_a_failing_step_leaves_the_model_as_it_was():
    objective, before = task()
    state = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}

    def fail(done, planned, bound):
        if planned - done == 10:
            raise StopError

    with pytest.raises(StopError):
        bounded(objective, before, "kronecker_optimized", progress=fail)
    assert same(state, dict(objective.model.state_dict()))
    assert not any(module._forward_hooks for module in objective.model.modules())


def test_descent_of_the_trained_network():
    """The helper has learned something: the bounds above are not of noise."""
    x, y = clusters()
    model, before = descended(network(), x, y)
    assert hs.layerwise.network_risk(hs.Objective(model, "cross_entropy", (x, y))) < 0.1
    assert hs.layerwise.network_risk(hs.Objective(before, "cross_entropy", (x, y))) > 0.2


def test_what_is_no_longer_finite_ends_at_the_last_round(monkeypatch):
    objective, before = task()
    loss, rounds = variational._Run._loss, []

    def lost(run, *arguments):
        found = loss(run, *arguments)
        return found * float("nan") if run.step == 11 else found

    monkeypatch.setattr(variational._Run, "_loss", lost)
    found = bounded(objective, before, "kronecker_optimized", steps=20, on_round=rounds.append)
    assert (found.steps, found.finished) == (10, False)
    assert rounds[-1].steps == 10
    assert found.certificate.kl_by_group == rounds[-1].certificate.kl_by_group
