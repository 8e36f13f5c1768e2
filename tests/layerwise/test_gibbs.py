"""The risk of networks drawn from a posterior: exact where it is known, and honest standard errors."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

import hesscope as hs
from hesscope.core.errors import DataError, InputError
from hesscope.layerwise import gibbs, risk, stochastic_risk
from hesscope.layerwise.gibbs import LOCAL_DRAWS, NETWORK_DRAWS, draw_risk
from hesscope.layerwise.risk import Risk
from tests.helpers import F64, call_flat, check_stderr, cut, randint, randn, randomized, same, snapshot
from tests.layerwise import posteriors

N = 12
X, LABELS = randn(N, 5, seed=1), randint(2, N, seed=2)
MANY = 1000  # copies of the samples, so that a pass is many draws


def copies(x, y, count=MANY):
    return x.repeat(count, *[1] * (x.ndim - 1)), y.repeat(count)


def exact_risk(model, posterior, x, y):
    """Of a linear network with two classes: the outputs' difference is normal, by the dense covariance."""
    mean, S = posteriors.dense_mean(model, posterior), posteriors.dense_covariance(model, posterior)
    J = torch.func.jacrev(lambda theta: call_flat(model, theta, x))(mean)
    margin = J[:, 1] - J[:, 0]  # [N, P]
    upper = norm.cdf((margin @ mean).numpy() / torch.einsum("np,pq,nq->n", margin, S, margin).sqrt().numpy())
    return float(np.where(y.numpy() == 1, 1 - upper, upper).mean())


@pytest.mark.parametrize("local", [True, False], ids=["own networks", "whole networks"])
def test_risk_of_a_linear_network_is_exact(local):
    model = randomized(nn.Linear(5, 2))
    objective = posteriors.objective(model, *copies(X, LABELS, MANY if local else 1))
    posterior = posteriors.random_posterior(objective)
    exact = exact_risk(model, posterior, X, LABELS)
    found = draw_risk(objective, posterior, Risk(), 120_000 if local else 2000, local, 0, "test")
    assert 0.1 < exact < 0.9
    assert abs(found.mean - exact) < 4 * found.stderr < 0.03
    assert found.draws == (120_000 if local else 2000)


@pytest.mark.parametrize("loss_bound", [None, 1.5], ids=["error", "bounded loss"])
@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
def test_own_networks_have_the_risk_of_whole_networks(turned, loss_bound):
    y = randint(3, N, seed=2)
    objective = posteriors.objective(posteriors.mlp(), X, y)
    many = posteriors.objective(posteriors.mlp(), *copies(X, y))
    posterior = posteriors.random_posterior(objective, turned)
    chosen = Risk(loss_bound)
    own = draw_risk(many, posterior, chosen, 100_000, True, 0, "own")
    whole = draw_risk(objective, posterior, chosen, 2000, False, 0, "whole")
    error = np.hypot(own.stderr, whole.stderr)
    assert abs(own.mean - whole.mean) < 4 * error < 0.02


def test_standard_errors_are_those_of_replicates():
    model = posteriors.mlp(widths=(5, 7, 2))
    objective = posteriors.objective(model, X, LABELS)
    posterior = posteriors.random_posterior(objective)
    whole = [draw_risk(objective, posterior, Risk(), 24, False, seed, "whole") for seed in range(150)]
    check_stderr([each.mean for each in whole], [each.stderr for each in whole])
    many = posteriors.objective(model, *copies(X, LABELS, 50))
    own = [draw_risk(many, posterior, Risk(), 600, True, seed, "own") for seed in range(400)]
    empirical = np.std([each.mean for each in own], ddof=1)
    reported = np.mean([each.stderr for each in own])
    # Samples differ in their risks, which is counted as noise: never below, and here by less than a half above.
    assert 0.85 * empirical < reported < 1.8 * empirical


def test_own_networks_are_drawn_in_whole_passes():
    objective = hs.Objective(posteriors.mlp(widths=(5, 7, 2)), "cross_entropy", cut(X, LABELS))
    posterior = posteriors.random_posterior(objective)
    for asked, drawn in ((1, N), (N, N), (N + 1, 2 * N), (100, 108)):
        assert draw_risk(objective, posterior, Risk(), asked, True, 0, "own").draws == drawn
    assert draw_risk(objective, posterior, Risk(), 5, False, 0, "whole").draws == 5
    single = draw_risk(objective, posterior, Risk(), 1, False, 0, "whole")
    assert single.draws == 1 and np.isnan(single.stderr)


