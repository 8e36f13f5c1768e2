"""Divergences of Gaussians: the diagonal formula against the dense one in every basis, and against many digits."""

import mpmath
import numpy as np
import pytest
from scipy.stats import ortho_group

from hesscope.bounds import GaussianKL, dense_gaussian_kl, diagonal_gaussian_kl
from hesscope.core.errors import InputError
from hesscope.core.rng import stream


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_the_dense_formula_in_random_bases(seed):
    """N(m, Q diag(v) Q^T) from N(m0, lambda I), with variances over six orders of magnitude."""
    random = stream(seed, "random basis")
    d, prior = 12, float(np.exp(random.normal()))
    Q = ortho_group.rvs(d, random_state=random)
    mean, origin = random.normal(size=d), random.normal(size=d)
    v = prior * 10 ** random.uniform(-5, 1, d)
    found = diagonal_gaussian_kl(Q.T @ (mean - origin), v, prior)
    truth = dense_gaussian_kl(mean, Q * v @ Q.T, origin, prior * np.eye(d))
    assert found.total == pytest.approx(truth, rel=1e-9)
    assert found.displacement == pytest.approx(((mean - origin) ** 2).sum() / (2 * prior), rel=1e-12)
    assert found.total == found.displacement + found.variance


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_dense_formula_in_kronecker_bases(seed):
    """Variances [out, in] in the basis U (x) V of row-major matrices [out, in]: the shift is U^T (W - W0) V."""
    random = stream(seed, "kronecker basis")
    rows, columns, prior = 3, 5, 0.3
    U, V = ortho_group.rvs(rows, random_state=random), ortho_group.rvs(columns, random_state=random)
    W, origin = random.normal(size=(rows, columns)), random.normal(size=(rows, columns))
    v = prior * 10 ** random.uniform(-3, 0.5, (rows, columns))
    basis = np.kron(U, V)
    truth = dense_gaussian_kl(W.ravel(), basis * v.ravel() @ basis.T, origin.ravel(), prior * np.eye(rows * columns))
    assert diagonal_gaussian_kl(U.T @ (W - origin) @ V, v, prior).total == pytest.approx(truth, rel=1e-10)
    assert diagonal_gaussian_kl(W - origin, v, prior).displacement == pytest.approx(  # a turn keeps the distance
        diagonal_gaussian_kl(U.T @ (W - origin) @ V, v, prior).displacement, rel=1e-12
    )


def test_dense_formula_by_hand_and_against_a_density():
    """One dimension by its formula; three with a dense prior by the mean of the log ratio, of 200000 draws."""
    value = dense_gaussian_kl([1.0], [[2.0]], [0.5], [[3.0]])
    assert value == pytest.approx((2 / 3 + 0.25 / 3 - 1 + np.log(3 / 2)) / 2, rel=1e-14)
    random = stream(0, "dense")
    roots = random.normal(size=(2, 3, 3))
    S, P = (root @ root.T + np.eye(3) for root in roots)
    mean, origin = random.normal(size=3), random.normal(size=3)
    draws = random.multivariate_normal(mean, S, 200_000)

    def log_density(x, center, covariance):
        shift = x - center
        quadratic = (shift @ np.linalg.inv(covariance) * shift).sum(axis=1)
        return -(quadratic + np.linalg.slogdet(covariance)[1]) / 2

    ratio = log_density(draws, mean, S) - log_density(draws, origin, P)
    assert abs(ratio.mean() - dense_gaussian_kl(mean, S, origin, P)) < 4 * ratio.std() / len(ratio) ** 0.5


@pytest.mark.parametrize("prior", [1e-8, 0.37, 1e2])
@pytest.mark.parametrize("step", [0.0, 1e-12, -1e-9, 1e-4, -0.3, 0.49, 0.51, -0.51, -1 + 1e-9, 1e6])
def test_variances_are_accurate_near_the_prior(prior, step):
    """To 1e-12, also where v/lambda - 1 - ln(v/lambda) is of second order in the difference."""
    v = np.full(7, prior * (1 + step))
    found = diagonal_gaussian_kl(np.zeros(7), v, prior).variance
    with mpmath.workdps(60):
        x = mpmath.mpf(float(v[0])) / mpmath.mpf(prior)
        assert found == pytest.approx(float(7 * (x - 1 - mpmath.log(x)) / 2), rel=1e-12, abs=0)
    assert found >= 0


def test_many_and_single_precision_are_summed_in_double():
    """A million float32 numbers, whose float32 sum would be off by more than 1e-6."""
    random = stream(0, "single")
    shift = random.normal(size=(1000, 1000)).astype(np.float32)
    v = (0.1 * random.random((1000, 1000)) + 1e-3).astype(np.float32)
    found = diagonal_gaussian_kl(shift, v, 0.1)
    assert found.displacement == pytest.approx((shift.astype(np.float64) ** 2).sum() / 0.2, rel=1e-12)
    x = v.astype(np.float64) / 0.1
    assert found.variance == pytest.approx((x - 1 - np.log(x)).sum() / 2, rel=1e-12)


def test_of_a_divergence_that_overflows():
    assert diagonal_gaussian_kl([1e300], [1.0], 1e-300).total == np.inf
    assert diagonal_gaussian_kl([0.0], [1e300], 1e-300).total == np.inf
    assert diagonal_gaussian_kl([0.0], [1e-300], 1e100).variance == pytest.approx(200 * np.log(10) - 0.5 + 0, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: diagonal_gaussian_kl(np.zeros(2), np.ones(3), 1.0),
            r"shift and variance must have one shape, got \(2,\) and",
        ),
        (lambda: diagonal_gaussian_kl(np.zeros(2), np.array([1, 0]), 1.0), "variance must be positive, got 0.0"),
        (lambda: diagonal_gaussian_kl(np.array([np.inf]), np.ones(1), 1.0), "shift must be finite, got inf"),
        (lambda: diagonal_gaussian_kl(np.zeros(1), np.array([np.nan]), 1.0), "variance must not contain nan"),
        (
            lambda: diagonal_gaussian_kl(np.zeros(1), np.ones(1), 0.0),
            "prior_variance must be a positive, finite number, got 0",
        ),
        (
            lambda: dense_gaussian_kl(np.zeros((2, 1)), np.eye(2), np.zeros(2), np.eye(2)),
            "mean must be one-dimensional",
        ),
        (
            lambda: dense_gaussian_kl(np.zeros(2), np.eye(2), np.zeros(3), np.eye(2)),
            r"prior_mean must have the shape of mean",
        ),
        (
            lambda: dense_gaussian_kl(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)),
            r"covariance must have shape \(2, 2\), got",
        ),
        (
            lambda: dense_gaussian_kl(np.zeros(2), np.eye(2), np.zeros(2), [[1.0, 0.5], [0.0, 1.0]]),
            "prior_covariance must be symmetric",
        ),
        (
            lambda: dense_gaussian_kl(np.zeros(2), np.diag([1.0, -1.0]), np.zeros(2), np.eye(2)),
            "covariance must be positive definite",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_record_is_frozen():
    with pytest.raises(AttributeError):
        GaussianKL(1.0, 2.0).displacement = 3.0
