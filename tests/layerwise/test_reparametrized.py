"""Outputs drawn in place of weights against whole networks, and when that is allowed."""

from dataclasses import replace
from itertools import pairwise
from math import erf, sqrt

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import DataError
from hesscope.layerwise.gaussians import generator_of
from hesscope.layerwise.gibbs import draw_risk
from hesscope.layerwise.reparametrized import Drawn, error_probability, is_local, reparametrized
from tests.helpers import F64, call_flat, randint, randn, randomized, relative_error
from tests.layerwise import networks, posteriors

N = 6


def drawn_outputs(objective, posterior, generator):
    """(outputs, what the layers made) of one pass with a network for every sample."""
    with objective.evaluating() as (_, batches):
        index, batch = next(iter(batches))
        with reparametrized(objective, posterior.groups, generator) as drawn:
            outputs, _ = objective.outputs_and_targets(posterior.prior_mean(), batch, index)
    return outputs, drawn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- linear networks: exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: nn.Linear(5, 3, bias=False)], ids=["bias", "none"])
def test_moments_of_a_linear_network_are_exact(make, turned):
    model, x = randomized(make()), randn(N, 5, seed=1)
    objective = posteriors.objective(model, x, randint(3, N, seed=2))
    posterior = posteriors.random_posterior(objective, turned)
    outputs, (drawn,) = drawn_outputs(objective, posterior, seeded())
    mean = posteriors.dense_mean(model, posterior)
    covariance = posteriors.dense_covariance(model, posterior)
    J = torch.func.jacrev(lambda theta: call_flat(model, theta, x))(mean)  # [N, 3, P]
    assert relative_error(drawn.mean, call_flat(model, mean, x)) < 1e-13
    left = torch.eye(3, dtype=F64) if drawn.left is None else drawn.left
    found = torch.einsum("ck,nk,dk->ncd", left, drawn.variance, left)
    assert relative_error(found, torch.einsum("ncp,pq,ndq->ncd", J, covariance, J)) < 1e-12
    assert drawn.made is outputs
    noise = torch.randn(N, 3, dtype=F64, generator=seeded())
    assert relative_error(outputs - drawn.mean, (drawn.variance.sqrt() * noise) @ left.T) < 1e-12


def test_conv1d_of_hugging_face_is_a_linear_layer():
    model, x = randomized(posteriors.Turned()), randn(N, 5, seed=1)
    objective = posteriors.objective(model, x, randint(3, N, seed=2))
    posterior = posteriors.random_posterior(objective)
    assert is_local(objective, posterior)
    outputs, _ = drawn_outputs(objective, posterior, None)
    assert relative_error(outputs, call_flat(model, posteriors.dense_mean(model, posterior), x)) < 1e-13


# --- deeper networks --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Nested modules, a residual connection, and a layer called by keyword."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 5, bias=False)))
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(input=torch.relu(x + self.body(x)))


LOCAL = {
    "mlp": posteriors.mlp,
    "no bias": lambda: posteriors.mlp(bias=False),
    "residual": lambda: randomized(Residual()),
    "in place": lambda: randomized(nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))),
    "frozen bias": lambda: frozen(posteriors.mlp()),
}


def frozen(model):
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
@pytest.mark.parametrize("name", LOCAL)
def test_outputs_have_the_moments_of_whole_networks(name, turned):
    """Mean and covariance of the outputs at one x: of 20,000 samples' own networks and of 4,000 whole networks."""
    model, x = LOCAL[name](), randn(1, 5, seed=1)
    many = 20_000
    objective = posteriors.objective(model, x.expand(many, 5).clone(), randint(3, many, seed=2))
    posterior = posteriors.random_posterior(objective, turned)
    outputs, _ = drawn_outputs(objective, posterior, seeded(1))
    generator = seeded(2)
    thetas = torch.stack([posterior.draw(generator) for _ in range(4000)])
    wanted = torch.func.vmap(lambda theta: call_flat(model, theta, x)[0])(thetas).detach()
    scale = wanted.std(0)
    for degree in (1, 2):
        first, second = (moments((o - wanted.mean(0)) / scale, degree) for o in (outputs.detach(), wanted))
        error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
        assert bool(((first.mean(0) - second.mean(0)).abs() < 4 * error).all())
        assert float(error.max()) < 0.05  # in units of the outputs' own deviations


