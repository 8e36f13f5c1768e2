"""The spectrum of T from samples: simulated data of known T, and limit laws without any noise."""

import numpy as np
import pytest

from hesscope.core.errors import InputError
from hesscope.core.rng import stream
from hesscope.theory.population_spectrum import population_spectrum
from hesscope.theory.spectral_law import SpectralLaw

D = 500
SPECTRA = {
    "white": np.ones(D),
    "two": np.repeat([1.0, 4.0], D // 2),
    "power law": 1 / np.arange(1, D + 1),
    "slow power law, zeros": np.concatenate((np.arange(1, 401) ** -0.3, np.zeros(100))),
    "spike": np.append(np.ones(D - 1), 30.0),
    "spikes": np.append(np.ones(D - 3), [30.0, 45.0, 67.0]),
    "wide": np.repeat([1e-6, 1.0], D // 2),
}
GAMMAS = [0.1, 0.5, 1.0, 2.0]


def sample_eigenvalues(name, gamma):
    """Eigenvalues of (1/N) sum x x^T, N = d / gamma; exact zeros where rank is missing."""
    T, rng = SPECTRA[name], stream(0, "population spectrum", name, round(1000 * gamma))
    X = rng.standard_normal((round(D / gamma), D)) * np.sqrt(T)
    eigenvalues = np.linalg.eigvalsh(X.T @ X / len(X))
    return np.where(eigenvalues < 1e-12 * eigenvalues[-1], 0.0, eigenvalues)


def kolmogorov(eigenvalues, law):
    F, below = law.cdf(eigenvalues), law.cdf(np.nextafter(eigenvalues, -np.inf))
    count = np.searchsorted(eigenvalues, eigenvalues, side="right") / len(eigenvalues)
    count_below = np.searchsorted(eigenvalues, eigenvalues, side="left") / len(eigenvalues)
    return max(np.abs(F - count).max(), np.abs(below - count_below).max())


def law_of(spectrum, gamma):
    return SpectralLaw([1.0], gamma, covariance=(spectrum.eigenvalues, spectrum.probabilities))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_law_of_the_estimate_is_that_of_the_samples(name, gamma):
    sample = sample_eigenvalues(name, gamma)
    spectrum = population_spectrum(sample, gamma)
    assert kolmogorov(sample, law_of(spectrum, gamma)) < 0.01
    assert spectrum.probabilities.sum() == pytest.approx(1.0, rel=1e-13)
    assert spectrum.probabilities @ spectrum.eigenvalues == pytest.approx(sample.mean(), rel=1e-13)
    assert (spectrum.probabilities > 0).all()
    assert (np.diff(spectrum.eigenvalues) > 0).all()
    assert len(spectrum.eigenvalues) < 100


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", ["white", "two", "slow power law, zeros"])
def test_the_second_moment_is_that_of_the_covariance(name, gamma):
    """Sample eigenvalues have gamma (tr T / d)^2 too much; the estimate keeps 1/25 of that, up to sampling noise."""
    sample, T = sample_eigenvalues(name, gamma), SPECTRA[name]
    spectrum = population_spectrum(sample, gamma)
    excess = np.mean(sample**2) - np.mean(T**2)
    assert excess == pytest.approx(gamma * np.mean(T) ** 2, rel=0.2)
    error = spectrum.probabilities @ spectrum.eigenvalues**2 - np.mean(T**2)
    assert abs(error) < 0.04 * excess + 0.01 * np.mean(T**2)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_white_data_have_one_eigenvalue(gamma):
    spectrum = population_spectrum(sample_eigenvalues("white", gamma), gamma)
    near = np.abs(spectrum.eigenvalues - 1) < 0.05
    assert spectrum.probabilities[near].sum() > 0.9


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_two_eigenvalues_are_told_apart(gamma):
    spectrum = population_spectrum(sample_eigenvalues("two", gamma), gamma)
    for value in (1.0, 4.0):
        near = np.abs(spectrum.eigenvalues - value) < 0.1 * value
        mass = spectrum.probabilities[near].sum()
        assert mass == pytest.approx(0.5, abs=0.05)
        mean = spectrum.probabilities[near] @ spectrum.eigenvalues[near] / mass
        assert mean == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_a_spike_stays_alone(gamma):
    """One eigenvalue of 500, whose sample eigenvalue lies gamma / (1 - 1/30) higher and 30 sqrt(2 / N) wide."""
    sample = sample_eigenvalues("spike", gamma)
    spectrum = population_spectrum(sample, gamma)
    high = spectrum.eigenvalues > 10
    mass = spectrum.probabilities[high].sum()
    assert mass == pytest.approx(1 / D, rel=0.1)
    spike = spectrum.probabilities[high] @ spectrum.eigenvalues[high] / mass
    assert spike == pytest.approx(sample[-1] - gamma * 30 / 29, rel=0.02)


@pytest.mark.parametrize("gamma", [0.05, 0.1])
def test_spikes_are_told_apart(gamma):
    sample = sample_eigenvalues("spikes", gamma)
    spectrum = population_spectrum(sample, gamma)
    for value in (30.0, 45.0, 67.0):
        near = np.abs(spectrum.eigenvalues / value - 1) < 0.05
        assert spectrum.probabilities[near].sum() == pytest.approx(1 / D, rel=0.1)


@pytest.mark.parametrize("gamma", [0.05, 0.1])
def test_a_cluster_in_a_wide_spectrum_stays_narrow(gamma):
    """Over six decades, candidates evenly in the logarithm alone would be 7 % apart."""
    spectrum = population_spectrum(sample_eigenvalues("wide", gamma), gamma)
    high = spectrum.eigenvalues > 0.1
    masses, values = spectrum.probabilities[high] / spectrum.probabilities[high].sum(), spectrum.eigenvalues[high]
    spread = (masses @ values**2 / (masses @ values) ** 2 - 1) ** 0.5
    assert spread < 0.015


@pytest.mark.parametrize("gamma", [0.2, 0.5, 2.0])
def test_without_noise_the_truth_comes_back(gamma):
    """Quantiles of the limit law in place of sample eigenvalues: what is left is the method's own error."""
    t, masses = np.asarray([1.0, 3.0, 12.0]), np.asarray([0.5, 0.3, 0.2])
    law = SpectralLaw([1.0], gamma, covariance=(t, masses))
    sample = law.quantile((np.arange(D) + 0.5) / D)
    spectrum = population_spectrum(sample, gamma)
    edges = [0.0, 1.8, 6.0, np.inf]
    for value, mass, low, high in zip(t, masses, edges[:-1], edges[1:], strict=True):
        near = (spectrum.eigenvalues > low) & (spectrum.eigenvalues < high)
        assert spectrum.probabilities[near].sum() == pytest.approx(mass, abs=0.01)
        mean = spectrum.probabilities[near] @ spectrum.eigenvalues[near] / mass
        assert mean == pytest.approx(value, rel=0.03)


def test_at_small_gamma_the_sample_spectrum_comes_back():
    sample = np.sort(stream(0, "population spectrum", "sample").lognormal(0.0, 1.0, D))
    spectrum = population_spectrum(sample, 1e-6)
    count = np.searchsorted(sample, spectrum.eigenvalues, side="right") / D
    middle = np.cumsum(spectrum.probabilities) - spectrum.probabilities / 2
    assert np.abs(middle - count).max() < 0.02
    assert spectrum.probabilities @ spectrum.eigenvalues**2 == pytest.approx(np.mean(sample**2), rel=1e-4)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_missing_rank_is_an_eigenvalue_zero(gamma):
    spectrum = population_spectrum(sample_eigenvalues("slow power law, zeros", gamma), gamma)
    assert spectrum.eigenvalues[0] == 0.0
    assert spectrum.probabilities[0] == pytest.approx(0.2, abs=1e-13)


def test_zeros_for_want_of_samples_are_no_eigenvalues():
    spectrum = population_spectrum(sample_eigenvalues("white", 2.0), 2.0)
    assert spectrum.eigenvalues[0] > 0.1


def test_small_eigenvalues_below_the_sample_spectrum():
    """With d > N the small eigenvalues of T only shift the others: they are found below all of these."""
    T, rng = np.repeat([1.0, 1e-3], [300, 200]), stream(0, "population spectrum", "low")
    X = rng.standard_normal((250, D)) * np.sqrt(T)
    sample = np.concatenate((np.zeros(250), np.linalg.eigvalsh(X @ X.T / 250)))
    spectrum = population_spectrum(sample, 2.0)
    low = spectrum.eigenvalues < 0.01
    assert sample[250] > 0.005
    assert spectrum.probabilities[low].sum() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1e100])