@pytest.mark.parametrize("local", [True, False], ids=["own networks", "whole networks"])
def test_a_share_of_the_samples_is_drawn_at_random(local):
    """Half of each batch of any size, another half in every pass: the mean stays that of all."""
    model = randomized(nn.Linear(5, 2))
    x, y = copies(X, LABELS, 50) if local else (X, LABELS)
    objective = hs.Objective(
        model, "cross_entropy", [(x[: len(x) // 3], y[: len(x) // 3]), (x[len(x) // 3 :], y[len(x) // 3 :])]
    )
    posterior = posteriors.random_posterior(objective)
    found = draw_risk(objective, posterior, Risk(), 30_000 if local else 1500, local, 0, "test", share=0.5)
    assert found.draws == (30_000 if local else 1500)
    assert abs(found.mean - exact_risk(model, posterior, X, LABELS)) < 4 * found.stderr < 0.04


class Branching(nn.Module):
    """The network inside, with control flow that depends on values: vmap cannot run it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        outputs = self.inner(x)
        return outputs if outputs.sum().item() < 1e9 else 2 * outputs


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_networks_drawn_together_are_those_of_a_loop(name, monkeypatch):
    """The network of vmap, the same where vmap fails, and by hand; also where batches are cut."""
    plain = posteriors.mlp() if name == "mlp" else posteriors.convolutional()
    x, y = X if name == "mlp" else posteriors.images(N), randint(3, N, seed=2)
    count, failures = 11, []  # not a multiple of those that are drawn at once
    vmap = torch.func.vmap

    def watched(function):
        def run(*args):
            try:
                return vmap(function)(*args)
            except Exception as error:
                failures.append(error)
                raise

        return run

    monkeypatch.setattr(torch.func, "vmap", watched)
    objective = hs.Objective(plain, "cross_entropy", cut(x, y))
    posterior = posteriors.random_posterior(objective)
    found = draw_risk(objective, posterior, Risk(), count, False, 3, "test")
    assert not failures
    looped = hs.Objective(Branching(plain), "cross_entropy", cut(x, y))
    slow = draw_risk(looped, posteriors.random_posterior(looped), Risk(), count, False, 3, "test")
    assert failures
    monkeypatch.setattr(risk, "CHUNK", 3)
    assert found == slow == draw_risk(objective, posterior, Risk(), count, False, 3, "test")
    generator = gibbs.generator_of(gibbs.stream(3, "gibbs", "test"), torch.device("cpu"))
    thetas = [posterior.draw(generator) for _ in range(count)]
    risks = [float((call_flat(plain, theta, x).argmax(1) != y).double().mean()) for theta in thetas]
    assert len(set(risks)) > 1
    assert found.mean == pytest.approx(np.mean(risks), rel=1e-14)
    assert found.stderr == pytest.approx(np.std(risks, ddof=1) / count**0.5, rel=1e-12)


@pytest.mark.parametrize("local", [True, False], ids=["own networks", "whole networks"])
def test_streams_are_named(local):
    objective = hs.Objective(posteriors.mlp(), "cross_entropy", cut(X, randint(3, N, seed=2)))
    posterior = posteriors.random_posterior(objective)

    def found(seed, *path):
        return draw_risk(objective, posterior, Risk(1.5), 48, local, seed, *path)

    assert found(0, "a", 1) == found(0, "a", 1)
    assert len({found(0, "a", 1).mean, found(1, "a", 1).mean, found(0, "b", 1).mean, found(0, "a", 2).mean}) == 4


@pytest.mark.parametrize("local", [True, False], ids=["own networks", "whole networks"])
def test_outputs_that_overflow_are_errors(local):
    """Not chances: a network whose outputs are infinite classifies nothing."""
    objective = posteriors.objective(posteriors.mlp(widths=(5, 7, 7, 3)), X, randint(3, N, seed=2))
    posterior = posteriors.random_posterior(objective, spread=1e140)
    assert draw_risk(objective, posterior, Risk(), 12, local, 0, "test").mean == 1.0


# --- the public form --------------------------------------------------------------------------------------------------


def test_stochastic_risk_of_held_out_data():
    model = randomized(nn.Linear(5, 2))
    objective = posteriors.objective(model, X, LABELS)
    posterior = posteriors.random_posterior(objective)
    x, y = randn(40, 5, seed=11), randint(2, 40, seed=12)
    held_out = posteriors.objective(model, *copies(x, y))
    before = snapshot(model)
    found = stochastic_risk(held_out, posterior, draws=40_000, seed=5)
    assert same(snapshot(model), before)
    assert abs(found.value - exact_risk(model, posterior, x, y)) < 4 * found.stderr < 0.02
    assert (found.probes, found.degrees, found.converged, found.samples) == (40_000, 39_999, True, None)
    assert found.message == "40,000 draws"
    assert found.provenance.engine == "a network for every sample (local reparametrization)"
    assert (found.provenance.seed, found.provenance.data_fingerprint) == (5, held_out.data_fingerprint)
    assert stochastic_risk(held_out, posterior, draws=40_000, seed=5).value == found.value
    assert stochastic_risk(held_out, posterior, draws=40_000, seed=6).value != found.value


def test_stochastic_risk_draws_as_many_as_documented():
    local = posteriors.objective(randomized(nn.Linear(5, 2)), *copies(X, LABELS))
    found = stochastic_risk(local, posteriors.random_posterior(local))
    assert found.probes == -(-LOCAL_DRAWS // (MANY * N)) * MANY * N
    whole = posteriors.objective(posteriors.convolutional(), posteriors.images(N), LABELS)
    found = stochastic_risk(whole, posteriors.random_posterior(whole))
    assert (found.probes, found.provenance.engine) == (NETWORK_DRAWS, "whole networks")
    told = f"{LOCAL_DRAWS:,} of samples' own networks, or {NETWORK_DRAWS} whole networks"
    assert told in stochastic_risk.__doc__


def test_stochastic_risk_of_a_bounded_loss():
    y = randn(N, 2, seed=3)
    objective = posteriors.objective(randomized(nn.Linear(5, 2)), X.repeat(MANY, 1), y.repeat(MANY, 1), "mse")
    posterior = posteriors.random_posterior(objective)
    found = stochastic_risk(objective, posterior, draws=60_000, loss_bound=1e9)
    mean = posteriors.dense_mean(objective.model, posterior)
    S = posteriors.dense_covariance(objective.model, posterior)
    J = torch.func.jacrev(lambda theta: call_flat(objective.model, theta, X))(mean)
    spread = torch.einsum("ncp,pq,ncq->nc", J, S, J)
    exact = float(((call_flat(objective.model, mean, X) - y).square() + spread).mean()) / 1e9
    assert abs(found.value - exact) < 4 * found.stderr < 0.05 * exact


def test_bad_input_of_stochastic_risk():
    objective = posteriors.objective(randomized(nn.Linear(5, 2)), X, LABELS)
    posterior = posteriors.random_posterior(objective)
    other = posteriors.objective(posteriors.mlp(), X, LABELS)
    narrow = posteriors.objective(randomized(nn.Linear(5, 2)).float(), X.float(), LABELS)
    with pytest.raises(
        InputError, match=r"distribution is of 12 parameters \(float64\).* the objective's 66 \(float64"
    ):
        stochastic_risk(other, posterior)
    with pytest.raises(InputError, match=r"12 parameters \(float64\) .* or dtype than the objective's 12 \(float32\)"):
        stochastic_risk(narrow, posterior)
    with pytest.raises(InputError, match=r"distribution must be that of a PacBayesBound .*, got NoneType"):
        stochastic_risk(objective, None)
    with pytest.raises(InputError, match="draws must be a positive integer, got 0"):
        stochastic_risk(objective, posterior, draws=0)
    mse = posteriors.objective(randomized(nn.Linear(5, 2)), X, randn(N, 2, seed=3), "mse")
    with pytest.raises(InputError, match=r"pass loss_bound=B"):
        stochastic_risk(mse, posterior)
    ignored = posteriors.objective(randomized(nn.Linear(5, 2)), X, LABELS.clone().index_fill(0, torch.arange(2), -100))
    with pytest.raises(DataError, match="some labels are ignored"):
        stochastic_risk(ignored, posterior, draws=10)


def test_dtype_of_the_network_is_kept():
    x, y = copies(X, LABELS)
    objective = posteriors.objective(posteriors.mlp(widths=(5, 7, 2)).float(), x.float(), y)
    posterior = posteriors.in_dtype(posteriors.random_posterior(objective), torch.float32)
    wide = posteriors.objective(posteriors.mlp(widths=(5, 7, 2)), x, y)
    assert posterior.draw(torch.Generator()).dtype == torch.float32
    first = stochastic_risk(objective, posterior, draws=60_000)
    second = stochastic_risk(wide, posteriors.in_dtype(posterior, F64), draws=60_000, seed=1)
    assert abs(first.value - second.value) < 4 * np.hypot(first.stderr, second.stderr)
    assert first.provenance.dtype == "float32"