def moments(o, degree):
    """Products of entries of every sample, [n, ...]."""
    return o if degree == 1 else torch.einsum("nc,nd->ncd", o, o).flatten(1)


def test_networks_of_two_samples_are_independent():
    model, many = posteriors.mlp(), 20_000
    objective = posteriors.objective(model, randn(1, 5, seed=1).expand(many, 5).clone(), randint(3, many, seed=2))
    outputs, drawn = drawn_outputs(objective, posteriors.random_posterior(objective), seeded(3))
    for made in (*(each.made - each.mean for each in drawn), outputs - outputs.mean(0)):
        standard = (made / made.std(0)).detach()
        across = standard[1:].T @ standard[:-1] / (many - 1)
        assert float(across.abs().max()) < 4.5 / many**0.5
    # Layers have noise of their own, too: equal draws in two layers would correlate.
    first, second = ((each.made - each.mean)[:, :3].detach() for each in drawn)
    assert float(((first / first.std(0)).T @ (second / second.std(0))).abs().max() / many) < 4.5 / many**0.5


def test_without_a_generator_it_is_the_network_at_the_mean():
    model, x = posteriors.mlp(), randn(N, 5, seed=1)
    objective = posteriors.objective(model, x, randint(3, N, seed=2))
    posterior = posteriors.random_posterior(objective)
    outputs, _ = drawn_outputs(objective, posterior, None)
    assert relative_error(outputs, call_flat(model, posteriors.dense_mean(model, posterior), x)) < 1e-13


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = posteriors.mlp()
    objective = posteriors.objective(model, randn(N, 5, seed=1), randint(3, N, seed=2))
    posterior = posteriors.random_posterior(objective)
    with pytest.raises(KeyError), reparametrized(objective, posterior.groups, seeded()):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_are_those_of_differences():
    """At equal noise the outputs are a smooth function of shifts and variances (tanh)."""
    model = posteriors.mlp(activation=nn.Tanh)
    objective = posteriors.objective(model, randn(N, 5, seed=1), randint(3, N, seed=2))
    posterior = posteriors.random_posterior(objective)

    def outputs(*tensors):
        pairs = zip(posterior.groups, tensors[::2], tensors[1::2], strict=True)
        groups = tuple(replace(each, shift=shift, variance=variance) for each, shift, variance in pairs)
        return drawn_outputs(objective, replace(posterior, groups=groups), seeded(4))[0].square().mean()

    tensors = [t.clone().requires_grad_() for each in posterior.groups for t in (each.shift, each.variance)]
    assert torch.autograd.gradcheck(outputs, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gradients_are_finite_at_inputs_that_are_zero(dtype):
    model = posteriors.mlp(bias=False).to(dtype)
    x = randn(N, 5, seed=1).to(dtype)
    x[:3], x[3:, 2] = 0.0, 0.0
    labels = randint(3, N, seed=2)
    # Of the mean square: without any input the cross-entropy depends on no parameter, which no objective takes.
    targets = nn.functional.one_hot(labels, 3).to(x)
    for data in (x, torch.cat([torch.zeros_like(x), x[-1:]])):  # all N samples of the error are zero in the second
        objective = hs.Objective(model, "mse", (data, targets if data is x else torch.cat([targets, targets[-1:]])))
        posterior = posteriors.in_dtype(posteriors.random_posterior(objective), dtype)
        for each in posterior.groups:
            each.shift.requires_grad_(), each.variance.requires_grad_()
        outputs, drawn = drawn_outputs(objective, posterior, seeded())
        first = {name: getattr(drawn[-1], name)[:N] for name in ("made", "base", "shift", "variance")}
        last = drawn[-1] if data is x else replace(drawn[-1], **first)
        (error_probability(last, labels) + outputs.square().sum()).backward()
        for each in posterior.groups:
            assert bool(each.shift.grad.isfinite().all()) and bool(each.variance.grad.isfinite().all())


# --- where it is allowed ----------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A weight is used beside its layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x))) + 0.3 * self.first.weight.mean()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


class Reduced(nn.Module):
    """One position of a sample, but with an axis for it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x[:, None, :]))).squeeze(1)


NOT_LOCAL = {
    "convolutions": (posteriors.convolutional, posteriors.images(N)),
    "called twice": (networks.Twice, randn(N, 4, seed=1)),
    "weight beside its layer": (Beside, randn(N, 5, seed=1)),
    "layer norm": (posteriors.Normed, randn(N, 5, seed=1)),
    "several positions": (lambda: networks.Tokens(torch.tanh), randn(N, 4, 5, seed=1)),
    "an axis for one position": (Reduced, randn(N, 5, seed=1)),
    "shared weights": (Tied, randn(N, 5, seed=1)),
    "embedding": (posteriors.Words, randint(6, N, 3, seed=3)),
}


@pytest.mark.parametrize("name", LOCAL)
def test_fully_connected_networks_are_local(name):
    objective = posteriors.objective(LOCAL[name](), randn(N, 5, seed=1), randint(3, N, seed=2))
    assert is_local(objective, posteriors.random_posterior(objective))


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_others_are_not_local(name):
    make, x = NOT_LOCAL[name]
    objective = posteriors.objective(randomized(make()), x, randint(3, N, seed=2))
    assert not is_local(objective, posteriors.random_posterior(objective))


def test_a_weight_beside_its_layer_is_seen_where_the_posterior_is_the_prior():
    """As in closed form where nothing is curved: at the mean the two networks would be the same."""
    objective = posteriors.objective(randomized(Beside()), randn(N, 5, seed=1), randint(3, N, seed=2))
    posterior = posteriors.random_posterior(objective)
    still = tuple(replace(each, shift=torch.zeros_like(each.shift)) for each in posterior.groups)
    assert not is_local(objective, replace(posterior, groups=still))


@pytest.mark.parametrize("widths", [(64, 600, 10), (192, 300, 300, 300, 2)])
def test_large_networks_in_float32_are_local(widths):
    """Rounding is not taken for another use of a weight."""
    torch.manual_seed(0)
    parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    x = randn(50, widths[0], seed=1).float()
    objective = posteriors.objective(nn.Sequential(*parts[:-1]), x, randint(2, 50, seed=2))
    posterior = posteriors.in_dtype(posteriors.random_posterior(objective, spread=0.05), torch.float32)
    assert is_local(objective, posterior)


def test_is_local_leaves_the_model_and_random_states_alone():
    from tests.helpers import same, snapshot

    model = posteriors.mlp()
    objective = posteriors.objective(model, randn(N, 5, seed=1), randint(3, N, seed=2))
    posterior = posteriors.random_posterior(objective)
    before = snapshot(model)
    assert is_local(objective, posterior)
    assert same(before, snapshot(model))


# --- the probability of an error --------------------------------------------------------------------------------------


def random_drawn(C, turned, samples=7):
    left = posteriors.orthonormal(C, 4) if turned else None
    mean, variance = randn(samples, C, seed=1), randn(samples, C, seed=2).exp() / 3
    return Drawn(mean, mean, torch.zeros_like(mean), variance, left), randint(C, samples, seed=3)


def covariance_of(drawn):
    left = torch.eye(drawn.mean.shape[1], dtype=F64) if drawn.left is None else drawn.left
    return torch.einsum("ck,nk,dk->ncd", left, drawn.variance, left)


def sum_over_pairs(drawn, labels):
    """Mean of sum_c P(o_c > o_y), by loops over samples and classes."""
    total, S = 0.0, covariance_of(drawn)
    for n, y in enumerate(labels.tolist()):
        for c in range(drawn.mean.shape[1]):
            if c != y:
                spread = float(S[n, c, c] + S[n, y, y] - 2 * S[n, c, y])
                total += (1 + erf(float(drawn.mean[n, c] - drawn.mean[n, y]) / sqrt(2 * spread))) / 2
    return total / len(labels)


def monte_carlo_error(drawn, labels, draws=100_000):
    """(classification error, its standard error) of outputs drawn from their dense covariances."""
    roots = torch.linalg.cholesky(covariance_of(drawn))
    noise = torch.randn(draws, *drawn.mean.shape, dtype=F64, generator=seeded(9))
    outputs = drawn.mean + torch.einsum("ncd,rnd->rnc", roots, noise)
    wrong = (outputs.argmax(2) != labels).double().mean(1)
    return float(wrong.mean()), float(wrong.std() / draws**0.5)


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
def test_of_two_classes_it_is_the_error(turned):
    drawn, labels = random_drawn(2, turned)
    found = float(error_probability(drawn, labels))
    error, stderr = monte_carlo_error(drawn, labels)
    assert found == pytest.approx(sum_over_pairs(drawn, labels), rel=1e-12)
    assert abs(found - error) < 4 * stderr < 0.005


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
def test_of_several_classes_it_is_the_sum_over_pairs_and_above_the_error(turned):
    drawn, labels = random_drawn(4, turned)
    found = float(error_probability(drawn, labels))
    assert found == pytest.approx(sum_over_pairs(drawn, labels), rel=1e-12)
    error, stderr = monte_carlo_error(drawn, labels, 20_000)
    assert found > error + 4 * stderr
    assert float(error_probability(drawn, labels.int())) == found


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
@pytest.mark.parametrize("C", [2, 4])
def test_its_gradient_is_that_of_differences(C, turned):
    drawn, labels = random_drawn(C, turned)

    def probability(mean, variance):
        return error_probability(replace(drawn, base=mean, variance=variance), labels)

    assert torch.autograd.gradcheck(probability, [t.clone().requires_grad_() for t in (drawn.mean, drawn.variance)])


def test_generators_are_seeded_from_all_of_their_stream():
    from hesscope.core.rng import stream

    first, second = (generator_of(stream(0, "a"), torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.randn(5, generator=first), torch.randn(5, generator=second))
    assert generator_of(stream(0, "b"), torch.device("cpu")).initial_seed() != first.initial_seed()


# --- every batch ------------------------------------------------------------------------------------------------------


class SometimesTwice(nn.Module):
    """In batches whose inputs are large a layer is used twice, with one weight for both."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(h) + self.last(h) if float(x.mean()) > 5 else self.last(h)


class BesideAMaskedOutput(nn.Module):
    """A weight is used beside its layer, and an output that never wins hides it behind a large number."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x):
        made = self.last(torch.relu(self.first(x))) + x @ self.first.weight.mean(0)[:, None]
        return torch.cat([made, torch.full_like(made[:, :1], -1e9)], dim=1)


def test_every_batch_is_looked_at():
    x, labels = randn(N, 5, seed=1), randint(3, N, seed=2)
    model = SometimesTwice().double()
    objective = hs.Objective(model, "cross_entropy", [(x, labels), (x + 20, labels)])
    posterior = posteriors.random_posterior(objective)
    assert not is_local(objective, posterior)
    risk = hs.layerwise.risk.Risk()
    with pytest.raises(DataError, match="called otherwise in batch 1"):
        draw_risk(objective, posterior, risk, N, True, 0)


def test_a_large_output_hides_nothing():
    x, labels = randn(N, 5, seed=1), randint(2, N, seed=2)
    objective = hs.Objective(BesideAMaskedOutput().double(), "cross_entropy", (x, labels))
    assert not is_local(objective, posteriors.random_posterior(objective))
