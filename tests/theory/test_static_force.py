"""The static force against MATH.md's numbers and against Hessians of real networks at initialization."""

import numpy as np
import pytest

from hesscope.core.errors import InputError
from hesscope.theory import static_force


@pytest.mark.parametrize(("gamma", "limit"), [(0.1, 0.570797), (0.5, 0.910028), (1.0, 1.079643)])
def test_hidden_limits_of_math_md(gamma, limit):
    assert static_force("one_hidden", "cross_entropy", 10, gamma, 8).limit_hidden == pytest.approx(limit, abs=5e-7)


def test_output_limit_of_math_md():
    assert static_force("one_hidden", "cross_entropy", 10, 1.0, 8).limit_output == pytest.approx(1.83351, abs=5e-6)


@pytest.mark.parametrize(("C", "hidden", "output"), [(10, 0.499, 1.65), (100, 0.820, 1.67)])
def test_finite_classes_of_math_md(C, hidden, output):
    """MATH.md states these simulated values to 2 %; 3 of our standard errors come on top."""
    force = static_force("one_hidden", "cross_entropy", C, 1.0, 8)
    assert abs(C * force.hidden_ratio - hidden) < 0.02 * hidden + 3 * C * force.hidden_stderr
    assert abs(C**2 * force.output_ratio - output) < 0.02 * output + 3 * C**2 * force.output_stderr
    assert force.hidden_stderr < 0.02 * force.hidden_ratio
    assert force.output_stderr < 0.02 * force.output_ratio


def test_squared_error_in_closed_form():
    force = static_force("one_hidden", "mse", 10, 0.5, 8)
    assert force.hidden_ratio == pytest.approx((1 / 16 + 0.125) / (0.25 + 0.25) / 12, rel=1e-14)
    assert (force.output_ratio, force.hidden_stderr, force.output_stderr, force.limit_output) == (0.0, 0.0, 0.0, 0.0)


def simulated_energies(loss, C, m, d, N, rng):
    """Mean off-diagonal and diagonal energies of H_ww and H_vv of one real network at initialization.

    From MATH.md section 2 in NumPy, no hesscope: H_ij = (1/N) sum_n lambda_n^ij x_n x_n^T, energies in Gram form.
    """
    x, W, V = rng.standard_normal((N, d)), rng.standard_normal((m, d)) / d**0.5, rng.standard_normal((C, m)) / m**0.5
    z = x @ W.T
    h = np.maximum(z, 0)
    p = np.exp(h @ V.T)
    p /= p.sum(axis=1, keepdims=True)
    A = np.broadcast_to(np.eye(C), (N, C, C)) if loss == "mse" else p[:, :, None] * (np.eye(C) - p[:, None, :])
    hidden = np.einsum("ci,ncd,dj,ni,nj->ijn", V, A, V, z > 0, z > 0, optimize=True)
    means = []
    for weights, gram in ((hidden, (x @ x.T) ** 2), (A.transpose(1, 2, 0), (h @ h.T) ** 2)):
        flat = weights.reshape(-1, N)
        energies = np.einsum("kn,nm,km->k", flat, gram, flat, optimize=True).reshape(len(weights), -1) / N**2
        on = np.trace(energies) / len(weights)
        means.append(((energies.sum() / len(weights) - on) / (len(weights) - 1), on))
    return np.asarray(means)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_real_networks_at_initialization(loss):
    """Ratios of mean energies over 4000 networks at d = 64, N = 128; finite d and N shift them by O(1/d)."""
    C, m, d, N = 5, 4, 64, 128
    rng = np.random.default_rng(0)
    energies = np.stack([simulated_energies(loss, C, m, d, N, rng) for _ in range(4000)])
    force = static_force("one_hidden", loss, C, d / N, m)
    predicted = [(force.hidden_ratio, force.hidden_stderr), (force.output_ratio, force.output_stderr)]
    for layer, (ratio, stderr) in enumerate(predicted):
        off, on = energies[:, layer].T
        measured = off.mean() / on.mean()
        spread = (off - measured * on).std(ddof=1) / on.mean() / len(off) ** 0.5
        assert spread <= 0.02 * measured  # fine enough to see an error of 10 %
        assert abs(measured - ratio) <= 3 * np.hypot(spread, stderr) + 2 / d * ratio


def test_equal_seeds_give_equal_numbers():
    first, second, other = (static_force("one_hidden", "cross_entropy", 3, 1.0, 4, seed=seed) for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": 1}, "classes must be at least 2"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"width": 2}, "width >= 3"),
        ({"model": "convolution"}, "model must be one of"),
        ({"loss": "hinge"}, "loss must be one of"),
    ],
)
def test_bad_input(changes, words):
    arguments = {"model": "one_hidden", "loss": "cross_entropy", "classes": 10, "gamma": 1.0, "width": 8, **changes}
    with pytest.raises(InputError, match=words):
        static_force(**arguments)