def test_equivariance(scale):
    sample = sample_eigenvalues("two", 0.5)
    spectrum, scaled = population_spectrum(sample, 0.5), population_spectrum(scale * sample[::-1], 0.5)
    moments = [
        [s.probabilities @ (s.eigenvalues / unit) ** k for k in (1, 2, 3)]
        for s, unit in ((spectrum, 1), (scaled, scale))
    ]
    np.testing.assert_allclose(moments[1], moments[0], rtol=1e-9)


def test_rounding_errors_are_zeros():
    sample = sample_eigenvalues("white", 2.0)
    spectrum = population_spectrum(sample, 2.0)
    noise = stream(0, "population spectrum", "rounding").standard_normal(D)
    for dtype, size in ((np.float64, 1e-15), (np.float32, 1e-6)):
        noisy = np.where(sample > 0, sample, size * noise).astype(dtype)
        found = population_spectrum(noisy, 2.0)
        np.testing.assert_allclose(law_of(found, 2.0).moment(2), law_of(spectrum, 2.0).moment(2), rtol=1e-4)


def test_one_eigenvalue():
    spectrum = population_spectrum([3.0], 0.5)
    np.testing.assert_allclose((spectrum.eigenvalues, spectrum.probabilities), ([3.0], [1.0]), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_eigenvalues": []}, "sample_eigenvalues must be a non-empty one-dimensional array, got shape (0,)"),
        (
            {"sample_eigenvalues": np.eye(2)},
            "sample_eigenvalues must be a non-empty one-dimensional array, got shape (2, 2)",
        ),
        ({"sample_eigenvalues": [1.0, np.nan]}, "sample_eigenvalues must not contain nan"),
        ({"sample_eigenvalues": [1.0, np.inf]}, "sample_eigenvalues must be finite, got inf"),
        ({"sample_eigenvalues": "abc"}, "sample_eigenvalues must be real numbers, got str"),
        (
            {"sample_eigenvalues": [1.0, -1e-9]},
            "sample_eigenvalues must not be negative, got -1e-09 (clip rounding errors with numpy.maximum)",
        ),
        ({"sample_eigenvalues": [0.0, 0.0]}, "sample_eigenvalues must not all be zero"),
        (
            {"gamma": 2.0},
            "sample_eigenvalues: at most d / gamma = 2 of them can be positive, got 4 "
            "(set rounding errors to 0, or correct gamma)",
        ),
        ({"gamma": 0.0}, "gamma must be a positive, finite number, got 0.0"),
        ({"gamma": -0.5}, "gamma must be a positive, finite number, got -0.5"),
        ({"gamma": np.nan}, "gamma must be a positive, finite number, got nan"),
        ({"points": 0}, "points must be a positive integer, got 0"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InputError) as caught:
        population_spectrum(**{"sample_eigenvalues": [1.0, 1.1, 1.2, 1.3], "gamma": 0.5, **arguments})
    assert str(caught.value) == message


def test_the_record_cannot_be_changed():
    spectrum = population_spectrum([1.0, 1.5, 2.0], 0.5)
    with pytest.raises(AttributeError):
        spectrum.eigenvalues = np.ones(1)
    with pytest.raises(ValueError, match="read-only"):
        spectrum.probabilities[0] = 1.0
