"""The theorems themselves, on simulated problems whose true risks are known: how often are the bounds violated?

Each of the 300 problems of a test may violate its bound with probability delta = 0.05. More than 15 + 3 standard
deviations (26) of them would, if the bound holds, have a probability below 0.003; the seeds are fixed.
"""

from functools import partial
from math import log, sqrt

import numpy as np
import pytest
from scipy.special import logsumexp, ndtr, rel_entr

from hesscope.bounds import (
    DEFAULT_GRID,
    Certificate,
    catoni_bound,
    diagonal_gaussian_kl,
    maurer_bound,
    mcallester_bound,
    monte_carlo_upper,
)
from hesscope.core.records import Provenance
from hesscope.core.rng import stream

PROBLEMS, DELTA = 300, 0.05
MOST = DELTA * PROBLEMS + 3 * sqrt(PROBLEMS * DELTA * (1 - DELTA))

FORMS = [maurer_bound, mcallester_bound, catoni_bound]


def gibbs(errors, n, sharpness):
    """The posterior of weights exp(-sharpness * errors) over a uniform prior: (weights [N], KL in nats)."""
    logs = -sharpness * errors
    weights = np.exp(logs - logsumexp(logs))
    return weights, max(0.0, float(rel_entr(weights, 1 / len(weights)).sum()))


def violations(form, risks, n, sharpness, kl_weight=1.0, draws=None):
    """How many of the problems violate the bound, with the divergence multiplied by `kl_weight`.

    Hypotheses err independently with probability `risks` [N] on each of n samples. With `draws`, the posterior's risk
    on the samples is not known but estimated from so many drawn hypotheses, at the price of a fifth of delta.
    """
    found = 0
    for problem in range(PROBLEMS):
        random = stream(problem, "theorem", n, len(risks))
        errors = random.binomial(n, risks)
        weights, kl = gibbs(errors, n, sharpness)
        risk, delta = min(1.0, float(weights @ errors) / n), DELTA
        if draws is not None:
            drawn = random.choice(len(risks), draws, p=weights)
            risk, delta = monte_carlo_upper(float(errors[drawn].mean()) / n, draws, DELTA / 5), DELTA * 4 / 5
        found += form(risk, kl_weight * kl, n, delta) < float(weights @ risks)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 30, 200])
def test_gibbs_posteriors_of_fifty_hypotheses(form, sharpness, n):
    risks = stream(0, "risks").uniform(0.02, 0.6, 50)
    assert violations(form, risks, n, sharpness) <= MOST


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("draws", [None, 3, 50])
def test_many_useless_hypotheses(form, draws):
    """The best of 4000 fair coins on 50 samples errs a quarter of the times: only the divergence says why."""
    risks = np.full(4000, 0.5)
    assert violations(form, risks, 50, 30.0, draws=draws) <= MOST
    if draws is None:
        assert violations(form, risks, 50, 30.0, kl_weight=0.0) > 4 * MOST


def test_catoni_is_tight():
    """The best of N hypotheses, of such a risk that one of them makes no error with probability delta.

    Then a bound of one large scale is violated just as often as it may be: nothing of it can be left out. Where one
    makes no error 2.5 times as often, the bound already lies above the risk; one of 3 delta would not.
    """
    N, n = 1000, 60
    risks = np.full(N, 1.0001 * (1 - (DELTA / N) ** (1 / n)))
    assert 3 <= violations(partial(catoni_bound, scales=(40.0,)), risks, n, 100.0) <= MOST
    risks = np.full(N, 1 - (2.5 * DELTA / N) ** (1 / n))
    assert violations(partial(catoni_bound, scales=(40.0,)), risks, n, 100.0) <= MOST


@pytest.mark.parametrize(("form", "weight"), [(partial(catoni_bound, scales=(40.0,)), 0.75), (maurer_bound, 0.5)])
def test_the_divergence_is_needed(form, weight):
    """One of 4000 hypotheses makes no error with probability 1/4: a part of the divergence would not be enough."""
    N, n = 4000, 10
    risks = np.full(N, 1 - (0.3 / N) ** (1 / n))
    assert violations(form, risks, n, 100.0) <= MOST
    assert violations(form, risks, n, 100.0, kl_weight=weight) > 2 * MOST


def memorizing(random, d, n, spread):
    """A certificate of labels learned by heart, and the true risk of its Gibbs classifier.

    Inputs are one of d directions, drawn uniformly; labels are fair coins, so that every classifier errs half of the
    times. A classifier sign(w_i) with w from N(m, spread^2 I) errs on a label y with probability Phi(-y m_i / spread).
    """
    which, labels = random.integers(0, d, n), random.choice([-1, 1], n)
    mean = np.sign(np.bincount(which, labels, minlength=d))  # what most of the direction's labels said; 0 if unseen
    errs = ndtr(-labels * mean[which] / spread)
    draws = 100
    risks = [float((labels * (mean + spread * random.normal(size=d))[which] < 0).mean()) for _ in range(draws)]
    variance = np.full(d, spread**2)
    prior = DEFAULT_GRID.values[DEFAULT_GRID.nearest(float((variance + mean**2).mean()))]
    certificate = Certificate(
        empirical_risk=float(np.mean(risks)),
        draws=draws,
        risk_stderr=float(np.std(risks, ddof=1)) / sqrt(draws),
        n=n,
        kl_by_group={"w": diagonal_gaussian_kl(mean, variance, prior)},
        prior_variances={"w": prior},
        grid_size=len(DEFAULT_GRID),
        delta=DELTA,
        delta_monte_carlo=DELTA / 5,
        classes=2,
        provenance=Provenance(engine="simulation", dtype="float64", device="cpu"),
    )
    return certificate, float(errs.mean())


@pytest.mark.parametrize(("d", "n", "spread"), [(100, 60, 0.3), (300, 150, 0.7), (20, 200, 1.0)])
def test_certificates_of_random_labels(d, n, spread):
    """Gaussian posteriors with a prior variance from the grid and Monte Carlo risks: the truth is exactly 1/2."""
    bounds, without_kl, too_small = [], 0, 0
    for problem in range(PROBLEMS):
        certificate, exact = memorizing(stream(problem, "memorizing", d), d, n, spread)
        bounds.append(certificate.bound)
        too_small += certificate.risk_upper < exact
        without_kl += maurer_bound(certificate.risk_upper, 0.0, n, certificate.delta_pac_bayes) < 0.5
    assert sum(bound < 0.5 for bound in bounds) <= MOST
    assert too_small <= DELTA / 5 * PROBLEMS + 3 * sqrt(PROBLEMS * DELTA / 5)
    if d > n:  # then next to nothing but the divergence tells what was learned by heart from what was understood
        assert without_kl > MOST


def test_gibbs_is_what_it_says():
    """The posterior's divergence by hand: all weight on one of N hypotheses costs ln N, equal weights cost nothing."""
    assert gibbs(np.array([0, 9, 9, 9]), 10, 100.0)[1] == pytest.approx(log(4), rel=1e-12)
    assert gibbs(np.array([3, 3, 3, 3]), 10, 100.0)[1] == pytest.approx(0, abs=1e-13)
