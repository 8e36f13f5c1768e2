"""Derivatives of the bound that an optimization follows, and its divergence without a grid."""

from dataclasses import replace

import pytest
import torch

from hesscope.bounds import VarianceGrid, kl_inverse
from hesscope.layerwise.risk import Risk
from hesscope.layerwise.variational import Optimization, _Run, bound_slopes
from tests.helpers import randint, randn
from tests.layerwise import posteriors


@pytest.mark.parametrize("cost", [1e-4, 0.01, 0.1, 0.5, 1.5])
@pytest.mark.parametrize("risk", [1e-3, 0.02, 0.2, 0.5, 0.8])
def test_slopes_are_those_of_differences(risk, cost):
    by_risk, by_cost = bound_slopes(risk, cost, 40_000)
    h = 1e-4 * min(risk, 0.2)
    assert by_risk == pytest.approx((kl_inverse(risk + h, cost) - kl_inverse(risk - h, cost)) / (2 * h), rel=1e-4)
    h = 1e-4 * cost
    assert by_cost == pytest.approx((kl_inverse(risk, cost + h) - kl_inverse(risk, cost - h)) / (2 * h), rel=1e-4)


@pytest.mark.parametrize("risk", [-0.1, 0.0, 1e-9, 1.0, 1.5])
@pytest.mark.parametrize("cost", [1e-6, 0.1, 60.0])
def test_slopes_are_finite_and_positive_everywhere(risk, cost):
    """A running mean of a surrogate may leave [0, 1]."""
    n = 1000
    slopes = bound_slopes(risk, cost, n)
    assert all(0 < slope < float("inf") for slope in slopes)
    assert slopes == bound_slopes(min(max(risk, 0.1 / n), 0.9), cost, n)


def test_divergence_is_that_at_the_best_of_all_prior_variances():
    """Of a fine grid's best, up to the grid."""
    objective = posteriors.objective(posteriors.mlp(), randn(6, 5, seed=1), randint(3, 6, seed=2))
    posterior = posteriors.random_posterior(objective)
    asked = Optimization(objective, Risk(), 6, True, VarianceGrid([1.0]), 0.0, 10, 0, None, "")
    run = _Run(asked, posterior, 0.3)
    fine = VarianceGrid.geometric(1e-3, 10.0, 100_001)
    least = sum(each.total for each in posterior.with_best_priors(fine).divergences().values())
    assert float(run._divergence().detach()) == pytest.approx(least, rel=1e-7)
    run._divergence().backward()
    for each, shift, log in zip(posterior.groups, run.shifts, run.logs, strict=True):
        for index, (moved, h) in enumerate(((shift, 1e-4), (log, 1e-4))):
            step = torch.zeros_like(each.shift)
            step[0, 1] = h

            def total(sign, each=each, index=index, step=step):
                shifted = each.shift + sign * step if index == 0 else each.shift
                variance = each.variance if index == 0 else each.variance * (2 * sign * step).exp()
                best = float((shifted.square() + variance).mean())
                return replace(each, shift=shifted, variance=variance, prior_variance=best).divergence.total

            assert float(moved.grad[0, 1]) == pytest.approx((total(1) - total(-1)) / (2 * h), rel=1e-5, abs=1e-7)
