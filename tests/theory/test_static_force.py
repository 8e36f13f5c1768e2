"""The static force against MATH.md's numbers and against Hessians of real networks at initialization."""

from math import e, erf, exp, inf, pi

import numpy as np
import pytest

from hesscope.core.errors import InputError
from hesscope.theory import static_force
from hesscope.theory.ensemble import describe
from hesscope.theory.static_limits import limit_hidden, limit_output, squared_error_hidden
from hesscope.theory.static_samples import SampledRatio, sample_ratios

C, M = 5, 4
USUAL = (64, 128)
ACTIVATIONS = ["relu", "tanh", "gelu"]


def predict(model="one_hidden", loss="cross_entropy", classes=10, gamma=1.0, width=8, **more):
    return static_force(model, loss, classes, gamma, width, **more)


@pytest.mark.parametrize(("gamma", "limit"), [(0.1, 0.570797), (0.5, 0.910028), (1.0, 1.079643)])
def test_hidden_limits_of_math_md(gamma, limit):
    assert limit_hidden(gamma, 8, "relu", 1.0, 1.0) == pytest.approx(limit, abs=5e-7)


def test_output_limit_of_math_md():
    assert limit_output(8, "relu", 1.0, 1.0) == pytest.approx(1.83351, abs=5e-6)


@pytest.mark.parametrize(
    ("classes", "hidden", "output"), [(10, 0.499, 1.65), (100, 0.820, 1.67), (1000, 1.02, 1.75), (4000, None, 1.78)]
)
def test_finite_classes_of_math_md(classes, hidden, output):
    """MATH.md states the simulated values of the output layer to 2 %; 3 of our standard errors come on top."""
    force = predict(classes=classes)
    if hidden is not None:
        assert abs(classes * force.hidden_ratio - hidden) < 0.02 * hidden + 3 * classes * force.hidden_stderr
    assert abs(classes**2 * force.output_ratio - output) < 0.02 * output + 3 * classes**2 * force.output_stderr
    assert force.hidden_stderr <= 0.02 * force.hidden_ratio
    assert force.output_stderr <= 0.02 * force.output_ratio
    assert force.limit_hidden == limit_hidden(1.0, 8, "relu", 1.0, 1.0)
    assert force.limit_output == limit_output(8, "relu", 1.0, 1.0)


# C = 100 as corrected: MATH.md prints 1.83612693 and 2.07641525, which its own table of moments does not give.
LINEAR = [
    (0.5, 10, 1.65963476),
    (0.5, 100, 1.83612695),
    (0.5, 1000, 1.96718088),
    (0.5, 131072, 1.98974569),
    (1.0, 10, 1.82563273),
    (1.0, 100, 2.07640415),
    (1.0, 1000, 2.22985028),
    (1.0, 131072, 2.25595038),
]


@pytest.mark.parametrize(("gamma", "classes", "expected"), LINEAR)
def test_linear_model_of_math_md(gamma, classes, expected):
    force = predict("linear", classes=classes, gamma=gamma, width=None)
    assert classes**2 * force.output_ratio == pytest.approx(expected, abs=6e-9)
    assert (force.hidden_ratio, force.hidden_stderr, force.limit_hidden, force.output_stderr) == (None, None, None, 0)
    assert force.limit_output == pytest.approx((1 + gamma * e**2) / (1 + gamma * e), rel=1e-14)


def test_linear_limits():
    assert predict("linear", classes=2, width=None).output_ratio == pytest.approx(1, rel=1e-12)
    assert predict("linear", "mse", width=None).output_ratio == 0
    for scale in (0.5, 1.5):
        force = predict("linear", classes=10**7, gamma=0.3, width=None, output_scale=scale)
        assert force.limit_output == pytest.approx((1 + 0.3 * exp(2 * scale**2)) / (1 + 0.3 * exp(scale**2)))
        assert 10**14 * force.output_ratio == pytest.approx(force.limit_output, rel=1e-3)


def test_squared_error_in_closed_form():
    force = predict(loss="mse", gamma=0.5)
    assert force.hidden_ratio == pytest.approx((1 / 16 + 0.125) / (0.25 + 0.25) / 12, rel=1e-14)
    assert force.limit_hidden == pytest.approx(12 * force.hidden_ratio)
    assert (force.output_ratio, force.hidden_stderr, force.output_stderr, force.limit_output) == (0.0, 0.0, 0.0, 0.0)


