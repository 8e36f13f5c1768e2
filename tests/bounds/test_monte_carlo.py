"""The Monte Carlo bound: exactly tight where it is, and never violated more often than it may be."""

from math import sqrt

import numpy as np
import pytest
from scipy.stats import binom

from hesscope.bounds import monte_carlo_upper
from hesscope.core.errors import InputError
from hesscope.core.rng import stream


@pytest.mark.parametrize("draws", [1, 7, 150, 100_000])
@pytest.mark.parametrize("delta", [0.05, 1e-3])
def test_of_no_errors_it_is_exact(draws, delta):
    """All draws are 0 with probability (1 - p)^draws, which is delta at the bound: no bound can be smaller."""
    assert monte_carlo_upper(0.0, draws, delta) == pytest.approx(1 - delta ** (1 / draws), rel=1e-9)


@pytest.mark.parametrize("draws", [1, 10, 60])
@pytest.mark.parametrize("delta", [0.3, 0.05])
def test_coverage_of_bernoullis_is_exact_everywhere(draws, delta):
    """P(bound < p) by the binomial distribution, on 2000 values of p: at most delta, and nearly delta somewhere."""
    upper = np.array([monte_carlo_upper(k / draws, draws, delta) for k in range(draws + 1)])
    # Just above each bound is where most outcomes violate it.
    p = np.concatenate([np.linspace(0.001, 0.999, 2000), np.minimum(upper * (1 + 1e-9), 1.0)])
    violated = (binom.pmf(np.arange(draws + 1)[:, None], draws, p) * (upper[:, None] < p)).sum(axis=0)
    assert violated.max() <= delta * (1 + 1e-6)
    assert violated.max() >= 0.99 * delta


def test_coverage_of_variables_that_differ():
    """Bernoulli variables of different expectations, whose mean lies just above the bound of no errors: 20000 times."""
    draws, delta, times = 40, 0.05, 20_000
    random = stream(0, "monte carlo")
    expectations = random.uniform(0.5, 1.5, draws)
    expectations *= 1.001 * (1 - delta ** (1 / draws)) / expectations.mean()
    means = (random.random((times, draws)) < expectations).mean(axis=1)
    upper = {mean: monte_carlo_upper(float(mean), draws, delta) for mean in np.unique(means)}
    violated = np.mean([upper[mean] < expectations.mean() for mean in means])
    assert violated <= delta + 3 * sqrt(delta * (1 - delta) / times)
    assert violated >= 0.8 * delta  # unequal expectations make 40 zeros only a little less likely


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.2, 10, 0.05), r"mean must be a number in \[0, 1\], got 1.2"),
        ((0.2, 0, 0.05), "draws must be a positive integer, got 0"),
        ((0.2, 10, 2), r"delta must be a number in \(0, 1\), got 2"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        monte_carlo_upper(*arguments)
