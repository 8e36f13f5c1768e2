"""Normal distributions over layers against the same ones as dense vectors and matrices."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hesscope.bounds import DEFAULT_GRID, VarianceGrid, dense_gaussian_kl
from hesscope.layerwise import gaussians
from hesscope.layerwise.axes import groups_of
from hesscope.layerwise.gaussians import Axes, noise_like
from tests.helpers import F64, randint, randn, randomized, relative_error
from tests.layerwise import networks, posteriors

N = 6
VECTORS = lambda: randn(N, 5, seed=1)  # noqa: E731

# name -> (network, inputs)
CASES = {
    "no bias": (lambda: posteriors.mlp(bias=False), VECTORS),
    "bias": (posteriors.mlp, VECTORS),
    "bias first": (lambda: randomized(posteriors.BiasFirst()), VECTORS),
    "convolutions": (posteriors.convolutional, lambda: posteriors.images(N)),
    "embedding": (lambda: randomized(posteriors.Words()), lambda: randint(6, N, 3, seed=3)),
    "layer norm": (lambda: randomized(posteriors.Normed()), VECTORS),
    "called twice": (lambda: randomized(networks.Twice()), lambda: randn(N, 4, seed=1)),
    "weight [inputs, outputs]": (lambda: randomized(posteriors.Turned()), VECTORS),
}


def case(name):
    """(model, objective) of the named case."""
    make, data = CASES[name]
    model = make()
    return model, posteriors.objective(model, data(), randint(3, N, seed=2))


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_those_of_the_modules(name):
    model, objective = case(name)
    tensors = {key: p.detach() for key, p in model.named_parameters()}
    for group in groups_of(objective)[0]:
        matrix = group.matrix(tensors)
        assert torch.equal(matrix, posteriors.matrix_of(model, group))
        assert torch.equal(group.entries(matrix), torch.cat([tensors[key].flatten() for key in group.parameters]))


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
@pytest.mark.parametrize("name", CASES)
def test_means_land_in_their_places(name, turned):
    model, objective = case(name)
    posterior = posteriors.random_posterior(objective, turned)
    assert relative_error(posterior.mean(), posteriors.dense_mean(model, posterior)) < 1e-14
    assert torch.equal(posterior.prior_mean(), posteriors.dense_mean(model, posterior, "prior"))


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
@pytest.mark.parametrize("name", CASES)
def test_covariance_of_draws_is_the_dense_one(name, turned, monkeypatch):
    """A draw is mean + A noise with A A^T = (U x V) diag(variance) (U x V)^T, column by column of A."""
    model, objective = case(name)
    posterior = posteriors.random_posterior(objective, turned)
    columns = []
    for chosen in range(posterior.space.size):
        behind = 0

        def unit_noise(tensor, _, chosen=chosen):
            nonlocal behind
            flat = torch.zeros(tensor.numel(), dtype=tensor.dtype)
            if behind <= chosen < behind + len(flat):
                flat[chosen - behind] = 1.0
            behind += len(flat)
            return flat.view(tensor.shape)

        monkeypatch.setattr(gaussians, "noise_like", unit_noise)
        columns.append(posterior.draw(torch.Generator()) - posterior.mean())
        assert behind == posterior.space.size
    A = torch.stack(columns, 1)
    assert relative_error(A @ A.T, posteriors.dense_covariance(model, posterior)) < 1e-13


def test_noise_is_standard_normal_and_new_for_every_entry_group_and_draw():
    generator, shape = torch.Generator().manual_seed(3), torch.zeros(40, 50, dtype=F64)
    noise = torch.stack([noise_like(shape, generator).flatten() for _ in range(100)])
    count = noise.numel()
    assert noise.dtype == F64
    assert abs(float(noise.mean())) < 4 / count**0.5
    assert abs(float(noise.square().mean()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((noise**4).mean()) - 3) < 4 * (96 / count) ** 0.5
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean(), (noise[1:] * noise[:-1]).mean()
    assert all(abs(float(each)) < 4 / count**0.5 for each in neighbours)


def test_draws_of_one_generator_differ_and_of_equal_seeds_agree():
    _, objective = case("bias")
    posterior = posteriors.random_posterior(objective)
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    draw = posterior.draw(first)
    assert torch.equal(draw, posterior.draw(second))
    assert not torch.equal(draw, posterior.draw(second))


def test_draws_are_differentiable_by_shifts_and_variances():
    model, objective = case("bias")
    posterior = posteriors.random_posterior(objective)
    for each in posterior.groups:
        each.shift.requires_grad_(), each.variance.requires_grad_()
    direction = randn(posterior.space.size, seed=8)
    (posterior.draw(torch.Generator().manual_seed(1)) @ direction).backward()
    generator = torch.Generator().manual_seed(1)
    for each in posterior.groups:
        left, right = posteriors.sides(each)
        along = left.T @ direction[posteriors.places(model, each.group)] @ right
        noise = torch.randn(each.shift.shape, dtype=F64, generator=generator)
        assert relative_error(each.shift.grad, along) < 1e-13
        assert relative_error(each.variance.grad, along * noise / (2 * each.variance.detach().sqrt())) < 1e-13


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
@pytest.mark.parametrize("name", CASES)
def test_divergences_add_up_to_the_dense_one(name, turned):
    model, objective = case(name)
    posterior = posteriors.random_posterior(objective, turned)
    prior_variances = torch.zeros(posterior.space.size, dtype=F64)
    for each in posterior.groups:
        prior_variances[posteriors.places(model, each.group)] = each.prior_variance
    found = posterior.divergences()
    truth = dense_gaussian_kl(
        posteriors.dense_mean(model, posterior).numpy(),
        posteriors.dense_covariance(model, posterior).numpy(),
        posteriors.dense_mean(model, posterior, "prior").numpy(),
        torch.diag(prior_variances).numpy(),
    )
    assert list(found) == [each.group.name for each in posterior.groups]
    assert sum(each.total for each in found.values()) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("grid", [DEFAULT_GRID, VarianceGrid.geometric(1e-3, 10.0, 13)], ids=["fine", "coarse"])
def test_best_prior_is_the_grids_best_within_a_step(grid):
    _, objective = case("bias")
    for scale in (1e-6, 1e-3, 1.0, 1e4):  # the last is beyond the grid
        posterior = posteriors.random_posterior(objective, spread=scale**0.5)
        best = posterior.with_best_priors(grid)
        for each, old in zip(best.groups, posterior.groups, strict=True):
            totals = [replace(old, prior_variance=value).divergence.total for value in grid.values]
            index = grid.values.index(each.prior_variance)
            assert abs(index - int(np.argmin(totals))) <= 1
            assert torch.equal(each.shift, old.shift) and torch.equal(each.variance, old.variance)


@pytest.mark.parametrize("start", [True, False], ids=["from random axes", "from parameters"])
@pytest.mark.parametrize("end", [True, False], ids=["to random axes", "to parameters"])
def test_turned_keeps_the_mean_and_the_diagonal_of_the_precision(start, end):
    model, objective = case("bias")
    posterior = posteriors.random_posterior(objective, start)
    others = posteriors.random_posterior(objective, end, seed=500)
    turned = replace(
        posterior,
        groups=tuple(each.turned(new.axes) for each, new in zip(posterior.groups, others.groups, strict=True)),
    )
    assert relative_error(turned.mean(), posterior.mean()) < 1e-14
    precision = torch.linalg.inv(posteriors.dense_covariance(model, posterior))
    for each, new in zip(turned.groups, others.groups, strict=True):
        assert each.axes is new.axes
        where = posteriors.places(model, each.group).flatten()
        basis = torch.kron(*posteriors.sides(each))
        diagonal = (basis.T @ precision[where[:, None], where] @ basis).diagonal()
        assert relative_error((1 / each.variance).flatten(), diagonal) < 1e-12


def test_axes_know_their_name_and_their_inverse():
    axes = Axes(posteriors.orthonormal(3, 1), posteriors.orthonormal(4, 2))
    W = randn(3, 4, seed=3)
    assert (axes.name, Axes().name) == ("kronecker", "parameters")
    assert relative_error(axes.coordinates(W), torch.einsum("ok,oi,il->kl", axes.left, W, axes.right)) < 1e-14
    assert relative_error(axes.matrix(axes.coordinates(W)), W) < 1e-14
    several = randn(2, 3, 4, seed=4)
    assert relative_error(axes.matrix(several)[1], axes.matrix(several[1])) < 1e-14