def activate(name, z):
    """Value, slope and bend, written out apart from the library."""
    if name == "relu":
        return np.maximum(z, 0), (z > 0) * 1.0, 0 * z
    if name == "tanh":
        return np.tanh(z), np.cosh(z) ** -2, -2 * np.tanh(z) * np.cosh(z) ** -2
    below, density = (1 + np.vectorize(erf)(z / 2**0.5)) / 2, np.exp(-(z**2) / 2) / (2 * pi) ** 0.5
    return z * below, below + z * density, 2 * density - z**2 * density


def simulated_energies(model, loss, activation, scales, sizes, rng):
    """Mean off-diagonal and diagonal energies of H_ww and H_vv of one real network at initialization, [layers, 2].

    From MATH.md section 2 in NumPy, no hesscope: H_ij = (1/N) sum_n lambda_n^ij x_n x_n^T, energies in Gram form.
    """
    D, N = sizes
    x, labels = rng.standard_normal((N, D)), rng.integers(0, C, N)
    if model == "linear":
        h, V = x, rng.standard_normal((C, D)) * scales[1] / D**0.5
    else:
        V, W = rng.standard_normal((C, M)) * scales[1] / M**0.5, rng.standard_normal((M, D)) * scales[0] / D**0.5
        h, slope, bend = activate(activation, x @ W.T)
    o = h @ V.T
    p = np.exp(o) / np.exp(o).sum(axis=1, keepdims=True)
    residual = (o if loss == "mse" else p) - np.eye(C)[labels]
    A = np.broadcast_to(np.eye(C), (N, C, C)) if loss == "mse" else p[:, :, None] * (np.eye(C) - p[:, None, :])
    layers = [(A.transpose(1, 2, 0), (h @ h.T) ** 2)]
    if model != "linear":
        hidden = np.einsum("ci,ncd,dj,ni,nj->ijn", V, A, V, slope, slope, optimize=True)
        hidden[range(M), range(M)] += (residual @ V * bend).T
        layers.insert(0, (hidden, (x @ x.T) ** 2))
    means = []
    for weights, gram in layers:
        flat = weights.reshape(-1, N)
        energies = ((flat @ gram) * flat).sum(axis=1).reshape(len(weights), -1) / N**2
        on = np.trace(energies) / len(weights)
        means.append(((energies.sum() / len(weights) - on) / (len(weights) - 1), on))
    return np.asarray(means)


CASES = [("linear", "cross_entropy", "relu", (1.0, 1.3), USUAL), ("one_hidden", "mse", "tanh", (1.0, 1.0), (10, 5))]
CASES += [("one_hidden", loss, name, (1.0, 1.0), USUAL) for loss in ("cross_entropy", "mse") for name in ACTIVATIONS]
CASES += [("one_hidden", "cross_entropy", "relu", (0.8, 1.5), USUAL), ("one_hidden", "mse", "gelu", (1.6, 0.7), USUAL)]


@pytest.mark.parametrize(("model", "loss", "activation", "scales", "sizes"), CASES)
def test_real_networks_at_initialization(model, loss, activation, scales, sizes):
    """Ratios of mean energies over 2000 networks, at exactly the predicted d and N."""
    rng = np.random.default_rng(0)
    energies = np.stack([simulated_energies(model, loss, activation, scales, sizes, rng) for _ in range(2000)])
    force = predict(
        model,
        loss,
        C,
        None,
        M,
        activation=activation,
        hidden_scale=scales[0],
        output_scale=scales[1],
        inputs=sizes[0],
        samples=sizes[1],
    )
    predicted = [(force.hidden_ratio, force.hidden_stderr), (force.output_ratio, force.output_stderr)]
    predicted = predicted[1:] if model == "linear" else predicted
    for layer, (ratio, stderr) in enumerate(predicted):
        measured = SampledRatio.of(energies[:, layer])
        if ratio == 0:
            assert measured.value == 0
            continue
        assert measured.stderr <= 0.03 * measured.value  # fine enough to see an error of 15 %
        assert abs(measured.value - ratio) <= 4 * np.hypot(measured.stderr, stderr)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_squared_error_s_closed_form_against_sampling(activation):
    ensemble = describe("one_hidden", "mse", 6, 0.7, 5, activation, 1.2, 0.9)
    sampled = sample_ratios(ensemble, 0.01, seed=0)["hidden"]
    exact = squared_error_hidden(6, 0.7, 5, activation, 1.2, 0.9) / 6
    assert abs(sampled.value - exact) <= 4 * sampled.stderr
    assert sampled.stderr <= 0.01 * sampled.value


