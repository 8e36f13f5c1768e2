"""Posteriors in closed form against numerical minimization, axis by axis and variance by variance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from hesscope.bounds import DEFAULT_GRID, VarianceGrid
from hesscope.layerwise import laplace
from hesscope.layerwise.axes import groups_of
from hesscope.layerwise.gaussians import Axes
from hesscope.layerwise.laplace import best_posterior, isotropic, laplace_posterior
from tests.helpers import randint, randn, randomized, relative_error
from tests.layerwise import posteriors

N = 8
STRENGTH = 300.0


def problem(spread=1.0, seed=0, turned=True):
    """Arguments of `laplace_posterior` up to the curvature: random axes and means, curvatures over decades."""
    model = randomized(posteriors.Normed())
    objective = posteriors.objective(model, randn(N, 5, seed=1), randint(3, N, seed=2))
    groups, _ = groups_of(objective)
    axes, curvature = {}, {}
    for number, group in enumerate(groups):
        own = 10 * number + 100 * seed
        axes[group.name] = Axes()
        if turned and group.layer is not None:
            axes[group.name] = Axes(*(posteriors.orthonormal(side, own + side) for side in group.shape))
        curvature[group.name] = (spread * 4 * randn(*group.shape, seed=own + 1)).exp() / 10
    P = objective.parameters.size
    means = (randn(P, seed=seed + 50), randn(P, seed=seed + 51))
    return model, ("test", objective.parameters, groups, axes, means, curvature)


def displacement(model, arguments, each):
    """d of a group, U^T (trained - prior) V from the flat vectors."""
    start, trained = arguments[4]
    left, right = posteriors.sides(each)
    return left.T @ (trained - start)[posteriors.places(model, each.group)] @ right


def minimum_over_mean_and_variance(a, d, prior_variance):
    """Of a/2 E(w - d)^2 + KL( N(m, s) || N(0, prior_variance) ), by search; (m, s)."""

    def cost(x):
        m, s = x[0], np.exp(x[1])
        kl = (s + m * m) / prior_variance - 1 - np.log(s / prior_variance)
        return a / 2 * ((m - d) ** 2 + s) + kl / 2

    scale = np.log(prior_variance)
    options = {"xatol": 1e-10, "fatol": 1e-15, "maxiter": 4000, "maxfev": 4000}
    found = minimize(cost, [d / 2, scale], method="Nelder-Mead", options=options)
    return found.x[0], np.exp(found.x[1])


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
def test_minimum_is_that_of_a_search_axis_by_axis(turned):
    model, arguments = problem(turned=turned)
    posterior = laplace_posterior(*arguments, STRENGTH, VarianceGrid([0.05]))
    for each in posterior.groups:
        d = displacement(model, arguments, each)
        h = arguments[5][each.group.name]
        assert each.prior_variance == 0.05
        for place in list(np.ndindex(*each.group.shape))[::5]:
            m, s = minimum_over_mean_and_variance(STRENGTH * float(h[place]), float(d[place]), 0.05)
            assert float(each.shift[place]) == pytest.approx(m, rel=1e-5, abs=1e-7)
            assert float(each.variance[place]) == pytest.approx(s, rel=1e-5)


def test_means_are_taken_from_their_vectors():
    _, arguments = problem()
    posterior = laplace_posterior(*arguments, STRENGTH, DEFAULT_GRID)
    assert posterior.kind == "test"
    assert torch.equal(posterior.prior_mean(), arguments[4][0])
    sharp = {name: torch.full_like(values, 1e12) for name, values in arguments[5].items()}
    stiff = laplace_posterior(*arguments[:5], sharp, STRENGTH, DEFAULT_GRID)
    assert relative_error(stiff.mean(), arguments[4][1]) < 1e-9  # nothing moves off the trained network


def least_costs(model, arguments, each):
    """Minimum over mean and variance of every axis, summed up, for each variance of the grid, in nats."""
    d = displacement(model, arguments, each).flatten().numpy()
    a = STRENGTH * arguments[5][each.group.name].flatten().numpy()
    found = []
    for v in DEFAULT_GRID.values:
        s = 1 / (a + 1 / v)
        m = a * d * s
        found.append(np.sum(a / 2 * ((m - d) ** 2 + s) + ((s + m**2) / v - 1 - np.log(s / v)) / 2))
    return np.array(found)


@pytest.mark.parametrize("seed", range(6))
def test_prior_variance_is_the_best_of_the_whole_grid(seed):
    """The curvatures of the last cases spread over many decades, where the cost has more than one valley."""
    model, arguments = problem(spread=(seed + 1) / 2, seed=seed)
    posterior = laplace_posterior(*arguments, STRENGTH, DEFAULT_GRID)
    for each in posterior.groups:
        costs = least_costs(model, arguments, each)
        index = DEFAULT_GRID.values.index(each.prior_variance)
        assert abs(index - int(np.argmin(costs))) <= 1
        assert costs[index] - costs.min() < 1e-4 * each.variance.numel()


def test_flat_axes_keep_the_prior():
    _, arguments = problem()
    flat = {name: torch.zeros_like(values) for name, values in arguments[5].items()}
    posterior = laplace_posterior(*arguments[:5], flat, STRENGTH, DEFAULT_GRID)
    assert torch.equal(posterior.mean(), posterior.prior_mean())
    for each in posterior.groups:
        assert bool((each.variance == each.prior_variance).all())
        assert each.divergence.total < 1e-12
    some = {name: values * (values > 0.1) for name, values in arguments[5].items()}
    for each in laplace_posterior(*arguments[:5], some, STRENGTH, VarianceGrid([0.3])).groups:
        still = some[each.group.name] == 0
        assert bool((each.shift[still] == 0).all()) and bool((each.variance[still] == 0.3).all())
        assert bool((each.variance[~still] < 0.3).all())


def test_is_the_same_in_float32_up_to_rounding():
    _, arguments = problem()
    kind, space, groups, axes, means, curvature = arguments
    narrow = laplace_posterior(
        kind, replace(space, dtype=torch.float32), groups, axes, means, curvature, STRENGTH, DEFAULT_GRID
    )
    wide = laplace_posterior(*arguments, STRENGTH, DEFAULT_GRID)
    assert narrow.mean().dtype == torch.float32
    assert relative_error(narrow.mean(), wide.mean()) < 1e-5
    for first, second in zip(narrow.groups, wide.groups, strict=True):
        assert first.prior_variance == second.prior_variance
        assert relative_error(first.variance, second.variance) < 1e-5


def test_isotropic_has_the_mean_curvature_everywhere():
    curvature = {"a": randn(3, 4, seed=1).exp(), "b": randn(1, 2, seed=2).exp()}
    for name, values in isotropic(curvature).items():
        assert values.shape == curvature[name].shape
        assert relative_error(values, curvature[name].mean().expand(values.shape)) < 1e-14


@pytest.mark.parametrize("target", [1 / 64, 0.01, 0.4, 3.1, 700.0, 4096.0])
def test_best_posterior_is_that_of_the_smallest_bound(target):
    """Of a bound with its least at a strength, and with the curvature that was found the second time (of three)."""
    asked, told, felt = [], [], []

    def make(curvature, strength):
        asked.append((curvature["number"], strength))
        return asked[-1]

    def bound_of(posterior):
        number, strength = posterior
        return (np.log(strength / target) / 100) ** 2 + abs(number - 2)

    def found_again(posterior, number):
        felt.append((posterior, number))
        return {"number": number + 1}

    best = best_posterior(make, bound_of, {"number": 0}, found_again, told.append)
    assert abs(np.log2(best.strength / target)) <= 0.25 + 1e-9 or not 1 / 64 <= target <= 4096
    assert (best.posterior, best.curvature) == ((2, best.strength), {"number": 2})
    assert best.bound == min(map(bound_of, asked)) == bound_of(best.posterior)
    assert told == list(range(1, laplace.LOOKS + 1)) and len(set(asked)) == laplace.LOOKS
    # Each time it is felt at the best posterior of the curvature before.
    assert felt == [((number, best.strength), number) for number in range(laplace.SOUNDINGS)]
