"""The sweep: exponents of [D] on simulated data, energies against dense Hessians, spectra against their laws."""

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.study.sweep import SERIES, SweepSettings, _layer_energies, _objective, run_sweep, sweep_store

# Enough networks for an interval of +- 0.05; few inputs keep them cheap.
SETTINGS = SweepSettings(classes=(10, 30, 100, 300, 1000), networks=40, inputs=60, samples=120)
EXPONENTS = {series.name: series.asymptotic for series in SERIES}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    run_sweep(folder, SETTINGS, lambda title, share: None)
    return sweep_store(folder, SETTINGS).require("sweep")


@pytest.mark.parametrize("name", EXPONENTS)
def test_fitted_exponents(swept, name):
    """-2 +- 0.05 for output layers under cross-entropy, -1 +- 0.05 for the hidden layer under squared error."""
    value, low, high = swept["exponent"].sel(series=name).to_numpy()
    truth = EXPONENTS[name]
    assert low <= truth <= high
    assert abs(value - truth) < 0.05
    assert high - value < 0.08


@pytest.mark.parametrize("name", EXPONENTS)
def test_measured_ratios_lie_on_the_predicted_curve(swept, name):
    """At every C, to the scatter of 40 networks, which is largest in the hidden layer."""
    at = swept.sel(series=name)
    measured = (at["off_diagonal"].sum("network") / at["diagonal"].sum("network")).to_numpy()
    residual = (at["off_diagonal"] - measured[:, None] * at["diagonal"]).std("network", ddof=1).to_numpy()
    spread = residual / 40**0.5 / at["diagonal"].mean("network").to_numpy()
    tolerance = 4 * np.hypot(spread, at["predicted_stderr"].to_numpy())
    assert (np.abs(measured - at["predicted"].to_numpy()) < tolerance).all()
    assert (spread < 0.2 * measured).all()


@pytest.mark.parametrize("series", SERIES, ids=lambda series: series.name)
def test_energies_are_those_of_the_dense_hessian(series):
    settings = SweepSettings(classes=(3, 6), inputs=7, samples=20, width=4, activation="gelu")
    objective = _objective(settings, series.model, series.loss, 6, 1)
    partition = hs.Partition.by_row(objective.model)
    E = hs.block_energies(hs.Hessian(objective).dense(), partition)
    layer = "fc1" if series.layer == "hidden" or series.model == "linear" else "fc2"
    labels = [label for label in partition.labels if label.startswith(f"{layer}.")]
    rows = [partition.labels.index(label) for label in labels]
    values = E.values[np.ix_(rows, rows)]
    off, diagonal = _layer_energies(objective, series)
    assert diagonal == pytest.approx(np.trace(values) / len(rows), rel=1e-12)
    assert off / diagonal == pytest.approx(E.off_diagonal_ratio(labels), rel=1e-11)


def test_networks_are_independent():
    """Different inputs, labels and weights at every C and for every network; the losses share them."""
    made = [_objective(SETTINGS, "one_hidden", "cross_entropy", C, network) for C in (10, 30) for network in (0, 1)]
    weights = [objective.model.fc1.weight.detach().flatten() for objective in made]
    for first in range(4):
        for second in range(first):
            assert abs(float(torch.corrcoef(torch.stack([weights[first], weights[second]]))[0, 1])) < 0.2
    again = _objective(SETTINGS, "one_hidden", "mse", 10, 0)
    assert torch.equal(again.model.fc1.weight, made[0].model.fc1.weight)


def test_spectra_lie_on_their_laws(swept):
    """d = 60 only: eigenvalues are rigid, so that even there the distance is a few hundredths."""
    assert (swept["kolmogorov_distance"] < 0.05).all()
    assert swept.sizes["block"] == 6
    for name in swept["block"].to_numpy():
        at = swept.sel(block=name)
        density, grid = at["density"].to_numpy(), at["grid"].to_numpy()
        finite = np.where(np.isfinite(density), density, 0)
        assert 0.5 < np.trapezoid(finite, grid) + float(at["atom_at_zero"]) < 1.2


def test_spectra_at_a_thousand_inputs():
    """Kolmogorov distance at most 0.02 at d = 1000: diagonal and off-diagonal, linear and hidden layer."""
    settings = SweepSettings(classes=(10, 11), inputs=1000, samples=2000)
    for model, loss in (("linear", "cross_entropy"), ("one_hidden", "cross_entropy"), ("one_hidden", "mse")):
        drawn = hs.layer_weights(_objective(settings, model, loss, 10, 0), "fc1", neurons=[0, 1])
        for other in (0, 1):
            law = hs.theory.SpectralLaw(drawn.weights[:, 0, other].numpy(), 0.5)
            eigenvalues = np.linalg.eigvalsh(drawn.block(0, other).numpy())
            assert hs.theory.kolmogorov_distance(law, eigenvalues) < 0.01
