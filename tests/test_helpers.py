"""The statistical rule itself must be able to fail."""

import numpy as np
import pytest

from tests.helpers import PLANTED_BIAS, check_stderr, check_unbiased

REPLICATES, EXACT, STDERR = 900, np.array([2.0, 5.0]), np.array([0.15, 0.3])


def replicates():
    noise = np.random.default_rng(11).standard_normal((REPLICATES, 2))
    return EXACT + STDERR * noise, np.broadcast_to(STDERR, (REPLICATES, 2))


def test_accepts_an_unbiased_estimator_with_honest_errors():
    check_unbiased(*replicates(), EXACT)


@pytest.mark.parametrize("sign", [-1, 1])
def test_refuses_a_planted_bias_of_3_percent(sign):
    estimates, stderrs = replicates()
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(estimates * (1 + sign * PLANTED_BIAS), stderrs, EXACT)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_refuses_standard_errors_that_are_30_percent_off(factor):
    estimates, stderrs = replicates()
    with pytest.raises(AssertionError, match="standard error"):
        check_stderr(estimates, stderrs * factor)


def test_refuses_too_few_replicates_to_see_the_bias():
    estimates, stderrs = replicates()
    with pytest.raises(AssertionError, match="too few"):
        check_unbiased(estimates[:100], stderrs[:100], EXACT)
