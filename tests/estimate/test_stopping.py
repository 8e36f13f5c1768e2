"""The stopping rule on samples of known law: unbiased, honest, and cheap; what it replaces is neither.

The samples are made by NumPy, without any matrix. Skewed ones are those where a rule errs most: a large sample has a
large variance, too, so that "stop when the error looks small" stops at small values.
"""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import stdtrit

import hesscope as hs
from hesscope.estimate import stopping

LAWS = {
    "normal": lambda g, n: g.standard_normal(n),
    "one direction": lambda g, n: g.standard_normal(n) ** 2 - 1,  # a single eigenvalue under normal probes
    "one negative direction": lambda g, n: 1 - g.standard_normal(n) ** 2,
}
CASES = [
    ("normal", 0.2),
    ("normal", 0.05),
    ("one direction", 0.1),
    ("one negative direction", 0.1),
]
REPLICATES = 2000


def drawing(law, deviation, seed):
    """Samples of mean 1; returns the function, and a list of what was drawn."""
    generator, drawn = np.random.default_rng(seed), []

    def draw(stage, numbers):
        drawn.append((stage, numbers))
        yield torch.from_numpy(1 + deviation * LAWS[law](generator, len(numbers)))[None]

    return draw, drawn


def sampled(law, deviation, seed, rtol=0.02, most=10**6, keep=False):
    draw, drawn = drawing(law, deviation, seed)
    excess = stopping.entrywise(rtol)
    (first,) = draw("pilot", range(stopping.FIRST_PILOT))
    pilot = stopping.grown_pilot(draw, stopping.Moments.of(first), stopping.FIRST_PILOT, excess, most)
    used = sum(len(numbers) for stage, numbers in drawn if stage == "pilot") - stopping.FIRST_PILOT
    return stopping.planned_sample(draw, stopping.planned(pilot, excess), excess, most - used, keep), drawn


def until_it_looks_good(law, deviation, seed, rtol=0.02):
    """What must not be done: add a sample until the error of all samples is small enough."""
    draw, _ = drawing(law, deviation, seed)
    (samples,) = draw("samples", range(5000))
    samples = samples[0].numpy()
    counts = np.arange(1, len(samples) + 1)
    means = np.cumsum(samples) / counts
    errors = np.sqrt((np.cumsum(samples**2) / counts - means**2) / counts)
    stop = 15 + np.flatnonzero(errors[15:] <= rtol * means[15:])[0]
    return means[stop]


def results(law, deviation, _cache={}):  # noqa: B006
    if (law, deviation) not in _cache:
        _cache[law, deviation] = [sampled(law, deviation, seed)[0] for seed in range(REPLICATES)]
    return _cache[law, deviation]


def values_and_errors(found):
    return np.array([float(s.mean) for s in found]), np.array([float(s.squared_error) ** 0.5 for s in found])


def bias_in_standard_errors(values):
    """z of the mean over replicates; a bias of 0.1 standard errors gives 4.5."""
    return abs(values.mean() - 1) / values.std(ddof=1) * np.sqrt(len(values))


@pytest.mark.parametrize(("law", "deviation"), CASES)
def test_the_mean_is_unbiased(law, deviation):
    values, _ = values_and_errors(results(law, deviation))
    assert bias_in_standard_errors(values) < 4


@pytest.mark.parametrize("law", ["one direction", "one negative direction"])
def test_stopping_when_it_looks_good_is_biased(law):
    values = np.array([until_it_looks_good(law, 0.1, seed) for seed in range(REPLICATES)])
    assert bias_in_standard_errors(values) > 8


@pytest.mark.parametrize(("law", "deviation"), CASES)
def test_the_standard_error_is_honest_and_intervals_cover(law, deviation):
    found = results(law, deviation)
    values, errors = values_and_errors(found)
    assert 0.8 < np.sqrt(np.mean(errors**2)) / values.std(ddof=1) < 1.25
    quantiles = stdtrit(np.array([s.count - 1 for s in found]), 0.975)
    assert 0.90 <= np.mean(np.abs(values - 1) <= quantiles * errors) <= 0.99


@pytest.mark.parametrize(("law", "deviation"), CASES)
def test_the_tolerance_is_met_by_most(law, deviation):
    """Nearly always where samples are normal, as those of many directions are; by nine of ten in the worst case."""
    values, errors = values_and_errors(results(law, deviation))
    assert np.mean(errors <= 0.02 * values) > (0.99 if law == "normal" else 0.9)


