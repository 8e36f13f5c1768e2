"""The bound beside the truth: which of two photographs a patch is from, over a population that can be enumerated.

A network of 64 hidden units, trained on 40,000 patches that were drawn independently; its risk over all 531,720 patches
is known. With labels that mean nothing the risk is 1/2, and no bound may be below it.
"""

import copy
import math

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.bounds import maurer_bound
from hesscope.core.rng import permutation, stream
from hesscope.data import patch_population, randomly_labelled
from hesscope.layerwise import laplace, network_risk, pac_bayes, stochastic_risk

N = 40_000
CLOSED = [kind for kind in hs.layerwise.POSTERIORS if kind not in pac_bayes.OPTIMIZED]

# Set beside the truth.
BESIDE = ("diagonal", "kronecker")


def trained(data, epochs=3, rate=0.01):
    """(objective of the trained network, the network before)."""
    model = hs.models.mlp((192, 64, 2), bias=True)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for epoch in range(epochs):
        for rows in permutation(len(data), stream(0, "patches", epoch)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.inputs[rows]), data.labels[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return hs.Objective(model, "cross_entropy", (data.inputs, data.labels)), before


@pytest.fixture(scope="module")
def population():
    return patch_population(dtype=torch.float32)


@pytest.fixture(scope="module")
def true_labels(population):
    return trained(population.draw(N, 1))


@pytest.fixture(scope="module")
def random_labels(population):
    return trained(randomly_labelled(population.draw(N, 2), 3))


@pytest.fixture(scope="module", autouse=True)
def less_to_choose():
    """A few strengths, one pass over the samples for each: what is left out would only make the bounds smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laplace, "STRENGTHS", (1.0, 4.0, 16.0))
        patch.setattr(laplace, "FINER", ())
        patch.setattr(laplace, "SOUNDINGS", 1)
        patch.setattr(pac_bayes, "CHOOSING_DRAWS", {True: 5000, False: 4})
        yield


@pytest.fixture(scope="module")
def bounds(true_labels):
    return {kind: hs.pac_bayes_bound(*true_labels, kind, draws=N) for kind in CLOSED}


@pytest.fixture(scope="module")
def everything(population, true_labels):
    """The same network on the whole population, 60,000 patches at a time: as few as are in memory together."""
    model = true_labels[0].model
    return lambda: (hs.Objective(model, "cross_entropy", batch) for batch in population.batches(60_000))


@pytest.fixture(scope="module")
def true_risks(everything, bounds):
    """Of the Gibbs classifiers, and of the network itself, over all patches."""
    totals, counted = dict.fromkeys([*BESIDE, "network"], 0.0), 0
    for part in everything():
        n = part.num_terms
        for kind in BESIDE:
            totals[kind] += n * stochastic_risk(part, bounds[kind].distribution, n, seed=counted).value
        totals["network"] += n * network_risk(part)
        counted += n
    assert counted == 531_720
    return {kind: total / counted for kind, total in totals.items()}


@pytest.mark.parametrize("kind", BESIDE)
def test_above_the_true_risk_and_not_vacuous(kind, bounds, true_risks):
    found = bounds[kind]
    assert true_risks[kind] + 0.02 < found.bound < 0.5
    assert found.certificate.n == N
    assert found.certificate.draws == N
    # The Gibbs classifier errs on the population about as often as on the samples.
    assert abs(true_risks[kind] - found.empirical_risk) < 0.02


def test_what_the_kronecker_basis_buys(bounds):
    kronecker, diagonal = bounds["kronecker"], bounds["diagonal"]
    error = math.hypot(kronecker.certificate.bound_stderr, diagonal.certificate.bound_stderr)
    assert kronecker.bound < diagonal.bound - 4 * error
    assert diagonal.bound < bounds["isotropic"].bound


def test_the_network_learned(true_labels, true_risks):
    assert network_risk(true_labels[0]) < 0.05
    assert true_risks["network"] < 0.05


@pytest.mark.parametrize("kind", [*CLOSED, "kronecker_optimized"])
def test_random_labels_are_not_predicted(kind, random_labels):
    found = hs.pac_bayes_bound(*random_labels, kind, draws=N, steps=30)
    assert found.bound >= 0.5
    assert found.certificate.guessing_rate == 0.5
    assert found.network_risk < 0.5  # something was learned by heart


@pytest.fixture(scope="module")
def by_heart(population):
    return trained(randomly_labelled(population.draw(1000, 4), 5), 150, 0.02)


@pytest.mark.parametrize("kind", CLOSED)
def test_random_labels_learned_by_heart(kind, by_heart, monkeypatch):
    """A posterior close to a network that knows a part of them: only the divergence says that it knows nothing."""
    monkeypatch.setattr(laplace, "STRENGTHS", (1e5,))
    monkeypatch.setattr(laplace, "SOUNDINGS", 0)
    found = hs.pac_bayes_bound(*by_heart, kind, draws=5000)
    certificate = found.certificate
    assert found.bound >= 0.5
    assert found.empirical_risk < 0.4
    assert maurer_bound(certificate.risk_upper, 0.0, certificate.n, certificate.delta_pac_bayes) < 0.46