@pytest.mark.parametrize(("activation", "width", "scale"), [("relu", 8, 0.8), ("tanh", 3, 1.7), ("gelu", 4, 0.9)])
def test_many_classes_approach_the_limits(activation, width, scale):
    """C = 10,000, where finite C shifts ratios by no more than 3 %."""
    force = predict(classes=10_000, gamma=0.1, rtol=0.03, width=width, activation=activation, output_scale=scale)
    for ratio, stderr, limit in (
        (1e4 * force.hidden_ratio, 1e4 * force.hidden_stderr, force.limit_hidden),
        (1e8 * force.output_ratio, 1e8 * force.output_stderr, force.limit_output),
    ):
        assert abs(ratio - limit) <= 3 * stderr + 0.03 * limit


def test_finite_sizes_approach_the_limit():
    limit = predict(loss="mse", gamma=0.5)
    finite = predict(loss="mse", gamma=None, inputs=500, samples=1000, rtol=0.01)
    assert abs(finite.hidden_ratio - limit.hidden_ratio) < 4 * finite.hidden_stderr + 0.01 * limit.hidden_ratio
    linear = predict("linear", gamma=None, inputs=300, samples=600, rtol=0.005)
    exact = predict("linear", gamma=0.5)
    assert abs(linear.output_ratio - exact.output_ratio) < 4 * linear.output_stderr + 0.02 * exact.output_ratio


def test_heavy_tails_leave_an_honest_standard_error(monkeypatch):
    monkeypatch.setattr("hesscope.theory.static_samples.BUDGET", 1e9)
    force = predict(classes=1000, width=3)
    assert force.hidden_stderr > 0.02 * force.hidden_ratio


def test_equal_seeds_give_equal_numbers():
    first, second, other = (predict(classes=3, width=4, seed=seed) for seed in (1, 1, 2))
    assert first == second != other


def test_to_xarray():
    data = predict("linear", width=None, gamma=0.5).to_xarray()
    assert set(data) == {"output_ratio", "output_stderr", "limit_output"}
    assert data.attrs["record"] == "StaticForce"
    sampled = predict(classes=3).to_xarray()
    assert sampled.attrs["seed"] == 0
    assert float(sampled["hidden_stderr"]) > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": 1}, "classes must be at least 2"),
        ({"classes": 2.5}, "classes must be a positive integer"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"gamma": -1.0}, "gamma must be positive"),
        ({"gamma": inf}, "gamma must be positive and finite"),
        ({"gamma": float("nan")}, "gamma must be positive"),
        ({"gamma": None}, "give either gamma, or inputs and samples"),
        ({"inputs": 10, "samples": 20}, "give either gamma, or inputs and samples"),
        ({"gamma": None, "inputs": 10}, "together"),
        ({"gamma": None, "inputs": 0, "samples": 2}, "inputs must be a positive integer"),
        ({"width": 2}, "needs width > 2"),
        ({"width": 8, "output_scale": 2.0}, "needs width > 8"),
        ({"width": 1, "loss": "mse"}, "width must be at least 2"),
        ({"width": None}, "needs width"),
        ({"model": "convolution"}, "model must be one of"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"output_scale": 0.0}, "output_scale must be positive"),
        ({"hidden_scale": float("nan")}, "hidden_scale must be positive"),
        ({"rtol": 0.0}, "rtol must lie between 0 and 1"),
    ],
)
def test_bad_input(changes, words):
    with pytest.raises(InputError, match=words):
        predict(**changes)


def test_tanh_needs_no_width():
    assert predict(width=2, activation="tanh", output_scale=3.0).hidden_ratio > 0