def test_the_cost_is_not_much_more_than_knowing_the_variance():
    counts = [sum(len(numbers) for _, numbers in sampled("normal", 0.5, seed)[1]) for seed in range(200)]
    oracle = (0.5 / 0.02) ** 2
    assert oracle < np.mean(counts) < 1.5 * oracle


def test_the_pilot_is_not_in_the_result():
    for seed in range(20):
        found, drawn = sampled("normal", 0.2, seed, keep=True)
        counted = [numbers for stage, numbers in drawn if stage == "samples"]
        assert found.count == len(found.samples) == sum(map(len, counted))
        assert [number for numbers in counted for number in numbers] == list(range(found.count))


def test_the_pilot_numbers_are_used_once():
    _, drawn = sampled("one direction", 1.0, 3, rtol=0.05)
    pilots = [number for stage, numbers in drawn if stage == "pilot" for number in numbers]
    assert pilots == list(range(len(pilots)))
    assert len(pilots) > stopping.SECOND_PILOT


@pytest.mark.parametrize("most", [2, 3, 33, 64, 100, 1000])
def test_the_budget_is_never_exceeded(most):
    for seed in range(20):
        _, drawn = sampled("one direction", 1.0, seed, rtol=0.001, most=most)
        assert sum(len(numbers) for _, numbers in drawn) - stopping.FIRST_PILOT == most


@pytest.mark.parametrize("shares", [(0.3, 0.3), (0.0, 0.6), (0.9, 0.1)])
def test_enlarged_samples_are_weighted_as_the_module_says(shares, monkeypatch):
    """Value and error against the formula, written out."""
    answers = iter(shares)
    monkeypatch.setattr(stopping, "_share", lambda *_: next(answers))
    draw, drawn = drawing("normal", 0.3, 5)
    found = stopping.planned_sample(draw, 40, stopping.entrywise(0.02), 1000, keep=True)
    assert [numbers.start for _, numbers in drawn] == [0, 20, 40]
    x = found.samples[:, 0].numpy()
    A, B, C = x[:20], x[20:40], x[40:]
    a, b = shares
    weights = np.concatenate(
        [np.full(20, (1 - b) / 2 / 20), np.full(20, (1 - a) / 2 / 20), np.full(len(C), (a + b) / 2 / len(C))]
    )
    assert float(found.mean) == pytest.approx(weights @ np.concatenate([A, B, C]), rel=1e-12)
    assert float(found.squared_error) == pytest.approx(x.var(ddof=1) * np.sum(weights**2), rel=1e-12)


# --- tolerances and moments -------------------------------------------------------------------------------------------


def test_moments_of_parts_are_those_of_the_whole():
    x = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e6
    parts = stopping.Moments.of(x[:, :1]) + stopping.Moments.of(x[:, 1:20]) + stopping.Moments.of(x[:, 20:])
    assert parts.count == 50
    assert torch.allclose(parts.mean, x.mean(dim=1), rtol=1e-14)
    assert torch.allclose(parts.variance, x.var(dim=1), rtol=1e-9)


def test_every_entry_counts():
    mean, error = torch.tensor([1.0, -10.0, 0.0]).double(), torch.tensor([0.02, 0.1, 0.0]).double()
    assert stopping.entrywise(0.02)(mean, error**2) == pytest.approx(1)
    assert stopping.entrywise(0.01)(mean, error**2) == pytest.approx(4)
    assert stopping.entrywise(0.02)(torch.zeros(1).double(), torch.ones(1).double()) == np.inf


def test_the_norm_counts_without_its_noise():
    mean, squared = torch.full((100,), 1.0).double(), torch.full((100,), 0.2).double()
    assert stopping.normwise(0.5)(mean, squared) == pytest.approx(0.2 / (1 - 0.2) / 0.25)
    assert stopping.normwise(0.5)(mean, 6 * squared) == np.inf
    assert stopping.normwise(0.5)(0 * mean, 0 * squared) == 0


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_plans_do_not_depend_on_the_unit(scale):
    x = torch.from_numpy(1 + 0.2 * np.random.default_rng(0).standard_normal((1, 16)))
    plan = partial(stopping.planned, excess=stopping.entrywise(0.02))
    assert plan(stopping.Moments.of(scale * x)) == pytest.approx(plan(stopping.Moments.of(x)), rel=1e-9)


@pytest.mark.parametrize("rtol", [0, -0.1, float("nan"), float("inf"), "2 %", True, None])
def test_a_tolerance_that_is_none(rtol):
    with pytest.raises(hs.HesscopeError, match="rtol must be a positive number"):
        stopping.require_rtol(rtol)
